// The CUDA sweep run on the host, block by block and thread by thread, through the same tables a launch carries: every
// element exactly once, and the same bytes as the CPU sweep. What needs a GPU to see is in tests/cuda.
#include <algorithm>
#include <array>
#include <memory>
#include <vector>

#include "cases.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cuda/block.h"
#include "rules/all_rules.h"

using namespace optim_ext;

namespace {

enum class Travel { small_arguments, large_arguments, device_memory };

template <class Rule, class V>
[[gnu::noinline]] void run_blocks(const cuda::Batch<Rule>& batch, const unsigned char* table, int64_t blocks) {
  for (int64_t index = 0; index < blocks; ++index) {
    cuda::Block<Rule> block;
    cuda::open_block(batch, table, index, block);
    if (block.skip) continue;
    for (int thread = 0; thread < cuda::kThreads; ++thread) cuda::sweep_thread<Rule, V>(block, thread);
    cuda::Block<rules::Average> average;
    cuda::open_average(batch, table, block, average);
    for (int thread = 0; !average.skip && thread < cuda::kThreads; ++thread) cuda::average_thread(average, thread);
  }
  if constexpr (rules::kStoresScalars<Rule>) {
    for (int32_t index = 0; index < batch.count; ++index) cuda::store_scalars(batch, table, index);
  }
}

template <class Rule, class V, int64_t kBytes>
int run_in_arguments(const cuda::Batch<Rule>& batch, const std::vector<const Bundle*>& bundles) {
  int launches = 0;
  for (size_t done = 0; done < bundles.size(); ++launches) {
    const auto args = std::make_unique<cuda::Args<Rule, kBytes>>();
    const auto shape = cuda::fitting<Rule>(bundles.data() + done, bundles.size() - done, args->kRoom);
    check(shape.count > 0 && shape.bytes() <= args->kRoom, "a table of %ld entries in %ld bytes",
          static_cast<long>(shape.count), static_cast<long>(shape.bytes()));
    args->batch = batch;
    args->batch.count = static_cast<int32_t>(shape.count);
    const int64_t chunks = cuda::fill_table(bundles.data() + done, shape, batch.chunk, args->room);
    run_blocks<Rule, V>(args->batch, args->room, chunks);
    done += shape.count;
  }
  return launches;
}

// What the driver does with a call, short of launching; the number of launches it would take.
template <class Rule, class V>
int run_on_host(cuda::Batch<Rule> batch, const std::vector<const Bundle*>& bundles, Travel travel) {
  if (travel == Travel::small_arguments) return run_in_arguments<Rule, V, 4096>(batch, bundles);
  if (travel == Travel::large_arguments) return run_in_arguments<Rule, V, cuda::kArgumentBytes>(batch, bundles);
  const auto shape = cuda::fitting<Rule>(bundles.data(), bundles.size(), INT64_MAX);
  const auto table = std::make_unique<unsigned char[]>(shape.bytes());  // exactly as long: the sanitizer watches
  batch.count = static_cast<int32_t>(shape.count);
  const int64_t chunks = cuda::fill_table(bundles.data(), shape, batch.chunk, table.get());
  run_blocks<Rule, V>(batch, table.get(), chunks);
  return 1;
}

// Around the width of an access, of a block and of a chunk.
const std::vector<int64_t> kLengths = {1,    2,    3,    4,    7,    8,    9,    16,   31,   33,   255,  256, 257, 300,
                                       1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097, 6144, 8200, 1,   5,   64};

// A running average of the parameter that `param` holds: dense like it, or only to be walked.
Case make_average(const Case& param, Storage storage, bool aligned, bool strided, Random& random) {
  const int64_t numel = param.bundle.numel;
  Case made = make_case<rules::Average>(numel, {storage}, strided || param.layout.ndim > 0, random, aligned);
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

// One call of many tensors, all differing in length, storage, alignment, strides and step.
template <class Rule, class V>
void test_bytes(const char* name, const std::vector<Storages>& mixes) {
  Random random{13};
  for (unsigned turn = 0; turn < 12; ++turn) {
    const auto travel = static_cast<Travel>(turn % 3);
    Rule rule = filled<Rule>(turn % 8, turn % 6 == 0 ? -1 : static_cast<int>(turn % 6), random);  // lr is never zero
    const bool scaled = turn % 4 >= 2, live = turn % 2 == 1 && sizeof(Rule) >= sizeof(double);
    const float scale = 3.0f, keep = 0.0f, live_value = 0.375f;
    std::vector<Case> start, expected, got, average_start, average_expected, average_got;
    const bool averages = turn % 2 == 0;
    std::vector<float> float_steps(kLengths.size());
    std::vector<double> double_steps(kLengths.size());
    constexpr int kScalars = rules::kScalarsOf<Rule>;
    std::vector<std::array<rules::Scalar, kMaxScalars>> scalars(kLengths.size());
    std::vector<std::array<float, kMaxScalars>> float_scalars(kLengths.size());
    std::vector<std::array<double, kMaxScalars>> double_scalars(kLengths.size());
    std::vector<const Bundle*> bundles;
    for (size_t i = 0; i < kLengths.size(); ++i) {
      const Storages& storages = mixes[(i + turn) % mixes.size()];
      const bool strided = i % 4 == 3;
      start.push_back(make_case<Rule>(kLengths[i], storages, strided, random, i % 3 != 2));
      start[i].bundle.step = 1.0 + static_cast<double>(i % 5);
    }
    if constexpr (sizeof(Rule) >= sizeof(double)) {  // the first field is replaced on the device
      if (live) std::memset(static_cast<void*>(&rule), 0, sizeof(double));
    }
    cuda::Batch<Rule> batch{};
    batch.rule = rule;
    batch.chunk = cuda::kMinChunk << turn % 2;
    batch.found_inf = turn % 3 == 1 ? &keep : nullptr;
    batch.grad_scale = scaled ? &scale : nullptr;
    const float factor = 0.3f;
    if (turn % 4 == 1) batch.grad_factor = &factor;
    if (live) {
      batch.hypers[batch.hyper_count++] = {0, &live_value, Storage::f32};
      const double value = live_value;
      if constexpr (sizeof(Rule) >= sizeof(double)) std::memcpy(static_cast<void*>(&rule), &value, sizeof value);
    }
    const float live_weight = 0.25f;
    batch.average_weight = turn % 8 == 0 ? 1.0 : 0.7;
    if (turn % 4 == 2) batch.live_average_weight = &live_weight;
    const rules::Average averaging{batch.live_average_weight ? live_weight : batch.average_weight};
    Pass pass;
    pass.unscale = scaled;
    pass.grad_scale = scale;
    if (batch.grad_factor) pass.grad_factor = factor;
    for (size_t i = 0; i < start.size(); ++i) {
      expected.push_back(start[i].clone());
      got.push_back(start[i].clone());
      const auto storage = static_cast<Storage>((i + turn) % 4);
      average_start.push_back(make_average(start[i], storage, i % 5 != 4, i % 6 == 5, random));
      average_expected.push_back(average_start[i].clone());
      average_got.push_back(average_start[i].clone());
    }
    for (size_t i = 0; i < start.size(); ++i) {
      const Bundle& bundle = expected[i].ready();
      scalars[i] = scalars_before(i % 3 == 2);
      for (int k = 0; k < kScalars; ++k) {
        float_scalars[i][k] = static_cast<float>(double_scalars[i][k] = scalars[i][k].value);
        ScalarState& there = got[i].bundle.scalars[k];
        there.value = i % 3 == 0 ? scalars[i][k].value : -1.0;
        there.storage = i % 3 == 2 ? Storage::f64 : Storage::f32;
        if (i % 3 == 1) there.device = &float_scalars[i][k];
        if (i % 3 == 2) there.device = &double_scalars[i][k];
      }
      const Rule ready = at_step(rule, bundle.step, scalars[i]);
      cpu::sweep_for<Rule, V>(cpu::Isa::baseline)(ready, bundle, 0, bundle.numel, pass);
      const Bundle& average = follow(average_expected[i], bundle);
      if (averages && i % 7 != 6) {
        const auto& sweeps = program_of<rules::Average>().sweep[static_cast<int>(cpu::Isa::baseline)];
        sweeps[average.in_double](&averaging, average, 0, average.numel, Pass{});
        got[i].bundle.average = &follow(average_got[i], got[i].bundle);
      }
      const double ahead = i % 2 == 0 ? 1.0 : 0.0;  // a later call counts the step
      float_steps[i] = static_cast<float>(double_steps[i] = bundle.step - ahead);
      Bundle& there = got[i].bundle;
      if (i % 3 != 0) {  // the step lives on the device
        there.step_storage = i % 3 == 1 ? Storage::f32 : Storage::f64;
        there.device_step = i % 3 == 1 ? static_cast<const void*>(&float_steps[i]) : &double_steps[i];
        there.step = ahead;
      }
      bundles.push_back(&got[i].ready());
    }
    const int launches = run_on_host<Rule, V>(batch, bundles, travel);
    check(travel == Travel::small_arguments ? launches > 1 : launches == 1, "%s: %d launches", name, launches);
    for (size_t i = 0; i < start.size(); ++i) {
      int operand = -1;
      int64_t element = -1;
      check(kLengths[i] < 8 || !same(start[i], got[i], &operand, &element), "%s leaves tensor %zu as it is", name, i);
      check(same(expected[i], got[i], &operand, &element),
            "%s, V of %zu bytes, turn %u, tensor %zu of %ld: operand %d, element %ld", name, sizeof(V), turn, i,
            static_cast<long>(kLengths[i]), operand, static_cast<long>(element));
      check(same(average_expected[i], average_got[i], &operand, &element),
            "%s, V of %zu bytes, turn %u, average %zu of %ld: element %ld", name, sizeof(V), turn, i,
            static_cast<long>(kLengths[i]), static_cast<long>(element));
      for (int k = 0; k < kScalars && i % 3 != 0; ++k) {
        const double found = i % 3 == 1 ? float_scalars[i][k] : double_scalars[i][k];
        const double value = scalars[i][k].value, expected_value = i % 3 == 1 ? static_cast<float>(value) : value;
        check(found == expected_value, "%s, turn %u, tensor %zu: scalar %d is %g, expected %g", name, turn, i, k, found,
              expected_value);
      }
      check(!averages || i % 7 == 6 || kLengths[i] < 8 || !same(average_start[i], average_got[i], &operand, &element),
            "%s leaves average %zu as it is", name, i);
    }
    const float skip = 1.0f;
    batch.found_inf = &skip;
    run_on_host<Rule, V>(batch, bundles, travel);
    for (size_t i = 0; i < start.size(); ++i) {
      int operand = -1;
      int64_t element = -1;
      check(same(expected[i], got[i], &operand, &element), "%s: a skipped step writes to tensor %zu", name, i);
      check(same(average_expected[i], average_got[i], &operand, &element), "%s: a skipped step averages %zu", name, i);
    }
  }
}

// A rule that counts how often it is applied to an element.
struct Count {
  static constexpr int kOperands = 2;
  static constexpr unsigned kUsed = 3, kUpdates = 1;
  OPTIM_EXT_RULE Count at_step(double) const { return *this; }
  template <class V>
  OPTIM_EXT_RULE void operator()(V& param, V) const {
    param = param + V(1);
  }
};

void test_every_element_once() {
  Random random{17};
  for (unsigned turn = 0; turn < 60; ++turn) {
    std::vector<Case> cases;
    std::vector<const Bundle*> bundles;
    const size_t tensors = 1 + random.bits() % 900;
    for (size_t i = 0; i < tensors; ++i) {
      const int64_t numel = 1 + static_cast<int64_t>(random.bits() % (i % 50 == 7 ? 20000 : 200));
      const Storage storage = static_cast<Storage>(random.bits() % 4);
      cases.push_back(make_case<Count>(numel, {storage}, random.bits() % 5 == 0, random, random.bits() % 2));
      std::memset(cases.back().operands[0].memory.get(), 0, cases.back().operands[0].bytes);
    }
    cuda::Batch<Count> batch{};
    batch.chunk = cuda::kMinChunk << turn % 4;
    std::vector<const Bundle*> in_float, in_double;
    for (Case& made : cases) {
      const Bundle& bundle = made.ready();
      (bundle.storage[0] == Storage::f64 ? in_double : in_float).push_back(&bundle);
    }
    const auto travel = static_cast<Travel>(turn % 3);
    if (!in_float.empty()) run_on_host<Count, float>(batch, in_float, travel);
    if (!in_double.empty()) run_on_host<Count, double>(batch, in_double, travel);
    for (size_t i = 0; i < tensors; ++i) {
      const Case& made = cases[i];
      const Storage storage = made.bundle.storage[0];
      int64_t wrong = 0, sum = 0;
      for (int64_t e = 0; e < made.bundle.numel; ++e) {
        const int64_t at = made.layout.ndim > 0 ? made.layout.offset(0, e) : e;
        wrong += load_element<double>(made.bundle.data[0], storage, at) != 1.0;
      }
      for (int64_t e = 0; e < made.operands[0].bytes / bytes_of(storage); ++e) {  // gaps included
        sum += static_cast<int64_t>(load_element<double>(made.operands[0].memory.get(), storage, e));
      }
      check(wrong == 0 && sum == made.bundle.numel,
            "turn %u, tensor %zu of %ld: %ld elements not visited once, sum %ld", turn, i,
            static_cast<long>(made.bundle.numel), static_cast<long>(wrong), static_cast<long>(sum));
    }
  }
}

// Sizes no test can allocate: the pieces of all blocks still tile each tensor, without a 32-bit number overflowing.
void test_beyond_32_bits() {
  std::vector<Bundle> made(3);
  made[0].numel = 5;
  made[1].numel = (int64_t{1} << 33) + 12345;
  made[2].numel = (int64_t{1} << 31) + 1;
  std::vector<const Bundle*> bundles;
  int64_t elements = 0;
  for (const Bundle& bundle : made) {
    bundles.push_back(&bundle);
    elements += bundle.numel;
  }
  cuda::Batch<Count> batch{};
  batch.chunk = cuda::chunk_for(elements, 132);
  batch.count = 3;
  const auto shape = cuda::fitting<Count>(bundles.data(), 3, INT64_MAX);
  std::vector<unsigned char> table(shape.bytes());
  const int64_t chunks = cuda::fill_table(bundles.data(), shape, batch.chunk, table.data());
  size_t tensor = 0;
  int64_t next = 0;
  for (int64_t index = 0; index < chunks; ++index) {
    cuda::Block<Count> block;
    cuda::open_block(batch, table.data(), index, block);
    const bool follows = tensor < made.size() && block.entry.numel == made[tensor].numel && block.begin == next;
    check(follows && block.size > 0 && block.size <= batch.chunk, "block %ld begins at %ld", static_cast<long>(index),
          static_cast<long>(block.begin));
    next = block.begin + block.size;
    if (next == block.entry.numel) ++tensor, next = 0;
  }
  check(tensor == made.size() && next == 0, "the blocks end in tensor %zu", tensor);
}

void test_chunks() {
  for (const int multiprocessors : {1, 16, 132}) {
    for (int64_t elements = 1; elements < int64_t{1} << 40; elements *= 3) {
      const int64_t chunk = cuda::chunk_for(elements, multiprocessors);
      check(chunk >= cuda::kMinChunk && chunk % cuda::kMinChunk == 0 && chunk <= INT32_MAX / 16, "a chunk of %ld",
            static_cast<long>(chunk));
    }
  }
}

template <class Rule>
void test_rule(const char* name) {
  using enum Storage;
  test_bytes<Rule, float>(name, {{f32}, {bf16}, {f16}, {bf16, bf16, f32}, {f32, f16, bf16, f32, f16}});
  test_bytes<Rule, double>(name, {{f64}, {f64}, {f64, f32, f64}, {f32, f64, bf16, f16, f64}});
}

}  // namespace

int main() {
  test_chunks();
  test_beyond_32_bits();
  test_every_element_once();
#define OPTIM_EXT_TEST(...) test_rule<rules::__VA_ARGS__>(#__VA_ARGS__);
  OPTIM_EXT_FOR_EACH_RULE(OPTIM_EXT_TEST)
  return verdict();
}
