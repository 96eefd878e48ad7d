// Cross entropy of one positive against sampled negatives or against every key, fused with the
// products that make the logits: neither [T, R, D] rows nor [T, P] logits reach memory.
//
// T tokens, P keys, D width, R negatives. Queries [T, D] and keys [P, D] are contiguous.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "simd.h"

namespace tandem {
namespace {

constexpr int kMaxVectors = 16;  // D <= 256; the Python side sends wider queries to the reference

// Rows zero-padded to whole vectors, so that every row is read without a tail.
std::vector<float> padded_rows(const float* x, long rows, long width, int pad) {
  std::vector<float> out(rows * pad, 0.f);
  for (long i = 0; i < rows; ++i) std::memcpy(&out[i * pad], x + i * width, width * sizeof(float));
  return out;
}

struct Negatives {
  const std::int64_t *rows, *groups;  // rows of the keys [G, R]; group of a token, null: its index
  long count;
  const std::int64_t* of(long token) const {
    return rows + (groups ? groups[token] : token) * count;
  }
};

template <int VECTORS>
inline float dot(const Vec* q, const float* key) {
  Vec acc = q[0] * load(key);
  for (int n = 1; n < VECTORS; ++n) acc += q[n] * load(key + n * kLanes);
  return sum(acc);
}

// Logits, then probabilities, of one token; returns its loss. probability holds R + 1 numbers, the
// positive's last.
template <int VECTORS>
float sampled_token(const float* query, const float* keys, const float* correction,
                    std::int64_t positive, const std::int64_t* negatives, long count,
                    float inverse_temperature, float* probability) {
  constexpr int pad = VECTORS * kLanes;
  Vec q[VECTORS];
  for (int n = 0; n < VECTORS; ++n) q[n] = load(query + n * kLanes);
  for (long r = 0; r < count; ++r) probability[r] = dot<VECTORS>(q, keys + negatives[r] * pad);
  probability[count] = dot<VECTORS>(q, keys + positive * pad);
  for (long r = 0; r <= count; ++r) probability[r] *= inverse_temperature;
  if (correction)
    for (long r = 0; r < count; ++r) probability[r] -= correction[negatives[r]];
  const float at_positive = probability[count];
  // A negative that is the positive itself is no negative.
  for (long r = 0; r < count; ++r)
    if (negatives[r] == positive) probability[r] = -std::numeric_limits<float>::infinity();
  float largest = at_positive;
  for (long r = 0; r < count; ++r) largest = probability[r] > largest ? probability[r] : largest;
  float total = 0.f;
  for (long r = 0; r <= count; ++r) probability[r] = fast_exp(probability[r] - largest);
  for (long r = 0; r < count; ++r)
    if (negatives[r] == positive) probability[r] = 0.f;
  for (long r = 0; r <= count; ++r) total += probability[r];
  const float inverse = 1.f / total;
  for (long r = 0; r <= count; ++r) probability[r] *= inverse;
  return std::log(total) + largest - at_positive;
}

template <int VECTORS>
void sampled_forward(const float* queries, const float* keys, const float* correction,
                     const std::int64_t* positives, Negatives negatives, long tokens, long width,
                     float inverse_temperature, int threads, float* probabilities, float* loss) {
  constexpr int pad = VECTORS * kLanes;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (long t = 0; t < tokens; ++t) {
    float* probability = probabilities + t * (negatives.count + 1);
    if (positives[t] < 0) {
      loss[t] = 0.f;
      continue;
    }
    float query[pad] = {};
    std::memcpy(query, queries + t * width, width * sizeof(float));
    loss[t] = sampled_token<VECTORS>(query, keys, correction, positives[t], negatives.of(t),
                                     negatives.count, inverse_temperature, probability);
  }
}

template <int VECTORS>
void sampled_backward(const float* queries, const float* keys, const std::int64_t* positives,
                      Negatives negatives, const float* probabilities, const float* d_loss,
                      long tokens, long width, float inverse_temperature, int threads,
                      float* d_queries, float* d_keys) {
  constexpr int pad = VECTORS * kLanes;
  const long count = negatives.count;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (long t = 0; t < tokens; ++t) {
    Vec acc[VECTORS] = {};
    if (positives[t] >= 0) {
      const float scale = d_loss[t] * inverse_temperature;
      const std::int64_t* rows = negatives.of(t);
      const float* probability = probabilities + t * (count + 1);
      for (long r = 0; r <= count; ++r) {
        const bool positive = r == count;
        const float weight = scale * (probability[r] - (positive ? 1.f : 0.f));
        const float* key = keys + (positive ? positives[t] : rows[r]) * pad;
        for (int n = 0; n < VECTORS; ++n) acc[n] += broadcast(weight) * load(key + n * kLanes);
      }
    }
    std::memcpy(d_queries + t * width, acc, width * sizeof(float));
  }
  // A thread owns columns of the keys' gradient: no conflicts, and sums in the order of tokens.
  const int workers = std::min(threads, VECTORS);
#pragma omp parallel for schedule(static) num_threads(workers) if (workers > 1)
  for (int worker = 0; worker < workers; ++worker) {
    const int first = VECTORS * worker / workers, last = VECTORS * (worker + 1) / workers;
    for (long t = 0; t < tokens; ++t) {
      if (positives[t] < 0) continue;
      const float scale = d_loss[t] * inverse_temperature;
      const std::int64_t* rows = negatives.of(t);
      const float* probability = probabilities + t * (count + 1);
      Vec query[VECTORS] = {};
      std::memcpy(query, queries + t * width, width * sizeof(float));
      for (long r = 0; r <= count; ++r) {
        const bool positive = r == count;
        const float weight = scale * (probability[r] - (positive ? 1.f : 0.f));
        float* key = d_keys + (positive ? positives[t] : rows[r]) * pad;
        for (int n = first; n < last; ++n)
          store(key + n * kLanes, load(key + n * kLanes) + broadcast(weight) * query[n]);
      }
    }
  }
}

constexpr int kTokenBlock = 24;
constexpr int kKeyBlock = 256;

// logits [kTokenBlock, kKeyBlock] of a block of padded queries against key columns from j0 on.
void logit_tile(const float* queries, int rows, int pad, const float* columns, long p_pad, long j0,
                int cols, long width, float* out) {
  for (int r = 0; r < rows; r += kBlockRows)
    matmul(std::min(kBlockRows, rows - r), queries + r * pad, pad, 1, columns + j0, p_pad,
           out + r * kKeyBlock, kKeyBlock, int(width), (cols + kLanes - 1) / kLanes, false);
}

float horizontal_max(const float* x, int n) {
  float largest = x[0];
  for (int c = 1; c < n; ++c) largest = x[c] > largest ? x[c] : largest;
  return largest;
}

// sum of exp(x - shift) over n entries, written back; in vectors, since order must be fixed.
float exp_sum(float* x, int n, float shift) {
  for (int c = 0; c < n; ++c) x[c] = fast_exp(x[c] - shift);
  Vec acc = {};
  int c = 0;
  for (; c + kLanes <= n; c += kLanes) acc += load(x + c);
  float total = sum(acc);
  for (; c < n; ++c) total += x[c];
  return total;
}

}  // namespace
}  // namespace tandem

