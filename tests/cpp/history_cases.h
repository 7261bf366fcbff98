// Made-up work for the loops of L-BFGS.
#pragma once

#include <vector>

#include "check.h"
#include "kernels/convert.h"
#include "kernels/cpu/history_kernels.h"

namespace optim_ext::history {

using Memory = std::vector<unsigned char>;

// What is asked of a sweep over the history.
struct Request {
  const char* name;
  bool forms_pair = false, with_difference = false, with_metric = false;
};

inline constexpr Request kRequests[] = {
    {.name = "dots alone"},
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

// One iteration's work on them, of the CPU or of a device, and what comes out.
class Side {
 public:
  Side(const Vectors& from, const Shape& shape, const Request& request, Storage value, Storage row,
       const std::vector<double>& coefficients)
      : vectors(from) {
    for (Memory& memory : vectors.y) y_rows_.push_back(memory.data());
    for (Memory& memory : vectors.s) s_rows_.push_back(memory.data());
    const History history{y_rows_.data(), s_rows_.data(), shape.count, row};
    const void* const metric = request.with_metric ? vectors.metric.data() : nullptr;
    const bool some = shape.count > 0;
    dots_task = {history,
                 shape.numel,
                 shape.numel,
                 value,
                 vectors.grad.data(),
                 metric,
                 request.with_difference && some,
                 request.forms_pair && some,
                 {0.5, 1.0, 1.0},
                 vectors.prev_grad.data(),
                 vectors.d.data()};
    combine_task = {history,
                    shape.numel,
                    shape.numel,
                    value,
                    vectors.grad.data(),
                    metric,
                    vectors.d.data(),
                    -0.7,
                    coefficients.data(),
                    coefficients.data() + shape.count};
    norms_task = {shape.numel, shape.numel, value, vectors.prev_grad.data(), nullptr};
    dots.assign(static_cast<size_t>(dots_task.sums()), -1.0);
  }

  void run_on_cpu(cpu::Isa isa) {
    const auto kernels = cpu::history_kernels_for(isa);
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

  Vectors vectors;
  HistoryDots dots_task;
  HistoryCombination combine_task;
  NormsOf norms_task;
  std::vector<double> dots;
  Norms combined{-1.0, -1.0, -1.0}, norms{-1.0, -1.0, -1.0};

 private:
  std::vector<void*> y_rows_, s_rows_;
};

}  // namespace optim_ext::history
