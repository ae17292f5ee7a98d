// An int8 head on a CPU with AMX: y[row][n] = scale[n] · W[n] · x[row], for a batch's rows, as in decoding.
//
// A product of few rows costs what reading W costs: here W is read once, in bytes. x is split into two int8 rows, what it is to the
// nearest 127th of its largest and what that leaves in steps 254 times finer, so that rounding it is finer than bf16 and costs
// nothing: both halves of 8 rows fill one tile. Sums are int32. Compiled and called by native_head.py.
//
// W lies as (vocabulary / 64, inputs / 64, 4, 16, 16, 4): blocks of 64 rows, in each 64 inputs after another, four tiles of 16 rows,
// in a tile four inputs of each row side by side. Inputs are padded to 64 with zeros.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "vectors.h"

#ifdef __AMX_INT8__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int TILE = 64, TOGETHER = 8, TILES = 4;  // bytes in a tile's row; rows of x; tiles of W
constexpr int WORD = 4, FEW_ROWS = 64;  // inputs side by side; to look up without waking another thread
constexpr float FINER = 254;
constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // of arch_prctl
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

inline int64_t whole(int64_t inputs) { return (inputs + TILE - 1) / TILE * TILE; }

inline float wide(float value) { return value; }

inline float wide(BFloat value) {
  const uint32_t word = uint32_t(value.bits) << 16;
  float found;
  std::memcpy(&found, &word, sizeof found);
  return found;
}

template <typename Vector, typename T>
inline Vector load(const T* from) {
  Vector values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

// GCC does not know that tiles are loaded from memory: what was written there is to be there.
inline void written() { asm volatile("" ::: "memory"); }

// The tiles of this thread as they are needed here: all of 16 rows of 64 bytes; afterwards as they were before.
class Tiles {
  struct alignas(64) Config {
    uint8_t palette = 0, start = 0, reserved[14] = {};
    uint16_t widths[16] = {};
    uint8_t rows[16] = {};
  } before;

 public:
  Tiles() {
    _tile_storeconfig(&before);
    Config ours;
    ours.palette = 1;
    for (int i = 0; i < 8; ++i) ours.widths[i] = TILE, ours.rows[i] = LANES;
    written();
    _tile_loadconfig(&ours);
  }
  ~Tiles() {
    if (before.palette)
      _tile_loadconfig(&before);
    else
      _tile_release();
  }
};

// Up to 8 rows of x as 16 of int8, (16, padded): their coarse halves, then their fine ones.
struct Group {
  std::vector<int8_t> halves;
  float steps[TOGETHER] = {};

  template <typename T>
  Group(const T* x, int64_t count, int64_t inputs, int64_t padded) : halves(2 * TOGETHER * padded) {
    for (int64_t row = 0; row < count; ++row) {
      const T* const from = x + row * inputs;
      int8_t *const coarse = halves.data() + row * padded, *const fine = coarse + TOGETHER * padded;
      float largest = 0, strange = 0;  // an infinity or a NaN makes all logits of its row NaN
      for (int64_t k = 0; k < inputs; ++k) largest = std::max(largest, std::fabs(wide(from[k]))), strange += 0 * wide(from[k]);
      steps[row] = largest / 127 + strange;
      const float inverse = largest > 0 && strange == 0 ? 127 / largest : 0;
      for (int64_t k = 0; k < inputs; ++k) {
        const float value = inverse > 0 ? wide(from[k]) * inverse : 0, near = std::nearbyint(value);
        coarse[k] = (int8_t)near;
        fine[k] = (int8_t)std::nearbyint((value - near) * FINER);
      }
    }
  }
};

template <typename T>
void multiply(const Group& group, int64_t count, const int8_t* w, const float* scale, int64_t padded, T* y, int64_t stride) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < padded; k += TILE) {
    const int8_t* const at = w + k * TILES * LANES;
    _tile_loadd(4, group.halves.data() + k, padded);
    _tile_loadd(5, at, TILE);
    _tile_dpbssd(0, 4, 5);
    _tile_loadd(6, at + LANES * TILE, TILE);
    _tile_dpbssd(1, 4, 6);
    _tile_loadd(7, at + 2 * LANES * TILE, TILE);
    _tile_dpbssd(2, 4, 7);
    _tile_loadd(5, at + 3 * LANES * TILE, TILE);
    _tile_dpbssd(3, 4, 5);
  }
  alignas(64) int32_t sums[TILES][2 * TOGETHER][LANES];
  _tile_stored(0, sums[0], TILE);
  _tile_stored(1, sums[1], TILE);
  _tile_stored(2, sums[2], TILE);
  _tile_stored(3, sums[3], TILE);
  for (int64_t row = 0; row < count; ++row)
    for (int tile = 0; tile < TILES; ++tile) {
      const Floats coarse = __builtin_convertvector(load<Ints>(sums[tile][row]), Floats);
      const Floats fine = __builtin_convertvector(load<Ints>(sums[tile][row + TOGETHER]), Floats);
      store(y + row * stride + tile * LANES, (coarse + fine / FINER) * (load<Floats>(scale + tile * LANES) * group.steps[row]));
    }
}

