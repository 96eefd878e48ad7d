// One step of beam search in the catalogue trie: log-probabilities renormalised over the legal
// children of each beam, and the best children of all beams of a request, in one pass. Neither
// children nor their scores reach memory, and a beam that cannot contribute is not looked at.
//
// N requests, W beams, K codes, S states of the next level, E dead states a request, P picked.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "simd.h"

namespace tandem {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

struct Candidate {
  float score;
  std::int32_t parent, child;
  // Better first; of equal ones the earlier, so that the result does not depend on the heap.
  bool operator<(const Candidate& other) const {
    if (score != other.score) return score > other.score;
    return parent != other.parent ? parent < other.parent : child < other.child;
  }
};

// The best `width` candidates so far, the worst of them on top of a heap.
class Best {
 public:
  explicit Best(long width) : width_(width) { kept_.reserve(width); }
  void clear() { kept_.clear(); }
  float threshold() const { return long(kept_.size()) < width_ ? kNever : kept_.front().score; }
  void offer(const Candidate& candidate) {
    if (long(kept_.size()) == width_) {
      std::pop_heap(kept_.begin(), kept_.end());
      kept_.back() = candidate;
    } else {
      kept_.push_back(candidate);
    }
    std::push_heap(kept_.begin(), kept_.end());
  }
  const std::vector<Candidate>& sorted() {
    std::sort_heap(kept_.begin(), kept_.end());
    return kept_;
  }

 private:
  long width_;
  std::vector<Candidate> kept_;
};

struct Level {
  const std::int32_t *indptr, *tokens;
  const std::uint8_t* allowed;  // of this request's list; null: all
  const std::int64_t *dead, *dead_end;
};

// Logits of a state's legal children, and which states they are; how many.
long legal_children(const Level& level, const float* logits, std::int32_t state, long codes,
                    float* picked, std::int32_t* ids) {
  const std::int32_t first = level.indptr[state], last = level.indptr[state + 1];
  if (!level.allowed && level.dead == level.dead_end) {
    const long count = last - first;
    if (count == codes) {  // every code is legal: no gather
      std::copy(logits, logits + codes, picked);
    } else {
      for (long m = 0; m < count; ++m) picked[m] = logits[level.tokens[first + m]];
    }
    for (long m = 0; m < count; ++m) ids[m] = first + std::int32_t(m);
    return count;
  }
  const std::int64_t* dead = std::lower_bound(level.dead, level.dead_end, std::int64_t(first));
  long count = 0;
  for (std::int32_t child = first; child < last; ++child) {
    const bool gone = dead != level.dead_end && *dead == child;
    dead += gone;
    if (gone || (level.allowed && !level.allowed[child])) continue;
    picked[count] = logits[level.tokens[child]];
    ids[count++] = child;
  }
  return count;
}

float log_sum_exp(const float* x, long count) {
  float largest = x[0], total = 0.f;
#pragma omp simd reduction(max : largest)
  for (long m = 0; m < count; ++m) largest = x[m] > largest ? x[m] : largest;
#pragma omp simd reduction(+ : total)
  for (long m = 0; m < count; ++m) total += fast_exp(x[m] - largest);
  return largest + std::log(total);
}

// Offers the children of one beam whose score beats what is kept.
void offer_children(const float* picked, const std::int32_t* ids, long count, float score,
                    std::int32_t parent, Best& best) {
  const float normaliser = log_sum_exp(picked, count);
  float threshold = best.threshold();
  for (long m = 0; m < count; ++m) {
    const float total = score + (picked[m] - normaliser);
    if (total > threshold) {
      best.offer({total, parent, ids[m]});
      threshold = best.threshold();
    }
  }
}

}  // namespace
}  // namespace tandem

using namespace tandem;

extern "C" {

// logits [N, W, K] and scores [N, W] float32; states [N, W] int64 (-1: none); indptr, tokens of the
// level; allowed [A, S] with lists [N], or null; dead [N, E] ascending, or null. Out: [N, P] each,
// best first; score -inf, state -1, parent and token 0 where legal children run out.
void tandem_trie_beam(const float* logits, const float* scores, const std::int64_t* states,
                      const std::int32_t* indptr, const std::int32_t* tokens,
                      const std::uint8_t* allowed, const std::int64_t* lists,
                      const std::int64_t* dead, long requests, long beams, long codes,
                      long next_states, long num_dead, long picked_count, long threads,
                      float* out_scores, std::int64_t* out_parents, std::int64_t* out_tokens,
                      std::int64_t* out_states) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Best best(picked_count);
    std::vector<float> picked(codes);
    std::vector<std::int32_t> ids(codes);
#pragma omp for schedule(dynamic)
    for (long n = 0; n < requests; ++n) {
      const std::int64_t* dead_row = dead ? dead + n * num_dead : nullptr;
      const Level level{indptr, tokens, allowed ? allowed + lists[n] * next_states : nullptr,
                        dead_row, dead_row + (dead ? num_dead : 0)};
      best.clear();
      for (long w = 0; w < beams; ++w) {
        const long beam = n * beams + w;
        // A child's log-probability is at most 0: it cannot beat what its own beam does not.
        if (states[beam] < 0 || !(scores[beam] > best.threshold())) continue;
        const long count = legal_children(level, logits + beam * codes,
                                          std::int32_t(states[beam]), codes, picked.data(),
                                          ids.data());
        if (count == 0) continue;
        offer_children(picked.data(), ids.data(), count, scores[beam], std::int32_t(w), best);
      }
      const std::vector<Candidate>& kept = best.sorted();
      for (long p = 0; p < picked_count; ++p) {
        const bool is_there = p < long(kept.size());
        const long out = n * picked_count + p;
        out_scores[out] = is_there ? kept[p].score : kNever;
        out_parents[out] = is_there ? kept[p].parent : 0;
        out_tokens[out] = is_there ? tokens[kept[p].child] : 0;
        out_states[out] = is_there ? kept[p].child : -1;
      }
    }
  }
}

}  // extern "C"
