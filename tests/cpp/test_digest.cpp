// What the kernels compute, down to the bit, is what was recorded: for every rule, storage, reduction and loop of
// L-BFGS, by every instruction set of this machine. So machines agree that never met: the record was made on one of
// them.
//
//   test_digest                 compares
//   test_digest avx2 baseline   compares, and fails unless these are the instruction sets of this machine
//   test_digest record          writes the record anew, after a change that is meant to change bits
#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "cases.h"
#include "history_cases.h"
#include "isas.h"
#include "kept_cases.h"
#include "kernels/interpret.h"
#include "reduce_cases.h"
#include "rules/all_rules.h"

using namespace optim_ext;

namespace {

// --- What bits come to, and what they came to when they were recorded. ---

class Digest {
 public:
  void add(uint64_t word) { state_ = Random{state_ ^ word}.bits(); }
  // Of a NaN nothing but that it is one: which sign and payload it has is up to the processor.
  void add(double value) { add(value != value ? kNan : __builtin_bit_cast(uint64_t, value)); }
  void add(const Norms& norms) {
    add(norms.largest);
    add(norms.sum);
    add(norms.product);
  }
  void add_bytes(const std::vector<unsigned char>& bytes) {
    for (const unsigned char byte : bytes) add(uint64_t{byte});
  }
  void add_elements(const unsigned char* memory, Storage storage, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      uint64_t word = 0;
      std::memcpy(&word, memory + i * bytes_of(storage), bytes_of(storage));
      add(std::isnan(load_element<double>(memory, storage, i)) ? kNan : word);
    }
  }
  void add(const Case& of) {
    for (size_t k = 0; k < of.operands.size(); ++k) {
      const Storage storage = of.bundle.storage[k];
      add_elements(of.operands[k].memory.get(), storage, of.operands[k].bytes / bytes_of(storage));
    }
  }
  uint64_t value() const { return state_; }

 private:
  static constexpr uint64_t kNan = 0x7ff8'0000'0000'0000u;
  uint64_t state_ = 0;
};

class Record {
 public:
  explicit Record(bool anew) : anew_(anew) {
    std::ifstream file(OPTIM_EXT_DIGESTS);
    uint64_t digest = 0;
    for (std::string name; !anew && file >> std::hex >> digest && std::getline(file >> std::ws, name);)
      recorded_[name] = digest;
  }

  // make(isa) is what an instruction set comes to.
  template <class Make>
  void compare(const std::string& name, const Make& make) {
    check(seen_.insert(name).second, "%s is there twice", name.c_str());
    if (anew_) recorded_[name] = make(cpu::Isa::baseline);
    const auto found = recorded_.find(name);
    if (found == recorded_.end()) return check(false, "%s has not been recorded (test_digest record)", name.c_str());
    for (const auto& [isa_name, isa] : isas()) {
      const uint64_t digest = make(isa);
      check(digest == found->second, "%s on %s: %016" PRIx64 ", recorded %016" PRIx64, name.c_str(), isa_name, digest,
            found->second);
    }
  }

  void finish() {
    for (const auto& [name, digest] : recorded_)
      check(seen_.count(name) == 1, "%s is recorded and no longer there", name.c_str());
    if (!anew_) return;
    std::ofstream file(OPTIM_EXT_DIGESTS);
    char digits[17];
    for (const auto& [name, digest] : recorded_) {
      std::snprintf(digits, sizeof digits, "%016" PRIx64, digest);
      file << digits << ' ' << name << '\n';
    }
    check(file.flush().good(), "cannot write %s", OPTIM_EXT_DIGESTS);
  }

 private:
  bool anew_;
  std::map<std::string, uint64_t> recorded_;
  std::set<std::string> seen_;
};

std::string name_of(Storage storage) {
  switch (storage) {
    case Storage::f32: return "f32";
    case Storage::f64: return "f64";
    case Storage::bf16: return "bf16";
    case Storage::f16: return "f16";
    default: return "q8";
  }
}

std::string name_of(const Storages& storages) {
  std::string name;
  for (const Storage storage : storages) name += (name.empty() ? "" : " ") + name_of(storage);
  return name;
}

// --- Sweeps. ---

// Around the width of a register, of a tile and of the blocks that are turned.
constexpr int64_t kLengths[] = {1, 3, 16, 31, 64, 105, 256, 257, 300, 399, 513, 1330};

// A few elements that are no ordinary numbers.
void put_specials(Case& into, Random& random) {
  using limits = std::numeric_limits<double>;
  const double specials[] = {0.0,
                             -0.0,
                             limits::infinity(),
                             -limits::infinity(),
                             limits::quiet_NaN(),
                             1e-40,
                             -1e-40,
                             5e-45,
                             6.1e-5,
                             -5.9e-8,
                             65504.0,
                             3.4e38,
                             1e-300};
  for (size_t k = 0; k < into.operands.size(); ++k) {
    const Storage storage = into.bundle.storage[k];
    const int64_t count = into.operands[k].bytes / bytes_of(storage);
    for (int64_t i = 0; i < count; ++i) {
      const double special = specials[random.below(std::size(specials))];
      if (random.one_in(24)) store_element<double>(into.operands[k].memory.get(), storage, i, special);
    }
  }
}

