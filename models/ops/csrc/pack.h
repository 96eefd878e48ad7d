// Copies of a head's rows in the layouts that the matrix kernel reads, and buffers for them.
#pragma once

#include <vector>

#include "simd.h"

namespace tandem {

// Rows of one head, zero-padded to vectors: [n, pad].
inline void pack_rows(const float* x, long stride, int n, int width, int pad, float* out) {
  for (int i = 0; i < n; ++i) {
    std::memcpy(out + long(i) * pad, x + i * stride, width * sizeof(float));
    std::memset(out + long(i) * pad + width, 0, (pad - width) * sizeof(float));
  }
}

// The same, transposed: [width, n_pad].
inline void pack_columns(const float* x, long stride, int n, int width, int n_pad, float* out) {
  for (int d = 0; d < width; ++d) {
    float* row = out + long(d) * n_pad;
    for (int i = 0; i < n; ++i) row[i] = x[i * stride + d];
    std::memset(row + n, 0, (n_pad - n) * sizeof(float));
  }
}

inline float* sized(std::vector<float>& buffer, long size) {
  if (long(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

inline float* zeroed(std::vector<float>& buffer, long size) {
  float* data = sized(buffer, size);
  std::memset(data, 0, size * sizeof(float));
  return data;
}

}  // namespace tandem
