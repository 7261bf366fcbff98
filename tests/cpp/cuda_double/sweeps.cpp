// Every rule: calls of many tensors through the driver, tables, kernels and fibers, against the CPU sweep, byte by
// byte.
#include <array>

#include "place.h"
#include "rules/all_rules.h"

namespace optim_ext {

namespace {

// Around the width of an access, of a block and of a chunk.
const std::vector<int64_t> kLengths = {1,   2,   3,   0,    8,    9,    31,   33,   255,  256,  257, 300,
                                       600, 513, 520, 1025, 2047, 2048, 2049, 4097, 6144, 8200, 0,   64};
// More than a launch has room for.
constexpr size_t kMany = 130;

// How a call's table travels.
enum class Travel { arguments, many_arguments, device_memory };

// What a call is given; between them the scenes have everything in more than one company.
struct Scene {
  const char* name;
  Travel travel;
  unsigned switches;         // the rule's, a bit each
  int zero;                  // which of its numbers is zero; -1: none. The first, lr, never is.
  bool live_number = false;  // the first is read on the device
  bool may_skip = false;     // found_inf is given, and 0
  bool scaled = false, clipped = false;
  bool averaged = false;
  double average_weight = 0.7;
  bool live_weight = false;
  bool counts_on_device = false;
  bool races = false;  // are looked for
};

constexpr Scene kScenes[] = {
    {.name = "nothing but averages",
     .travel = Travel::arguments,
     .switches = 0,
     .zero = -1,
     .averaged = true,
     .average_weight = 1.0},
    {.name = "a live rate, clipped",
     .travel = Travel::many_arguments,
     .switches = 1,
     .zero = 1,
     .live_number = true,
     .may_skip = true,
     .clipped = true,
     .counts_on_device = true},
    {.name = "scaled, live averages",
     .travel = Travel::device_memory,
     .switches = 2,
     .zero = 2,
     .scaled = true,
     .averaged = true,
     .live_weight = true,
     .counts_on_device = true},
    {.name = "a live rate, scaled",
     .travel = Travel::arguments,
     .switches = 3,
     .zero = 3,
     .live_number = true,
     .scaled = true,
     .counts_on_device = true},
    {.name = "many averages that may be skipped",
     .travel = Travel::many_arguments,
     .switches = 4,
     .zero = 4,
     .may_skip = true,
     .averaged = true},
    {.name = "many tensors, a live rate, clipped",
     .travel = Travel::device_memory,
     .switches = 5,
     .zero = 5,
     .live_number = true,
     .clipped = true,
     .counts_on_device = true},
    {.name = "scaled, live averages of every length",
     .travel = Travel::arguments,
     .switches = 6,
     .zero = -1,
     .scaled = true,
     .averaged = true,
     .live_weight = true,
     .counts_on_device = true,
     .races = true},
    {.name = "many tensors, all switches, scaled",
     .travel = Travel::many_arguments,
     .switches = 7,
     .zero = 1,
     .live_number = true,
     .may_skip = true,
     .scaled = true,
     .counts_on_device = true},
};

// Where the step and the other numbers of a tensor's state live, and in which type.
enum class Home { host, device_float, device_double };

// What one tensor of a call is.
struct Member {
  Storages storages;
  Storage average_storage;
  bool strided, aligned;
  bool average_strided, average_aligned;
  bool averaged;
  Home home;
  double step;
  bool behind;  // by this step, where the call does not count on the device
};

// The state of one tensor outside of its operands: on the host, in float or in double on the device.
struct Numbers {
  float single_step;
  double double_step;
  std::array<float, kMaxScalars> single_scalars;
  std::array<double, kMaxScalars> double_scalars;
  std::array<rules::Scalar, kMaxScalars> expected;
  double expected_step;
};

bool any_double(const Case& made, unsigned used) {
  bool any = false;
  for (size_t k = 0; k < made.operands.size(); ++k) any |= ((used >> k) & 1u) && made.bundle.storage[k] == Storage::f64;
  return any;
}

template <class Rule>
void sweep_on_cpu(const Rule& rule, const Bundle& bundle, const Pass& pass) {
  if (bundle.in_double) {
    cpu::sweep_for<Rule, double>(kIsa)(rule, bundle, 0, bundle.numel, pass);
  } else {
    cpu::sweep_for<Rule, float>(kIsa)(rule, bundle, 0, bundle.numel, pass);
  }
}

// A running average of the parameter that `param` holds: dense like it, or only to be walked.
Case make_average(const Case& param, Storage storage, bool aligned, bool strided, Random& random) {
  const int64_t numel = param.bundle.numel;
  strided = (strided && numel > 0) || param.layout.ndim > 0;
  Case made = make_case<rules::Average>(numel, {storage}, strided, random, aligned);
  made.operands.pop_back();
  if (made.layout.ndim > 0) {
    int64_t stride = 1;
    for (int d = 2; d >= 0; --d) {
      made.layout.strides[1][d] = param.layout.ndim > 0 ? param.layout.strides[0][d] : stride;
      stride *= made.layout.sizes[d];
    }
  }
  return made;
}

const Bundle& follow(Case& average, const Bundle& param) {
  average.bundle.data[1] = param.data[0];
  average.bundle.storage[1] = param.storage[0];
  average.bundle.in_double = average.bundle.storage[0] == Storage::f64 || param.storage[0] == Storage::f64;
  return average.ready();
}

const std::vector<Storages>& mixes() {
  using enum Storage;
  static const std::vector<Storages> all = {{f32},
                                            {bf16},
                                            {f64},
                                            {f16},
                                            {bf16, bf16, f32},
                                            {f64, f32, f64},
                                            {f32, f16, bf16, f32, f16},
                                            {f32, f64, bf16, f16, f64}};
  return all;
}

template <class Rule>
class Sweeps {
 public:
  Sweeps(const char* name, const Scene& scene, uint64_t seed) : name_(name), scene_(scene), random_{seed} {
    if (scene.travel == Travel::arguments) {
      lengths_ = kLengths;
    } else {
      lengths_.resize(kMany);
      for (int64_t& length : lengths_) length = random_.one_in(40) ? 2100 : random_.below(11) * 3;
    }
    rule_ = filled<Rule>(scene.switches, scene.zero, random_);
    place_.capturing = scene.travel == Travel::many_arguments;
    device::set_seed(seed);
  }

