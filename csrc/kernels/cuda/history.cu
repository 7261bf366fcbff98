// The L-BFGS kernels. A group of kHistoryLanes threads sums one row over one tile, thread l taking elements l,
// l + kHistoryLanes, ...: the lanes of the CPU's vectors, added up in the same order, so the bits are the same. Not
// so for dot products of bf16 rows: the CPU gives element i of sixteen to lane i / 2, and the last bits may differ.
#include "history.h"

#include "../../device/kernel.h"
#include "../convert.h"

namespace optim_ext::cuda {

namespace {

constexpr int kBlock = 256;
constexpr int kGroups = kBlock / kHistoryLanes;  // rows or tiles that a block works on side by side

struct Bf16 {
  uint16_t bits;
};

OPTIM_EXT_DEVICE double as_double(double value) { return value; }
OPTIM_EXT_DEVICE double as_double(float value) { return value; }
OPTIM_EXT_DEVICE double as_double(Bf16 value) { return widen_bf16(value.bits); }

template <class T>
OPTIM_EXT_DEVICE void store(T* to, double value) {
  *to = static_cast<T>(value);
}
OPTIM_EXT_DEVICE void store(Bf16* to, double value) { to->bits = narrow_bf16(static_cast<float>(value)); }

// The sum over a group, in lane 0.
OPTIM_EXT_DEVICE double group_sum(double lane) {
  for (int apart = kHistoryLanes / 2; apart > 0; apart /= 2)
    lane += device::shuffle_down(~0u, lane, apart, kHistoryLanes);
  return lane;
}

OPTIM_EXT_DEVICE double group_largest(double lane) {
  for (int apart = kHistoryLanes / 2; apart > 0; apart /= 2) {
    lane = rules::larger(lane, device::shuffle_down(~0u, lane, apart, kHistoryLanes));
  }
  return lane;
}

OPTIM_EXT_DEVICE int tile_size(int64_t numel, int64_t start) {
  return static_cast<int>(numel - start < kHistoryTile ? numel - start : kHistoryTile);
}

template <class V, class Row>
OPTIM_EXT_KERNEL(kBlock)
form_pair(const HistoryDots task) {
  const int64_t i = device::block_x() * static_cast<int64_t>(kBlock) + device::thread_x();
  if (i >= task.numel) return;
  V y = static_cast<const V*>(task.prev_grad)[i], s = static_cast<const V*>(task.d)[i];
  task.pair(static_cast<const V*>(task.grad)[i], y, s);
  store(static_cast<Row*>(task.history.old_dirs[task.history.count - 1]) + i, y);
  store(static_cast<Row*>(task.history.old_stps[task.history.count - 1]) + i, s);
}

// Blocks along x are tiles, along y groups of rows: of old_dirs, then of old_stps.
template <class V, class Row, int kColumns>
OPTIM_EXT_KERNEL(kBlock)
dot_rows(const HistoryDots task, double* sums) {
  OPTIM_EXT_SHARED(vectors, double[kColumns][kHistoryTile]);
  const History& history = task.history;
  const int64_t start = device::block_x() * kHistoryTile;
  const int n = tile_size(task.numel, start);
  const unsigned row_blocks = device::blocks_y() / 2;
  const bool of_steps = device::block_y() >= row_blocks;
  for (int i = device::thread_x(); i < n; i += kBlock) {
    const double weight =
        task.metric == nullptr || of_steps ? 1.0 : as_double(static_cast<const V*>(task.metric)[start + i]);
    vectors[0][i] = as_double(static_cast<const V*>(task.grad)[start + i]) * weight;
    if constexpr (kColumns == 2) {
      vectors[1][i] = as_double(static_cast<const Row*>(history.old_dirs[history.count - 1])[start + i]) * weight;
    }
  }
  device::barrier();
  const int lane = device::thread_x() % kHistoryLanes;
  const int64_t r = (device::block_y() - (of_steps ? row_blocks : 0u)) * kGroups + device::thread_x() / kHistoryLanes;
  double lanes[kColumns] = {};
  if (r < history.count) {
    const Row* const row = static_cast<const Row*>((of_steps ? history.old_stps : history.old_dirs)[r]) + start;
#pragma unroll 8
    for (int i = lane; i < n; i += kHistoryLanes) {
      const double value = as_double(row[i]);
      for (int c = 0; c < kColumns; ++c) lanes[c] += value * vectors[c][i];
    }
  }
  for (int c = 0; c < kColumns; ++c) {
    const double sum = group_sum(lanes[c]);
    const int64_t at = (of_steps ? history.count : 0) + r;
    if (lane == 0 && r < history.count) sums[device::block_x() * task.sums() + at * kColumns + c] = sum;
  }
}

OPTIM_EXT_KERNEL(kBlock) total_sums(const double* sums, int64_t tiles, int64_t width, double* out) {
  const int64_t j = device::block_x() * static_cast<int64_t>(kBlock) + device::thread_x();
  if (j >= width) return;
  double total = 0.0;
#pragma unroll 8
  for (int64_t i = 0; i < tiles; ++i) total += sums[i * width + j];
  out[j] = total;
}

template <class V, class Row>
OPTIM_EXT_KERNEL(kBlock)
combine(const HistoryCombination task) {
  const int64_t i = device::block_x() * static_cast<int64_t>(kBlock) + device::thread_x();
  if (i >= task.numel) return;
  const History& history = task.history;
  double sum = task.grad_coefficient * as_double(static_cast<const V*>(task.grad)[i]);
#pragma unroll 8
  for (int64_t r = 0; r < history.count; ++r) {
    sum += task.y_coefficient[r] * as_double(static_cast<const Row*>(history.old_dirs[r])[i]);
  }
  if (task.metric != nullptr) sum *= as_double(static_cast<const V*>(task.metric)[i]);
#pragma unroll 8
  for (int64_t r = 0; r < history.count; ++r) {
    sum += task.s_coefficient[r] * as_double(static_cast<const Row*>(history.old_stps[r])[i]);
  }
  static_cast<V*>(task.d)[i] = static_cast<V>(sum);
}

// One group of threads for each tile.
template <class V>
OPTIM_EXT_KERNEL(kBlock)
norms_of_tiles(const NormsOf task, Norms* norms) {
  const int64_t tile = device::block_x() * static_cast<int64_t>(kGroups) + device::thread_x() / kHistoryLanes;
  const int64_t start = tile * kHistoryTile;
  const int lane = device::thread_x() % kHistoryLanes;
  const int n = start < task.numel ? tile_size(task.numel, start) : 0;
  double largest = 0.0, sum = 0.0, product = 0.0;
#pragma unroll 4
  for (int i = lane; i < n; i += kHistoryLanes) {
    const double value = as_double(static_cast<const V*>(task.vector)[start + i]);
    const double magnitude = fabs(value);
    largest = rules::larger(largest, magnitude);
    sum += magnitude;
    if (task.other != nullptr) product += value * as_double(static_cast<const V*>(task.other)[start + i]);
  }
  const Norms tile_norms{group_largest(largest), group_sum(sum), group_sum(product)};
  if (lane == 0 && n > 0) norms[tile] = tile_norms;
}

OPTIM_EXT_KERNEL(3) total_norms(const Norms* norms, int64_t tiles, Norms* out) {
  const double* const fields = reinterpret_cast<const double*>(norms);
  double all = 0.0;
#pragma unroll 8
  for (int64_t i = 0; i < tiles; ++i) {
    const double value = fields[3 * i + device::thread_x()];
    all = device::thread_x() == 0 ? rules::larger(all, value) : all + value;
  }
  reinterpret_cast<double*>(out)[device::thread_x()] = all;
}

int64_t blocks(int64_t count, int64_t per_block) { return (count + per_block - 1) / per_block; }

template <class V, class Row>
device::Status dots(const HistoryDots& task, double* sums, device::Stream stream) {
  device::Status error = device::kSuccess;
  if (task.forms_pair) {
    error = device::launch(&form_pair<V, Row>, {blocks(task.numel, kBlock)}, kBlock, stream, task);
  }
  if (error != device::kSuccess) return error;
  const auto kernel = task.with_difference ? &dot_rows<V, Row, 2> : &dot_rows<V, Row, 1>;
  const device::Grid grid{history_tiles(task.numel), 2 * blocks(task.history.count, kGroups)};
  return device::launch(kernel, grid, kBlock, stream, task, sums);
}

// What work says for a value of the vectors' type and one of the rows'.
template <class Work>
device::Status with_types(Storage value, Storage row, const Work& work) {
  if (value == Storage::f64) return row == Storage::bf16 ? work(double(), Bf16()) : work(double(), double());
  return row == Storage::bf16 ? work(float(), Bf16()) : work(float(), float());
}

}  // namespace

device::Status launch_history_dots(const HistoryDots& task, double* sums, double* out, device::Stream stream) {
  if (task.sums() == 0) return device::kSuccess;
  device::Status error = device::kSuccess;
  if (task.numel > 0) {
    error = with_types(task.value, task.history.storage,
                       [&]<class V, class Row>(V, Row) { return dots<V, Row>(task, sums, stream); });
  }
  if (error != device::kSuccess) return error;
  return device::launch(&total_sums, {blocks(task.sums(), kBlock)}, kBlock, stream, sums, history_tiles(task.counted),
                        task.sums(), out);
}

device::Status launch_history_combine(const HistoryCombination& task, Norms* norms, Norms* out, device::Stream stream) {
  device::Status error = device::kSuccess;
  if (task.numel > 0) {
    error = with_types(task.value, task.history.storage, [&]<class V, class Row>(V, Row) {
      return device::launch(&combine<V, Row>, {blocks(task.numel, kBlock)}, kBlock, stream, task);
    });
  }
  if (error != device::kSuccess) return error;
  return launch_norms({task.numel, task.counted, task.value, task.d, task.grad}, norms, out, stream);
}

device::Status launch_norms(const NormsOf& task, Norms* norms, Norms* out, device::Stream stream) {
  const int64_t tiles = history_tiles(task.counted);
  device::Status error = device::kSuccess;
  if (tiles > 0) {
    const auto kernel = task.value == Storage::f64 ? &norms_of_tiles<double> : &norms_of_tiles<float>;
    error = device::launch(kernel, {blocks(tiles, kGroups)}, kBlock, stream, task, norms);
  }
  if (error != device::kSuccess) return error;
  return device::launch(&total_norms, {1}, 3, stream, norms, tiles, out);
}

}  // namespace optim_ext::cuda
