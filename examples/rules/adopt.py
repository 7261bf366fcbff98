"""ADOPT (Taniguchi et al. 2024, arXiv:2411.02853, algorithm 2, clipped as its authors' code does): the second moment of the
steps before normalizes a gradient before it enters the momentum. The first step only looks."""

import optim_ext
from optim_ext.math import clamp, lerp, maximum, sqrt


@optim_ext.rule(state=("exp_avg", "exp_avg_sq"))
def ADOPT(param, grad, exp_avg, exp_avg_sq, *, step, lr=1e-3, betas=(0.9, 0.9999), eps=1e-6, weight_decay=0.0):
    limit = (step - 1) ** 0.25
    normed = clamp(grad / maximum(sqrt(exp_avg_sq), eps), -limit, limit)
    exp_avg = lerp(exp_avg, normed, 1 - betas[0])
    exp_avg_sq = grad * grad if step == 1 else lerp(exp_avg_sq, grad * grad, 1 - betas[1])
    return param * (1 - (lr * weight_decay if step > 1 else 0.0)) - lr * exp_avg, exp_avg, exp_avg_sq
