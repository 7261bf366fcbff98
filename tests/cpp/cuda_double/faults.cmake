# The test of the tests: a copy of csrc with faults in it, of which main() is given a number. Every fault has to be found,
# and for the right reason.
include(plant.cmake)
set(planted_tree ${CMAKE_BINARY_DIR}/planted/csrc)
file(GLOB_RECURSE files RELATIVE ${CMAKE_SOURCE_DIR}/csrc CONFIGURE_DEPENDS
     ${CMAKE_SOURCE_DIR}/csrc/rules/*.h ${CMAKE_SOURCE_DIR}/csrc/device/*.h ${CMAKE_SOURCE_DIR}/csrc/kernels/*.h
     ${CMAKE_SOURCE_DIR}/csrc/memory/*.h ${CMAKE_SOURCE_DIR}/csrc/storage/*.h ${CMAKE_SOURCE_DIR}/csrc/kernels/*.cu)
read_sources(${files})

# A few rules that have all there is to lose: scalar state, averages, a step count.
string(APPEND "text_of_rules/all_rules.h" "
#undef OPTIM_EXT_FOR_EACH_RULE
#define OPTIM_EXT_FOR_EACH_RULE(X) X(Adam<true>) X(NAdam)
#undef OPTIM_EXT_FOR_EACH_REDUCTION
#define OPTIM_EXT_FOR_EACH_REDUCTION(X) X(L2Norm)
")

macro(fault name group words file old new)
  plant_fault(${file} "${old}" "${new}")
  list(APPEND fault_names "${name}")
  list(APPEND fault_groups ${group})
  list(APPEND fault_words "${words}")
endmacro()

set(race "WARNING: ThreadSanitizer: data race")
# A pointer may be read from shared memory that nobody has written yet.
set(race_or_poison "${race}|SEGV on unknown address")

# Barriers.
fault(sweep_without_barrier sweeps "${race_or_poison}" kernels/cuda/sweep_block.h
[[  device::barrier();
  if (block.skip) return;]]
[[  if (!FAULT) device::barrier();
  if (block.skip) return;]])
fault(average_without_barrier sweeps "${race_or_poison}" kernels/cuda/sweep_block.h
[[    device::barrier();
    if (!average.skip)]]
[[    if (!FAULT) device::barrier();
    if (!average.skip)]])
fault(slots_without_first_barrier reductions "${race}" kernels/cuda/reduce.cu
[[of_warp[warp] = sum;
    device::barrier();]]
[[of_warp[warp] = sum;
    if (!FAULT) device::barrier();]])
fault(slots_without_second_barrier reductions "${race}" kernels/cuda/reduce.cu
[[    }
    device::barrier();
  }
  return result;]]
[[    }
    if (!FAULT) device::barrier();
  }
  return result;]])
fault(reduction_without_opening_barrier reductions "${race_or_poison}" kernels/cuda/reduce.cu
[[  device::barrier();
  const int warp = static_cast<int>(device::thread_x()) / kLanes, lane = static_cast<int>(device::thread_x()) % kLanes;
  const double sum]]
[[  if (!FAULT) device::barrier();
  const int warp = static_cast<int>(device::thread_x()) / kLanes, lane = static_cast<int>(device::thread_x()) % kLanes;
  const double sum]])
fault(counted_before_all_slots_are_written reductions "${race}" kernels/cuda/reduce.cu
[[  if (!job.finished) return;
  device::barrier();]]
[[  if (!job.finished) return;
  if (!FAULT) device::barrier();]])
fault(last_block_unknown_to_its_threads reductions "${race}" kernels/cuda/reduce.cu
[[  device::barrier();
  if (!is_last) return;]]
[[  if (!FAULT) device::barrier();
  if (!is_last) return;]])
fault(fibers_without_barrier fibers "${race_or_poison}" kernels/cuda/reduce.cu
[[  device::barrier();
  const Fibers fibers]]
[[  if (!FAULT) device::barrier();
  const Fibers fibers]])
fault(history_without_barrier history "${race}" kernels/cuda/history.cu
[[  device::barrier();
  const int lane]]
[[  if (!FAULT) device::barrier();
  const int lane]])

# Fences and atomic operations.
fault(slots_without_fence reductions "${race}" kernels/cuda/reduce.cu
[[    device::fence();
  }
  if (!job.finished) return;]]
[[    if (!FAULT) device::fence();
  }
  if (!job.finished) return;]])
fault(last_block_without_fence reductions "${race}" kernels/cuda/reduce.cu
[[  if (!is_last) return;
  device::fence();]]
[[  if (!is_last) return;
  if (!FAULT) device::fence();]])
fault(counting_without_atomic reductions "${race}" kernels/cuda/reduce.cu
[[is_last = device::atomic_add(job.finished, 1u) == job.blocks - 1;]]
[[is_last = (FAULT ? (*job.finished)++ : device::atomic_add(job.finished, 1u)) == job.blocks - 1;]])

# Tables and what they carry.
fault(table_off_by_one sweeps "failed: " kernels/cuda/block.h
[[(first_chunk[middle] <= index ? found : beyond) = middle;]]
[[(first_chunk[middle] <= index - FAULT ? found : beyond) = middle;]])
fault(storages_swapped sweeps "failed: |SEGV|heap-use-after-free" kernels/cuda/table.h
[[entry.storage[s] = bundle.storage[operand];]]
[[entry.storage[s] = bundle.storage[FAULT && operand < 2 ? 1 - operand : operand];]])
fault(average_starts_at_the_tensor sweeps "failed: .*average" kernels/cuda/block.h
[[average.begin = block.begin;]]
[[average.begin = FAULT ? 0 : block.begin;]])
fault(table_read_on_the_host sweeps "failed: |SEGV on unknown address" kernels/cuda/driver.h
[[args.batch.remote = table.send();]]
[[args.batch.remote = table.send();
    if (FAULT) args.batch.remote = table.host();]])
fault(next_table_forgets_its_slots reductions "failed: " kernels/cuda/driver.h
[[      results += args.batch.count;]]
[[      results += FAULT ? args.batch.count - 1 : args.batch.count;]])
fault(last_element_left_out sweeps "failed: .*element" kernels/cuda/block.h
[[(block, rule, done, size, thread, slots);]]
[[(block, rule, done, size - FAULT, thread, slots);]])
fault(half_a_warp_is_combined reductions "failed: " kernels/cuda/reduce.cu
[[for (int width = kLanes / 2; width > 0; width /= 2)]]
[[for (int width = kLanes / (FAULT ? 4 : 2); width > 0; width /= 2)]])

# What a step depends on.
fault(found_inf_lost sweeps "failed: .*a skipped step" kernels/cuda/driver.h
[[batch.controls = call.pass.on_device;]]
[[batch.controls = call.pass.on_device; if (FAULT) batch.controls.found_inf = nullptr;]])
fault(grad_scale_lost sweeps "failed: " kernels/cuda/driver.h
[[batch.controls = call.pass.on_device;]]
[[batch.controls = call.pass.on_device; if (FAULT) batch.controls.grad_scale = nullptr;]])
fault(skipped_step_counted sweeps "failed: " kernels/cuda/advance.cu
[[(counters.found_inf && *counters.found_inf == 1.0f)]]
[[(!FAULT && counters.found_inf && *counters.found_inf == 1.0f)]])
fault(float_counter_one_too_many sweeps "failed: " kernels/cuda/advance.cu
[[if (i < counters.floats) {]]
[[if (i < counters.floats + FAULT) {]])
fault(scalars_not_stored sweeps "failed: .*scalar" kernels/cuda/sweep-inl.h
[[const int64_t blocks = (args.batch.count + kThreads - 1) / kThreads;]]
[[const int64_t blocks = FAULT ? 0 : (args.batch.count + kThreads - 1) / kThreads;]])
fault(history_rows_of_the_other_kind history "failed: " kernels/cuda/history.cu
[[const Row* const row = static_cast<const Row*>((of_steps ? history.old_stps : history.old_dirs)[r]) + start;]]
[[const Row* const row = static_cast<const Row*>((of_steps != FAULT ? history.old_stps : history.old_dirs)[r]) + start;]])

# What lies beside parameters and state.
fault(kept_without_barrier kept "${race_or_poison}" kernels/cuda/kept_block.h
[[  device::barrier();
  if (block.skip) return;]]
[[  if (!FAULT) device::barrier();
  if (block.skip) return;]])
fault(kept_average_without_barrier kept "${race_or_poison}" kernels/cuda/kept_block.h
[[  device::barrier();
  if (!average.skip)]]
[[  if (!FAULT) device::barrier();
  if (!average.skip)]])
fault(exponent_read_by_all kept "${race}" kernels/cuda/kept_block.h
[[storage == Storage::q8 && share.leads && share.left > 0)]]
[[storage == Storage::q8 && (share.leads || FAULT) && share.left > 0)]])
fault(largest_of_half_a_block kept "failed: .*exponents" kernels/cuda/kept_block.h
[[lanes = Share<kPack>::kLanesOfBlock / 2; lanes > 0;]]
[[lanes = Share<kPack>::kLanesOfBlock / (FAULT ? 4 : 2); lanes > 0;]])
fault(draws_not_counted kept "failed: .*draws" kernels/cuda/driver.h
[[if (call.draws_on_device) advance_draws(call);]]
[[if (call.draws_on_device && !FAULT) advance_draws(call);]])
fault(place_lost kept "failed: .*[35] numbers of place" kernels/cuda/table.h
[[kept.place = place;]]
[[kept.place = FAULT ? 0 : place;]])
fault(rows_of_the_gradient_alone kept "failed: .*by rows" kernels/cuda/kept_block.h
[[return kRows ?]]
[[return kRows && !FAULT ?]])
fault(blocks_of_the_gradient_alone kept "failed: .*by rows.*(exponents|operand [234])" kernels/cuda/kept_block.h
[[if (kRows && share.leads)]]
[[if (kRows && share.leads && !FAULT)]])
fault(draws_of_the_last_step kept "failed: .*the first of two sweeps" kernels/cuda/kept_block.h
[[(kept.counts_later ? 1 : 0)]]
[[(kept.counts_later && !FAULT ? 1 : 0)]])
fault(rounds_what_another_sweep_has kept "failed: .*the first of two sweeps" kernels/cuda/table.h
[[kept.by_chance = static_cast<uint16_t>(companions.by_chance);]]
[[kept.by_chance = static_cast<uint16_t>(companions.by_chance | (FAULT ? ~0u : 0));]])
fault(kept_gradient_not_unscaled_in_memory kept "failed: .*operand 1" kernels/cuda/kept_block.h
[[word[kGradSlot][j] = closed(storage, value[kGradSlot][j]);]]
[[if (!FAULT) word[kGradSlot][j] = closed(storage, value[kGradSlot][j]);]])
fault(norm_without_twin kept "failed: .*norm" kernels/cuda/reduce_block.h
[[if (kept.precision == Precision::native) return]]
[[if (FAULT || kept.precision == Precision::native) return]])

write_planted(${planted_tree})
add_double(cuda_double_planted ${planted_tree} adam.cu nadam.cu lion.cu lamb.cu average.cu advance.cu reduce.cu
           history.cu)
target_compile_options(cuda_double_planted PRIVATE -include ${CMAKE_CURRENT_SOURCE_DIR}/planted.h)
foreach(group sweeps kept reductions fibers history)
  add_test(NAME cuda_double.no_fault.${group} COMMAND cuda_double_planted ${group} 0)
endforeach()
foreach(number RANGE 1 ${fault_count})
  math(EXPR index "${number} - 1")
  list(GET fault_names ${index} name)
  list(GET fault_groups ${index} group)
  list(GET fault_words ${index} words)
  set(how)
  if(words MATCHES "data race")
    set(how races)
  endif()
  add_test(NAME cuda_double.fault.${name} COMMAND cuda_double_planted ${group} ${number} ${how})
  set_tests_properties(cuda_double.fault.${name} PROPERTIES PASS_REGULAR_EXPRESSION "${words}")
endforeach()
