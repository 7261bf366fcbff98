// Reductions: the same bits for every instruction set and from the CUDA threads run on the host, and the right value.
#include <algorithm>
#include <vector>

#include "cases.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cuda/reduce_block.h"

using namespace optim_ext;

namespace {

// Around the width of a row of lanes, of a tile and of a chunk, and several chunks.
const std::vector<int64_t> kLengths = {0,    1,    2,     31,    32,    33,    63,    255,   2047,
                                       2048, 2049, 16383, 16384, 16385, 40000, 70001, 12345, 6};

std::vector<cpu::Isa> instruction_sets() {
  std::vector<cpu::Isa> found{cpu::Isa::baseline};
#if OPTIM_EXT_X86_ISAS
  if (__builtin_cpu_supports("avx2")) found.push_back(cpu::Isa::avx2);
  if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")) found.push_back(cpu::Isa::avx512);
#endif
  return found;
}

template <class Reduction>
std::vector<double> slots_of(const std::vector<const Bundle*>& bundles, cpu::Isa isa) {
  std::vector<double> slots;
  for (const Bundle* bundle : bundles) {
    const size_t first = slots.size();
    slots.resize(first + reduce_chunks(bundle->numel) * kReduceSlots, 0.0);
    for (int64_t from = 0, slot = 0; from < bundle->numel; from += kReduceTile, ++slot) {
      slots[first + slot] = cpu::reduce_for<Reduction>(isa)(*bundle, from, std::min(bundle->numel, from + kReduceTile));
    }
  }
  return slots;
}

// What the kernel does with its lanes' results by shuffles.
template <class Rule>
double combined(std::vector<double> lane) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) lane[l] = Rule::combine(lane[l], lane[l + width]);
  }
  return lane[0];
}

// The slots as the CUDA blocks fill them, and what its last block makes of them.
template <class Reduction>
std::vector<double> slots_on_host(const std::vector<const Bundle*>& bundles) {
  using Job = cuda::ReduceJob<Reduction>;
  const auto shape = cuda::fitting<Job>(bundles.data(), static_cast<int64_t>(bundles.size()), INT64_MAX);
  std::vector<unsigned char> table(shape.bytes());
  cuda::Batch<Job> batch{};
  batch.chunk = kReduceChunk;
  batch.count = static_cast<int32_t>(shape.count);
  const int64_t chunks = cuda::fill_table(bundles.data(), shape, batch.chunk, table.data());
  std::vector<double> slots;
  for (int64_t index = 0; index < chunks; ++index) {
    cuda::Block<Job> block;
    cuda::open_block(batch, table.data(), index, block);
    for (int tile = 0; tile < kReduceSlots; ++tile) {
      std::vector<double> lane;
      for (int l = 0; l < kLanes; ++l) lane.push_back(cuda::reduce_thread(block, tile, l));
      slots.push_back(combined<Reduction>(lane));
    }
  }
  return slots;
}

template <class Reduction>
double slots_reduced_on_host(const std::vector<double>& slots) {
  double result = 0.0;
  for (size_t start = 0; start < slots.size(); start += kReduceTile) {
    const int64_t size = std::min<int64_t>(kReduceTile, slots.size() - start);
    std::vector<double> lane;
    for (int l = 0; l < kLanes; ++l) {
      lane.push_back(
          cuda::reduce_lane<rules::Combined<Reduction>>(size, l, [&](int64_t i) { return slots[start + i]; }));
    }
    result = Reduction::combine(result, combined<Reduction>(lane));
  }
  return result;
}

bool same_bits(double a, double b) { return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b)); }

// Element i as the walk meets it.
double element(const Bundle& bundle, int64_t i) {
  return load_element<double>(bundle.data[0], bundle.storage[0], bundle.layout ? bundle.layout->offset(0, i) : i);
}

