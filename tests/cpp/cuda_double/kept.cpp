// Parameters and state that are kept in another way than a rule sees them, swept by the driver on fibers: the bytes of
// the CPU's sweep, whatever lies beside, wherever rows and blocks end.
#include <deque>

#include "../kept_cases.h"
#include "place.h"
#include "rules/lamb.h"
#include "rules/nadam.h"
#include "rules/norm.h"
#include "storage/stochastic.h"

namespace optim_ext {

namespace {

using namespace kept;

// Rows that end with a block of q8 and with 8 elements or with neither; one element; more than a block of threads has.
const Shape kShapes[] = {{1, 1},   {3, 5},    {2, 64},   {20, 63},  {9, 104},
                         {2, 700}, {1500, 1}, {12, 256}, {3, 1032}, {20, 129}};

// The whole; a part of it in rows, beyond 2^32 elements; a part in columns.
Place place_of(int which, const Shape& shape) {
  const int64_t far = (int64_t{1} << 32) - 100;
  if (which == 0) return {};
  if (which == 1) return {far, shape.numel(), 1};
  return {far, shape.rows, shape.row + 37, shape.row, 1};
}

// Every other row, or half a row where blocks allow for that, from the last one to the first: of a sparse gradient.
struct HeldRows {
  Layout layout{};
  std::vector<int64_t> places;
  explicit HeldRows(const Shape& shape) {
    const int64_t width = shape.row % (2 * kBlock8) == 0 ? shape.row / 2 : shape.row;
    for (int64_t place = shape.numel() / width - 1; place >= 0; place -= 2) places.push_back(place);
    layout.rows = places.data();
    layout.ndim = 2;
    layout.sizes[0] = static_cast<int64_t>(places.size());
    layout.sizes[1] = width;
    for (auto& strides : layout.strides) strides[0] = width, strides[1] = 1;
  }
  HeldRows(const HeldRows&) = delete;
};

struct Scene {
  const char* name;
  bool averaged = false, scaled = false, capturing = false;
  bool by_rows = false;           // the gradient is sparse
  bool first_of_two = false;      // sweeps of one step, of which the other one counts
  unsigned by_chance = kAnyKept;  // operands that may be rounded so

  static constexpr unsigned kAnyKept = ~0u;
};
constexpr Scene kScenes[] = {{.name = "as they are"},
                             {.name = "scaled, averaged", .averaged = true, .scaled = true, .capturing = true},
                             {.name = "by rows", .by_rows = true},
                             {.name = "the first of two sweeps", .first_of_two = true, .by_chance = 1u << 2}};

// A parameter with everything beside it, as the CPU and as the device has it.
struct Member {
  const Way& way;
  const Shape shape;
  const Place place;
  Memory start, expected, got;
  RoundingKey key;
  const HeldRows held;
  std::vector<unsigned char> average_expected, average_got;
  Ready on_cpu, on_device;
  Bundle average{};
  double mu_product = 0.75;

  Member(const Way& way, const Shape& shape, int place, const Scene& scene, Random& random)
      : way(way),
        shape(shape),
        place(place_of(place, shape)),
        start(draw_memory(way, shape, random)),
        expected(start),
        got(start),
        key{static_cast<int64_t>(random.bits()), 4, way.by_chance | kPositive << 16},
        held(shape),
        average_expected(scene.averaged ? shape.numel() * 4 : 0),
        average_got(average_expected),
        on_cpu(expected, way, shape, this->place),
        on_device(got, way, shape, this->place) {
    on_cpu.companions.key = key_at_step(static_cast<uint64_t>(key.key), static_cast<uint64_t>(key.draws) + 1);
    on_cpu.companions.by_chance &= scene.by_chance;
    on_device.companions.key = 0;
    on_device.companions.by_chance = scene.by_chance;
    on_device.companions.positive = 0;
    on_device.companions.live_key = &key;
    on_device.companions.counts_later = scene.first_of_two;
    for (Bundle* const bundle : {&on_cpu.bundle, &on_device.bundle}) {
      if (!scene.by_rows) continue;
      bundle->layout = &held.layout;
      bundle->numel = held.layout.sizes[0] * held.layout.sizes[1];
    }
    if (!scene.averaged) return;
    average.data[0] = average_got.data();
    average.data[1] = on_device.bundle.data[0];
    average.storage[0] = f32;
    average.storage[1] = way.param;
    average.numel = shape.numel();
    on_device.bundle.average = &average;
  }
  Member(const Member&) = delete;
};

template <class Rule>
class Steps {
 public:
  Steps(const char* name, const Rule& rule, const Way& way, const Scene& scene, int place)
      : name_(name), scene_(scene), way_(way), rule_(rule) {
    double_place_.capturing = scene.capturing;
    call_.draws_on_device = !scene.first_of_two;
    call_.pass.average_weight = 0.25;
    cpu_pass_.grad_factor = 0.3;
    call_.pass.on_device.grad_factor = &factor_;
    cpu_pass_.unscale = scene.scaled;
    cpu_pass_.grad_scale = scale_;
    if (scene.scaled) call_.pass.on_device.grad_scale = &scale_;
    for (const Shape& shape : kShapes) members_.emplace_back(way, shape, place, scene, random_);
  }

