// Every rule, swept by every instruction set this machine has, against the same rule called one element at a time:
// the same bytes, whatever the length, the place to begin, the storage of each operand, the strides and the switches.
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "check.h"
#include "kernels/cpu/kernels.h"

using namespace optim_ext;

namespace {

// --- A rule with numbers in it. Rules are aggregates of doubles and bools; this fills any of them, in field order. ---

struct Filler {
  unsigned* bools;  // bit 0 is the next switch
  int* zero_in;     // doubles until the one that is zero: no weight decay, no dampening, ...
  Random* random;
  operator double() const { return (*zero_in)-- == 0 ? 0.0 : random->uniform(0.05, 0.95); }
  operator bool() const {
    const bool bit = *bools & 1u;
    *bools >>= 1;
    return bit;
  }
};

template <class Rule, size_t... I>
constexpr bool has_fields(std::index_sequence<I...>) {
  return requires(Filler f) { Rule{(static_cast<void>(I), f)...}; };
}

template <class Rule, size_t N = 16>
constexpr size_t count_fields() {
  if constexpr (has_fields<Rule>(std::make_index_sequence<N>{})) {
    return N;
  } else {
    return count_fields<Rule, N - 1>();
  }
}

template <class Rule>
Rule filled(unsigned bools, int zero_in, Random& random) {
  const Filler f{&bools, &zero_in, &random};
  return [&]<size_t... I>(std::index_sequence<I...>) {
    return Rule{(static_cast<void>(I), f)...};
  }(std::make_index_sequence<count_fields<Rule>()>{});
}

// --- Memory for one parameter and its state. ---

struct Operand {
  std::unique_ptr<unsigned char[]> memory;  // exactly as long as needed, so that the sanitizer sees a step too far
  int64_t bytes;
};

struct Case {
  Bundle bundle{};
  Layout layout{};
  std::vector<Operand> operands;

