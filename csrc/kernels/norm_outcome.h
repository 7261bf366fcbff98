// Where the outcome of a norm goes, and what it depends on besides the norm.
#pragma once

#include "../rules/norm.h"
#include "convert.h"

namespace optim_ext {

struct NormOutcome {
  rules::NormPolicy policy;
  const float* grad_scale;  // null: the gradients are not scaled
  const float* found_inf;   // null: nobody looked
  void* norm;               // float, or double if the policy says so
  double* grad_factor;
  float* skip;     // 1 or 0
  int64_t* skips;  // counts them; null: nobody wants to know

  OPTIM_EXT_HOST_DEVICE void write(double raw_norm) const {
    const rules::NormVerdict verdict =
        rules::judge(policy, raw_norm, grad_scale ? static_cast<double>(*grad_scale) : 1.0,
                     found_inf != nullptr && *found_inf == 1.0f);
    store_element<double>(norm, policy.in_double ? Storage::f64 : Storage::f32, 0, verdict.norm);
    *grad_factor = verdict.grad_factor;
    *skip = verdict.skip ? 1.0f : 0.0f;
    if (skips) *skips += verdict.skip;
  }
};

}  // namespace optim_ext
