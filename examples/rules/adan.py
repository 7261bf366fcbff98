"""Adan (Xie et al. 2022, arXiv:2208.06677, algorithm 1): Nesterov momentum from differences of gradients."""

import optim_ext
from optim_ext.math import lerp, sqrt, where


@optim_ext.rule(state=("exp_avg", "exp_avg_diff", "exp_avg_sq", "last_grad"))
def Adan(
    param, grad, exp_avg, exp_avg_diff, exp_avg_sq, last_grad, *, step,
    lr=1e-3, betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=0.0,
):  # fmt: skip
    beta1, beta2, beta3 = betas
    diff = where(step == 1, 0.0, grad - last_grad)
    exp_avg = lerp(exp_avg, grad, 1 - beta1)
    exp_avg_diff = lerp(exp_avg_diff, diff, 1 - beta2)
    exp_avg_sq = lerp(exp_avg_sq, (grad + beta2 * diff) ** 2, 1 - beta3)
    denom = sqrt(exp_avg_sq) / sqrt(1 - beta3**step) + eps
    update = (exp_avg / (1 - beta1**step) + beta2 / (1 - beta2**step) * exp_avg_diff) / denom
    return (param - lr * update) / (1 + lr * weight_decay), exp_avg, exp_avg_diff, exp_avg_sq, grad
