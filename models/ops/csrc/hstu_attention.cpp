// HSTU attention on jagged sequences, forward and backward (arXiv 2402.17152).
//
// One thread owns a sequence. Its queries are taken kQueryBlock at a time against kKeyBlock keys, so
// no score matrix larger than that tile exists, and keys after the diagonal are never touched
// (beyond the rounding to vectors). The time and position bias of a tile is computed once for all
// heads. Gradients of the shared bias tables are kept per sequence and summed in a fixed order, so
// results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "pack.h"
#include "simd.h"

namespace tandem {
namespace {

constexpr int kQueryBlock = 24;
constexpr int kKeyBlock = 128;
constexpr int kTimeBuckets = 129;

// Bucket of |dt| by table: the exponent and 4 mantissa bits of |dt| pick a cell, which at most one
// threshold divides (cells grow by 1/16 or less, thresholds by e^0.301).
struct BucketTable {
  static constexpr int kCells = 57 * 16;
  static constexpr std::int64_t kLargest = std::int64_t(1) << 56;  // beyond the last threshold
  std::int32_t reached[kCells];    // thresholds <= the cell's first integer
  std::int64_t threshold[kCells];  // the next one

  explicit BucketTable(const std::int64_t* thresholds) {
    for (int cell = 0; cell < kCells; ++cell) {
      const double first = std::ceil(std::ldexp(1.0 + (cell % 16) / 16.0, cell / 16));
      int count = 0;
      while (count < kTimeBuckets - 1 && double(thresholds[count]) <= first) ++count;
      reached[cell] = count;
      threshold[cell] = count < kTimeBuckets - 1 ? thresholds[count] : INT64_MAX;
    }
  }