template <class Rule, class V>
uint64_t digest_of_sweeps(const Storages& storages, cpu::Isa isa) {
  Digest digest;
  Random random{17};
  for (const int64_t numel : kLengths) {
    for (const bool special : {false, true}) {
      const Scene scene = draw_scene(numel, random);
      auto scalars = scalars_before(random.one_in(2));
      const Rule rule = at_step(filled<Rule>(scene.switches, scene.zero, random), scene.step, scalars);
      for (int k = 0; k < rules::kScalarsOf<Rule>; ++k) digest.add(scalars[k].value);
      Case made = make_case<Rule>(numel, storages, scene.strides, random);
      if (special) put_specials(made, random);
      cpu::sweep_for<Rule, V>(isa)(rule, made.ready(), scene.begin, scene.end, scene.pass);
      digest.add(made);
    }
  }
  return digest.value();
}

template <class Rule, class V>
void compare_sweeps(Record& record, const std::string& name, const std::vector<Storages>& mixes) {
  for (const Storages& storages : mixes) {
    record.compare("sweep " + name + ", " + name_of(storages),
                   [&](cpu::Isa isa) { return digest_of_sweeps<Rule, V>(storages, isa); });
  }
}

template <class Rule>
void compare_rule(Record& record, const std::string& name) {
  using enum Storage;
  compare_sweeps<Rule, float>(record, name, {{f32}, {bf16}, {f16}, {bf16, bf16, f32}, {f32, f16, bf16}});
  compare_sweeps<Rule, double>(record, name, {{f64}, {f64, f32}, {f32, f64, bf16, f16, f64}});
}

// --- Parameters and state that are kept in another way. ---

template <class Rule>
void compare_kept(Record& record, const std::string& name, const Rule& rule) {
  for (const kept::Way& way : kept::kWays) {
    record.compare("kept " + name + ", " + way.name, [&](cpu::Isa isa) {
      Digest digest;
      Random random{19};
      for (const kept::Shape& shape : {kept::Shape{1, 1}, {3, 5}, {2, 64}, {20, 63}, {2, 700}}) {
        Pass pass;
        pass.unscale = random.one_in(2);
        pass.grad_scale = 3.0;
        pass.grad_factor = 0.3;
        kept::Memory memory = draw_memory(way, shape, random);
        sweep_in_pieces(rule, memory, way, shape, pass, isa, shape.numel());
        for (int k = 0; k < 5; ++k) {
          digest.add_bytes(memory.operands[k]);
          digest.add_bytes(memory.exponents[k]);
        }
        digest.add_bytes(memory.twin);
      }
      return digest.value();
    });
  }
}

// --- The words of rules that are interpreted. ---

// A rule that makes its parameter of the four operands by one instruction.
template <class V>
void compare_word(Record& record, const std::string& name, TileOp op, Storage storage) {
  RuleCode code{};
  code.operands = 4;
  code.hypers = 1;
  code.uniform_registers = 2;  // the direction and the step
  code.used = 15;
  code.updates = 1;
  code.shared = {{-1, 0.375}};
  const uint8_t uniform = 4;
  code.tile = {{op, 0, op == TileOp::choose ? uniform : uint8_t{0}, 2, op == TileOp::lerp_by ? uniform : uint8_t{3}}};
  check(code.problem().empty(), "%s: %s", name.c_str(), code.problem().c_str());
  code.seal();
  const RuleProgram program = interpreted(code);
  record.compare("word " + name + ", " + name_of(storage), [&](cpu::Isa isa) {
    Digest digest;
    Random random{23};
    OpenRule open{&code, {1.0}}, ready{};
    program.at_step(&open, 1.0, nullptr, &ready);
    for (const double scale : {1.0, 40.0}) {
      Case made = make_case<rules::Adam<false>>(400, {storage}, kDense, random);
      for (int64_t i = 0; i < made.bundle.numel; ++i) {
        const double value = load_element<double>(made.bundle.data[0], storage, i);
        store_element<double>(made.bundle.data[0], storage, i, scale * value);
      }
      put_specials(made, random);
      program.sweep[static_cast<int>(isa)][sizeof(V) == sizeof(double)](&ready, made.ready(), 0, 400, Pass{});
      digest.add(made);
    }
    return digest.value();
  });
}

// --- Reductions. ---

template <class Reduction>
void compare_reduction(Record& record, const std::string& name) {
  for (const Storage storage : {Storage::f32, Storage::f64, Storage::bf16, Storage::f16}) {
    record.compare("reduction " + name + ", " + name_of(storage), [&](cpu::Isa isa) {
      Digest digest;
      Random random{29};
      for (const int64_t numel : {0, 1, 31, 33, 255, 2049, 16385}) {
        for (const int strides : {kDense, kMixed}) {
          if (numel == 0 && strides != kDense) continue;
          Case made = make_case<Reduction>(numel, {storage}, strides, random);
          const std::vector<double> slots = slots_of<Reduction>({&made.ready()}, isa);
          for (const double slot : slots) digest.add(slot);
          const double total = reduce_slots<Reduction>(slots.data(), static_cast<int64_t>(slots.size()));
          digest.add(Reduction::finish(total, static_cast<double>(numel)));
        }
      }
      return digest.value();
    });
  }
}

