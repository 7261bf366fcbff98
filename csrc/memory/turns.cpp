#include "turns.h"

#include <numeric>
#include <utility>

#include "overlap.h"

namespace optim_ext::memory {

namespace {

// Places tried for all pairs together. Pairs of one member have more: there is nothing to fall back to.
constexpr int64_t kCallBudget = int64_t{1} << 22, kOwnBudget = int64_t{1} << 26;

// A stretch of a line, or of a circle that is cut open.
struct Span {
  int64_t begin, end;
  int64_t access;
};

class Finder {
 public:
  Finder(const std::vector<Access>& writes, const std::vector<Access>& reads, int64_t members)
      : writes_(writes), reads_(reads), members_(members) {}

  Turns find() {
    find_own();
    find_between();
    turns_.of_member = numbered();
    return std::move(turns_);
  }

 private:
  const Access& at(int64_t i) const {
    const auto count = static_cast<int64_t>(writes_.size());
    return i < count ? writes_[i] : reads_[i - count];
  }
  bool is_write(int64_t i) const { return i < static_cast<int64_t>(writes_.size()); }

  // Pairs of one member.
  void find_own() {
    std::vector<std::vector<int64_t>> of_member(members_);
    for (size_t i = 0; i < writes_.size(); ++i) of_member[writes_[i].member].push_back(static_cast<int64_t>(i));
    int64_t budget = kOwnBudget;
    for (size_t i = 0; i < writes_.size() && turns_.bad_write < 0; ++i) {
      for (const int64_t other : of_member[writes_[i].member]) {
        if (other >= static_cast<int64_t>(i)) break;
        if (overlap(writes_[other].extent, writes_[i].extent, budget) == Overlap::none) continue;
        turns_.bad_write = static_cast<int64_t>(i);
      }
    }
    for (size_t i = 0; i < reads_.size() && turns_.bad_read < 0; ++i) {
      for (const int64_t write : of_member[reads_[i].member]) {
        if (reads_[i].in_place || overlap(writes_[write].extent, reads_[i].extent, budget) == Overlap::none) continue;
        turns_.bad_read = static_cast<int64_t>(i);
      }
    }
  }

  // Pairs of different members, cluster by cluster of accesses whose addresses meet.
  void find_between() {
    std::vector<Span> spans;
    for (int64_t i = 0; i < static_cast<int64_t>(writes_.size() + reads_.size()); ++i) {
      const Extent& extent = at(i).extent;
      if (extent.begin == extent.end) continue;
      spans.push_back({static_cast<int64_t>(extent.begin), static_cast<int64_t>(extent.end), i});
    }
    sort(spans);
    for (size_t first = 0, next; first < spans.size() && !too_many_; first = next) {
      int64_t end = spans[first].end;
      for (next = first + 1; next < spans.size() && spans[next].begin < end; ++next)
        end = std::max(end, spans[next].end);
      if (next - first == 1) continue;
      std::vector<Span> cluster(spans.begin() + static_cast<int64_t>(first),
                                spans.begin() + static_cast<int64_t>(next));
      fold(cluster);
      find_in(cluster);
    }
  }

  static void sort(std::vector<Span>& spans) {
    std::stable_sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  }

  // Views of one matrix meet each other by their addresses, thousands of them perhaps, but lie in different columns. So
  // where there is a view with rows, spans become what they cover of a row: addresses modulo its stride.
  void fold(std::vector<Span>& cluster) const {
    const auto strided = std::find_if(cluster.begin(), cluster.end(),
                                      [&](const Span& span) { return !at(span.access).extent.is_dense(); });
    if (strided == cluster.end()) return;
    const int64_t row = at(strided->access).extent.dims.front().stride;
    const size_t count = cluster.size();
    for (size_t i = 0; i < count; ++i) {
      Span& span = cluster[i];
      const Extent& extent = at(span.access).extent;
      int64_t length = span.end - span.begin;
      if (!extent.is_dense() && extent.dims.front().stride == row) length -= (extent.dims.front().size - 1) * row;
      span.begin = length < row ? span.begin % row : 0;
      span.end = span.begin + std::min(length, row);
      if (span.end > row) cluster.push_back({span.begin - row, span.end - row, span.access});
    }
    sort(cluster);
  }

  void find_in(const std::vector<Span>& cluster) {
    std::vector<Span> open;
    for (const Span& span : cluster) {
      std::erase_if(open, [&](const Span& other) { return other.end <= span.begin; });
      for (const Span& other : open) {
        note(other.access, span.access);
        if (pairs_.size() > kMostPairs) {
          too_many_ = true;
          return;
        }
      }
      open.push_back(span);
    }
  }

  void note(int64_t a, int64_t b) {
    if (at(a).member == at(b).member || (!is_write(a) && !is_write(b))) return;
    int64_t budget = std::min(kPairBudget, budget_);
    const int64_t before = budget;
    const Overlap found = overlap(at(a).extent, at(b).extent, budget);
    budget_ -= before - std::max<int64_t>(budget, 0);
    if (found == Overlap::none) return;
    if (at(b).member < at(a).member) std::swap(a, b);
    pairs_.push_back({at(a).member, at(b).member});
    if (found != Overlap::some || is_write(b) || at(b).in_place) return;
    const int64_t read = b - static_cast<int64_t>(writes_.size());
    if (turns_.late_read < 0 || read < turns_.late_read) turns_.late_read = read;
  }

  std::vector<int32_t> numbered() {
    std::vector<int32_t> turns;
    if (pairs_.empty()) return turns;
    turns.resize(members_, 0);
    if (too_many_) {
      std::iota(turns.begin(), turns.end(), 0);
      return turns;
    }
    std::sort(pairs_.begin(), pairs_.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
    for (const auto& [before, after] : pairs_) turns[after] = std::max(turns[after], turns[before] + 1);
    return turns;
  }

  const std::vector<Access>&writes_, &reads_;
  const int64_t members_;
  Turns turns_;
  int64_t budget_ = kCallBudget;
  std::vector<std::pair<int32_t, int32_t>> pairs_;  // members, the earlier one first
  bool too_many_ = false;
};

}  // namespace

Turns turns_of(const std::vector<Access>& writes, const std::vector<Access>& reads, int64_t members) {
  return Finder(writes, reads, members).find();
}

}  // namespace optim_ext::memory