  std::int32_t operator()(std::int64_t dt) const {
    std::int64_t d = dt < 0 ? -dt : dt;
    d = d < 1 ? 1 : d;
    d = d > kLargest ? kLargest : d;
    const double x = static_cast<double>(d);
    std::int64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const std::int64_t cell = (bits >> 48) - (1023 << 4);
    return reached[cell] + (d >= threshold[cell] ? 1 : 0);
  }
};

struct Shape {
  int heads, dqk, dv, max_len;
  int qk_pad, v_pad;  // widths rounded up to vectors
  Shape(int heads, int dqk, int dv, int max_len)
      : heads(heads), dqk(dqk), dv(dv), max_len(max_len), qk_pad(round_up(dqk)), v_pad(round_up(dv)) {}
};

struct Times {
  const std::int64_t *at, *next;  // event times and times of the next events of this sequence
  const float *pos_weight, *ts_weight;
  const BucketTable* buckets;
};

// Bias and buckets of queries [i0, i0 + rows) against keys [j0, j0 + cols).
void bias_tile(const Times& t, const Shape& s, int i0, int rows, int j0, int cols, float* bias,
               std::int32_t* bucket) {
  for (int r = 0; r < rows; ++r) {
    const std::int64_t query_time = t.next[i0 + r];
    const float* position = t.pos_weight + (j0 - (i0 + r) + s.max_len - 1);
    float* bias_row = bias + r * kKeyBlock;
    std::int32_t* bucket_row = bucket + r * kKeyBlock;
    const int visible = std::min(cols, i0 + r - j0 + 1);
    for (int c = 0; c < visible; ++c) bucket_row[c] = (*t.buckets)(query_time - t.at[j0 + c]);
    for (int c = 0; c < visible; ++c) bias_row[c] = position[c] + t.ts_weight[bucket_row[c]];
  }
}

// Columns of row r of the tile that the causal mask leaves, 0 .. cols.
inline int visible_columns(int i, int j0, int cols) { return std::max(0, std::min(cols, i - j0 + 1)); }

struct Tile {
  int i0, rows, j0, cols;  // queries and keys of the tile; cols counts real keys
  int vectors() const { return (cols + kLanes - 1) / kLanes; }
};

// out[r, c] = A[i0 + r, :] . B[:, j0 + c], rows trimmed to the vectors that the mask needs.
void scores(const Tile& t, const float* a, long lda, const float* b_columns, long n_pad, int depth,
            float* out) {
  for (int r = 0; r < t.rows; r += kBlockRows) {
    const int rows = std::min(kBlockRows, t.rows - r);
    const int needed = visible_columns(t.i0 + r + rows - 1, t.j0, t.cols);
    matmul(rows, a + (t.i0 + r) * lda, lda, 1, b_columns + t.j0, n_pad, out + r * kKeyBlock,
           kKeyBlock, depth, (needed + kLanes - 1) / kLanes, false);
  }
}

// C[i0 + r, :] += W[r, :] B[j0 .., :], the weights of hidden keys skipped.
void times_keys(const Tile& t, const float* weights, const float* b, long pad, float* c) {
  for (int r = 0; r < t.rows; r += kBlockRows) {
    const int rows = std::min(kBlockRows, t.rows - r);
    const int depth = visible_columns(t.i0 + r + rows - 1, t.j0, t.cols);
    if (depth > 0)
      matmul(rows, weights + r * kKeyBlock, kKeyBlock, 1, b + t.j0 * pad, pad, c + r * pad, pad, depth,
             pad / kLanes, true);
  }
}

// C[j0 + c, :] += W[:, c]^T B[i0 .., :], skipping queries before the keys.
void times_queries(const Tile& t, const float* weights, const float* b, long pad, float* c) {
  for (int j = 0; j < t.cols; j += kBlockRows) {
    const int keys = std::min(kBlockRows, t.cols - j);
    const int first = std::max(0, t.j0 + j - t.i0);
    if (first < t.rows)
      matmul(keys, weights + first * kKeyBlock + j, 1, kKeyBlock, b + (t.i0 + first) * pad, pad,
             c + (t.j0 + j) * pad, pad, t.rows - first, pad / kLanes, true);
  }
}

struct Scratch {
  std::vector<float> q, k, v, k_columns, v_columns, d_out, dq, dk, dv, out;
  alignas(64) float bias[kQueryBlock * kKeyBlock];
  alignas(64) std::int32_t bucket[kQueryBlock * kKeyBlock];
  alignas(64) float score[kQueryBlock * kKeyBlock];
  alignas(64) float d_score[kQueryBlock * kKeyBlock];
  alignas(64) float d_bias[kQueryBlock * kKeyBlock];
};

// The buffers live as long as the thread, so that a step allocates nothing.
Scratch& scratch() {
  static thread_local Scratch s;
  return s;
}

// SiLU(score + bias) / N in place; hidden entries up to the end of the tile's vectors become zero.
void activate(const Tile& t, const float* bias, float inverse_n, float* score) {
  for (int r = 0; r < t.rows; ++r) {
    float* s = score + r * kKeyBlock;
    const float* b = bias + r * kKeyBlock;
    const int visible = visible_columns(t.i0 + r, t.j0, t.cols);
    for (int c = 0; c < visible; ++c) {
      const float x = s[c] + b[c];
      s[c] = x * inverse_n / (1.f + fast_exp(-x));
    }
    for (int c = visible; c < t.cols; ++c) s[c] = 0.f;
  }
}

// score -> weights as above, and d_weight -> d_score in place.
void activate_backward(const Tile& t, const float* bias, float inverse_n, float* score,
                       float* d_score) {
  for (int r = 0; r < t.rows; ++r) {
    float* s = score + r * kKeyBlock;
    float* d = d_score + r * kKeyBlock;
    const float* b = bias + r * kKeyBlock;
    const int visible = visible_columns(t.i0 + r, t.j0, t.cols);
    for (int c = 0; c < visible; ++c) {
      const float x = s[c] + b[c];
      const float sigmoid = 1.f / (1.f + fast_exp(-x));
      s[c] = x * sigmoid * inverse_n;
      d[c] *= inverse_n * sigmoid * (1.f + x * (1.f - sigmoid));
    }
    for (int c = visible; c < t.cols; ++c) s[c] = d[c] = 0.f;
  }
}

void forward_sequence(const Shape& s, const Times& times, int n, const float* q, long q_stride,
                      const float* k, long k_stride, const float* v, long v_stride, float* out,
                      long out_stride) {
  Scratch& w = scratch();
  const int n_pad = round_up(n);
  float* q_rows = sized(w.q, long(s.heads) * n * s.qk_pad);
  float* k_columns = sized(w.k_columns, long(s.heads) * s.dqk * n_pad);
  float* v_rows = sized(w.v, long(s.heads) * n * s.v_pad);
  for (int h = 0; h < s.heads; ++h) {
    pack_rows(q + h * s.dqk, q_stride, n, s.dqk, s.qk_pad, q_rows + long(h) * n * s.qk_pad);
    pack_columns(k + h * s.dqk, k_stride, n, s.dqk, n_pad, k_columns + long(h) * s.dqk * n_pad);
    pack_rows(v + h * s.dv, v_stride, n, s.dv, s.v_pad, v_rows + long(h) * n * s.v_pad);
  }
  const long block = long(kQueryBlock) * s.v_pad;
  for (int i0 = 0; i0 < n; i0 += kQueryBlock) {
    const int rows = std::min(kQueryBlock, n - i0);
    float* acc = zeroed(w.out, s.heads * block);
    for (int j0 = 0; j0 < i0 + rows; j0 += kKeyBlock) {
      const Tile tile{i0, rows, j0, std::min(kKeyBlock, i0 + rows - j0)};
      bias_tile(times, s, i0, rows, j0, tile.cols, w.bias, w.bucket);
      for (int h = 0; h < s.heads; ++h) {
        scores(tile, q_rows + long(h) * n * s.qk_pad, s.qk_pad,
               k_columns + long(h) * s.dqk * n_pad, n_pad, s.dqk, w.score);
        activate(tile, w.bias, 1.f / s.max_len, w.score);
        times_keys(tile, w.score, v_rows + long(h) * n * s.v_pad, s.v_pad, acc + h * block);
      }
    }
    for (int h = 0; h < s.heads; ++h)
      for (int r = 0; r < rows; ++r)
        std::memcpy(out + (i0 + r) * out_stride + h * s.dv, acc + h * block + r * s.v_pad,
                    s.dv * sizeof(float));
  }
}

// Sums d_bias into the tables' gradients: along diagonals for positions, by bucket for times.
void accumulate_bias(const Tile& t, const Shape& s, const float* d_bias, const std::int32_t* bucket,
                     float* d_pos, float* d_ts) {
  // Four interleaved histograms: neighbours often share a bucket, and one would wait for its own
  // store on every addition.
  float lanes[4][kTimeBuckets] = {};
  for (int r = 0; r < t.rows; ++r) {
    const float* d = d_bias + r * kKeyBlock;
    const std::int32_t* b = bucket + r * kKeyBlock;
    const int visible = visible_columns(t.i0 + r, t.j0, t.cols);
    float* position = d_pos + (t.j0 - (t.i0 + r) + s.max_len - 1);
    for (int c = 0; c < visible; ++c) position[c] += d[c];
    for (int c = 0; c < visible; ++c) lanes[c & 3][b[c]] += d[c];
  }
  for (int b = 0; b < kTimeBuckets; ++b)
    d_ts[b] += (lanes[0][b] + lanes[1][b]) + (lanes[2][b] + lanes[3][b]);
}

void backward_sequence(const Shape& s, const Times& times, int n, const float* q, long q_stride,
                       const float* k, long k_stride, const float* v, long v_stride,
                       const float* d_out, float* dq, float* dk, float* dv, float* d_pos,
                       float* d_ts) {
  Scratch& w = scratch();
  const int n_pad = round_up(n);
  const long qk_size = long(n) * s.qk_pad, v_size = long(n) * s.v_pad;
  float* q_rows = sized(w.q, s.heads * qk_size);
  float* k_rows = sized(w.k, s.heads * qk_size);
  float* do_rows = sized(w.d_out, s.heads * v_size);
  float* k_columns = sized(w.k_columns, long(s.heads) * s.dqk * n_pad);
  float* v_columns = sized(w.v_columns, long(s.heads) * s.dv * n_pad);
  float* dq_rows = zeroed(w.dq, s.heads * qk_size);
  float* dk_rows = zeroed(w.dk, s.heads * qk_size);
  float* dv_rows = zeroed(w.dv, s.heads * v_size);
  for (int h = 0; h < s.heads; ++h) {
    pack_rows(q + h * s.dqk, q_stride, n, s.dqk, s.qk_pad, q_rows + h * qk_size);
    pack_rows(k + h * s.dqk, k_stride, n, s.dqk, s.qk_pad, k_rows + h * qk_size);
    pack_columns(k + h * s.dqk, k_stride, n, s.dqk, n_pad, k_columns + long(h) * s.dqk * n_pad);
    pack_columns(v + h * s.dv, v_stride, n, s.dv, n_pad, v_columns + long(h) * s.dv * n_pad);
    pack_rows(d_out + h * s.dv, long(s.heads) * s.dv, n, s.dv, s.v_pad, do_rows + h * v_size);
  }
  for (int i0 = 0; i0 < n; i0 += kQueryBlock) {
    const int rows = std::min(kQueryBlock, n - i0);
    for (int j0 = 0; j0 < i0 + rows; j0 += kKeyBlock) {
      const Tile tile{i0, rows, j0, std::min(kKeyBlock, i0 + rows - j0)};
      bias_tile(times, s, i0, rows, j0, tile.cols, w.bias, w.bucket);
      std::memset(w.d_bias, 0, sizeof w.d_bias);
      for (int h = 0; h < s.heads; ++h) {
        scores(tile, q_rows + h * qk_size, s.qk_pad, k_columns + long(h) * s.dqk * n_pad, n_pad,
               s.dqk, w.score);
        scores(tile, do_rows + h * v_size, s.v_pad, v_columns + long(h) * s.dv * n_pad, n_pad, s.dv,
               w.d_score);
        activate_backward(tile, w.bias, 1.f / s.max_len, w.score, w.d_score);
        times_queries(tile, w.score, do_rows + h * v_size, s.v_pad, dv_rows + h * v_size);
        times_queries(tile, w.d_score, q_rows + h * qk_size, s.qk_pad, dk_rows + h * qk_size);
        times_keys(tile, w.d_score, k_rows + h * qk_size, s.qk_pad,
                   dq_rows + h * qk_size + long(i0) * s.qk_pad);
        for (int r = 0; r < rows; ++r)
          for (int c = 0; c < tile.cols; ++c)
            w.d_bias[r * kKeyBlock + c] += w.d_score[r * kKeyBlock + c];
      }
      accumulate_bias(tile, s, w.d_bias, w.bucket, d_pos, d_ts);
    }
  }
  const long qk_stride = long(s.heads) * s.dqk, dv_stride = long(s.heads) * s.dv;
  for (int h = 0; h < s.heads; ++h)
    for (int i = 0; i < n; ++i) {
      const long row = long(h) * n + i;
      std::memcpy(dq + i * qk_stride + h * s.dqk, dq_rows + row * s.qk_pad, s.dqk * sizeof(float));
      std::memcpy(dk + i * qk_stride + h * s.dqk, dk_rows + row * s.qk_pad, s.dqk * sizeof(float));
      std::memcpy(dv + i * dv_stride + h * s.dv, dv_rows + row * s.v_pad, s.dv * sizeof(float));
    }
}

}  // namespace
}  // namespace tandem

