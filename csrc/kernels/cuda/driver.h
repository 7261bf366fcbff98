// The loop over the tensors of a call on a device, whoever owns the memory: torch's allocators in ops/, plain memory
// where the tests run it on the double. Tables are filled, kernels launched on one stream, nothing is waited for.
//
// Place says where a call runs:
//   stream, multiprocessors
//   capturing                    whatever is launched goes into a graph and is replayed when the call's memory is gone
//   Table(place, bytes)          memory for a table: host(), and send() gives its copy on the device
//   Scratch(bytes), data()       memory of the device for the length of the call
//   check(status), require(condition, message)    throw
//
// Call has the bundles, what happens to gradients on the way (pass), the device_hypers, and whether step counts live on
// the device (steps_on_device), and whether random words are drawn there (draws_on_device).
#pragma once

#include <algorithm>
#include <deque>
#include <initializer_list>
#include <utility>
#include <vector>

#include "history.h"
#include "launch.h"
#include "reduce_block.h"

namespace optim_ext::cuda {

template <class Place>
class Driver {
 public:
  explicit Driver(const Place& place) : place_(place) {}

  // One launch for all tensors computed in float and one for those in double, if there are any; and one for those that
  // are kept in another way than the rule sees them. While a graph is captured a table has to travel in the arguments,
  // so a call of hundreds of tensors becomes several launches.
  template <class Call>
  void run(const Program& program, const void* rule, const Call& call) const {
    if (call.steps_on_device) advance_counters(call);
    if (call.draws_on_device) advance_draws(call);
    Packed args;
    std::memcpy(args.rest, rule, static_cast<size_t>(program.shape.bytes));
    BatchHead& batch = args.batch;
    batch.controls = call.pass.on_device;
    batch.average_weight = call.pass.average_weight;
    Place::require(call.device_hypers.size() <= static_cast<size_t>(kMaxLiveHypers),
                   "optim_ext: more hyper-parameters on the device than a launch has room for");
    for (const auto& hyper : call.device_hypers) {
      batch.hypers[batch.hyper_count++] = {hyper.offset, hyper.value, hyper.storage};
    }
    for (const bool in_double : {false, true}) sweep(program, args, call, in_double, false);
    sweep(program, args, call, false, true);
  }
  template <class Rule, class Call>
  void run(const Rule& rule, const Call& call) const {
    alignas(8) unsigned char bytes[shape_of<Rule>().bytes] = {};
    std::memcpy(bytes, &rule, sizeof rule);
    run(program_of<Rule>(), bytes, call);
  }

  // Adds one to every step counter that lives on the device, unless the step is skipped there.
  template <class Call>
  void advance_counters(const Call& call) const {
    std::vector<void*> by_storage[2];  // floats, then doubles
    for (const Bundle& bundle : call.bundles) {
      if (bundle.device_step)
        by_storage[bundle.step_storage == Storage::f64].push_back(const_cast<void*>(bundle.device_step));
    }
    using Table = Counters<kArgumentBytes>;
    Table counters;
    counters.found_inf = call.pass.on_device.found_inf;
    counters.count = counters.floats = 0;
    const auto launch = [&] {
      Place::check(launch_advance(counters, place_.stream));
      counters.count = counters.floats = 0;
    };
    for (const auto& of_storage : by_storage) {
      for (void* counter : of_storage) {
        if (counters.count == Table::kRoom) launch();
        counters.counter[counters.count++] = counter;
        if (&of_storage == &by_storage[0]) counters.floats = counters.count;
      }
    }
    launch();
  }

  // The same for the draws of random words.
  template <class Call>
  void advance_draws(const Call& call) const {
    Counters<kArgumentBytes> counters;
    counters.found_inf = call.pass.on_device.found_inf;
    counters.count = counters.floats = 0;
    const auto launch = [&] {
      Place::check(launch_advance_draws(counters, place_.stream));
      counters.count = 0;
    };
    for (const Bundle& bundle : call.bundles) {
      if (bundle.companions == nullptr || bundle.companions->live_key == nullptr) continue;
      if (counters.count == counters.kRoom) launch();
      counters.counter[counters.count++] = &bundle.companions->live_key->draws;
    }
    launch();
  }