  void run() {
    choose_pass();
    for (size_t i = 0; i < lengths_.size(); ++i) make_tensor(i);
    numbers_.resize(lengths_.size());
    for (size_t i = 0; i < lengths_.size(); ++i) step_on_cpu(i);
    for (size_t i = 0; i < lengths_.size(); ++i) bundle_for_device(i);
    find_races(scene_.races);
    const long uploads = DoublePlace::uploads, launches = DoublePlace::launches + call_.steps_on_device;
    const cuda::Driver driver(place_);
    driver.run(given_rule_, call_);
    check((DoublePlace::uploads > uploads) == (scene_.travel == Travel::device_memory) &&
              (DoublePlace::launches - launches > 2) == (scene_.travel == Travel::many_arguments),
          "%s, %s: %ld tables sent, %ld launches", name_, scene_.name, DoublePlace::uploads - uploads,
          DoublePlace::launches - launches);
    compare("a step");
    // Skipped: nothing changes once more.
    const float skip = 1.0f;
    call_.pass.on_device.found_inf = &skip;
    driver.run(given_rule_, call_);
    compare("a skipped step");
  }

 private:
  static constexpr int kScalars = rules::kScalarsOf<Rule>;
  static constexpr bool kHasHypers = sizeof(Rule) >= sizeof(double);

