// Softmax attention of each request's queries over its own jagged context, forward and backward.
//
// One thread owns one key-value head of one request. Queries (beams, positions and grouped heads) are
// taken kQueryBlock at a time against all keys of the context, so no score matrix larger than that
// exists. The backward pass recomputes the weights from the kept log-sum-exp.
#include <algorithm>
#include <cmath>
#include <vector>

#include "pack.h"
#include "softmax_rows.h"

namespace tandem {
namespace {

// One key-value head of one request: `queries` rows of dh numbers, n context tokens at their stride.
struct Head {
  int queries, n, dh, n_pad, pad;
  const float *q, *k, *v;
  long stride;
  float scale;

  // A block of scaled queries, zero-padded.
  float* block(Scratch& w, int i0, int rows) const {
    float* out = sized(w.q, long(kQueryBlock) * pad);
    pack_rows(q + long(i0) * dh, dh, rows, dh, pad, out);
    for (long e = 0; e < long(rows) * pad; ++e) out[e] *= scale;
    return out;
  }

  void logits(const float* q_rows, const float* k_columns, int rows, float* out) const {
    product(rows, q_rows, pad, k_columns, n_pad, out, n_pad, dh, n_pad / kLanes);
  }
};

void forward_head(const Head& h, float* out, float* lse) {
  if (h.n == 0) {  // an empty context says nothing
    std::fill(out, out + long(h.queries) * h.dh, 0.f);
    std::fill(lse, lse + h.queries, 0.f);
    return;
  }
  Scratch& w = scratch();
  float* k_columns = sized(w.k_columns, long(h.dh) * h.n_pad);
  float* v_rows = sized(w.v, long(h.n) * h.pad);
  pack_columns(h.k, h.stride, h.n, h.dh, h.n_pad, k_columns);
  pack_rows(h.v, h.stride, h.n, h.dh, h.pad, v_rows);
  float* score = sized(w.score, long(kQueryBlock) * h.n_pad);
  float* mixed = sized(w.d_out, long(kQueryBlock) * h.pad);
  for (int i0 = 0; i0 < h.queries; i0 += kQueryBlock) {
    const int rows = std::min(kQueryBlock, h.queries - i0);
    h.logits(h.block(w, i0, rows), k_columns, rows, score);
    float inverse[kQueryBlock];
    for (int r = 0; r < rows; ++r) {
      float* row = score + long(r) * h.n_pad;
      const float top = largest(row, h.n);
      const float total = exponentials(row, h.n, h.n_pad, top);
      inverse[r] = 1.f / total;
      lse[i0 + r] = top + std::log(total);
    }
    product(rows, score, h.n_pad, v_rows, h.pad, mixed, h.pad, h.n, h.pad / kLanes);
    for (int r = 0; r < rows; ++r)
      for (int d = 0; d < h.dh; ++d)
        out[long(i0 + r) * h.dh + d] = mixed[long(r) * h.pad + d] * inverse[r];
  }
}

// d_q is laid out as q; d_k and d_v as k and v.
void backward_head(const Head& h, const float* out, const float* d_out, const float* lse, float* d_q,
                   float* d_k, float* d_v) {
  if (h.n == 0) {
    std::fill(d_q, d_q + long(h.queries) * h.dh, 0.f);
    return;
  }
  Scratch& w = scratch();
  const long size = long(h.n) * h.pad, columns = long(h.dh) * h.n_pad;
  float* k_rows = sized(w.k, size);
  float *k_columns = sized(w.k_columns, columns), *v_columns = sized(w.v_columns, columns);
  pack_rows(h.k, h.stride, h.n, h.dh, h.pad, k_rows);
  pack_columns(h.k, h.stride, h.n, h.dh, h.n_pad, k_columns);
  pack_columns(h.v, h.stride, h.n, h.dh, h.n_pad, v_columns);
  float *dk_rows = zeroed(w.dk, size), *dv_rows = zeroed(w.dv, size);
  float* dq_rows = sized(w.dq, long(kQueryBlock) * h.pad);
  float* do_rows = sized(w.d_out, long(kQueryBlock) * h.pad);
  float* weight = sized(w.score, long(kQueryBlock) * h.n_pad);
  float* d_score = sized(w.d_score, long(kQueryBlock) * h.n_pad);
  for (int i0 = 0; i0 < h.queries; i0 += kQueryBlock) {
    const int rows = std::min(kQueryBlock, h.queries - i0);
    const float* q_rows = h.block(w, i0, rows);
    pack_rows(d_out + long(i0) * h.dh, h.dh, rows, h.dh, h.pad, do_rows);
    h.logits(q_rows, k_columns, rows, weight);
    product(rows, do_rows, h.pad, v_columns, h.n_pad, d_score, h.n_pad, h.dh, h.n_pad / kLanes);
    for (int r = 0; r < rows; ++r) {
      const long at = long(i0 + r) * h.dh;
      float *p = weight + long(r) * h.n_pad, *d = d_score + long(r) * h.n_pad;
      exponentials(p, h.n, h.n_pad, lse[i0 + r]);
      float along = 0.f;
      for (int c = 0; c < h.dh; ++c) along += out[at + c] * d_out[at + c];
      for (int c = 0; c < h.n_pad; ++c) d[c] = p[c] * (d[c] - along);
    }
    add_transposed(h.n, weight, h.n_pad, do_rows, h.pad, dv_rows, rows);
    add_transposed(h.n, d_score, h.n_pad, q_rows, h.pad, dk_rows, rows);
    product(rows, d_score, h.n_pad, k_rows, h.pad, dq_rows, h.pad, h.n, h.pad / kLanes);
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < h.dh; ++c)
        d_q[long(i0 + r) * h.dh + c] = dq_rows[long(r) * h.pad + c] * h.scale;
  }
  for (int i = 0; i < h.n; ++i) {
    std::memcpy(d_k + i * h.stride, dk_rows + long(i) * h.pad, h.dh * sizeof(float));
    std::memcpy(d_v + i * h.stride, dv_rows + long(i) * h.pad, h.dh * sizeof(float));
  }
}

Head head_at(const float* q, const float* k, const float* v, const std::int64_t* offsets, long task,
             long groups, long queries, long dh) {
  const long request = task / groups, first = offsets[request] * groups * dh + task % groups * dh;
  const int n = int(offsets[request + 1] - offsets[request]);
  return Head{int(queries), n,         int(dh),   round_up(n),           round_up(int(dh)),
              q + task * queries * dh, k + first, v + first, groups * dh, 1.f / std::sqrt(float(dh))};
}

}  // namespace
}  // namespace tandem

extern "C" {

// q, out [N, G, Q, dh], k and v [T, G, dh], lse [N, G, Q]; all contiguous.
void tandem_context_forward(const float* q, const float* k, const float* v,
                            const std::int64_t* offsets, long requests, long groups, long queries,
                            long dh, long threads, float* out, float* lse) {
  using namespace tandem;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (long task = 0; task < requests * groups; ++task)
    forward_head(head_at(q, k, v, offsets, task, groups, queries, dh), out + task * queries * dh,
                 lse + task * queries);
}

// d_q, d_k and d_v are overwritten.
void tandem_context_backward(const float* q, const float* k, const float* v,
                             const std::int64_t* offsets, const float* out, const float* lse,
                             const float* d_out, long requests, long groups, long queries, long dh,
                             long threads, float* d_q, float* d_k, float* d_v) {
  using namespace tandem;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (long task = 0; task < requests * groups; ++task) {
    const Head head = head_at(q, k, v, offsets, task, groups, queries, dh);
    const long at = task * queries * dh;
    backward_head(head, out + at, d_out + at, lse + task * queries, d_q + at, d_k + (head.k - k),
                  d_v + (head.v - v));
  }
}

}  // extern "C"
