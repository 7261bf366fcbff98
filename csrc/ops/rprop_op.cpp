#include "drivers.h"
#include "ops.h"

namespace optim_ext::ops {

template <class Driver>
void rprop_(const Common& common, TensorList params, TensorList grads, TensorList prevs, TensorList step_sizes,
            TensorList state_steps, double etaminus, double etaplus, double step_size_min, double step_size_max,
            bool maximize) {
  rules::Rprop rule{};
  rule.maximize = maximize;
  const CallSpec spec{
      common, {{"params", params}, {"grads", grads}, {"prevs", prevs}, {"step_sizes", step_sizes}}, state_steps};
  run<Driver>(rule, spec,
              {{"etaminus", rule.etaminus, etaminus},
               {"etaplus", rule.etaplus, etaplus},
               {"step_size_min", rule.step_size_min, step_size_min},
               {"step_size_max", rule.step_size_max, step_size_max}});
}

OPTIM_EXT_INSTANTIATE_OP(rprop_)

}  // namespace optim_ext::ops
