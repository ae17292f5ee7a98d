// LoRA for a batch's rows on a CPU: y[row] += scale · B (A x[row]), each row with its own adapter's factors.
//
// Products this small cost most by being called: here a layer's slices (q, k, v; gate, up) and all adapters of a batch are one
// call, whatever their number of rows, for which a library would compile other code each time. The factors are in their own
// precision; sums are fp32 and rounded once, into y. Rows have a slot each; those with slot -1 are left alone. Compiled and called
// by native.py.

#include <omp.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "vectors.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define UNROLL _Pragma("GCC unroll 4")  // else sums are kept in memory

namespace {

constexpr int TILE = 4;                   // rows of A that are gone through together
constexpr int ABREAST = 4;                // vectors of outputs, the same
constexpr int NEAR = 512;                 // outputs whose factors stay in the nearest cache while rows go by
constexpr int BYTES_A_THREAD = 16 << 10;  // of factors; for fewer, another thread costs more than it saves

inline Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

inline Floats load(const BFloat* from) {
#ifdef __AVX512F__  // GCC 12 widens in two halves
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#endif
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

template <typename T>
inline Floats load_some(const T* from, int count) {
  T values[LANES] = {};
  std::memcpy(values, from, count * sizeof(T));
  return load(values);
}

template <typename T>
inline void add(T* to, Floats values, int count) {
  if (count == LANES) {
    store(to, load(to) + values);
    return;
  }
  T sums[LANES] = {};
  std::memcpy(sums, to, count * sizeof(T));
  store(sums, load(sums) + values);
  std::memcpy(to, sums, count * sizeof(T));
}

inline float sum(Floats values) {
  float lanes[LANES];
  std::memcpy(lanes, &values, sizeof lanes);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

// A layer's factors. A is (slots, slices · rank, inputs), B (slots, rank, outputs): row k of B holds each slice's k-th row.
struct Layer {
  const void* a;
  const void* b;
  int64_t inputs, rank, slices;
  const int64_t* ends;  // of the slices in the outputs
};

// The rows of a batch that belong to one adapter, and the place of the first of them among all rows that have one.
struct Group {
  int64_t slot, place;
  std::vector<int64_t> rows;
};

// A row of x as `down` reads it: as it is where the processor multiplies bf16, else widened to fp32; zeros after it, up to STEP.
#ifdef __AVX512BF16__
template <typename T>
using Row = T;
#else
template <typename T>
using Row = float;
#endif

template <typename T>
constexpr int STEP = 64 / sizeof(Row<T>);

template <typename T>
inline bool is_read_as_it_is(int64_t inputs) {
  return std::is_same_v<T, Row<T>> && inputs % STEP<T> == 0;
}

// The row itself, or what is to be read in its place, written to `to`.
template <typename T>
inline const Row<T>* as_read(const T* from, int64_t inputs, Row<T>* to) {
  if constexpr (std::is_same_v<T, Row<T>>) {
    if (is_read_as_it_is<T>(inputs)) return from;
    std::memset(to + inputs / STEP<T> * STEP<T>, 0, STEP<T> * sizeof(T));
    std::memcpy(to, from, inputs * sizeof(T));
  } else {
    int64_t k = 0;
    for (; k + LANES <= inputs; k += LANES) store(to + k, load(from + k));
    if (k < inputs) store(to + k, load_some(from + k, inputs - k));
  }
  return to;
}

// STEP values of a row of A as they are multiplied, `count` of them from memory, zeros after them.
inline Floats part(const float* a, int64_t count) { return count >= LANES ? load(a) : load_some(a, count); }

// sums + the products with as many of x, in a partial sum for each lane.
inline Floats dot(Floats sums, Floats a, const float* x) { return sums + a * load(x); }

#ifdef __AVX512BF16__
inline __m512bh part(const BFloat* a, int64_t count) {
  return (__m512bh)_mm512_maskz_loadu_epi16(count >= 2 * LANES ? ~0u : (1u << count) - 1, a);
}

inline Floats dot(Floats sums, __m512bh a, const BFloat* x) {
  return (Floats)_mm512_dpbf16_ps((__m512)sums, a, (__m512bh)_mm512_loadu_si512(x));
}
#else
inline Floats part(const BFloat* a, int64_t count) { return count >= LANES ? load(a) : load_some(a, count); }
#endif

// hidden[row][n] = A[n] · x[row] for N rows of A and R rows of x.
template <int N, int R, typename T>
inline void down(const T* a, int64_t inputs, const Row<T>* const* x, float* hidden, int64_t hidden_stride) {
  Floats sums[N][R] = {};
  for (int64_t k = 0; k < inputs; k += STEP<T>)
    UNROLL for (int n = 0; n < N; ++n) {
      const auto factor = part(a + n * inputs + k, inputs - k);
      UNROLL for (int r = 0; r < R; ++r) sums[n][r] = dot(sums[n][r], factor, x[r] + k);
    }
  UNROLL for (int n = 0; n < N; ++n)
    UNROLL for (int r = 0; r < R; ++r) hidden[r * hidden_stride + n] = sum(sums[n][r]);
}

// y[row] += scale · Σ hidden[row][k] B[k] for R rows and V vectors of outputs, the last of `count` lanes.
template <int R, int V, typename T>
inline void up(const T* b, int64_t outputs, int64_t rank, int count, const float* hidden, int64_t hidden_stride, float scale,
               T* const* y) {
  Floats sums[R][V] = {};
  for (int64_t k = 0; k < rank; ++k)
    UNROLL for (int v = 0; v < V; ++v) {
      const T* const from = b + k * outputs + v * LANES;
      const Floats factor = v + 1 < V || count == LANES ? load(from) : load_some(from, count);
      UNROLL for (int r = 0; r < R; ++r) sums[r][v] += factor * hidden[r * hidden_stride + k];
    }
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int v = 0; v < V; ++v) add(y[r] + v * LANES, sums[r][v] * scale, v + 1 < V ? LANES : count);
}

// Call `work` with as many rows together as registers hold sums of.
template <typename Work>
inline void by_rows(int64_t rows, Work work) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) work(std::integral_constant<int, 4>{}, row);
  for (; row + 2 <= rows; row += 2) work(std::integral_constant<int, 2>{}, row);
  for (; row < rows; ++row) work(std::integral_constant<int, 1>{}, row);
}

