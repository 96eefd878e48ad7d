// Counter-based dropout: the bits of models/ops/hashing.py, a channel per lane.
#include "simd.h"

extern "C" {

// out[t, c] = keep(keys[t], salted, c) ? x[t, c] * scale : 0. keys are already salted and mixed.
void tandem_keyed_dropout(const float* x, const std::int64_t* keys, long tokens, long channels,
                          long threshold_bits, float scale, long threads, float* out) {
  const std::uint32_t threshold = std::uint32_t(threshold_bits);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (long t = 0; t < tokens; ++t) {
    const std::uint32_t low = std::uint32_t(keys[t]), high = std::uint32_t(std::uint64_t(keys[t]) >> 32);
    const float* in = x + t * channels;
    float* to = out + t * channels;
    for (long c = 0; c < channels; ++c) {
      std::uint32_t z = low + std::uint32_t(c) * 0x9E3779B9u;
      z = (z ^ (z >> 16)) * 0x21F0AAADu;
      z = (z ^ (z >> 15) ^ high) * 0x735A2D97u;
      z ^= z >> 15;
      to[c] = z >= threshold ? in[c] * scale : 0.f;
    }
  }
}

}  // extern "C"