  Case clone() const {
    Case copy;
    copy.bundle = bundle;
    copy.layout = layout;
    for (size_t k = 0; k < operands.size(); ++k) {
      Operand operand{std::make_unique<unsigned char[]>(operands[k].bytes), operands[k].bytes};
      std::memcpy(operand.memory.get(), operands[k].memory.get(), operand.bytes);
      copy.bundle.data[k] =
          operand.memory.get() + (static_cast<unsigned char*>(bundle.data[k]) - operands[k].memory.get());
      copy.operands.push_back(std::move(operand));
    }
    return copy;
  }
  const Bundle& ready() {
    bundle.layout = layout.ndim > 0 ? &layout : nullptr;
    return bundle;
  }
};

using Storages = std::vector<Storage>;  // per operand, the last one repeated

// Sizes and strides that only a walk can follow: each operand has its own order of dimensions, with gaps.
void make_strided(Layout& layout, int operands, int64_t numel) {
  layout.ndim = 3;
  layout.sizes[2] = numel % 7 == 0 ? 7 : numel % 2 == 0 ? 2 : 1;
  layout.sizes[1] = (numel / layout.sizes[2]) % 3 == 0 ? 3 : 1;
  layout.sizes[0] = numel / layout.sizes[2] / layout.sizes[1];
  const int orders[][3] = {{0, 1, 2}, {2, 1, 0}, {1, 0, 2}, {2, 0, 1}, {0, 2, 1}, {1, 2, 0}};
  for (int k = 0; k < operands; ++k) {
    int64_t stride = 1 + k % 3;
    for (int d = 2; d >= 0; --d) {
      const int dim = orders[k % 6][d];
      layout.strides[k][dim] = stride;
      stride *= layout.sizes[dim] + (k == 3);
    }
  }
}

template <class Rule>
Case make_case(int64_t numel, const Storages& storages, bool strided, Random& random) {
  Case made;
  made.bundle.numel = numel;
  if (strided) make_strided(made.layout, Rule::kOperands, numel);
  for (int k = 0; k < Rule::kOperands; ++k) {
    const Storage storage = storages[k < static_cast<int>(storages.size()) ? k : storages.size() - 1];
    const bool used = (Rule::kUsed >> k) & 1u;
    int64_t last = numel - 1;
    if (strided && numel > 0) {
      last = 0;
      for (int d = 0; d < 3; ++d) last += (made.layout.sizes[d] - 1) * made.layout.strides[k][d];
    }
    const int64_t lead = used ? static_cast<int64_t>(random.bits() % 5) : 0;  // data need not be aligned to a vector
    const int64_t length = used ? lead + last + 1 : 0;
    Operand operand{std::make_unique<unsigned char[]>(length * bytes_of(storage)), length * bytes_of(storage)};
    for (int64_t i = 0; i < length; ++i) {
      store_element<double>(operand.memory.get(), storage, i, random.uniform(k < 2 ? -2.0 : 0.5, 2.0));
    }
    made.bundle.data[k] = operand.memory.get() + lead * bytes_of(storage);
    made.bundle.storage[k] = storage;
    made.operands.push_back(std::move(operand));
  }
  return made;
}

// --- What a sweep has to do, said once more and slowly. ---

template <class Rule, class V>
void sweep_slowly(const Rule& rule, const Bundle& bundle, int64_t begin, int64_t end, const Pass& pass) {
  for (int64_t i = begin; i < end; ++i) {
    V value[Rule::kOperands] = {};
    int64_t at[Rule::kOperands] = {};
    for (int k = 0; k < Rule::kOperands; ++k) {
      at[k] = bundle.layout ? bundle.layout->offset(k, i) : i;
      if ((Rule::kUsed >> k) & 1u) value[k] = load_element<V>(bundle.data[k], bundle.storage[k], at[k]);
    }
    if (pass.unscale) {
      value[1] = value[1] / V(pass.grad_scale);
      store_element<V>(bundle.data[1], bundle.storage[1], at[1], value[1]);
    }
    value[1] *= V(pass.grad_factor);
    [&]<size_t... I>(std::index_sequence<I...>) { rule(value[I]...); }(std::make_index_sequence<Rule::kOperands>{});
    for (int k = 0; k < Rule::kOperands; ++k) {
      if ((Rule::kUpdates >> k) & 1u) store_element<V>(bundle.data[k], bundle.storage[k], at[k], value[k]);
    }
  }
}

// Equal bytes; where both hold a NaN its payload is free.
bool same(const Case& a, const Case& b, int* operand, int64_t* element) {
  for (size_t k = 0; k < a.operands.size(); ++k) {
    const Storage storage = a.bundle.storage[k];
    const unsigned char *x = a.operands[k].memory.get(), *y = b.operands[k].memory.get();
    if (std::memcmp(x, y, a.operands[k].bytes) == 0) continue;
    for (int64_t i = 0; i < a.operands[k].bytes / bytes_of(storage); ++i) {
      const bool equal = std::memcmp(x + i * bytes_of(storage), y + i * bytes_of(storage), bytes_of(storage)) == 0;
      if (equal || (std::isnan(load_element<double>(x, storage, i)) && std::isnan(load_element<double>(y, storage, i))))
        continue;
      *operand = static_cast<int>(k);
      *element = i;
      return false;
    }
  }
  return true;
}

std::vector<std::pair<const char*, cpu::Isa>> isas() {
  std::vector<std::pair<const char*, cpu::Isa>> found{{"baseline", cpu::Isa::baseline}};
#if OPTIM_EXT_X86_ISAS
  if (__builtin_cpu_supports("avx2")) found.push_back({"avx2", cpu::Isa::avx2});
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) found.push_back({"avx512", cpu::Isa::avx512});
#endif
  return found;
}