  void run() {
    for (Member& member : members_) {
      step_on_cpu(member);
      Bundle& bundle = member.on_device.bundle;
      bundle.step = kStep;
      bundle.scalars[0] = {0.0, &member.mu_product, Storage::f64};
      call_.bundles.push_back(bundle);
    }
    const float no = 0.0f, yes = 1.0f;
    call_.pass.on_device.found_inf = &no;
    const cuda::Driver driver(double_place_);
    driver.run(rule_, call_);
    compare("a step");
    call_.pass.on_device.found_inf = &yes;
    driver.run(rule_, call_);
    compare("a skipped step");
  }

 private:
  static constexpr double kStep = 3.0;

  void step_on_cpu(Member& member) {
    rules::Scalar scalars[kMaxScalars] = {{member.mu_product, true}};
    Rule ready = rule_;
    if constexpr (rules::kScalarsOf<Rule> == 0) {
      ready = rule_.at_step(kStep);
    } else {
      ready = rule_.at_step(kStep, scalars);
    }
    const cpu::Sweep sweep = program_of<Rule>().sweep[static_cast<int>(kIsa)][0];
    const cpu::ReadyRule ready_rule{sweep, &ready, Rule::kOperands, Rule::kUsed, Rule::kUpdates};
    Bundle& bundle = member.on_cpu.bundle;
    cpu::companions_kernel_for(kIsa)(ready_rule, bundle, 0, bundle.numel, cpu_pass_);
    if constexpr (rules::kStoresScalars<Rule>) expected_scalar_ = scalars[0].value;
    if (member.average_expected.empty()) return;
    Bundle average = member.average;
    average.data[0] = member.average_expected.data();
    average.data[1] = bundle.data[0];
    const rules::Average averaging{0.25};
    cpu::sweep_for<rules::Average, float>(kIsa)(averaging, average, 0, bundle.numel, Pass{});
  }

  void compare(const char* what) {
    for (const Member& member : members_) {
      const auto complain = [&](bool fits, const char* of) {
        check(fits, "%s, %s, %s, %s, %ld rows of %ld, %zu numbers of place: %s", name_, way_.name, scene_.name, what,
              static_cast<long>(member.shape.rows), static_cast<long>(member.shape.row), member.place.size(), of);
      };
      for (int k = 0; k < 5; ++k) {
        static constexpr const char* kOperands[] = {"operand 0", "operand 1", "operand 2", "operand 3", "operand 4"};
        complain(member.got.operands[k] == member.expected.operands[k], kOperands[k]);
        complain(member.got.exponents[k] == member.expected.exponents[k], "exponents");
      }
      complain(member.got.twin == member.expected.twin, "the twin");
      complain(member.shape.numel() < 64 || !(member.got == member.start), "nothing changes");
      complain(member.average_got == member.average_expected, "the average");
      complain(member.key.draws == (scene_.first_of_two ? 4 : 5), "draws");
      if constexpr (rules::kStoresScalars<Rule>) complain(member.mu_product == expected_scalar_, "the scalar");
    }
  }