// y[row] += scale · Σ hidden[row][k] B[k] for R rows and the outputs from `begin` to `end`.
template <int R, typename T>
inline void across(const T* b, int64_t outputs, int64_t begin, int64_t end, int64_t rank, const float* hidden,
                   int64_t hidden_stride, float scale, T* const* y) {
  T* to[R];
  const auto at = [&](int64_t n) {
    for (int r = 0; r < R; ++r) to[r] = y[r] + n;
  };
  int64_t n = begin;
  for (; n + ABREAST * LANES <= end; n += ABREAST * LANES)
    at(n), up<R, ABREAST>(b + n, outputs, rank, LANES, hidden, hidden_stride, scale, to);
  for (; n < end; n += LANES)
    at(n), up<R, 1>(b + n, outputs, rank, end - n < LANES ? end - n : LANES, hidden, hidden_stride, scale, to);
}

// Outputs for a thread to take together: whole vectors, an equal share of a slice if that is less than NEAR.
inline int64_t near(int64_t width, int64_t threads) {
  const int64_t abreast = ABREAST * LANES, share = (width + threads * abreast - 1) / (threads * abreast) * abreast;
  return share < NEAR ? share : NEAR;
}

std::vector<Group> grouped(const int64_t* slots, int64_t rows) {
  std::vector<Group> groups;
  for (int64_t row = 0; row < rows; ++row) {
    if (slots[row] < 0) continue;
    auto group = groups.begin();
    while (group != groups.end() && group->slot != slots[row]) ++group;
    if (group == groups.end()) group = groups.insert(group, {slots[row], 0, {}});
    group->rows.push_back(row);
  }
  for (size_t i = 1; i < groups.size(); ++i) groups[i].place = groups[i - 1].place + groups[i - 1].rows.size();
  return groups;
}

