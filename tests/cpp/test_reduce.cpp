// Reductions: the same bits for every instruction set and from the CUDA threads run on the host, and the right value.
#include <algorithm>
#include <array>
#include <vector>

#include "isas.h"
#include "kernels/cuda/reduce_block.h"
#include "kernels/cuda/table.h"
#include "reduce_cases.h"
#include "rules/reductions.h"

using namespace optim_ext;

namespace {

// Around the width of a row of lanes, of a tile and of a chunk, and several chunks.
const std::vector<int64_t> kLengths = {0,    1,    2,     31,    32,    33,    63,    255,   2047,
                                       2048, 2049, 16383, 16384, 16385, 40000, 70001, 12345, 6};

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
  const auto shape =
      cuda::fitting(cuda::shape_of<Job>(), bundles.data(), static_cast<int64_t>(bundles.size()), INT64_MAX);
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

// What element i contributes, as the walk meets it.
template <class Reduction>
double term(const Bundle& bundle, int64_t i) {
  const auto element = [&](int k) {
    if (!((Reduction::kUsed >> k) & 1u)) return 0.0;
    return load_element<double>(bundle.data[k], bundle.storage[k], bundle.layout ? bundle.layout->offset(k, i) : i);
  };
  return [&]<int... K>(std::integer_sequence<int, K...>) {
    return Reduction::term(element(K)...);
  }(std::make_integer_sequence<int, Reduction::kOperands>{});
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
        const double found = term<Reduction>(bundle, i);
        expected = Reduction::combine(1.0, 1.0) == 2.0
                       ? expected + found
                       : static_cast<long double>(rules::larger<double>(expected, found));
      }
    }
    const std::vector<double> baseline = slots_of<Reduction>(bundles, cpu::Isa::baseline);
    const double total = reduce_slots<Reduction>(baseline.data(), static_cast<int64_t>(baseline.size()));
    const bool close = std::isfinite(static_cast<double>(expected))
                           ? std::abs(total - static_cast<double>(expected)) <= 1e-14 * static_cast<double>(expected)
                           : same_bits(total, static_cast<double>(expected));
    check(close, "%s: %.17g instead of %.17Lg", name, total, expected);
    for (const auto& [isa_name, isa] : isas()) {
      const std::vector<double> slots = slots_of<Reduction>(bundles, isa);
      check(slots.size() == baseline.size() && std::equal(slots.begin(), slots.end(), baseline.begin(), same_bits),
            "%s: %s differs from the baseline", name, isa_name);
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

// Fibers of every kind: side by side or not, short, of several pieces, and more of them than are taken together.
template <class Reduction>
void test_fibers(const char* name) {
  Random random{7};
  const std::vector<std::array<int64_t, 3>> sizes = {
      {1, 1, 1},   {3, 5, 1},   {4, 31, 1},   {4, 32, 1},   {2, 300, 1},    {1, 3000, 1}, {5, 3, 3},
      {2, 7, 100}, {1, 256, 9}, {2, 257, 33}, {1, 2, 1025}, {1, 600, 1030}, {9, 1, 4}};
  std::vector<Case> inputs;
  std::vector<std::vector<double>> on_cpu, on_host;
  std::vector<Layout> layouts(sizes.size());
  std::vector<Bundle> made(sizes.size());
  std::vector<const Bundle*> bundles;
  std::vector<Fibers> tensors;
  for (size_t t = 0; t < sizes.size(); ++t) {
    const auto [outer, along, inner] = sizes[t];
    inputs.push_back(make_case<Reduction>(outer * along * inner, {static_cast<Storage>(t % 4)}, false, random));
    const Bundle& input = inputs[t].bundle;
    Fibers fibers{input.data[0], input.storage[0], outer, along, inner, t % 2 ? 3.0 : 1.0, nullptr};
    const size_t results = outer * fibers.pieces() * inner;
    on_cpu.emplace_back(results, -1.0);
    on_host.emplace_back(results, -1.0);
    for (const auto& [isa_name, isa] : isas()) {
      std::vector<double> got(results, -1.0);
      fibers.results = got.data();
      const int64_t half = fibers.units() / 2;
      cpu::reduce_fibers_for<Reduction>(isa)(fibers, half, fibers.units());
      cpu::reduce_fibers_for<Reduction>(isa)(fibers, 0, half);
      if (isa == cpu::Isa::baseline) on_cpu[t] = got;
      check(std::equal(got.begin(), got.end(), on_cpu[t].begin(), same_bits), "%s: fibers %zu on %s", name, t,
            isa_name);
    }
    for (int64_t result = 0; result < static_cast<int64_t>(results); ++result) {
      const int64_t i = result % inner, piece = result / inner % fibers.pieces(), o = result / inner / fibers.pieces();
      long double expected = 0.0L;
      for (int64_t a = 0; a < fibers.size_of(piece); ++a) {
        expected += term<Reduction>(input, (o * along + piece * kFiberPiece + a) * inner + i);
      }
      const double right = static_cast<double>(expected / fibers.divisor);
      check(std::abs(on_cpu[t][result] - right) <= 1e-13 * (std::abs(right) + 1.0), "%s: fiber %zu, result %ld: %.17g",
            name, t, static_cast<long>(result), on_cpu[t][result]);
    }
    fibers.results = on_host[t].data();
    made[t] = cuda::bundle_of(fibers, layouts[t]);
    bundles.push_back(&made[t]);
  }
  using Job = cuda::FiberJob<Reduction>;
  const auto shape =
      cuda::fitting(cuda::shape_of<Job>(), bundles.data(), static_cast<int64_t>(bundles.size()), INT64_MAX);
  std::vector<unsigned char> table(shape.bytes());
  cuda::Batch<Job> batch{};
  batch.chunk = cuda::kMinChunk;
  batch.count = static_cast<int32_t>(shape.count);
  const int64_t chunks = cuda::fill_table(bundles.data(), shape, batch.chunk, table.data());
  for (int64_t index = 0; index < chunks; ++index) {
    cuda::Block<Job> block;
    cuda::open_block(batch, table.data(), index, block);
    const Fibers fibers = cuda::fibers_of(block);
    for (int64_t thread = block.begin; thread < block.begin + block.size;) {
      if (!fibers.by_lanes()) {
        fibers.results[thread] = cuda::reduce_fiber<Reduction>(fibers, thread) / fibers.divisor;
        ++thread;
        continue;
      }
      std::vector<double> lane;
      for (int l = 0; l < kLanes; ++l) lane.push_back(cuda::reduce_fiber<Reduction>(fibers, thread + l));
      fibers.results[thread / kLanes] = combined<Reduction>(lane) / fibers.divisor;
      thread += kLanes;
    }
  }
  for (size_t t = 0; t < sizes.size(); ++t) {
    check(std::equal(on_cpu[t].begin(), on_cpu[t].end(), on_host[t].begin(), same_bits),
          "%s: the CUDA threads reduce fibers %zu differently", name, t);
  }
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
#define OPTIM_EXT_TEST(...) test_reduction<rules::__VA_ARGS__>(#__VA_ARGS__);
  OPTIM_EXT_FOR_EACH_REDUCTION(OPTIM_EXT_TEST)
#undef OPTIM_EXT_TEST
#define OPTIM_EXT_TEST(...) test_fibers<rules::__VA_ARGS__>(#__VA_ARGS__);
  OPTIM_EXT_FOR_EACH_FIBER_REDUCTION(OPTIM_EXT_TEST)
  test_many_slots();
  test_verdicts();
  return verdict();
}