#define TANDEM_BY_WIDTH(call)                                    \
  switch (vectors) {                                             \
    case 1: call(1); break; case 2: call(2); break;              \
    case 3: call(3); break; case 4: call(4); break;              \
    case 5: case 6: case 7: case 8: call(8); break;              \
    default: call(16); break;                                    \
  }

namespace {
// The instantiated vector counts: other widths are padded to the next one.
int vector_count(long width) {
  const int vectors = tandem::round_up(int(width)) / tandem::kLanes;
  return vectors <= 4 ? vectors : vectors <= 8 ? 8 : tandem::kMaxVectors;
}
}  // namespace

extern "C" {

// groups and correction may be null. probabilities [T, R + 1] is kept for the backward pass.
void tandem_sampled_softmax_forward(const float* queries, const float* keys, const float* correction,
                                    const std::int64_t* positives, const std::int64_t* negatives,
                                    const std::int64_t* groups, long tokens, long num_keys,
                                    long width, long count, float inverse_temperature, long threads,
                                    float* probabilities, float* loss) {
  using namespace tandem;
  const int vectors = vector_count(width);
  const std::vector<float> rows = padded_rows(keys, num_keys, width, vectors * kLanes);
  const Negatives sampled{negatives, groups, count};
#define TANDEM_CALL(V)                                                                         \
  sampled_forward<V>(queries, rows.data(), correction, positives, sampled, tokens, width,      \
                     inverse_temperature, int(threads), probabilities, loss)
  TANDEM_BY_WIDTH(TANDEM_CALL)
#undef TANDEM_CALL
}

void tandem_sampled_softmax_backward(const float* queries, const float* keys,
                                     const std::int64_t* positives, const std::int64_t* negatives,
                                     const std::int64_t* groups, const float* probabilities,
                                     const float* d_loss, long tokens, long num_keys, long width,
                                     long count, float inverse_temperature, long threads,
                                     float* d_queries, float* d_keys) {
  using namespace tandem;
  const int vectors = vector_count(width), pad = vectors * kLanes;
  const std::vector<float> rows = padded_rows(keys, num_keys, width, pad);
  std::vector<float> d_rows(num_keys * pad, 0.f);
  const Negatives sampled{negatives, groups, count};
#define TANDEM_CALL(V)                                                                           \
  sampled_backward<V>(queries, rows.data(), positives, sampled, probabilities, d_loss, tokens,   \
                      width, inverse_temperature, int(threads), d_queries, d_rows.data())
  TANDEM_BY_WIDTH(TANDEM_CALL)
#undef TANDEM_CALL
  for (long i = 0; i < num_keys; ++i)
    std::memcpy(d_keys + i * width, &d_rows[i * pad], width * sizeof(float));
}

// Cross entropy over all keys; log_sums [T] (log of the sum of exponentials) is kept for backward.
void tandem_full_softmax_forward(const float* queries, const float* keys,
                                 const std::int64_t* positives, long tokens, long num_keys,
                                 long width, float inverse_temperature, long threads,
                                 float* log_sums, float* loss) {
  using namespace tandem;
  const int pad = round_up(int(width)), p_pad = round_up(int(num_keys));
  std::vector<float> columns(width * long(p_pad), 0.f);
  for (long i = 0; i < num_keys; ++i)
    for (long d = 0; d < width; ++d) columns[d * p_pad + i] = keys[i * width + d];
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (long t0 = 0; t0 < tokens; t0 += kTokenBlock) {
    const int rows = int(std::min<long>(kTokenBlock, tokens - t0));
    std::vector<float> query(kTokenBlock * pad, 0.f);
    float largest[kTokenBlock], total[kTokenBlock] = {}, at_positive[kTokenBlock] = {};
    alignas(64) float tile[kTokenBlock * kKeyBlock];
    for (int r = 0; r < rows; ++r) {
      largest[r] = -std::numeric_limits<float>::infinity();
      for (long d = 0; d < width; ++d)
        query[r * pad + d] = queries[(t0 + r) * width + d] * inverse_temperature;
    }
    for (long j0 = 0; j0 < num_keys; j0 += kKeyBlock) {
      const int cols = int(std::min<long>(kKeyBlock, num_keys - j0));
      logit_tile(query.data(), rows, pad, columns.data(), p_pad, j0, cols, width, tile);
      for (int r = 0; r < rows; ++r) {
        float* logits = tile + r * kKeyBlock;
        const long positive = positives[t0 + r] - j0;
        if (positive >= 0 && positive < cols) at_positive[r] = logits[positive];
        const float now = horizontal_max(logits, cols);
        const float before = largest[r];
        largest[r] = now > before ? now : before;
        total[r] = total[r] * (before == largest[r] ? 1.f : std::exp(before - largest[r])) +
                   exp_sum(logits, cols, largest[r]);
      }
    }
    for (int r = 0; r < rows; ++r) {
      log_sums[t0 + r] = std::log(total[r]) + largest[r];
      loss[t0 + r] = positives[t0 + r] < 0 ? 0.f : log_sums[t0 + r] - at_positive[r];
    }
  }
}

void tandem_full_softmax_backward(const float* queries, const float* keys,
                                  const std::int64_t* positives, const float* log_sums,
                                  const float* d_loss, long tokens, long num_keys, long width,
                                  float inverse_temperature, long threads, float* d_queries,
                                  float* d_keys) {
  using namespace tandem;
  const int pad = round_up(int(width)), p_pad = round_up(int(num_keys));
  const std::vector<float> key_rows = padded_rows(keys, num_keys, width, pad);
  std::vector<float> columns(width * long(p_pad), 0.f);
  for (long i = 0; i < num_keys; ++i)
    for (long d = 0; d < width; ++d) columns[d * p_pad + i] = keys[i * width + d];
  // Each worker sums its own tokens' share; the shares are added in the workers' order.
  std::vector<std::vector<float>> shares(threads);
  const long blocks = (tokens + kTokenBlock - 1) / kTokenBlock;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (long worker = 0; worker < threads; ++worker) {
    std::vector<float>& d_rows = shares[worker];
    d_rows.assign(long(p_pad) * pad, 0.f);
    std::vector<float> query(kTokenBlock * pad), d_query(kTokenBlock * pad);
    alignas(64) float tile[kTokenBlock * kKeyBlock];
    for (long block = blocks * worker / threads; block < blocks * (worker + 1) / threads; ++block) {
      const long t0 = block * kTokenBlock;
      const int rows = int(std::min<long>(kTokenBlock, tokens - t0));
      std::fill(d_query.begin(), d_query.end(), 0.f);
      std::fill(query.begin(), query.end(), 0.f);
      for (int r = 0; r < rows; ++r)
        for (long d = 0; d < width; ++d)
          query[r * pad + d] = queries[(t0 + r) * width + d] * inverse_temperature;
      for (long j0 = 0; j0 < num_keys; j0 += kKeyBlock) {
        const int cols = int(std::min<long>(kKeyBlock, num_keys - j0));
        logit_tile(query.data(), rows, pad, columns.data(), p_pad, j0, cols, width, tile);
        for (int r = 0; r < rows; ++r) {
          float* weight = tile + r * kKeyBlock;
          const long positive = positives[t0 + r];
          const float scale = positive < 0 ? 0.f : d_loss[t0 + r];
          const float log_sum = log_sums[t0 + r];
          for (int c = 0; c < cols; ++c) weight[c] = scale * fast_exp(weight[c] - log_sum);
          if (positive >= j0 && positive < j0 + cols) weight[positive - j0] -= scale;
        }
        for (int r = 0; r < rows; r += kBlockRows)
          matmul(std::min(kBlockRows, rows - r), tile + r * kKeyBlock, kKeyBlock, 1,
                 key_rows.data() + j0 * pad, pad, d_query.data() + r * pad, pad, cols, pad / kLanes,
                 true);
        for (int c = 0; c < cols; c += kBlockRows)  // query carries 1 / temperature already
          matmul(std::min(kBlockRows, cols - c), tile + c, 1, kKeyBlock, query.data(), pad,
                 d_rows.data() + (j0 + c) * pad, pad, rows, pad / kLanes, true);
      }
      for (int r = 0; r < rows; ++r)
        for (long d = 0; d < width; ++d)
          d_queries[(t0 + r) * width + d] = d_query[r * pad + d] * inverse_temperature;
    }
  }
  for (long i = 0; i < num_keys; ++i)
    for (long d = 0; d < width; ++d) {
      float total = 0.f;
      for (const std::vector<float>& share : shares) total += share[i * pad + d];
      d_keys[i * width + d] = total;
    }
}

}  // extern "C"
