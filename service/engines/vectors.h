// Sixteen floats at once, and bf16 as it lies in memory: what lora.cpp and head.cpp share.

#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct BFloat {  // the upper half of a float
  uint16_t bits;
};

inline void store(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }

inline void store(BFloat* to, Floats values) {  // to the nearest, ties to even; a NaN stays one
  const Words words = (Words)values;
  const Words rounded = (words + 0x7fff + ((words >> 16) & 1)) >> 16;
  const Words found = values == values ? rounded : Words{} + 0x7fc0;
#ifdef __AVX512F__  // GCC 12 narrows, as it widens, in two halves
  const __m256i halves = _mm512_cvtepi32_epi16((__m512i)found);
#else
  const Halves halves = __builtin_convertvector(found, Halves);
#endif
  std::memcpy(to, &halves, sizeof halves);
}

}  // namespace