  // One result for all tensors of the call: a launch, unless a graph is captured and the table is long.
  template <class Reduction, class Call>
  void reduce_all(const Call& call, const NormOutcome& outcome) const {
    std::vector<const Bundle*> bundles;
    int64_t chunks = 0;
    double count = 0.0;
    for (const Bundle& bundle : call.bundles) {
      if (bundle.numel != 0) bundles.push_back(&bundle);
      chunks += reduce_chunks(bundle.numel);
      count += static_cast<double>(bundle.numel);
    }
    Place::require(chunks <= INT32_MAX, "optim_ext: more than 2^31 chunks of gradients");
    const typename Place::Scratch scratch((chunks * kReduceSlots + 1) * static_cast<int64_t>(sizeof(double)));
    auto* const finished = static_cast<unsigned*>(scratch.data());
    auto* slots = static_cast<double*>(scratch.data()) + 1;
    Place::check(device::zero(finished, sizeof(unsigned), place_.stream));
    using Job = ReduceJob<Reduction>;
    Packed args;
    args.batch.chunk = kReduceChunk;
    Job& job = args.put(Job{});
    job.finished = finished;
    job.blocks = static_cast<unsigned>(chunks);
    job.all_slots = slots;
    job.outcome = outcome;
    job.count = count;
    for_each_table(shape_of<Job>(), args, bundles, [&](int64_t of_table) {
      job.slots = slots;
      Place::check(launch_reduce<Reduction>(args.as<Job>(), of_table, place_.stream));
      slots += of_table * kReduceSlots;
    });
  }

  // One result per tensor.
  template <class Reduction, class Call>
  void reduce_each(const Call& call, double* results) const {
    std::vector<const Bundle*> bundles;
    int64_t chunks = 0;
    for (const Bundle& bundle : call.bundles) {
      bundles.push_back(&bundle);
      chunks += reduce_chunks(bundle.numel);
    }
    const WithTwins twins(bundles);
    const typename Place::Scratch scratch(chunks * kReduceSlots * static_cast<int64_t>(sizeof(double)));
    auto* slots = static_cast<double*>(scratch.data());
    using Job = ReduceJob<Reduction>;
    Packed args;
    args.batch.chunk = kReduceChunk;
    args.batch.kept = twins.any;
    Place::require(kReducesKept<Reduction> || !twins.any, "optim_ext: no kernel reduces what lies beside parameters");
    RuleShape shape = shape_of<Job>();
    shape.kept = twins.any;
    Job& job = args.put(Job{});
    for_each_table(shape, args, bundles, [&](int64_t of_table) {
      job.slots = slots;
      job.each = results;
      job.chunks = static_cast<int32_t>(of_table);
      Place::check(launch_reduce<Reduction>(args.as<Job>(), of_table, place_.stream));
      Place::check(launch_finish_each<Reduction>(args.as<Job>(), place_.stream));
      slots += of_table * kReduceSlots;
      results += args.batch.count;
    });
  }

  // The pieces of all fibers.
  template <class Reduction>
  void reduce_fibers(const std::vector<Fibers>& tensors) const {
    std::vector<Layout> layouts(tensors.size());
    std::vector<Bundle> all(tensors.size());
    std::vector<const Bundle*> bundles;
    int64_t threads = 0;
    for (size_t t = 0; t < tensors.size(); ++t) {
      all[t] = bundle_of(tensors[t], layouts[t]);
      bundles.push_back(&all[t]);
      threads += all[t].numel;
    }
    using Job = FiberJob<Reduction>;
    Packed args;
    args.batch.chunk = chunk_for(threads, place_.multiprocessors);
    args.put(Job{});
    for_each_table(shape_of<Job>(), args, bundles, [&](int64_t chunks) {
      Place::check(launch_fibers<Reduction>(args.as<Job>(), chunks, place_.stream));
    });
  }

  // The vectors of L-BFGS. The task's lists of rows and coefficients are on the host, `out` is on the device.
  void history_dots(HistoryDots task, double* out) const {
    const int64_t count = task.history.count;
    typename Place::Table table(place_, count > 0 ? 16 * count : 8);
    const unsigned char* const sent = send(table, {{task.history.old_dirs, count}, {task.history.old_stps, count}});
    task.history.old_dirs = rows_at(sent, 0);
    task.history.old_stps = rows_at(sent, count);
    const typename Place::Scratch sums(8 * task.sums() * history_tiles(task.numel));
    Place::check(launch_history_dots(task, static_cast<double*>(sums.data()), out, place_.stream));
  }

  void history_combine(HistoryCombination task, Norms* out) const {
    const int64_t count = task.history.count;
    typename Place::Table table(place_, count > 0 ? 32 * count : 8);
    const unsigned char* const sent = send(table, {{task.history.old_dirs, count},
                                                   {task.history.old_stps, count},
                                                   {task.y_coefficient, count},
                                                   {task.s_coefficient, count}});
    task.history.old_dirs = rows_at(sent, 0);
    task.history.old_stps = rows_at(sent, count);
    task.y_coefficient = reinterpret_cast<const double*>(sent) + 2 * count;
    task.s_coefficient = reinterpret_cast<const double*>(sent) + 3 * count;
    const typename Place::Scratch norms(static_cast<int64_t>(sizeof(Norms)) * history_tiles(task.numel));
    Place::check(launch_history_combine(task, static_cast<Norms*>(norms.data()), out, place_.stream));
  }