// A buffer of a thread's own that only grows.
template <typename T>
inline T* room(std::vector<T>& kept, size_t count) {
  if (kept.size() < count) kept.resize(count);
  return kept.data();
}

template <typename T>
thread_local std::vector<Row<T>> kept_rows;
template <typename T>
thread_local std::vector<const Row<T>*> kept_places;
thread_local std::vector<float> kept_hidden;

template <typename T>
void add_lora(const Layer& layer, const T* x, int64_t x_stride, T* y, int64_t y_stride, const int64_t* slots, int64_t rows,
              float scale, int threads) {
  const int64_t inputs = layer.inputs, rank = layer.rank, ranks = layer.slices * rank, outputs = layer.ends[layer.slices - 1];
  const int64_t padded = (inputs + STEP<T> - 1) / STEP<T> * STEP<T>;
  const std::vector<Group> groups = grouped(slots, rows);
  const int64_t bytes = groups.size() * (ranks * inputs + rank * outputs) * sizeof(T);
  float* const hidden = room(kept_hidden, rows * ranks);
#pragma omp parallel num_threads(bytes / BYTES_A_THREAD < threads ? bytes / BYTES_A_THREAD + 1 : threads)
  {
    Row<T>* const own = room(kept_rows<T>, is_read_as_it_is<T>(inputs) ? 0 : rows * padded);  // each thread its own: no waiting
    const Row<T>** const wide = room(kept_places<T>, rows);
    for (const Group& group : groups)
      for (size_t i = 0; i < group.rows.size(); ++i)
        wide[group.place + i] = as_read(x + group.rows[i] * x_stride, inputs, own + (group.place + i) * padded);
    for (const Group& group : groups) {
      const T* const a = static_cast<const T*>(layer.a) + group.slot * ranks * inputs;
#pragma omp for schedule(static) nowait
      for (int64_t n = 0; n < ranks; n += TILE)
        by_rows(group.rows.size(), [&](auto together, int64_t first) {
          const Row<T>* const* const from = wide + group.place + first;
          float* const to = hidden + (group.place + first) * ranks + n;
          if (n + TILE <= ranks)
            down<TILE, together()>(a + n * inputs, inputs, from, to, ranks);
          else
            for (int64_t i = 0; n + i < ranks; ++i) down<1, together()>(a + (n + i) * inputs, inputs, from, to + i, ranks);
        });
    }
#pragma omp barrier
    for (const Group& group : groups) {
      const T* const b = static_cast<const T*>(layer.b) + group.slot * rank * outputs;
      for (int64_t slice = 0, begin = 0; slice < layer.slices; begin = layer.ends[slice++]) {
        const int64_t end = layer.ends[slice], step = near(end - begin, omp_get_num_threads());
#pragma omp for schedule(static) nowait
        for (int64_t n = begin; n < end; n += step)
          by_rows(group.rows.size(), [&](auto together, int64_t first) {
            T* to[together()];
            for (int r = 0; r < together(); ++r) to[r] = y + group.rows[first + r] * y_stride;
            const float* const from = hidden + (group.place + first) * ranks + slice * rank;
            across<together()>(b, outputs, n, n + step < end ? n + step : end, rank, from, ranks, scale, to);
          });
      }
    }
  }
}

}  // namespace

extern "C" {

void add_lora_bfloat16(const Layer* layer, const void* x, int64_t x_stride, void* y, int64_t y_stride, const int64_t* slots,
                       int64_t rows, float scale, int threads) {
  add_lora(*layer, (const BFloat*)x, x_stride, (BFloat*)y, y_stride, slots, rows, scale, threads);
}

void add_lora_float32(const Layer* layer, const void* x, int64_t x_stride, void* y, int64_t y_stride, const int64_t* slots,
                      int64_t rows, float scale, int threads) {
  add_lora(*layer, (const float*)x, x_stride, (float*)y, y_stride, slots, rows, scale, threads);
}

}  // extern "C"
