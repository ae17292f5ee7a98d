// LoRA for a batch's few rows on a CPU, as in decoding: y[row] += scale · B (A x[row]), each row with its own adapter's factors.
//
// Products this small cost most by being called: here a layer's slices (q, k, v; gate, up) and all adapters of a batch are one
// call. The factors are read once for all rows of an adapter, in their own precision; sums are fp32 and rounded once, into y.
// Rows have a slot each; those with slot -1 are left alone. Compiled and called by native.py.

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace {

constexpr int TILE = 4;                   // rows of A that are gone through together
constexpr int BYTES_A_THREAD = 16 << 10;  // of factors; for fewer, another thread costs more than it saves

inline Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

inline Floats load(const BFloat* from) {
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

// hidden[row][n] = A[n] · x[row] for N rows of A and R rows of x, which are padded with zeros to whole vectors.
template <int N, int R, typename T>
inline void down(const T* a, int64_t inputs, const float* x, int64_t x_stride, float* hidden, int64_t hidden_stride) {
  Floats sums[N][R] = {};
  for (int64_t k = 0; k < inputs; k += LANES)
    for (int n = 0; n < N; ++n) {
      const T* const from = a + n * inputs + k;
      const Floats factor = k + LANES <= inputs ? load(from) : load_some(from, inputs - k);
      for (int r = 0; r < R; ++r) sums[n][r] += factor * load(x + r * x_stride + k);
    }
  for (int n = 0; n < N; ++n)
    for (int r = 0; r < R; ++r) hidden[r * hidden_stride + n] = sum(sums[n][r]);
}

// y[row][:count] += scale · Σ hidden[row][k] B[k][:count] for R rows and at most LANES outputs.
template <int R, typename T>
inline void up(const T* b, int64_t outputs, int64_t rank, int count, const float* hidden, int64_t hidden_stride, float scale,
               T* const* y) {
  Floats sums[R] = {};
  for (int64_t k = 0; k < rank; ++k) {
    const Floats factor = count == LANES ? load(b + k * outputs) : load_some(b + k * outputs, count);
    for (int r = 0; r < R; ++r) sums[r] += factor * hidden[r * hidden_stride + k];
  }
  for (int r = 0; r < R; ++r) add(y[r], sums[r] * scale, count);
}

// Call `work` with as many rows together as registers hold sums of.
template <typename Work>
inline void by_rows(int64_t rows, Work work) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) work(std::integral_constant<int, 4>{}, row);
  for (; row + 2 <= rows; row += 2) work(std::integral_constant<int, 2>{}, row);
  for (; row < rows; ++row) work(std::integral_constant<int, 1>{}, row);
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
inline float* room(std::vector<float>& kept, size_t count) {
  if (kept.size() < count) kept.resize(count);
  return kept.data();
}

thread_local std::vector<float> kept_wide, kept_hidden;

template <typename T>
void add_lora(const Layer& layer, const T* x, int64_t x_stride, T* y, int64_t y_stride, const int64_t* slots, int64_t rows,
              float scale, int threads) {
  const int64_t inputs = layer.inputs, rank = layer.rank, ranks = layer.slices * rank, outputs = layer.ends[layer.slices - 1];
  const int64_t whole = inputs - inputs % LANES, padded = whole < inputs ? whole + LANES : whole;
  const std::vector<Group> groups = grouped(slots, rows);
  const int64_t bytes = groups.size() * (ranks * inputs + rank * outputs) * sizeof(T);
  float* const hidden = room(kept_hidden, rows * ranks);
#pragma omp parallel num_threads(bytes / BYTES_A_THREAD < threads ? bytes / BYTES_A_THREAD + 1 : threads)
  {
    float* const wide = room(kept_wide, rows * padded);  // x in fp32: each thread makes its own, which is cheaper than waiting
    for (const Group& group : groups)
      for (size_t i = 0; i < group.rows.size(); ++i) {
        const T* const from = x + group.rows[i] * x_stride;
        float* const to = wide + (group.place + i) * padded;
        for (int64_t k = 0; k < whole; k += LANES) store(to + k, load(from + k));
        if (whole < inputs) store(to + whole, load_some(from + whole, inputs - whole));
      }
    for (const Group& group : groups) {
      const T* const a = static_cast<const T*>(layer.a) + group.slot * ranks * inputs;
#pragma omp for schedule(static) nowait
      for (int64_t n = 0; n < ranks; n += TILE)
        by_rows(group.rows.size(), [&](auto together, int64_t first) {
          const float* const from = wide + (group.place + first) * padded;
          float* const to = hidden + (group.place + first) * ranks + n;
          if (n + TILE <= ranks)
            down<TILE, together()>(a + n * inputs, inputs, from, padded, to, ranks);
          else
            for (int64_t i = 0; n + i < ranks; ++i) down<1, together()>(a + (n + i) * inputs, inputs, from, padded, to + i, ranks);
        });
    }
#pragma omp barrier
    for (const Group& group : groups) {
      const T* const b = static_cast<const T*>(layer.b) + group.slot * rank * outputs;
      for (int64_t slice = 0, begin = 0; slice < layer.slices; begin = layer.ends[slice++]) {
        const int64_t end = layer.ends[slice];
#pragma omp for schedule(static) nowait
        for (int64_t n = begin; n < end; n += LANES)
          by_rows(group.rows.size(), [&](auto together, int64_t first) {
            const float* const from = hidden + (group.place + first) * ranks + slice * rank;
            T* to[together()];
            for (int r = 0; r < together(); ++r) to[r] = y + group.rows[first + r] * y_stride + n;
            up<together()>(b + n, outputs, rank, end - n < LANES ? end - n : LANES, from, ranks, scale, to);
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
