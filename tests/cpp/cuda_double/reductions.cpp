// Every reduction, of whole tensors and along one dimension, against the CPU's, bit by bit.
#include <algorithm>
#include <array>
#include <string>

#include "place.h"
#include "rules/all_rules.h"

namespace optim_ext {

namespace {

// Around a warp, a tile and a chunk.
const std::vector<int64_t> kLengths = {0, 1, 33, 255, 2048, 16383, 16384, 16385, 40000, 6, 0};

// What the CPU makes of the tensors.
template <class Reduction>
struct OnCpu {
  std::vector<double> each;
  double all;

  explicit OnCpu(const std::vector<Bundle>& bundles) {
    std::vector<double> slots;
    double count = 0.0;
    for (const Bundle& bundle : bundles) {
      const size_t first = slots.size();
      slots.resize(first + reduce_chunks(bundle.numel) * kReduceSlots, 0.0);
      for (int64_t from = 0, slot = 0; from < bundle.numel; from += kReduceTile, ++slot) {
        const int64_t to = std::min(bundle.numel, from + kReduceTile);
        slots[first + slot] = cpu::reduce_for<Reduction>(kIsa)(bundle, from, to);
      }
      const double sum = reduce_slots<Reduction>(slots.data() + first, static_cast<int64_t>(slots.size() - first));
      each.push_back(Reduction::finish(sum, static_cast<double>(bundle.numel)));
      count += static_cast<double>(bundle.numel);
    }
    all = Reduction::finish(reduce_slots<Reduction>(slots.data(), static_cast<int64_t>(slots.size())), count);
  }
};

template <class Reduction>
void compare(const std::string& what, const DoublePlace& place, const DoubleCall& call) {
  const char* const name = what.c_str();
  const OnCpu<Reduction> expected(call.bundles);
  const cuda::Driver driver(place);
  std::vector<double> each(call.bundles.size(), -1.0);
  driver.template reduce_each<Reduction>(call, each.data());
  for (size_t i = 0; i < each.size(); ++i) {
    check(same_bits(each[i], expected.each[i]), "%s of tensor %zu is %.17g, expected %.17g", name, i, each[i],
          expected.each[i]);
  }
  for (const float found_inf : {0.0f, 1.0f}) {
    double norm = -1.0, factor = -1.0;
    float skip = -1.0f;
    int64_t skips = 5;
    NormOutcome outcome{};
    outcome.policy.in_double = true;
    outcome.found_inf = &found_inf;
    outcome.norm = &norm;
    outcome.grad_factor = &factor;
    outcome.skip = &skip;
    outcome.skips = &skips;
    const rules::NormVerdict verdict = rules::judge(outcome.policy, expected.all, 1.0, found_inf == 1.0f);
    driver.template reduce_all<Reduction>(call, outcome);
    check(same_bits(norm, verdict.norm), "%s of all is %.17g, expected %.17g", name, norm, verdict.norm);
    check(same_bits(factor, verdict.grad_factor) && (skip == 1.0f) == verdict.skip && skips == 5 + verdict.skip,
          "what %s comes to: factor %g, skip %g, %ld skips", name, factor, skip, static_cast<long>(skips));
  }
}

// Which tensors a call is given, and how it is made.
struct Scene {
  const char* name;
  uint64_t seed;
  bool many;  // too many for one launch's arguments
  bool capturing = false, races = false;
};

constexpr Scene kScenes[] = {{.name = "few tensors", .seed = 1, .many = false, .races = true},
                             {.name = "many tensors", .seed = 2, .many = true},
                             {.name = "few tensors of other types", .seed = 3, .many = false},
                             {.name = "many tensors, captured", .seed = 4, .many = true, .capturing = true}};

Storage any_storage(Random& random) { return static_cast<Storage>(random.below(4)); }

template <class Reduction>
void test_reduction(const char* name) {
  for (const Scene& scene : kScenes) {
    Random random{scene.seed};
    std::vector<int64_t> lengths = kLengths;
    if (scene.many) {
      lengths.resize(80);
      for (int64_t& length : lengths) length = random.below(9) * 30;
    }
    std::vector<Case> cases;
    for (const int64_t numel : lengths) {
      const bool strided = scene.many != random.one_in(4) && numel > 0;
      cases.push_back(make_case<Reduction>(numel, {any_storage(random), any_storage(random)}, strided, random));
    }
    DoubleCall call;
    for (Case& made : cases) call.bundles.push_back(made.ready());
    DoublePlace place;
    place.capturing = scene.capturing;
    device::set_seed(scene.seed);
    find_races(scene.races);
    compare<Reduction>(std::string(name) + " of " + scene.name, place, call);
  }
}

// So many slots that a block takes several rounds to add them up.
void test_many_slots() {
  constexpr int64_t kTensors = 2060;
  static_assert(kTensors * kReduceSlots > kReduceTile * kReduceSlots);
  std::vector<float> numbers(kTensors);
  Random random{31};
  DoubleCall call;
  for (float& number : numbers) {
    number = static_cast<float>(random.uniform(0.5, 2.0));
    Bundle bundle{};
    bundle.data[0] = &number;
    bundle.storage[0] = Storage::f32;
    bundle.numel = 1;
    call.bundles.push_back(bundle);
  }
  const double expected = OnCpu<rules::L2Norm>(call.bundles).all;
  device::set_seed(2);
  find_races(false);
  float norm = -1.0f, skip = -1.0f;
  double factor = -1.0;
  NormOutcome outcome{};
  outcome.norm = &norm;
  outcome.grad_factor = &factor;
  outcome.skip = &skip;
  cuda::Driver(DoublePlace{}).reduce_all<rules::L2Norm>(call, outcome);
  check(norm == static_cast<float>(expected), "the norm of many tensors is %.9g, expected %.9g", norm, expected);
}

// The same number of slots, of one tensor, and the race detector: one block instead of thousands.
void test_rounds() {
  constexpr int32_t kChunks = 2060;
  std::vector<double> slots(kChunks * kReduceSlots);
  Random random{37};
  for (double& slot : slots) slot = random.uniform(0.5, 2.0);
  Bundle bundle{};
  bundle.numel = kChunks * kReduceChunk;
  const Bundle* const only = &bundle;
  using Job = cuda::ReduceJob<rules::L2Norm>;
  const auto args = std::make_unique<cuda::Args<Job, cuda::kArgumentBytes>>();
  args->batch = {};
  args->batch.chunk = kReduceChunk;
  args->batch.count = 1;
  const auto shape = cuda::fitting(cuda::shape_of<Job>(), &only, 1, args->kRoom);
  check(cuda::fill_table(&only, shape, kReduceChunk, args->room) == kChunks, "a tensor has another number of chunks");
  double result = -1.0;
  args->batch.rule.slots = slots.data();
  args->batch.rule.each = &result;
  args->batch.rule.chunks = kChunks;
  device::set_seed(3);
  find_races(true);
  DoublePlace::check(cuda::launch_finish_each<rules::L2Norm>(*args, nullptr));
  const double sum = reduce_slots<rules::L2Norm>(slots.data(), static_cast<int64_t>(slots.size()));
  check(same_bits(result, rules::L2Norm::finish(sum, 1.0)), "the norm of a long tensor is %.17g", result);
}

// Fibers of every shape the two walks take, in every storage.
template <class Reduction>
void test_fiber_reduction(const char* name) {
  const std::vector<std::array<int64_t, 3>> sizes = {{1, 1, 1},    {3, 5, 1},    {4, 31, 1},  {4, 32, 1},  {2, 300, 1},
                                                     {1, 3000, 1}, {5, 3, 3},    {2, 7, 100}, {70, 33, 1}, {1, 256, 9},
                                                     {2, 257, 33}, {1, 2, 1025}, {9, 1, 4}};
  for (const Scene& scene : kScenes) {
    Random random{scene.seed};
    const size_t tensors = scene.many ? 100 : sizes.size();
    std::vector<Case> inputs;
    std::vector<std::vector<double>> expected(tensors), got(tensors);
    std::vector<Fibers> fibers;
    for (size_t t = 0; t < tensors; ++t) {
      const auto [outer, along, inner] = sizes[t % sizes.size()];
      inputs.push_back(make_case<Reduction>(outer * along * inner, {any_storage(random)}, false, random));
      const Bundle& input = inputs[t].bundle;
      Fibers of{input.data[0], input.storage[0], outer, along, inner, random.one_in(2) ? 3.0 : 1.0, nullptr};
      expected[t].assign(static_cast<size_t>(outer * of.pieces() * inner), -1.0);
      got[t] = expected[t];
      of.results = expected[t].data();
      cpu::reduce_fibers_for<Reduction>(kIsa)(of, 0, of.units());
      of.results = got[t].data();
      fibers.push_back(of);
    }
    DoublePlace place;
    place.capturing = scene.capturing;
    device::set_seed(scene.seed);
    find_races(scene.races);
    cuda::Driver(place).template reduce_fibers<Reduction>(fibers);
    for (size_t t = 0; t < tensors; ++t) {
      check(std::equal(expected[t].begin(), expected[t].end(), got[t].begin(), same_bits),
            "%s of fibers, %s, tensor %zu", name, scene.name, t);
    }
  }
}

}  // namespace

void test_reductions() {
  test_rounds();
#define OPTIM_EXT_TEST(...) test_reduction<rules::__VA_ARGS__>(#__VA_ARGS__);
  OPTIM_EXT_FOR_EACH_REDUCTION(OPTIM_EXT_TEST)
#undef OPTIM_EXT_TEST
  test_many_slots();
}

void test_fibers() {
#define OPTIM_EXT_TEST(...) test_fiber_reduction<rules::__VA_ARGS__>(#__VA_ARGS__);
  OPTIM_EXT_FOR_EACH_FIBER_REDUCTION(OPTIM_EXT_TEST)
}

}  // namespace optim_ext
