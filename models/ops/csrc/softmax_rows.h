// What softmax attention over the keys of one head is made of.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

namespace tandem {

// Queries taken at once against all keys.
constexpr int kQueryBlock = 24;

struct Scratch {
  std::vector<float> q, k, v, d_out, k_columns, v_columns, score, d_score, dq, dk, dv;
};

// The buffers live as long as the thread, so that a step allocates nothing.
inline Scratch& scratch() {
  static thread_local Scratch s;
  return s;
}

// C [rows, vectors] = A [rows, depth] B, rows of any number.
inline void product(int rows, const float* a, long lda, const float* b, long ldb, float* c, long ldc,
             int depth, int vectors) {
  for (int r = 0; r < rows; r += kBlockRows)
    matmul(std::min(kBlockRows, rows - r), a + r * lda, lda, 1, b, ldb, c + r * ldc, ldc, depth,
           vectors, false);
}

// C [columns, vectors] += A [rows, columns]^T B [rows, vectors].
inline void add_transposed(int columns, const float* a, long lda, const float* b, long pad, float* c,
                    int rows) {
  for (int j = 0; j < columns; j += kBlockRows)
    matmul(std::min(kBlockRows, columns - j), a + j, 1, lda, b, pad, c + long(j) * pad, pad, rows,
           int(pad / kLanes), true);
}

inline float largest(const float* x, int n) {
  float top = -INFINITY;
  int c = 0;
  if (n >= kLanes) {
    Vec best = load(x);
    for (c = kLanes; c + kLanes <= n; c += kLanes) {
      const Vec next = load(x + c);
      best = next > best ? next : best;
    }
    for (int lane = 0; lane < kLanes; ++lane) top = std::max(top, best[lane]);
  }
  for (; c < n; ++c) top = std::max(top, x[c]);
  return top;
}

// x[c] = exp(x[c] - shift), zero from n on; the sum.
inline float exponentials(float* x, int n, int n_pad, float shift) {
  for (int c = 0; c < n; ++c) x[c] = fast_exp(x[c] - shift);
  for (int c = n; c < n_pad; ++c) x[c] = 0.f;
  Vec total{};
  for (int c = 0; c < n_pad; c += kLanes) total += load(x + c);
  return sum(total);
}

}  // namespace tandem