extern "C" {

// q, k [T, H, dqk] and v [T, H, dv] with any token stride; out [T, H, dv] contiguous.
void tandem_hstu_forward(const float* q, long q_stride, const float* k, long k_stride, const float* v,
                         long v_stride, const std::int64_t* offsets, const std::int64_t* timestamps,
                         const std::int64_t* next_timestamps, const float* pos_weight,
                         const float* ts_weight, const std::int64_t* thresholds, long sequences,
                         long heads, long dqk, long dv, long max_len, long threads, float* out) {
  using namespace tandem;
  const Shape shape{int(heads), int(dqk), int(dv), int(max_len)};
  const BucketTable buckets(thresholds);
  const long out_stride = long(heads) * dv;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (long b = 0; b < sequences; ++b) {
    const std::int64_t start = offsets[b];
    const Times times{timestamps + start, next_timestamps + start, pos_weight, ts_weight, &buckets};
    forward_sequence(shape, times, int(offsets[b + 1] - start), q + start * q_stride, q_stride,
                     k + start * k_stride, k_stride, v + start * v_stride, v_stride,
                     out + start * out_stride, out_stride);
  }
}

// d_out and all gradients contiguous; d_pos [2 N - 1] and d_ts [129] are overwritten.
void tandem_hstu_backward(const float* q, long q_stride, const float* k, long k_stride,
                          const float* v, long v_stride, const std::int64_t* offsets,
                          const std::int64_t* timestamps, const std::int64_t* next_timestamps,
                          const float* pos_weight, const float* ts_weight,
                          const std::int64_t* thresholds, long sequences, long heads, long dqk, long dv,
                          long max_len, long threads, const float* d_out, float* dq, float* dk,
                          float* d_v, float* d_pos, float* d_ts) {
  using namespace tandem;
  const Shape shape{int(heads), int(dqk), int(dv), int(max_len)};
  const BucketTable buckets(thresholds);
  const long bias_size = 2L * max_len - 1 + kTimeBuckets;
  const long qk_stride = long(heads) * dqk, out_stride = long(heads) * dv;
  std::vector<float> d_bias(sequences * bias_size, 0.f);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (long b = 0; b < sequences; ++b) {
    const std::int64_t start = offsets[b];
    const Times times{timestamps + start, next_timestamps + start, pos_weight, ts_weight, &buckets};
    float* mine = d_bias.data() + b * bias_size;
    backward_sequence(shape, times, int(offsets[b + 1] - start), q + start * q_stride, q_stride,
                      k + start * k_stride, k_stride, v + start * v_stride, v_stride,
                      d_out + start * out_stride, dq + start * qk_stride, dk + start * qk_stride,
                      d_v + start * out_stride, mine, mine + 2L * max_len - 1);
  }
  std::vector<double> total(bias_size, 0.0);
  for (long b = 0; b < sequences; ++b)
    for (long e = 0; e < bias_size; ++e) total[e] += d_bias[b * bias_size + e];
  for (long e = 0; e < 2L * max_len - 1; ++e) d_pos[e] = float(total[e]);
  for (int e = 0; e < kTimeBuckets; ++e) d_ts[e] = float(total[2L * max_len - 1 + e]);
}

}  // extern "C"