template <class Reduction>
void compare_fibers(Record& record, const std::string& name) {
  for (const Storage storage : {Storage::f32, Storage::f64, Storage::bf16, Storage::f16}) {
    record.compare("fibers " + name + ", " + name_of(storage), [&](cpu::Isa isa) {
      Digest digest;
      Random random{31};
      for (const auto& [outer, along, inner] :
           {std::array<int64_t, 3>{3, 5, 1}, {4, 31, 1}, {2, 300, 1}, {5, 3, 3}, {2, 257, 33}, {1, 2, 1025}}) {
        const Case made = make_case<Reduction>(outer * along * inner, {storage}, kDense, random);
        Fibers fibers{made.bundle.data[0], storage, outer, along, inner, 3.0, nullptr};
        std::vector<double> results(outer * fibers.pieces() * inner, -1.0);
        fibers.results = results.data();
        cpu::reduce_fibers_for<Reduction>(isa)(fibers, 0, fibers.units());
        for (const double result : results) digest.add(result);
      }
      return digest.value();
    });
  }
}

// --- L-BFGS. ---

void compare_history(Record& record) {
  using enum Storage;
  for (const history::Request& request : history::kRequests) {
    for (const auto& [value, row] : {std::pair{f32, f32}, {f64, f64}, {f32, bf16}, {f64, bf16}}) {
      record.compare("history " + std::string(request.name) + ", " + name_of({value, row}), [&](cpu::Isa isa) {
        Digest digest;
        Random random{37};
        for (const auto& [numel, count] :
             {std::pair<int64_t, int64_t>{1, 3}, {7, 0}, {1023, 9}, {1025, 2}, {2600, 5}}) {
          const history::Shape shape{numel, count};
          const history::Vectors vectors(shape, value, row, random);
          std::vector<double> coefficients;  // floats, as products with bf16 have to be exact
          for (int64_t i = 0; i < 2 * count; ++i) coefficients.push_back(static_cast<float>(random.uniform(-1.0, 1.0)));
          history::Side side(vectors, shape, request, value, row, coefficients);
          side.run_on_cpu(isa);
          for (const double dot : side.dots) digest.add(dot);
          digest.add(side.combined);
          digest.add(side.norms);
          digest.add_elements(side.vectors.d.data(), value, numel);
          for (const auto* rows : {&side.vectors.y, &side.vectors.s}) {
            for (const history::Memory& of_row : *rows) digest.add_elements(of_row.data(), row, numel);
          }
        }
        return digest.value();
      });
    }
  }
}

// Whether the instruction sets of this machine are those that its caller knows it to have.
void check_instruction_sets(const std::set<std::string>& expected) {
  std::set<std::string> found;
  for (const auto& isa : isas()) found.insert(isa.first);
  check(found == expected, "the instruction sets of this machine are others than those named");
}

}  // namespace

int main(int count, char** arguments) {
  const std::set<std::string> words(arguments + 1, arguments + count);
  const bool anew = words.count("record") == 1;
  for (const auto& isa : isas()) std::printf("%s ", isa.first);
  std::printf("\n");
  if (!words.empty() && !anew) check_instruction_sets(words);
  Record record(anew);
#define OPTIM_EXT_COMPARE(...) compare_rule<rules::__VA_ARGS__>(record, #__VA_ARGS__);
  OPTIM_EXT_FOR_EACH_RULE(OPTIM_EXT_COMPARE)
#undef OPTIM_EXT_COMPARE
  compare_kept(record, "Adam", kept::adam());
  compare_kept(record, "Lion", kept::lion());
#define OPTIM_EXT_COMPARE(word)                                   \
  compare_word<float>(record, #word, TileOp::word, Storage::f32); \
  compare_word<double>(record, #word, TileOp::word, Storage::f64);
  OPTIM_EXT_FOR_EACH_TILE_OP(OPTIM_EXT_COMPARE)
#undef OPTIM_EXT_COMPARE
#define OPTIM_EXT_COMPARE(...) compare_reduction<rules::__VA_ARGS__>(record, #__VA_ARGS__);
  OPTIM_EXT_FOR_EACH_REDUCTION(OPTIM_EXT_COMPARE)
#undef OPTIM_EXT_COMPARE
#define OPTIM_EXT_COMPARE(...) compare_fibers<rules::__VA_ARGS__>(record, #__VA_ARGS__);
  OPTIM_EXT_FOR_EACH_FIBER_REDUCTION(OPTIM_EXT_COMPARE)
  compare_history(record);
  record.finish();
  return verdict();
}