template <class Rule, class V>
void test(const char* name, const std::vector<Storages>& mixes) {
  Random random{7};
  unsigned turn = 0;
  for (const Storages& storages : mixes) {
    for (int64_t numel = 0; numel <= 300; ++numel, ++turn) {
      // Switches, zeros, strides, scaling and the place to begin take turns at different paces, so they meet each
      // other.
      const bool strided = numel > 0 && turn % 3 == 2;
      const Rule rule = filled<Rule>(turn % 8, static_cast<int>(turn % 7) - 1, random).at_step(1.0 + turn % 5);
      Pass pass;
      pass.unscale = turn % 4 == 1;
      pass.grad_scale = 3.0 + turn % 2;
      if (turn % 6 >= 4) pass.grad_factor = 0.3;
      const int64_t begin = turn % 5 == 4 ? numel / 3 : 0, end = turn % 11 == 10 ? numel - numel / 4 : numel;
      const Case start = make_case<Rule>(numel, storages, strided, random);
      Case expected = start.clone();
      sweep_slowly<Rule, V>(rule, expected.ready(), begin, end, pass);
      for (const auto& [isa_name, isa] : isas()) {
        Case got = start.clone();
        cpu::sweep_for<Rule, V>(isa)(rule, got.ready(), begin, end, pass);
        int operand = -1;
        int64_t element = -1;
        check(same(got, expected, &operand, &element),
              "%s on %s, V of %zu bytes, storages %d %d.., numel %ld [%ld, %ld), strided %d, unscale %d: operand %d, "
              "element %ld",
              name, isa_name, sizeof(V), static_cast<int>(storages[0]), static_cast<int>(storages.back()),
              static_cast<long>(numel), static_cast<long>(begin), static_cast<long>(end), strided, pass.unscale,
              operand, static_cast<long>(element));
      }
    }
  }
}

// Long enough for many tiles, and for the unconverted body to run in one go.
template <class Rule, class V>
void test_long(const char* name, const Storages& storages) {
  Random random{11};
  const Rule rule = filled<Rule>(0, -1, random).at_step(2.0);
  const Case start = make_case<Rule>(100003, storages, false, random);
  Case expected = start.clone();
  sweep_slowly<Rule, V>(rule, expected.ready(), 0, 100003, Pass{});
  check(std::memcmp(start.operands[0].memory.get(), expected.operands[0].memory.get(), start.operands[0].bytes) != 0,
        "%s changes nothing", name);
  for (const auto& [isa_name, isa] : isas()) {
    Case whole = start.clone(), pieces = start.clone();
    const auto sweep = cpu::sweep_for<Rule, V>(isa);
    sweep(rule, whole.ready(), 0, 100003, Pass{});
    for (int64_t begin = 0; begin < 100003; begin += 769) {
      sweep(rule, pieces.ready(), begin, begin + 769 < 100003 ? begin + 769 : 100003, Pass{});
    }
    int operand = -1;
    int64_t element = -1;
    check(same(whole, expected, &operand, &element), "%s on %s, long: operand %d, element %ld", name, isa_name, operand,
          static_cast<long>(element));
    check(same(pieces, expected, &operand, &element), "%s on %s, in pieces: operand %d, element %ld", name, isa_name,
          operand, static_cast<long>(element));
  }
}

template <class Rule>
void test_rule(const char* name) {
  using enum Storage;
  test<Rule, float>(name, {{f32}, {bf16}, {f16}, {bf16, bf16, f32}, {f32, f16, bf16, f32, f16}, {f32, f32, bf16}});
  test<Rule, double>(name, {{f64}, {f64, f32, f64}, {f32, f64, bf16, f16, f64}});
  test_long<Rule, float>(name, {f32});
  test_long<Rule, float>(name, {bf16});
  test_long<Rule, double>(name, {f64});
}

}  // namespace

int main() {
  for (const auto& isa : isas()) std::printf("%s ", isa.first);
  std::printf("\n");
#define OPTIM_EXT_TEST(...) test_rule<rules::__VA_ARGS__>(#__VA_ARGS__);
  OPTIM_EXT_FOR_EACH_RULE(OPTIM_EXT_TEST)
  return verdict();
}