  void choose_pass() {
    given_rule_ = rule_;
    if constexpr (kHasHypers) {  // the first field is replaced on the device
      if (scene_.live_number) {
        const double live = live_;
        std::memcpy(static_cast<void*>(&rule_), &live, sizeof live);
        std::memset(static_cast<void*>(&given_rule_), 0, sizeof(double));
        call_.device_hypers.push_back({0, &live_, Storage::f32});
      }
    }
    Pass& pass = call_.pass;
    if (scene_.may_skip) pass.on_device.found_inf = &zero_;
    if (scene_.scaled) pass.on_device.grad_scale = &scale_;
    if (scene_.clipped) pass.on_device.grad_factor = &factor_;
    pass.average_weight = scene_.average_weight;
    if (scene_.live_weight) pass.on_device.average_weight = &weight_;
    call_.steps_on_device = scene_.counts_on_device;
    cpu_pass_.unscale = pass.on_device.grad_scale != nullptr;
    cpu_pass_.grad_scale = scale_;
    if (pass.on_device.grad_factor) cpu_pass_.grad_factor = factor_;
  }

  Member draw_member(int64_t length) {
    Member member;
    member.storages = mixes()[random_.below(static_cast<int64_t>(mixes().size()))];
    member.average_storage = static_cast<Storage>(random_.below(4));
    // Layouts are what fills a table.
    member.strided = (scene_.travel == Travel::arguments) == random_.one_in(4) && length > 0;
    member.aligned = !random_.one_in(3);
    member.average_strided = random_.one_in(6);
    member.average_aligned = !random_.one_in(5);
    member.averaged = cuda::kCanAverage<Rule> && scene_.averaged && !random_.one_in(7);
    member.home = static_cast<Home>(random_.below(3));
    member.step = 2.0 + static_cast<double>(random_.below(5));
    member.behind = random_.one_in(2);
    return member;
  }

  void make_tensor(size_t i) {
    members_.push_back(draw_member(lengths_[i]));
    const Member& member = members_[i];
    start_.push_back(make_case<Rule>(lengths_[i], member.storages, member.strided, random_, member.aligned));
    start_[i].bundle.step = member.step;
    start_[i].bundle.in_double = any_double(start_[i], Rule::kUsed);
    average_start_.push_back(
        make_average(start_[i], member.average_storage, member.average_aligned, member.average_strided, random_));
    expected_.push_back(start_[i].clone());
    got_.push_back(start_[i].clone());
    average_expected_.push_back(average_start_[i].clone());
    average_got_.push_back(average_start_[i].clone());
  }

  void step_on_cpu(size_t i) {
    const Bundle& bundle = expected_[i].ready();
    Numbers& numbers = numbers_[i];
    numbers.expected = scalars_before(members_[i].home == Home::device_double);
    for (int k = 0; k < kScalars; ++k) {
      numbers.single_scalars[k] = static_cast<float>(numbers.double_scalars[k] = numbers.expected[k].value);
    }
    const Rule ready = at_step(rule_, bundle.step, numbers.expected);
    sweep_on_cpu(ready, bundle, cpu_pass_);
    const Bundle& average = follow(average_expected_[i], bundle);
    if (!members_[i].averaged) return;
    const rules::Average averaging{call_.pass.on_device.average_weight ? weight_ : call_.pass.average_weight};
    sweep_on_cpu(averaging, average, Pass{});
  }

  void bundle_for_device(size_t i) {
    Bundle& there = got_[i].bundle;
    Numbers& numbers = numbers_[i];
    const Member& member = members_[i];
    const bool single = member.home == Home::device_float, twice = member.home == Home::device_double;
    for (int k = 0; k < kScalars; ++k) {
      ScalarState& scalar = there.scalars[k];
      scalar.value = member.home == Home::host ? numbers.double_scalars[k] : -1.0;
      scalar.storage = twice ? Storage::f64 : Storage::f32;
      if (single) scalar.device = &numbers.single_scalars[k];
      if (twice) scalar.device = &numbers.double_scalars[k];
    }
    if (member.home != Home::host) {  // the step lives on the device, where this call counts it, or a later one will
      const double ahead = call_.steps_on_device || member.behind ? 1.0 : 0.0;
      numbers.single_step = static_cast<float>(numbers.double_step = there.step - ahead);
      numbers.expected_step = call_.steps_on_device ? there.step : there.step - ahead;
      there.step_storage = single ? Storage::f32 : Storage::f64;
      there.device_step = single ? static_cast<const void*>(&numbers.single_step) : &numbers.double_step;
      there.step = call_.steps_on_device ? 0.0 : ahead;
    }
    if (member.averaged) there.average = &follow(average_got_[i], there);
    call_.bundles.push_back(got_[i].ready());
  }

