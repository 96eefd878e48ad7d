// Vectors of 16 floats and the one matrix kernel that the others are built on.
//
// GCC's vector extension is lowered to whatever the machine has (one AVX-512 register, two AVX2
// registers, four NEON registers), so there is a single source for all of them.
#pragma once

#include <cstdint>
#include <cstring>

namespace tandem {

constexpr int kLanes = 16;
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

inline int round_up(int n) { return (n + kLanes - 1) / kLanes * kLanes; }
inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline Vec broadcast(float x) { return Vec{} + x; }

// Halving adds, which need log2(16) steps instead of 16.
inline float sum(Vec v) {
  v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  return v[0];
}

// exp(x) to 1 ulp or so: 2^n * polynomial, branch-free so that loops over it vectorise.
// NaN stays NaN: both comparisons are false for it.
inline float fast_exp(float x) {
  x = x > 88.f ? 88.f : x;
  x = x < -87.f ? -87.f : x;
  const float shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23 rounds to an integer
  const float n = shifted - 12582912.f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.f;
  std::int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const std::int32_t scale_bits = (bits << 23) + (127 << 23);
  float scale;
  std::memcpy(&scale, &scale_bits, sizeof scale);
  return y * scale;
}

// C[m, :] (+)= sum over k of A[m, k] B[k, :] for ROWS rows and COLS vectors of 16 columns.
// A is read element by element with any strides, so a transposed A costs nothing.
template <int ROWS, int COLS>
inline void matmul_block(const float* a, long a_row, long a_col, const float* b, long ldb, float* c,
                         long ldc, int depth, bool accumulate) {
  Vec acc[ROWS][COLS];
  for (int r = 0; r < ROWS; ++r)
    for (int n = 0; n < COLS; ++n)
      acc[r][n] = accumulate ? load(c + r * ldc + n * kLanes) : Vec{};
  for (int k = 0; k < depth; ++k) {
    Vec row[COLS];
    for (int n = 0; n < COLS; ++n) row[n] = load(b + k * ldb + n * kLanes);
    for (int r = 0; r < ROWS; ++r) {
      const Vec x = broadcast(a[r * a_row + k * a_col]);
      for (int n = 0; n < COLS; ++n) acc[r][n] += x * row[n];
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int n = 0; n < COLS; ++n) store(c + r * ldc + n * kLanes, acc[r][n]);
}

template <int ROWS>
inline void matmul_rows(const float* a, long a_row, long a_col, const float* b, long ldb, float* c,
                        long ldc, int depth, int vectors, bool accumulate) {
  int n = 0;
  for (; n + 4 <= vectors; n += 4)
    matmul_block<ROWS, 4>(a, a_row, a_col, b + n * kLanes, ldb, c + n * kLanes, ldc, depth,
                          accumulate);
  const float* tail_b = b + n * kLanes;
  float* tail_c = c + n * kLanes;
  switch (vectors - n) {
    case 3: matmul_block<ROWS, 3>(a, a_row, a_col, tail_b, ldb, tail_c, ldc, depth, accumulate); break;
    case 2: matmul_block<ROWS, 2>(a, a_row, a_col, tail_b, ldb, tail_c, ldc, depth, accumulate); break;
    case 1: matmul_block<ROWS, 1>(a, a_row, a_col, tail_b, ldb, tail_c, ldc, depth, accumulate); break;
    default: break;
  }
}

constexpr int kBlockRows = 6;  // 6 x 4 accumulators fill 24 of the 32 AVX-512 registers

// Up to kBlockRows rows at once; the caller walks over larger matrices.
inline void matmul(int rows, const float* a, long a_row, long a_col, const float* b, long ldb,
                   float* c, long ldc, int depth, int vectors, bool accumulate) {
  switch (rows) {
    case 6: matmul_rows<6>(a, a_row, a_col, b, ldb, c, ldc, depth, vectors, accumulate); break;
    case 5: matmul_rows<5>(a, a_row, a_col, b, ldb, c, ldc, depth, vectors, accumulate); break;
    case 4: matmul_rows<4>(a, a_row, a_col, b, ldb, c, ldc, depth, vectors, accumulate); break;
    case 3: matmul_rows<3>(a, a_row, a_col, b, ldb, c, ldc, depth, vectors, accumulate); break;
    case 2: matmul_rows<2>(a, a_row, a_col, b, ldb, c, ldc, depth, vectors, accumulate); break;
    case 1: matmul_rows<1>(a, a_row, a_col, b, ldb, c, ldc, depth, vectors, accumulate); break;
    default: break;
  }
}

}  // namespace tandem
