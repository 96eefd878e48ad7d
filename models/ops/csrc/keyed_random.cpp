// Counter-based dropout and sampling: the bits of models/ops/hashing.py, a hash per lane.
// Keys are salted and mixed by the caller.
#include "bfloat16.h"
#include "simd.h"

namespace {

struct Key {
  std::uint32_t low, high;
  explicit Key(std::int64_t key)
      : low(std::uint32_t(key)), high(std::uint32_t(std::uint64_t(key) >> 32)) {}

  std::uint32_t hash(long counter) const {
    std::uint32_t z = low + std::uint32_t(counter) * 0x9E3779B9u;
    z = (z ^ (z >> 16)) * 0x21F0AAADu;
    z = (z ^ (z >> 15) ^ high) * 0x735A2D97u;
    return z ^ (z >> 15);
  }
};

using tandem::Bfloat16;
using tandem::put;
using tandem::widen;

template <typename Number>
void dropout(const Number* x, const std::int64_t* keys, long tokens, long channels,
             long threshold_bits, float scale, long threads, Number* out) {
  const std::uint32_t threshold = std::uint32_t(threshold_bits);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (long t = 0; t < tokens; ++t) {
    const Key key(keys[t]);
    const Number* in = x + t * channels;
    Number* to = out + t * channels;
    for (long c = 0; c < channels; ++c)
      put(key.hash(c) >= threshold ? widen(in[c]) * scale : 0.f, to + c);
  }
}

template <typename Number>
void relu_dropout(const Number* x, const std::int64_t* keys, long tokens, long channels,
                  long threshold_bits, float scale, long threads, Number* out) {
  const std::uint32_t threshold = std::uint32_t(threshold_bits);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (long t = 0; t < tokens; ++t) {
    const Key key(keys[t]);
    const Number* in = x + t * channels;
    Number* to = out + t * channels;
    for (long c = 0; c < channels; ++c) {
      const float value = widen(in[c]), positive = value <= 0.f ? 0.f : value * scale;
      put(key.hash(c) >= threshold ? positive : 0.f, to + c);
    }
  }
}

template <typename Number>
void relu_dropout_backward(const Number* out, const Number* d_out, long count, float scale,
                           long threads, Number* d_x) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (long e = 0; e < count; ++e)
    put(widen(out[e]) == 0.f ? 0.f : widen(d_out[e]) * scale, d_x + e);
}

}  // namespace

extern "C" {

// out[t, c] = x[t, c] * scale where the hash of (keys[t], c) reaches the threshold, else 0.
void tandem_keyed_dropout(const float* x, const std::int64_t* keys, long tokens, long channels,
                          long threshold, float scale, long threads, float* out) {
  dropout(x, keys, tokens, channels, threshold, scale, threads, out);
}

void tandem_keyed_dropout_bfloat16(const Bfloat16* x, const std::int64_t* keys, long tokens,
                                   long channels, long threshold, float scale, long threads,
                                   Bfloat16* out) {
  dropout(x, keys, tokens, channels, threshold, scale, threads, out);
}

// The same of max(x, 0); NaN stays NaN.
void tandem_keyed_relu_dropout(const float* x, const std::int64_t* keys, long tokens, long channels,
                               long threshold, float scale, long threads, float* out) {
  relu_dropout(x, keys, tokens, channels, threshold, scale, threads, out);
}

void tandem_keyed_relu_dropout_bfloat16(const Bfloat16* x, const std::int64_t* keys, long tokens,
                                        long channels, long threshold, float scale, long threads,
                                        Bfloat16* out) {
  relu_dropout(x, keys, tokens, channels, threshold, scale, threads, out);
}

// d_x = d_out * scale where the output above is not zero.
void tandem_keyed_relu_dropout_backward(const float* out, const float* d_out, long count, float scale,
                                        long threads, float* d_x) {
  relu_dropout_backward(out, d_out, count, scale, threads, d_x);
}

void tandem_keyed_relu_dropout_backward_bfloat16(const Bfloat16* out, const Bfloat16* d_out,
                                                 long count, float scale, long threads,
                                                 Bfloat16* d_x) {
  relu_dropout_backward(out, d_out, count, scale, threads, d_x);
}

// out[t, r] = floor(hash of (keys[t], r) * high / 2^32).
void tandem_keyed_integers(const std::int64_t* keys, long tokens, long count, long high,
                           long threads, std::int64_t* out) {
  const std::uint64_t range = std::uint64_t(high);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (long t = 0; t < tokens; ++t) {
    const Key key(keys[t]);
    std::int64_t* to = out + t * count;
    for (long r = 0; r < count; ++r) to[r] = std::int64_t((key.hash(r) * range) >> 32);
  }
}

}  // extern "C"