  void compare(const char* what) {
    for (size_t i = 0; i < lengths_.size(); ++i) {
      int operand = -1;
      int64_t element = -1;
      check(lengths_[i] < 8 || !same(start_[i], got_[i], &operand, &element), "%s, %s: %s leaves tensor %zu as it is",
            name_, scene_.name, what, i);
      check(same(expected_[i], got_[i], &operand, &element), "%s, %s, %s, tensor %zu of %ld: operand %d, element %ld",
            name_, scene_.name, what, i, static_cast<long>(lengths_[i]), operand, static_cast<long>(element));
      check(same(average_expected_[i], average_got_[i], &operand, &element),
            "%s, %s, %s, average %zu of %ld: element %ld", name_, scene_.name, what, i, static_cast<long>(lengths_[i]),
            static_cast<long>(element));
      compare_numbers(what, i);
    }
  }

  void compare_numbers(const char* what, size_t i) {
    if (members_[i].home == Home::host) return;
    const bool single = members_[i].home == Home::device_float;
    const Numbers& numbers = numbers_[i];
    const double step = single ? numbers.single_step : numbers.double_step;
    check(step == numbers.expected_step, "%s, %s, %s, tensor %zu: step %g, expected %g", name_, scene_.name, what, i,
          step, numbers.expected_step);
    for (int k = 0; k < kScalars; ++k) {
      const double found = single ? numbers.single_scalars[k] : numbers.double_scalars[k];
      const double value = numbers.expected[k].value, wanted = single ? static_cast<float>(value) : value;
      check(found == wanted, "%s, %s, %s, tensor %zu: scalar %d is %g, expected %g", name_, scene_.name, what, i, k,
            found, wanted);
    }
  }

  const char* name_;
  const Scene& scene_;
  Random random_;
  DoublePlace place_;
  std::vector<int64_t> lengths_;
  std::vector<Member> members_;
  Rule rule_, given_rule_;
  DoubleCall call_;
  Pass cpu_pass_;
  const float live_ = 0.375f, zero_ = 0.0f, scale_ = 3.0f, factor_ = 0.3f, weight_ = 0.25f;
  std::vector<Case> start_, expected_, got_, average_start_, average_expected_, average_got_;
  std::vector<Numbers> numbers_;
};

template <class Rule>
void test_rule(const char* name) {
  uint64_t seed = 13;
  for (const Scene& scene : kScenes) Sweeps<Rule>(name, scene, seed++).run();
}

// One counter may serve several parameters, and is then advanced for each of them; more counters than a launch takes.
void test_counters() {
  for (const float skip : {0.0f, 1.0f}) {
    std::vector<float> singles(3000, 4.0f);
    std::vector<double> doubles(3001, 6.0);
    DoubleCall call;
    call.pass.on_device.found_inf = &skip;
    for (size_t i = 0; i < 2 * singles.size() + doubles.size(); ++i) {
      Bundle bundle{};
      const bool single = i < 2 * singles.size();
      bundle.step_storage = single ? Storage::f32 : Storage::f64;
      bundle.device_step = single ? static_cast<void*>(&singles[i / 2]) : &doubles[i - 2 * singles.size()];
      call.bundles.push_back(bundle);
    }
    cuda::Driver(DoublePlace{}).advance_counters(call);
    const bool skipped = skip == 1.0f;
    for (const float count : singles) check(count == (skipped ? 4.0f : 6.0f), "a shared counter is %g", count);
    for (const double count : doubles) check(count == (skipped ? 6.0 : 7.0), "a counter is %g", count);
  }
}

}  // namespace

void test_sweeps() {
  test_counters();
#define OPTIM_EXT_TEST(...) test_rule<rules::__VA_ARGS__>(#__VA_ARGS__);
  OPTIM_EXT_FOR_EACH_RULE(OPTIM_EXT_TEST)
}

}  // namespace optim_ext
