"""AdaBelief (Zhuang et al. 2020, arXiv:2010.07468, algorithm 2): Adam whose second moment is that of the surprise."""

import optim_ext
from optim_ext.math import sqrt


@optim_ext.rule(state=("exp_avg", "exp_avg_var"))
def AdaBelief(param, grad, exp_avg, exp_avg_var, *, step, lr=1e-3, betas=(0.9, 0.999), eps=1e-16, weight_decay=0.0):
    beta1, beta2 = betas
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_var = beta2 * exp_avg_var + (1 - beta2) * (grad - exp_avg) ** 2 + eps
    denom = sqrt(exp_avg_var) / sqrt(1 - beta2**step) + eps
    return param * (1 - lr * weight_decay) - lr / (1 - beta1**step) * (exp_avg / denom), exp_avg, exp_avg_var
