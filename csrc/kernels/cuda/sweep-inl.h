// The kernels around a block's work. Each family of rules is a translation unit that includes its header and this file
// and instantiates the kernel for its rules: to change a rule recompiles its own family only.
#include "kept_block.h"
#include "launch.h"
#include "sweep_block.h"

namespace optim_ext::cuda {

namespace {

template <class Rule, class V, int64_t kBytes, bool kAveraged>
OPTIM_EXT_KERNEL(kThreads, min_blocks(kAveraged))
sweep(OPTIM_EXT_ARGUMENT(Args<Rule, kBytes>) args) {
  sweep_block<Rule, V, kAveraged>(args);
}

// A kernel of its own, with room for more registers, so that steps which keep nothing beside pay nothing for it.
template <class Rule, int64_t kBytes>
OPTIM_EXT_KERNEL(kThreads, 2)
sweep_kept(OPTIM_EXT_ARGUMENT(Args<Rule, kBytes>) args) {
  sweep_kept_block<Rule>(args);
}

template <class Rule, class EntryOf, int64_t kBytes>
OPTIM_EXT_KERNEL(kThreads)
advance_scalars(OPTIM_EXT_ARGUMENT(Args<Rule, kBytes>) args) {
  advance_scalars_of_thread<Rule, EntryOf>(args);
}

}  // namespace

// Whether parameters and state of a rule may be kept in another way than it sees them: those of
// OPTIM_EXT_INSTANTIATE_NATIVE may not.
template <class Rule>
constexpr bool kMayBeKept = true;

template <class Rule, class V, int64_t kBytes>
device::Status launch_sweep(const Args<Rule, kBytes>& args, int64_t chunks, device::Stream stream) {
  if (args.batch.kept && !(kMayBeKept<Rule> && sizeof(V) == sizeof(float))) return device::kInvalidGrid;
  auto* kernel = &sweep<Rule, V, kBytes, false>;
  if constexpr (kCanAverage<Rule>) {
    if (args.batch.averaged) kernel = &sweep<Rule, V, kBytes, true>;
  }
  if constexpr (kMayBeKept<Rule> && sizeof(V) == sizeof(float)) {
    if (args.batch.kept) kernel = &sweep_kept<Rule, kBytes>;
  }
  device::Status error = launch_blocks(kernel, args, chunks, stream);
  if constexpr (rules::kStoresScalars<Rule>) {
    const int64_t blocks = (args.batch.count + kThreads - 1) / kThreads;
    auto* advance = &advance_scalars<Rule, Entry<Rule>, kBytes>;
    if (args.batch.kept) advance = &advance_scalars<Rule, KeptEntry<Rule>, kBytes>;
    if (error == device::kSuccess) error = launch_blocks(advance, args, blocks, stream);
  }
  return error;
}

#define OPTIM_EXT_INSTANTIATE(...)                                                  \
  template device::Status launch_sweep<rules::__VA_ARGS__, float, kArgumentBytes>(  \
      const Args<rules::__VA_ARGS__, kArgumentBytes>&, int64_t, device::Stream);    \
  template device::Status launch_sweep<rules::__VA_ARGS__, double, kArgumentBytes>( \
      const Args<rules::__VA_ARGS__, kArgumentBytes>&, int64_t, device::Stream);

#define OPTIM_EXT_INSTANTIATE_NATIVE(...)                \
  template <>                                            \
  constexpr bool kMayBeKept<rules::__VA_ARGS__> = false; \
  OPTIM_EXT_INSTANTIATE(__VA_ARGS__)

}  // namespace optim_ext::cuda
