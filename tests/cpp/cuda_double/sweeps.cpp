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
constexpr size_t kMany = 100;

// How a call's table travels.
enum class Travel { arguments, many_arguments, device_memory };

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
  Sweeps(const char* name, unsigned turn) : name_(name), turn_(turn), random_{13 + turn} {
    travel_ = static_cast<Travel>(turn % 3);
    if (travel_ == Travel::arguments) {
      lengths_ = kLengths;
    } else {
      for (size_t i = 0; i < kMany; ++i) lengths_.push_back(i % 41 == 7 ? 2100 : static_cast<int64_t>(i % 11) * 3);
    }
    rule_ = filled<Rule>(turn % 8, turn % 6 == 0 ? -1 : static_cast<int>(turn % 6), random_);  // lr is never zero
    place_.capturing = travel_ == Travel::many_arguments;
  }

  void run() {
    choose_pass();
    for (size_t i = 0; i < lengths_.size(); ++i) make_tensor(i);
    numbers_.resize(lengths_.size());
    for (size_t i = 0; i < lengths_.size(); ++i) step_on_cpu(i);
    for (size_t i = 0; i < lengths_.size(); ++i) bundle_for_device(i);
    device::set_seed(turn_ + 1);
    find_races(turn_ == 6);  // averaged, with all lengths
    const long uploads = DoublePlace::uploads, launches = DoublePlace::launches + call_.steps_on_device;
    const cuda::Driver driver(place_);
    driver.run(given_rule_, call_);
    check((DoublePlace::uploads > uploads) == (travel_ == Travel::device_memory) &&
              (DoublePlace::launches - launches > 2) == (travel_ == Travel::many_arguments),
          "%s, turn %u: %ld tables sent, %ld launches", name_, turn_, DoublePlace::uploads - uploads,
          DoublePlace::launches - launches);
    compare("a step");
    // Skipped: nothing changes once more.
    const float skip = 1.0f;
    call_.pass.device_found_inf = &skip;
    driver.run(given_rule_, call_);
    compare("a skipped step");
  }

 private:
  static constexpr int kScalars = rules::kScalarsOf<Rule>;
  static constexpr bool kHasHypers = sizeof(Rule) >= sizeof(double);

  void choose_pass() {
    given_rule_ = rule_;
    if constexpr (kHasHypers) {  // the first field is replaced on the device
      if (turn_ % 2 == 1) {
        const double live = live_;
        std::memcpy(static_cast<void*>(&rule_), &live, sizeof live);
        std::memset(static_cast<void*>(&given_rule_), 0, sizeof(double));
        call_.device_hypers.push_back({0, &live_, Storage::f32});
      }
    }
    Pass& pass = call_.pass;
    if (turn_ % 3 == 1) pass.device_found_inf = &zero_;
    if (turn_ % 4 >= 2) pass.device_grad_scale = &scale_;
    if (turn_ % 4 == 1) pass.device_grad_factor = &factor_;
    pass.average_weight = turn_ % 8 == 0 ? 1.0 : 0.7;
    if (turn_ % 4 == 2) pass.device_average_weight = &weight_;
    call_.steps_on_device = turn_ % 4 != 0;
    cpu_pass_.unscale = pass.device_grad_scale != nullptr;
    cpu_pass_.grad_scale = scale_;
    if (pass.device_grad_factor) cpu_pass_.grad_factor = factor_;
  }

  bool is_averaged(size_t i) const { return cuda::kCanAverage<Rule> && turn_ % 2 == 0 && i % 7 != 6; }

  void make_tensor(size_t i) {
    // Layouts are what fills a table.
    const bool strided = (travel_ == Travel::arguments ? i % 4 == 3 : i % 4 != 0) && lengths_[i] > 0;
    const Storages& storages = mixes()[(i + turn_ + i / mixes().size()) % mixes().size()];
    start_.push_back(make_case<Rule>(lengths_[i], storages, strided, random_, i % 3 != 2));
    start_[i].bundle.step = 2.0 + static_cast<double>(i % 5);
    start_[i].bundle.in_double = any_double(start_[i], Rule::kUsed);
    average_start_.push_back(
        make_average(start_[i], static_cast<Storage>((i + turn_) % 4), i % 5 != 4, i % 6 == 5, random_));
    expected_.push_back(start_[i].clone());
    got_.push_back(start_[i].clone());
    average_expected_.push_back(average_start_[i].clone());
    average_got_.push_back(average_start_[i].clone());
  }

  void step_on_cpu(size_t i) {
    const Bundle& bundle = expected_[i].ready();
    Numbers& numbers = numbers_[i];
    numbers.expected = scalars_before(i % 3 == 2);
    for (int k = 0; k < kScalars; ++k) {
      numbers.single_scalars[k] = static_cast<float>(numbers.double_scalars[k] = numbers.expected[k].value);
    }
    const Rule ready = at_step(rule_, bundle.step, numbers.expected);
    sweep_on_cpu(ready, bundle, cpu_pass_);
    const Bundle& average = follow(average_expected_[i], bundle);
    if (!is_averaged(i)) return;
    const rules::Average averaging{call_.pass.device_average_weight ? weight_ : call_.pass.average_weight};
    sweep_on_cpu(averaging, average, Pass{});
  }

  void bundle_for_device(size_t i) {
    Bundle& there = got_[i].bundle;
    Numbers& numbers = numbers_[i];
    for (int k = 0; k < kScalars; ++k) {
      ScalarState& scalar = there.scalars[k];
      scalar.value = i % 3 == 0 ? numbers.double_scalars[k] : -1.0;
      scalar.storage = i % 3 == 2 ? Storage::f64 : Storage::f32;
      if (i % 3 == 1) scalar.device = &numbers.single_scalars[k];
      if (i % 3 == 2) scalar.device = &numbers.double_scalars[k];
    }
    if (i % 3 != 0) {  // the step lives on the device, where this call counts it, or a later one will
      const double ahead = call_.steps_on_device ? 1.0 : i % 2 == 0 ? 1.0 : 0.0;
      numbers.single_step = static_cast<float>(numbers.double_step = there.step - ahead);
      numbers.expected_step = call_.steps_on_device ? there.step : there.step - ahead;
      there.step_storage = i % 3 == 1 ? Storage::f32 : Storage::f64;
      there.device_step = i % 3 == 1 ? static_cast<const void*>(&numbers.single_step) : &numbers.double_step;
      there.step = call_.steps_on_device ? 0.0 : ahead;
    }
    if (is_averaged(i)) there.average = &follow(average_got_[i], there);
    call_.bundles.push_back(got_[i].ready());
  }

  void compare(const char* what) {
    for (size_t i = 0; i < lengths_.size(); ++i) {
      int operand = -1;
      int64_t element = -1;
      check(lengths_[i] < 8 || !same(start_[i], got_[i], &operand, &element),
            "%s, turn %u: %s leaves tensor %zu as it is", name_, turn_, what, i);
      check(same(expected_[i], got_[i], &operand, &element),
            "%s, turn %u, %s, tensor %zu of %ld: operand %d, element %ld", name_, turn_, what, i,
            static_cast<long>(lengths_[i]), operand, static_cast<long>(element));
      check(same(average_expected_[i], average_got_[i], &operand, &element),
            "%s, turn %u, %s, average %zu of %ld: element %ld", name_, turn_, what, i, static_cast<long>(lengths_[i]),
            static_cast<long>(element));
      compare_numbers(what, i);
    }
  }

  void compare_numbers(const char* what, size_t i) {
    if (i % 3 == 0) return;
    const Numbers& numbers = numbers_[i];
    const double step = i % 3 == 1 ? numbers.single_step : numbers.double_step;
    check(step == numbers.expected_step, "%s, turn %u, %s, tensor %zu: step %g, expected %g", name_, turn_, what, i,
          step, numbers.expected_step);
    for (int k = 0; k < kScalars; ++k) {
      const double found = i % 3 == 1 ? numbers.single_scalars[k] : numbers.double_scalars[k];
      const double value = numbers.expected[k].value, wanted = i % 3 == 1 ? static_cast<float>(value) : value;
      check(found == wanted, "%s, turn %u, %s, tensor %zu: scalar %d is %g, expected %g", name_, turn_, what, i, k,
            found, wanted);
    }
  }

  const char* name_;
  unsigned turn_;
  Random random_;
  Travel travel_;
  DoublePlace place_;
  std::vector<int64_t> lengths_;
  Rule rule_, given_rule_;
  DoubleCall call_;
  Pass cpu_pass_;
  const float live_ = 0.375f, zero_ = 0.0f, scale_ = 3.0f, factor_ = 0.3f, weight_ = 0.25f;
  std::vector<Case> start_, expected_, got_, average_start_, average_expected_, average_got_;
  std::vector<Numbers> numbers_;
};

template <class Rule>
void test_rule(const char* name) {
  for (unsigned turn = 0; turn < 8; ++turn) Sweeps<Rule>(name, turn).run();
}

// One counter may serve several parameters, and is then advanced for each of them; more counters than a launch takes.
void test_counters() {
  for (const float skip : {0.0f, 1.0f}) {
    std::vector<float> singles(3000, 4.0f);
    std::vector<double> doubles(3001, 6.0);
    DoubleCall call;
    call.pass.device_found_inf = &skip;
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
