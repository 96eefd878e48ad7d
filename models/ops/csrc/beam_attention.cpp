// Attention of each beam over its own path of codes: keys and values are read where each level wrote
// them, so nothing is gathered. A path has a handful of positions; one thread owns a beam.
//
// N requests, W beams, P positions, H heads, G key-value heads, dh width of a head.
#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

namespace tandem {
namespace {

// What a level wrote, [N, beams, G, dh] each; beams are `stride` floats apart.
struct Written {
  const float *keys, *values;
  long beams, stride;
};

float dot(const float* a, const float* b, long n) {
  Vec total{};
  long d = 0;
  for (; d + kLanes <= n; d += kLanes) total += load(a + d) * load(b + d);
  float result = sum(total);
  for (; d < n; ++d) result += a[d] * b[d];
  return result;
}

void add_scaled(float* out, const float* x, float scale, long n) {
  long d = 0;
  for (; d + kLanes <= n; d += kLanes) store(out + d, load(out + d) + scale * load(x + d));
  for (; d < n; ++d) out[d] += scale * x[d];
}

// x[p] = softmax(x)[p]
void softmax(float* x, long n) {
  const float top = *std::max_element(x, x + n);
  float total = 0.f;
  for (long p = 0; p < n; ++p) total += x[p] = fast_exp(x[p] - top);
  for (long p = 0; p < n; ++p) x[p] /= total;
}

}  // namespace
}  // namespace tandem

using namespace tandem;

extern "C" {

// q [N, W, H, dh], beams `q_stride` floats apart; written [P, 4]: addresses of keys and of values,
// beams, stride; ancestors [N, W, P]; bias [H, P] or null; out [N, W, H, dh].
void tandem_beam_attention(const float* q, const std::int64_t* written,
                           const std::int64_t* ancestors, const float* bias, long requests,
                           long beams, long positions, long heads, long groups, long dh,
                           long q_stride, long threads, float* out) {
  std::vector<Written> levels(positions);
  for (long p = 0; p < positions; ++p) {
    const std::int64_t* row = written + 4 * p;
    levels[p] = {reinterpret_cast<const float*>(row[0]), reinterpret_cast<const float*>(row[1]),
                 long(row[2]), long(row[3])};
  }
  const float scale = 1.f / std::sqrt(float(dh));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> weights(positions);
    std::vector<long> places(positions);
#pragma omp for schedule(static)
    for (long row = 0; row < requests * beams; ++row) {
      for (long p = 0; p < positions; ++p)
        places[p] = (row / beams * levels[p].beams + ancestors[row * positions + p]) *
                    levels[p].stride;
      for (long h = 0; h < heads; ++h) {
        const long group = h * groups / heads * dh;
        const float* query = q + row * q_stride + h * dh;
        for (long p = 0; p < positions; ++p) {
          weights[p] = scale * dot(query, levels[p].keys + places[p] + group, dh);
          if (bias) weights[p] += bias[h * positions + p];
        }
        softmax(weights.data(), positions);
        float* mixed = out + (row * heads + h) * dh;
        std::fill(mixed, mixed + dh, 0.f);
        for (long p = 0; p < positions; ++p)
          add_scaled(mixed, levels[p].values + places[p] + group, weights[p], dh);
      }
    }
  }
}

}  // extern "C"
