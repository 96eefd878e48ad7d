// Bidirectional softmax attention with a bias by distance on jagged sequences, forward and backward.
//
// One thread owns one head of one sequence. Queries are taken kQueryBlock at a time against all keys
// of the sequence, so no score matrix larger than that exists. The backward pass recomputes the
// weights from the kept log-sum-exp. Gradients of the shared bias are kept per sequence and summed in
// a fixed order, so results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "pack.h"
#include "softmax_rows.h"

namespace tandem {
namespace {

// One head of one sequence: n tokens, each dh numbers at its stride.
struct Head {
  int n, dh, n_pad, pad;
  const float *q, *k, *v;
  long stride;
  const float* bias;  // of the head, at distance 0
  float scale;

  float* queries(Scratch& w) const {
    float* rows = sized(w.q, long(n) * pad);
    pack_rows(q, stride, n, dh, pad, rows);
    for (long e = 0; e < long(n) * pad; ++e) rows[e] *= scale;
    return rows;
  }

  // Logits of queries [i0, i0 + rows) and all keys.
  void logits(const float* q_rows, const float* k_columns, int i0, int rows, float* out) const {
    product(rows, q_rows + long(i0) * pad, pad, k_columns, n_pad, out, n_pad, dh, n_pad / kLanes);
    for (int r = 0; r < rows; ++r) {
      float* row = out + long(r) * n_pad;
      const float* by_distance = bias - (i0 + r);
      for (int c = 0; c < n; ++c) row[c] += by_distance[c];
    }
  }
};

void forward_head(const Head& h, float* out, long out_stride, float* lse, long lse_stride) {
  Scratch& w = scratch();
  const float* q_rows = h.queries(w);
  float* k_columns = sized(w.k_columns, long(h.dh) * h.n_pad);
  float* v_rows = sized(w.v, long(h.n) * h.pad);
  pack_columns(h.k, h.stride, h.n, h.dh, h.n_pad, k_columns);
  pack_rows(h.v, h.stride, h.n, h.dh, h.pad, v_rows);
  float* score = sized(w.score, long(kQueryBlock) * h.n_pad);
  float* mixed = sized(w.d_out, long(kQueryBlock) * h.pad);
  for (int i0 = 0; i0 < h.n; i0 += kQueryBlock) {
    const int rows = std::min(kQueryBlock, h.n - i0);
    h.logits(q_rows, k_columns, i0, rows, score);
    float inverse[kQueryBlock];
    for (int r = 0; r < rows; ++r) {
      float* row = score + long(r) * h.n_pad;
      const float top = largest(row, h.n);
      const float total = exponentials(row, h.n, h.n_pad, top);
      inverse[r] = 1.f / total;
      lse[(i0 + r) * lse_stride] = top + std::log(total);
    }
    product(rows, score, h.n_pad, v_rows, h.pad, mixed, h.pad, h.n, h.pad / kLanes);
    for (int r = 0; r < rows; ++r)
      for (int d = 0; d < h.dh; ++d)
        out[(i0 + r) * out_stride + d] = mixed[long(r) * h.pad + d] * inverse[r];
  }
}

// d_q, d_k, d_v have the strides of q, k, v; d_bias points to distance 0 of this head's own table.
void backward_head(const Head& h, const float* out, const float* d_out, long out_stride,
                   const float* lse, long lse_stride, float* d_q, float* d_k, float* d_v,
                   long d_stride, float* d_bias) {
  Scratch& w = scratch();
  const long size = long(h.n) * h.pad, columns = long(h.dh) * h.n_pad;
  const float* q_rows = h.queries(w);
  float *k_rows = sized(w.k, size), *do_rows = sized(w.d_out, size);
  float *k_columns = sized(w.k_columns, columns), *v_columns = sized(w.v_columns, columns);
  pack_rows(h.k, h.stride, h.n, h.dh, h.pad, k_rows);
  pack_rows(d_out, out_stride, h.n, h.dh, h.pad, do_rows);
  pack_columns(h.k, h.stride, h.n, h.dh, h.n_pad, k_columns);
  pack_columns(h.v, h.stride, h.n, h.dh, h.n_pad, v_columns);
  float *dk_rows = zeroed(w.dk, size), *dv_rows = zeroed(w.dv, size);
  float* dq_rows = sized(w.dq, long(kQueryBlock) * h.pad);
  float* weight = sized(w.score, long(kQueryBlock) * h.n_pad);
  float* d_score = sized(w.d_score, long(kQueryBlock) * h.n_pad);
  for (int i0 = 0; i0 < h.n; i0 += kQueryBlock) {
    const int rows = std::min(kQueryBlock, h.n - i0);
    const float* block_do = do_rows + long(i0) * h.pad;
    h.logits(q_rows, k_columns, i0, rows, weight);
    product(rows, block_do, h.pad, v_columns, h.n_pad, d_score, h.n_pad, h.dh, h.n_pad / kLanes);
    for (int r = 0; r < rows; ++r) {
      const int i = i0 + r;
      float *p = weight + long(r) * h.n_pad, *d = d_score + long(r) * h.n_pad;
      exponentials(p, h.n, h.n_pad, lse[i * lse_stride]);
      float along = 0.f;
      for (int c = 0; c < h.dh; ++c) along += out[i * out_stride + c] * d_out[i * out_stride + c];
      for (int c = 0; c < h.n_pad; ++c) d[c] = p[c] * (d[c] - along);
      float* table = d_bias - i;
      for (int c = 0; c < h.n; ++c) table[c] += d[c];
    }
    add_transposed(h.n, weight, h.n_pad, block_do, h.pad, dv_rows, rows);
    add_transposed(h.n, d_score, h.n_pad, q_rows + long(i0) * h.pad, h.pad, dk_rows, rows);
    product(rows, d_score, h.n_pad, k_rows, h.pad, dq_rows, h.pad, h.n, h.pad / kLanes);
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < h.dh; ++c)
        d_q[(i0 + r) * d_stride + c] = dq_rows[long(r) * h.pad + c] * h.scale;
  }
  for (int i = 0; i < h.n; ++i) {
    std::memcpy(d_k + i * d_stride, dk_rows + long(i) * h.pad, h.dh * sizeof(float));
    std::memcpy(d_v + i * d_stride, dv_rows + long(i) * h.pad, h.dh * sizeof(float));
  }
}

// qkv [T, 3, H, dh]: where a head of the sequence that starts at `start` has its q; k and v follow.
Head head_at(const float* qkv, const std::int64_t* offsets, long b, long h, long heads, long dh,
             long longest, const float* bias) {
  const long inner = heads * dh;
  const int n = int(offsets[b + 1] - offsets[b]);
  const float* q = qkv + offsets[b] * 3 * inner + h * dh;
  return Head{n,          int(dh),       round_up(n),
              round_up(int(dh)), q,      q + inner,
              q + 2 * inner, 3 * inner,  bias + h * (2 * longest - 1) + longest - 1,
              1.f / std::sqrt(float(dh))};
}

}  // namespace
}  // namespace tandem

