// Whether the members of a call may be written at once, which is remembered with the call it is true of.
#include <algorithm>
#include <bit>

#include "../memory/overlap.h"
#include "../memory/strided.h"
#include "call.h"
#include "tensors.h"
#include "turns.h"

namespace optim_ext::ops {

using memory::Access;

static_assert(memory::kMostArrays == kMaxOperands);

namespace {

constexpr const char* kOverlaps =
    "overlaps in memory with another tensor this step writes; each needs memory of its own";
constexpr const char* kReadsLate =
    "overlaps in memory with what the step of an earlier parameter writes (torch's modes disagree on which value it "
    "has "
    "then); give it memory of its own";

}  // namespace

struct KnownCall {
  std::vector<Access> writes, reads;  // reads: of memory that is written, too
  Addresses memory;                   // that what is written was allocated in
  std::vector<int32_t> turn_of_member;
};

namespace {
thread_local KnownCalls kept_by_nobody;
thread_local KnownCalls* current_calls = nullptr;
}  // namespace

KnownCalls& KnownCalls::current() { return current_calls ? *current_calls : kept_by_nobody; }

RemembersCalls::RemembersCalls(KnownCalls& calls) : before_(current_calls) { current_calls = &calls; }
RemembersCalls::~RemembersCalls() { current_calls = before_; }

std::array<KnownCalls::Known, KnownCalls::kMost> KnownCalls::all() const {
  const std::lock_guard lock(mutex_);
  return calls_;
}

void KnownCalls::remember(Known call, const KnownCall* outdated) {
  const std::lock_guard lock(mutex_);
  for (Known& known : calls_) {
    if (outdated != nullptr && known.get() == outdated) return known.swap(call);
  }
  calls_[oldest_++ % kMost].swap(call);
}

// Lists are numbered: operands, averages, scalars, partial ones, companions.
const char* Call::name_of_list(int32_t list) const {
  if (list < rule_.count) return rule_.lists[list].name;
  if (list == rule_.count) return averaging_lists_[kParam].name;
  const size_t scalar = list - rule_.count - 1, partial = scalar - spec_.scalars.size();
  if (scalar < spec_.scalars.size()) return spec_.scalars.begin()[scalar].name;
  const size_t companion = partial - spec_.partial.size();
  return partial < spec_.partial.size() ? spec_.partial.begin()[partial].list.name : kCompanions[companion];
}

// Calls visit(access, tensor) for the memory of all tensors that are written, until it returns false.
template <class Visit>
bool Call::visit_written(const Visit& visit) const {
  for (size_t i = 0; i < bundles.size(); ++i) {
    const auto member = static_cast<int32_t>(i);
    for (int k = 0; bundles[i].numel != 0 && k < rule_.count; ++k) {
      if (!rule_.is_written(k)) continue;
      const at::Tensor& tensor = rule_.lists[k].tensors[i];
      if (!visit(Access{extent_of(bundles[i], k, tensor), member, k}, tensor)) return false;
    }
    int32_t list = rule_.count;
    if (bundles[i].numel != 0 && bundles[i].average) {
      const at::Tensor& tensor = averaging_lists_[kParam].tensors[i];
      if (!visit(Access{extent_of(averages_[i], kParam, tensor), member, list}, tensor)) return false;
    }
    for (const List& scalars : spec_.scalars) {
      const at::Tensor& tensor = scalars.tensors[i];
      if (!visit(Access{extent_of(tensor), member, ++list}, tensor)) return false;
    }
    for (const PartialList& partial : spec_.partial) {
      const at::Tensor& tensor = partial.list.tensors[i];
      ++list;
      if (tensor.defined() && tensor.numel() != 0 && !visit(Access{extent_of(tensor), member, list}, tensor))
        return false;
    }
    for (size_t kind = 0; bundles[i].companions && bundles[i].numel != 0 && kind < companion_kinds(); ++kind) {
      const at::Tensor& tensor = companion(kind, i);
      if (!visit(Access{extent_of(tensor), member, ++list}, tensor)) return false;
    }
  }
  return true;
}

// Gradients in memory that is written, too: they are other tensors at every step, so only these are looked at closely.
template <class Memory>
std::vector<Access> Call::reads_from(const Memory& written) const {
  std::vector<Access> reads;
  if (!rule_.reads_grads()) return reads;
  for (size_t i = 0; i < bundles.size(); ++i) {
    const at::Tensor& tensor = rule_.lists[kGrad].tensors[i];
    if (bundles[i].numel == 0 || tensor.layout() != at::kStrided || !written.contains(memory_of(tensor))) continue;
    const at::Tensor& param = rule_.lists[kParam].tensors[i];
    // A gradient may be its own parameter, element by element.
    const bool in_place = rule_.is_written(kParam) && bundles[i].data[kGrad] == bundles[i].data[kParam] &&
                          bundles[i].storage[kGrad] == bundles[i].storage[kParam] && same_strides(tensor, param);
    reads.push_back({extent_of(bundles[i], kGrad, tensor), static_cast<int32_t>(i), kGrad, in_place});
  }
  return reads;
}

// The sweep runs in parallel over all members, so their memory must be disjoint. Looking at thousands of addresses at
// every step would cost more than a small model's update, so what was found is remembered with the call it is true of.
void Call::check_overlap() const {
  KnownCalls::Known call;
  for (const KnownCalls::Known& known : known_) {
    if (known == nullptr) continue;
    auto at = known->writes.begin();
    const auto end = known->writes.end();
    const auto is_next = [&](const Access& access, const at::Tensor&) { return at != end && *at++ == access; };
    if (!visit_written(is_next) || at != end) continue;
    const bool reads_none = known.get() == expected_ && !grads_meet_writes_;
    std::vector<Access> reads = reads_none ? std::vector<Access>() : reads_from(known->memory);
    if (reads == known->reads) {
      call = known;
    } else {
      call = look_at_overlaps({known->writes, std::move(reads), known->memory, {}});
      KnownCalls::current().remember(call, known.get());
    }
    break;
  }
  if (call == nullptr) {
    std::vector<Access> writes;
    std::vector<const void*> memory;
    visit_written([&](Access access, const at::Tensor& tensor) {
      writes.push_back(std::move(access));
      memory.push_back(memory_of(tensor));
      return true;
    });
    const Addresses addresses(memory);
    call = look_at_overlaps({std::move(writes), reads_from(addresses), addresses, {}});
    KnownCalls::current().remember(call, nullptr);
  }
  if (!call->turn_of_member.empty()) take_turns(call->turn_of_member);
}

// Refuses what no order of the members makes right, and says in which order the others go.
KnownCalls::Known Call::look_at_overlaps(KnownCall call) const {
  memory::Turns turns = memory::turns_of(call.writes, call.reads, static_cast<int64_t>(bundles.size()));
  const auto refuse_access = [&](const Access& access, const char* problem) {
    refuse(name_of_list(access.list), access.member, problem);
  };
  if (turns.bad_write >= 0) refuse_access(call.writes[turns.bad_write], kOverlaps);
  if (turns.bad_read >= 0) refuse_access(call.reads[turns.bad_read], kOverlaps);
  if (turns.late_read >= 0) refuse_access(call.reads[turns.late_read], kReadsLate);
  call.turn_of_member = std::move(turns.of_member);
  return std::make_shared<const KnownCall>(std::move(call));
}

void Call::take_turns(const std::vector<int32_t>& turn_of_member) const {
  MembersInTurn turns(*std::max_element(turn_of_member.begin(), turn_of_member.end()) + 1);
  for (size_t i = 0; i < turn_of_member.size(); ++i) turns[turn_of_member[i]].push_back(static_cast<int64_t>(i));
  const int64_t first_to_wait = turns[1][0];
  throw InTurn(spec_.op, rule_.lists[kParam].name, first_to_wait, kOverlaps, std::move(turns));
}

// What this call is going to write, most likely: so the threads that look at the tensors can also see to it that no
// gradient lies in that memory.
void Call::expect_writes() {
  if (!rule_.reads_grads() || bundles[0].numel == 0) return;
  const auto first = reinterpret_cast<uintptr_t>(bundles[0].data[std::countr_zero(rule_.written)]);
  for (const KnownCalls::Known& known : known_) {
    if (known && !known->writes.empty() && known->writes.front().extent.begin == first) expected_ = known.get();
  }
  const at::Tensor& grad = rule_.lists[kGrad].tensors[0];  // whose bundle was made before this was known
  if (grad.layout() == at::kStrided) note_grad(memory_of(grad));
}

void Call::note_grad(const void* memory) const {
  if (expected_ && expected_->memory.contains(memory)) grads_meet_writes_ = true;
}

}  // namespace optim_ext::ops
