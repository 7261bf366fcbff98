"""Grams (Cao et al. 2024, arXiv:2412.17107, algorithm 1): as far as Adam, in the direction of the gradient."""

import optim_ext
from optim_ext.math import lerp, sign, sqrt


@optim_ext.rule(state=("exp_avg", "exp_avg_sq"))
def Grams(param, grad, exp_avg, exp_avg_sq, *, step, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
    exp_avg = lerp(exp_avg, grad, 1 - betas[0])
    exp_avg_sq = lerp(exp_avg_sq, grad * grad, 1 - betas[1])
    update = exp_avg / (1 - betas[0] ** step) / (sqrt(exp_avg_sq) / sqrt(1 - betas[1] ** step) + eps)
    return param * (1 - lr * weight_decay) - lr * sign(grad) * abs(update), exp_avg, exp_avg_sq