extern "C" {

// qkv [T, 3, H, dh], bias [H, 2 S - 1], out [T, H, dh], lse [T, H]; all contiguous.
void tandem_relative_forward(const float* qkv, const std::int64_t* offsets, const float* bias,
                             long sequences, long heads, long dh, long longest, long threads,
                             float* out, float* lse) {
  using namespace tandem;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (long task = 0; task < sequences * heads; ++task) {
    const long b = task / heads, h = task % heads, start = offsets[b];
    const Head head = head_at(qkv, offsets, b, h, heads, dh, longest, bias);
    forward_head(head, out + start * heads * dh + h * dh, heads * dh, lse + start * heads + h, heads);
  }
}

// d_qkv and d_bias are overwritten.
void tandem_relative_backward(const float* qkv, const std::int64_t* offsets, const float* bias,
                              const float* out, const float* lse, const float* d_out,
                              long sequences, long heads, long dh, long longest, long threads,
                              float* d_qkv, float* d_bias) {
  using namespace tandem;
  const long inner = heads * dh, table = heads * (2 * longest - 1);
  std::vector<float> parts(sequences * table, 0.f);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (long task = 0; task < sequences * heads; ++task) {
    const long b = task / heads, h = task % heads, start = offsets[b];
    const Head head = head_at(qkv, offsets, b, h, heads, dh, longest, bias);
    const long at = start * inner + h * dh;
    float* d_q = d_qkv + start * 3 * inner + h * dh;
    backward_head(head, out + at, d_out + at, inner, lse + start * heads + h, heads, d_q,
                  d_q + inner, d_q + 2 * inner, 3 * inner,
                  parts.data() + b * table + h * (2 * longest - 1) + longest - 1);
  }
  std::vector<double> total(table, 0.0);
  for (long b = 0; b < sequences; ++b)
    for (long e = 0; e < table; ++e) total[e] += parts[b * table + e];
  for (long e = 0; e < table; ++e) d_bias[e] = float(total[e]);
}

}  // extern "C"
