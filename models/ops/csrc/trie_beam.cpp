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
constexpr float kLowest = std::numeric_limits<float>::lowest();

// Bits that order unsigned as floats do, and back.
std::uint32_t ordered(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}

float unordered(std::uint32_t bits) {
  bits ^= bits >> 31 ? 0x80000000u : 0xFFFFFFFFu;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct Candidate {
  std::uint64_t key;  // score, then order of arrival: of equal ones the earlier is better
  std::int32_t parent, child;
  float score() const { return unordered(std::uint32_t(key >> 32)); }
  bool operator<(const Candidate& other) const { return key > other.key; }  // better first
};

// The best `width` candidates. They gather in a buffer twice that long, which is cut in linear time
// when it is full: a constant cost each, where a heap pays a logarithm.
class Best {
 public:
  explicit Best(long width) : width_(width), capacity_(2 * width + 64) { kept_.reserve(capacity_); }
  void clear() {
    kept_.clear();
    arrivals_ = 0;
    threshold_ = kNever;
  }
  // No worse candidate can be among the best.
  float threshold() const { return threshold_; }
  void offer(float score, std::int32_t parent, std::int32_t child) {
    const std::uint64_t key = std::uint64_t(ordered(score)) << 32 | std::uint32_t(~arrivals_++);
    kept_.push_back({key, parent, child});
    if (long(kept_.size()) == capacity_) cut();
  }
  const std::vector<Candidate>& sorted() {
    if (long(kept_.size()) > width_) cut();
    std::sort(kept_.begin(), kept_.end());
    return kept_;
  }

 private:
  void cut() {
    std::nth_element(kept_.begin(), kept_.begin() + width_ - 1, kept_.end());
    kept_.resize(width_);
    threshold_ = kept_.back().score();
  }
  long width_, capacity_;
  std::uint32_t arrivals_ = 0;
  float threshold_ = kNever;
  std::vector<Candidate> kept_;
};

struct Level {
  const std::int32_t *indptr, *tokens;
  const std::uint8_t* allowed;  // of this request's list; null: all
  const std::int64_t *dead, *dead_end;
  bool restricted() const { return allowed || dead != dead_end; }
};

struct Range {
  std::int32_t first, last;
};

// Legal children of one beam: their logits, filled up to whole vectors so that loops have no tail.
class Children {
 public:
  explicit Children(long codes) : codes_(codes), room_(round_up(int(codes))), ids_(codes) {}

  const float* logits() const { return logits_; }
  long count() const { return count_; }
  long padded() const { return round_up(int(count_)); }
  std::int32_t state(long m) const { return consecutive_ ? first_ + std::int32_t(m) : ids_[m]; }

  void pick(const Level& level, const float* logits, Range range) {
    first_ = range.first;
    consecutive_ = !level.restricted();
    if (!consecutive_) {
      pick_permitted(level, logits, range);
    } else {
      count_ = range.last - range.first;
      if (count_ == codes_ && codes_ == padded()) {  // every code is legal: no gather, no copy
        logits_ = logits;
        return;
      }
      for (long m = 0; m < count_; ++m) room_[m] = logits[level.tokens[range.first + m]];
    }
    for (long m = count_; m < padded(); ++m) room_[m] = kLowest;
    logits_ = room_.data();
  }

 private:
  void pick_permitted(const Level& level, const float* logits, Range range) {
    const std::int64_t* dead =
        std::lower_bound(level.dead, level.dead_end, std::int64_t(range.first));
    count_ = 0;
    for (std::int32_t child = range.first; child < range.last; ++child) {
      const bool gone = dead != level.dead_end && *dead == child;
      dead += gone;
      if (gone || (level.allowed && !level.allowed[child])) continue;
      room_[count_] = logits[level.tokens[child]];
      ids_[count_++] = child;
    }
  }

  long codes_, count_ = 0;
  bool consecutive_ = true;
  std::int32_t first_ = 0;
  const float* logits_ = nullptr;
  std::vector<float> room_;
  std::vector<std::int32_t> ids_;
};

float log_sum_exp(const float* x, long padded) {
  float largest = kLowest, total = 0.f;
#pragma omp simd reduction(max : largest)
  for (long m = 0; m < padded; ++m) largest = x[m] > largest ? x[m] : largest;
#pragma omp simd reduction(+ : total)
  for (long m = 0; m < padded; ++m) total += fast_exp(x[m] - largest);
  return largest + std::log(total);
}

// Offers the children of one beam whose score beats what is kept.
void offer_children(const Children& children, float score, std::int32_t parent, Best& best) {
  constexpr long kBlock = 2 * kLanes;
  const float* picked = children.logits();
  const float normaliser = log_sum_exp(picked, children.padded());
  for (long first = 0; first < children.count(); first += kBlock) {
    const long end = std::min(first + kBlock, children.padded());
    const float threshold = best.threshold();
    int any = 0;  // mostly none: a block costs a few vector comparisons
#pragma omp simd reduction(| : any)
    for (long m = first; m < end; ++m) any |= score + (picked[m] - normaliser) > threshold;
    if (!any) continue;
    for (long m = first; m < std::min(end, children.count()); ++m) {
      const float total = score + (picked[m] - normaliser);
      if (total > best.threshold()) best.offer(total, parent, children.state(m));
    }
  }
}

// Where the children of a later beam begin is known: their codes and logits can be on their way.
void prefetch_codes(const Level& level, Range range) {
  __builtin_prefetch(level.tokens + range.first);
}

void prefetch_logits(const Level& level, const float* logits, Range range) {
  const std::int32_t last = std::min(range.last, range.first + kLanes);
  for (std::int32_t m = range.first; m < last; ++m) __builtin_prefetch(logits + level.tokens[m]);
}

// The best continuations of one request's beams.
void request_step(const Level& level, const float* logits, const float* scores,
                  const std::int64_t* states, long beams, long codes, std::vector<Range>& ranges,
                  Children& children, Best& best) {
  constexpr long kCodesAhead = 8, kLogitsAhead = 4;
  for (long w = 0; w < beams; ++w)
    ranges[w] = states[w] < 0 ? Range{0, 0}
                              : Range{level.indptr[states[w]], level.indptr[states[w] + 1]};
  for (long w = 0; w < beams; ++w) {
    if (w + kCodesAhead < beams) prefetch_codes(level, ranges[w + kCodesAhead]);
    if (w + kLogitsAhead < beams)
      prefetch_logits(level, logits + (w + kLogitsAhead) * codes, ranges[w + kLogitsAhead]);
    // A child's log-probability is at most 0: it cannot beat what its own beam does not.
    if (!(scores[w] > best.threshold())) continue;
    children.pick(level, logits + w * codes, ranges[w]);
    if (children.count() > 0) offer_children(children, scores[w], std::int32_t(w), best);
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
    Children children(codes);
    std::vector<Range> ranges(beams);
#pragma omp for schedule(dynamic)
    for (long n = 0; n < requests; ++n) {
      const std::int64_t* dead_row = dead ? dead + n * num_dead : nullptr;
      const Level level{indptr, tokens, allowed ? allowed + lists[n] * next_states : nullptr,
                        dead_row, dead_row + (dead ? num_dead : 0)};
      best.clear();
      request_step(level, logits + n * beams * codes, scores + n * beams, states + n * beams,
                   beams, codes, ranges, children, best);
      const std::vector<Candidate>& kept = best.sorted();
      for (long p = 0; p < picked_count; ++p) {
        const bool is_there = p < long(kept.size());
        const long out = n * picked_count + p;
        out_scores[out] = is_there ? kept[p].score() : kNever;
        out_parents[out] = is_there ? kept[p].parent : 0;
        out_tokens[out] = is_there ? tokens[kept[p].child] : 0;
        out_states[out] = is_there ? kept[p].child : -1;
      }
    }
  }
}

}  // extern "C"
