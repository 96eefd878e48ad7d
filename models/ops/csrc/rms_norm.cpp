// Root-mean-square norm of rows, forward and backward: one pass over memory each.
#include <algorithm>
#include <cmath>

#include "simd.h"

namespace tandem {
namespace {

float dot(const float* a, const float* b, long width) {
  Vec total{};
  long c = 0;
  for (; c + kLanes <= width; c += kLanes) total += load(a + c) * load(b + c);
  float rest = 0.f;
  for (; c < width; ++c) rest += a[c] * b[c];
  return sum(total) + rest;
}

}  // namespace
}  // namespace tandem

extern "C" {

// out = x * inverse * weight with inverse[t] = 1 / sqrt(mean(x[t]^2) + eps), which is kept.
void tandem_rms_forward(const float* x, const float* weight, long tokens, long width, float eps,
                        long threads, float* out, float* inverse) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (long t = 0; t < tokens; ++t) {
    const float* in = x + t * width;
    float* to = out + t * width;
    const float scale = 1.f / std::sqrt(tandem::dot(in, in, width) / float(width) + eps);
    for (long c = 0; c < width; ++c) to[c] = in[c] * scale * weight[c];
    inverse[t] = scale;
  }
}

// d_x, and per chunk of tokens its part of d_weight: the sum does not depend on the threads.
void tandem_rms_backward(const float* x, const float* weight, const float* inverse,
                         const float* d_out, long tokens, long width, long chunk, long threads,
                         float* d_x, float* d_weight_parts) {
  const long chunks = (tokens + chunk - 1) / chunk;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (long part = 0; part < chunks; ++part) {
    float* d_weight = d_weight_parts + part * width;
    std::fill(d_weight, d_weight + width, 0.f);
    for (long t = part * chunk; t < std::min(tokens, (part + 1) * chunk); ++t) {
      const float *in = x + t * width, *g = d_out + t * width;
      float* to = d_x + t * width;
      const float scale = inverse[t];
      for (long c = 0; c < width; ++c) {
        d_weight[c] += g[c] * in[c] * scale;
        to[c] = g[c] * weight[c];
      }
      const float along = tandem::dot(to, in, width) * scale * scale / float(width);
      for (long c = 0; c < width; ++c) to[c] = scale * (to[c] - along * in[c]);
    }
  }
}

}  // extern "C"