  void norms(const NormsOf& task, Norms* out) const {
    const typename Place::Scratch norms(static_cast<int64_t>(sizeof(Norms)) * history_tiles(task.numel));
    Place::check(launch_norms(task, static_cast<Norms*>(norms.data()), out, place_.stream));
  }

 private:
  // Where some parameters of a reduction have twins, all of them say so, and nothing else of what lies beside: it is
  // one of elements, not of positions.
  struct WithTwins {
    explicit WithTwins(std::vector<const Bundle*>& of)
        : any(std::any_of(of.begin(), of.end(), [](const Bundle* bundle) {
            return bundle->companions != nullptr && bundle->companions->precision != Precision::native;
          })) {
      for (const Bundle*& bundle : of) {
        if (!any) return;
        Companions& twin = companions.emplace_back();
        if (bundle->companions != nullptr) {
          twin.precision = bundle->companions->precision;
          twin.twin = bundle->companions->twin;
        }
        Bundle& with_twin = bundles.emplace_back(*bundle);
        with_twin.companions = &twin;
        bundle = &with_twin;
      }
    }
    WithTwins(const WithTwins&) = delete;

    const bool any;
    std::deque<Companions> companions;
    std::deque<Bundle> bundles;
  };

  template <class Call>
  void sweep(const Program& program, Packed& args, const Call& call, bool in_double, bool kept) const {
    std::vector<const Bundle*> bundles;
    bundles.reserve(call.bundles.size());
    int64_t elements = 0;
    args.batch.averaged = false;
    args.batch.kept = kept;
    for (const Bundle& bundle : call.bundles) {
      if (bundle.in_double != in_double || (bundle.companions != nullptr) != kept) continue;
      if (bundle.numel == 0 && !program.stores_scalars) continue;
      bundles.push_back(&bundle);
      elements += bundle.numel;
      args.batch.averaged |= bundle.average != nullptr;
    }
    args.batch.chunk = chunk_for(elements, place_.multiprocessors);
    RuleShape shape = program.shape;
    shape.kept = kept;
    for_each_table(shape, args, bundles, [&](int64_t chunks) {
      Place::check(program.sweep[in_double](program.of, args, chunks, place_.stream));
    });
  }

  // Launches with as few tables as hold all tensors.
  template <class Launch>
  void for_each_table(const RuleShape& rule, Packed& args, const std::vector<const Bundle*>& bundles,
                      const Launch& launch) const {
    const int64_t room = Packed::room(rule);
    const auto count = static_cast<int64_t>(bundles.size());
    for (int64_t done = 0; done < count;) {
      const Bundle* const* const next = bundles.data() + done;
      auto shape = fitting(rule, next, count - done, room);
      if (shape.count < count - done && !place_.capturing) {
        shape = fitting(rule, next, count - done, INT64_MAX);
        launch_remote(args, next, shape, launch);
      } else {
        launch_local(args, next, shape, launch);
      }
      done += shape.count;
    }
  }

  template <class Launch>
  void launch_local(Packed& args, const Bundle* const* bundles, const TableShape& shape, const Launch& launch) const {
    args.batch.count = static_cast<int32_t>(shape.count);
    args.batch.remote = nullptr;
    launch(fill_table(bundles, shape, args.batch.chunk, args.table(shape.rule)));
  }

  template <class Launch>
  void launch_remote(Packed& args, const Bundle* const* bundles, const TableShape& shape, const Launch& launch) const {
    typename Place::Table table(place_, shape.bytes());
    args.batch.count = static_cast<int32_t>(shape.count);
    const int64_t chunks = fill_table(bundles, shape, args.batch.chunk, table.host());
    args.batch.remote = table.send();
    launch(chunks);
  }

  // Sends what a task keeps on the host, one block of 8-byte values after the other, to the device.
  static const unsigned char* send(typename Place::Table& table,
                                   std::initializer_list<std::pair<const void*, int64_t>> blocks) {
    unsigned char* to = table.host();
    for (const auto& [data, count] : blocks) {
      if (count > 0) std::memcpy(to, data, static_cast<size_t>(8 * count));
      to += 8 * count;
    }
    return table.send();
  }

  static void* const* rows_at(const unsigned char* table, int64_t index) {
    return reinterpret_cast<void* const*>(table + 8 * index);
  }

  const Place& place_;
};

}  // namespace optim_ext::cuda