  const char* name_;
  const Scene& scene_;
  const Way& way_;
  const Rule rule_;
  Random random_{31};
  DoublePlace double_place_;
  DoubleCall call_;
  Pass cpu_pass_;
  const float scale_ = 3.0f, factor_ = 0.3f;
  double expected_scalar_ = 0.0;
  std::deque<Member> members_;
};

template <class Rule>
void test_rule(const char* name, unsigned switches) {
  Random random{37};
  const Rule rule = filled<Rule>(switches, -1, random);
  uint64_t seed = 5;
  for (const Way& way : kWays) {
    for (const Scene& scene : kScenes) {
      for (int place = 0; place < 3; ++place) {
        if (place > 0 && (scene.scaled || way.by_chance == 0)) continue;
        device::set_seed(seed++);
        find_races(place == 0 && rules::kStoresScalars<Rule>);  // in the rule that has all there is
        Steps<Rule>(name, rule, way, scene, place).run();
      }
    }
  }
}

// Norms of what parameters are together with their twins, and of operands that a rule makes of it without writing to
// anything that is kept.
void test_reading() {
  Random random{41};
  const auto rule = filled<rules::LambDirection>(0, -1, random);
  const auto ready = rule.at_step(3.0);
  for (Way way : kWays) {
    way.state[2] = f32;
    std::deque<Member> members;
    DoubleCall call;
    std::vector<double> expected, got(std::size(kShapes));
    for (const Shape& shape : kShapes) {
      Member& member = members.emplace_back(way, shape, 0, kScenes[0], random);
      member.on_device.bundle.step = 3.0;
      call.bundles.push_back(member.on_device.bundle);
      const Bundle& bundle = member.on_cpu.bundle;
      using Rule = rules::LambDirection;
      const cpu::Sweep sweep = program_of<Rule>().sweep[static_cast<int>(kIsa)][0];
      cpu::companions_kernel_for(kIsa)({sweep, &ready, Rule::kOperands, Rule::kUsed, Rule::kUpdates}, bundle, 0,
                                       bundle.numel, Pass{});
      std::vector<float> values(static_cast<size_t>(bundle.numel));
      if (way.precision != Precision::native) {
        cpu::read_kept_kernel_for(kIsa)(bundle, 0, bundle.numel, values.data());
      } else {
        for (int64_t i = 0; i < bundle.numel; ++i) values[i] = load_element<float>(bundle.data[0], way.param, i);
      }
      Bundle opened{};
      opened.data[0] = values.data();
      opened.numel = bundle.numel;
      std::vector<double> slots;
      for (int64_t begin = 0; begin < bundle.numel; begin += kReduceTile)
        slots.push_back(
            cpu::reduce_for<rules::L2Norm>(kIsa)(opened, begin, std::min(begin + kReduceTile, bundle.numel)));
      expected.push_back(rules::L2Norm::finish(reduce_slots<rules::L2Norm>(slots.data(), slots.size()), 0.0));
    }
    find_races(true);
    const DoublePlace place;
    const cuda::Driver driver(place);
    driver.run(rule, call);
    driver.reduce_each<rules::L2Norm>(call, got.data());
    for (size_t i = 0; i < members.size(); ++i) {
      check(members[i].got == members[i].expected, "%s read: tensor %zu", way.name, i);
      check(members[i].key.draws == 4, "%s: a key that was read has drawn", way.name);
      check(same_bits(got[i], expected[i]), "%s: norm %zu is %g, expected %g", way.name, i, got[i], expected[i]);
    }
  }
}

// More keys than a launch takes.
void test_draws() {
  std::vector<RoundingKey> keys(5000, RoundingKey{1, 2, 3});
  std::vector<Companions> companions(keys.size());
  for (const float skip : {0.0f, 1.0f}) {
    DoubleCall call;
    call.pass.on_device.found_inf = &skip;
    for (size_t i = 0; i < keys.size(); ++i) {
      companions[i].live_key = &keys[i];
      Bundle bundle{};
      bundle.companions = &companions[i];
      call.bundles.push_back(bundle);
    }
    cuda::Driver(DoublePlace{}).advance_draws(call);
    for (const RoundingKey& key : keys)
      check(key.key == 1 && key.draws == 3 && key.by_chance == 3, "a key has drawn %ld times",
            static_cast<long>(key.draws));
  }
}

}  // namespace

void test_kept() {
  test_draws();
  test_reading();
  test_rule<rules::Adam<true>>("Adam", 0);
  test_rule<rules::Lion>("Lion", 1);
  test_rule<rules::NAdam>("NAdam", 0);
}

}  // namespace optim_ext
