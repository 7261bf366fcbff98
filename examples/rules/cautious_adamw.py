"""Cautious AdamW (Liang et al. 2024, arXiv:2411.16085, algorithm 1, without its scaling by the share of what is left):
elements move only where the update agrees with the gradient."""

import optim_ext
from optim_ext.math import lerp, sqrt, where


@optim_ext.rule(state=("exp_avg", "exp_avg_sq"))
def CautiousAdamW(param, grad, exp_avg, exp_avg_sq, *, step, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    exp_avg = lerp(exp_avg, grad, 1 - betas[0])
    exp_avg_sq = lerp(exp_avg_sq, grad * grad, 1 - betas[1])
    update = exp_avg / (sqrt(exp_avg_sq) / sqrt(1 - betas[1] ** step) + eps)
    update = where(update * grad > 0, update, 0.0)
    return param * (1 - lr * weight_decay) - lr / (1 - betas[0] ** step) * update, exp_avg, exp_avg_sq
