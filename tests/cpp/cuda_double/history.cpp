// The L-BFGS kernels against the CPU's: bit by bit, dot products of bf16 rows excepted, whose lanes the CPU shares out
// differently.
#include <iterator>

#include "kernels/cpu/history_kernels.h"
#include "place.h"

namespace optim_ext {

namespace {

using Memory = std::vector<unsigned char>;

// What is asked of a sweep over the history.
struct Scene {
  const char* name;
  bool forms_pair = false, with_difference = false, with_metric = false;
};

constexpr Scene kScenes[] = {{.name = "dots alone"},
                             {.name = "a pair", .forms_pair = true},
                             {.name = "a difference", .with_difference = true},
                             {.name = "a pair and a difference", .forms_pair = true, .with_difference = true},
                             {.name = "a metric", .with_metric = true},
                             {.name = "everything", .forms_pair = true, .with_difference = true, .with_metric = true}};

struct Shape {
  int64_t numel, count;
};

// The vectors of one optimizer.
struct Vectors {
  std::vector<Memory> y, s;
  Memory grad, prev_grad, d, metric;

  Vectors(const Shape& shape, Storage value, Storage row, Random& random) {
    const auto make = [&](Storage storage) {
      Memory memory(static_cast<size_t>(shape.numel * bytes_of(storage)));
      for (int64_t i = 0; i < shape.numel; ++i)
        store_element<double>(memory.data(), storage, i, random.uniform(-1.0, 1.0));
      return memory;
    };
    for (int64_t i = 0; i < shape.count; ++i) {
      y.push_back(make(row));
      s.push_back(make(row));
    }
    grad = make(value), prev_grad = make(value), d = make(value), metric = make(value);
  }
};

// What one side, the CPU or the device, does and what comes out.
class Side {
 public:
  Side(const Vectors& from, const Shape& shape, const Scene& scene, Storage value, Storage row,
       const std::vector<double>& coefficients)
      : vectors(from) {
    for (Memory& memory : vectors.y) y_rows_.push_back(memory.data());
    for (Memory& memory : vectors.s) s_rows_.push_back(memory.data());
    const History history{y_rows_.data(), s_rows_.data(), shape.count, row};
    const void* const metric = scene.with_metric ? vectors.metric.data() : nullptr;
    const bool some = shape.count > 0;
    dots_task = {history,
                 shape.numel,
                 value,
                 vectors.grad.data(),
                 metric,
                 scene.with_difference && some,
                 scene.forms_pair && some,
                 {0.5, 1.0, 1.0},
                 vectors.prev_grad.data(),
                 vectors.d.data()};
    combine_task = {history,
                    shape.numel,
                    value,
                    vectors.grad.data(),
                    metric,
                    vectors.d.data(),
                    -0.7,
                    coefficients.data(),
                    coefficients.data() + shape.count};
    norms_task = {shape.numel, value, vectors.prev_grad.data(), nullptr};
    dots.assign(static_cast<size_t>(dots_task.sums()), -1.0);
  }

  void run_on_cpu() {
    const auto kernels = cpu::history_kernels_for(kIsa);
    const int64_t tiles = history_tiles(dots_task.numel), sums = dots_task.sums();
    std::vector<double> of_tiles(static_cast<size_t>(tiles * sums), -1.0);
    kernels.dots(dots_task, 0, tiles, of_tiles.data());
    total(of_tiles.data(), tiles, sums, dots.data());
    std::vector<Norms> norms_of_tiles(static_cast<size_t>(tiles));
    kernels.combine(combine_task, 0, tiles, norms_of_tiles.data());
    combined = total(norms_of_tiles.data(), tiles);
    kernels.norms(norms_task, 0, tiles, norms_of_tiles.data());
    norms = total(norms_of_tiles.data(), tiles);
  }

  void run_on_device() {
    const DoublePlace place;
    const cuda::Driver driver(place);
    driver.history_dots(dots_task, dots.data());
    driver.history_combine(combine_task, &combined);
    driver.norms(norms_task, &norms);
  }

  Vectors vectors;
  HistoryDots dots_task;
  HistoryCombination combine_task;
  NormsOf norms_task;
  std::vector<double> dots;
  Norms combined{-1.0, -1.0, -1.0}, norms{-1.0, -1.0, -1.0};

 private:
  std::vector<void*> y_rows_, s_rows_;
};

bool same_norms(const Norms& a, const Norms& b) {
  return same_bits(a.largest, b.largest) && same_bits(a.sum, b.sum) && same_bits(a.product, b.product);
}

void test_shape(const Shape& shape, const Scene& scene, Storage value, Storage row, Random& random) {
  const Vectors vectors(shape, value, row, random);
  std::vector<double> coefficients;
  for (int64_t i = 0; i < 2 * shape.count; ++i) coefficients.push_back(random.uniform(-1.0, 1.0));
  Side cpu(vectors, shape, scene, value, row, coefficients), there(vectors, shape, scene, value, row, coefficients);
  cpu.run_on_cpu();
  there.run_on_device();
  const auto numel = static_cast<long>(shape.numel), count = static_cast<long>(shape.count);
  for (size_t i = 0; i < cpu.dots.size(); ++i) {
    const double a = cpu.dots[i], b = there.dots[i];
    const bool good = row == Storage::bf16 ? std::abs(a - b) <= 1e-13 * (1.0 + std::abs(a)) : same_bits(a, b);
    check(good, "history %ld x %ld, %s: dot product %zu is %.17g, expected %.17g", count, numel, scene.name, i, b, a);
  }
  check(same_norms(cpu.combined, there.combined), "history %ld x %ld, %s: norms of the direction", count, numel,
        scene.name);
  check(same_norms(cpu.norms, there.norms), "history %ld x %ld, %s: norms of a vector", count, numel, scene.name);
  check(cpu.vectors.d == there.vectors.d, "history %ld x %ld, %s: the direction", count, numel, scene.name);
  check(cpu.vectors.y == there.vectors.y && cpu.vectors.s == there.vectors.s, "history %ld x %ld, %s: the rows", count,
        numel, scene.name);
}

}  // namespace

void test_history() {
  using enum Storage;
  uint64_t seed = 0;
  for (const int64_t numel : {0, 1, 7, 1023, 1024, 1025, 5000}) {
    for (const int64_t count : {0, 1, 31, 33, 70}) {
      for (const auto& [value, row] : {std::pair{f32, f32}, {f64, f64}, {f32, bf16}, {f64, bf16}}) {
        if (numel == 5000 && count == 70 && row == bf16) continue;
        Random random{++seed};
        device::set_seed(seed);
        find_races(random.one_in(8));
        test_shape({numel, count}, kScenes[random.below(std::size(kScenes))], value, row, random);
      }
    }
  }
}

}  // namespace optim_ext