template <typename T>
void logits(const int8_t* w, const float* scale, int64_t vocabulary, int64_t inputs, const T* x, int64_t rows, T* y, int threads) {
  const int64_t padded = whole(inputs);
  std::vector<Group> groups;
  for (int64_t row = 0; row < rows; row += TOGETHER)
    groups.emplace_back(x + row * inputs, std::min<int64_t>(TOGETHER, rows - row), inputs, padded);
#pragma omp parallel num_threads(threads)
  {
    const Tiles tiles;
#pragma omp for schedule(static) nowait
    for (int64_t n = 0; n < vocabulary; n += TILES * LANES)
      for (size_t i = 0; i < groups.size(); ++i)
        multiply(groups[i], std::min<int64_t>(TOGETHER, rows - i * TOGETHER), w + n * padded, scale + n, padded,
                 y + i * TOGETHER * vocabulary + n, vocabulary);
  }
}

// y[i] = scale[n] · W[n] of n = ids[i].
template <typename T>
void rows(const int8_t* w, const float* scale, int64_t vocabulary, int64_t inputs, const int64_t* ids, int64_t count, T* y,
          int threads) {
  const int64_t padded = whole(inputs);
#pragma omp parallel for schedule(static) num_threads(count < FEW_ROWS ? 1 : threads)
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = ids[i];
    const bool is_known = n >= 0 && n < vocabulary;
    const int64_t block = n / (TILES * LANES), tile = n % (TILES * LANES) / LANES;
    const int8_t* const from = is_known ? w + (block * TILES * padded + tile * TILE) * LANES : w;
    const float step = is_known ? scale[n] : 0;
    for (int64_t k = 0; k < inputs; k += LANES) {  // the four words of 16 inputs
      int8_t integers[LANES];
      for (int word = 0; word < LANES / WORD; ++word)
        std::memcpy(integers + word * WORD,
                    from + k / TILE * TILES * LANES * TILE + (k % TILE / WORD + word) * TILE + n % LANES * WORD, WORD);
      Floats values;
      for (int lane = 0; lane < LANES; ++lane) values[lane] = integers[lane];
      T found[LANES];
      store(found, values * step);
      std::memcpy(y + i * inputs + k, found, std::min<int64_t>(LANES, inputs - k) * sizeof(T));
    }
  }
}

}  // namespace

extern "C" {

int may_multiply() { return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0; }

void logits_bfloat16(const int8_t* w, const float* scale, int64_t vocabulary, int64_t inputs, const void* x, int64_t rows, void* y,
                     int threads) {
  logits(w, scale, vocabulary, inputs, (const BFloat*)x, rows, (BFloat*)y, threads);
}

void logits_float32(const int8_t* w, const float* scale, int64_t vocabulary, int64_t inputs, const void* x, int64_t rows, void* y,
                    int threads) {
  logits(w, scale, vocabulary, inputs, (const float*)x, rows, (float*)y, threads);
}

void rows_bfloat16(const int8_t* w, const float* scale, int64_t vocabulary, int64_t inputs, const void* ids, int64_t count, void* y,
                   int threads) {
  rows(w, scale, vocabulary, inputs, (const int64_t*)ids, count, (BFloat*)y, threads);
}

void rows_float32(const int8_t* w, const float* scale, int64_t vocabulary, int64_t inputs, const void* ids, int64_t count, void* y,
                  int threads) {
  rows(w, scale, vocabulary, inputs, (const int64_t*)ids, count, (float*)y, threads);
}

}  // extern "C"

#else

extern "C" int may_multiply() { return 0; }

#endif