template <class Reduction>
void test_reduction(const char* name) {
  Random random{5};
  for (const double special : {0.0, static_cast<double>(INFINITY), static_cast<double>(NAN)}) {
    std::vector<Case> cases;
    for (size_t i = 0; i < kLengths.size(); ++i) {
      const auto storage = static_cast<Storage>(i % 4);
      cases.push_back(make_case<Reduction>(kLengths[i], {storage}, i % 5 == 4 && kLengths[i] > 0, random));
    }
    if (special != 0.0) store_element<double>(cases[14].ready().data[0], cases[14].bundle.storage[0], 3, special);
    std::vector<const Bundle*> bundles;
    long double expected = 0.0L;
    for (Case& of : cases) {
      const Bundle& bundle = of.ready();
      bundles.push_back(&bundle);
      for (int64_t i = 0; i < bundle.numel; ++i) {
        const double term = Reduction::term(element(bundle, i));
        expected = Reduction::combine(1.0, 1.0) == 2.0
                       ? expected + term
                       : static_cast<long double>(rules::larger<double>(expected, term));
      }
    }
    const std::vector<double> baseline = slots_of<Reduction>(bundles, cpu::Isa::baseline);
    const double total = reduce_slots<Reduction>(baseline.data(), static_cast<int64_t>(baseline.size()));
    const bool close = std::isfinite(static_cast<double>(expected))
                           ? std::abs(total - static_cast<double>(expected)) <= 1e-14 * static_cast<double>(expected)
                           : same_bits(total, static_cast<double>(expected));
    check(close, "%s: %.17g instead of %.17Lg", name, total, expected);
    for (const cpu::Isa isa : instruction_sets()) {
      const std::vector<double> slots = slots_of<Reduction>(bundles, isa);
      check(slots.size() == baseline.size() && std::equal(slots.begin(), slots.end(), baseline.begin(), same_bits),
            "%s: instruction set %d differs from the baseline", name, static_cast<int>(isa));
    }
    const std::vector<double> on_host = slots_on_host<Reduction>(bundles);
    check(on_host.size() == baseline.size() && std::equal(on_host.begin(), on_host.end(), baseline.begin(), same_bits),
          "%s: the CUDA blocks fill their slots differently", name);
    check(same_bits(slots_reduced_on_host<Reduction>(on_host), total), "%s: the last CUDA block differs", name);
  }
}

// More slots than one tile of them: 2048 chunks and some.
void test_many_slots() {
  std::vector<double> slots(2 * kReduceTile + 77);
  Random random{3};
  long double expected = 0.0L;
  for (double& slot : slots) expected += slot = random.uniform(0.0, 1.0);
  const double got = reduce_slots<rules::L2Norm>(slots.data(), static_cast<int64_t>(slots.size()));
  check(std::abs(got - static_cast<double>(expected)) <= 1e-14 * got, "sum of slots %.17g", got);
  check(same_bits(got, slots_reduced_on_host<rules::L2Norm>(slots)), "the last CUDA block differs on many slots");
}

void test_verdicts() {
  rules::NormPolicy policy{};
  policy.in_double = true;
  const double inf = INFINITY, nan = NAN;
  const auto judged = [&](double norm, double scale = 1.0, bool found = false) {
    return rules::judge(policy, norm, scale, found);
  };
  check(judged(3.0).grad_factor == 1.0 && !judged(nan).skip && judged(3.0, 1.0, true).skip, "no policy");
  check(judged(8.0, 4.0).norm == 2.0, "the norm is that of unscaled gradients");
  policy.clips = true;
  policy.max_norm = 1.5;
  check(judged(3.0).grad_factor == 1.5 / (3.0 + 1e-6) && judged(1.0).grad_factor == 1.0, "clipping");
  check(judged(12.0, 4.0).grad_factor == 1.5 / (3.0 + 1e-6), "clipping of scaled gradients");
  check(judged(inf).grad_factor == 0.0 && std::isnan(judged(nan).grad_factor),
        "as torch's for a norm that is not finite");
  policy.skips_above = true;
  policy.skip_above = 4.0;
  check(!judged(4.0).skip && judged(4.0001).skip && judged(inf).skip && judged(nan).skip, "skip_above");
  policy.skips_above = false;
  policy.skips_nonfinite = true;
  check(!judged(1e300).skip && judged(inf).skip && judged(-inf).skip && judged(nan).skip, "skip_nonfinite");
  policy.in_double = false;
  check(judged(1e300).skip && judged(0.1).norm == static_cast<double>(0.1f),
        "what counts is the norm as it is reported");
}

}  // namespace

int main() {
#define OPTIM_EXT_TEST(rule) test_reduction<rules::rule>(#rule);
  OPTIM_EXT_FOR_EACH_REDUCTION(OPTIM_EXT_TEST)
  test_many_slots();
  test_verdicts();
  return verdict();
}
