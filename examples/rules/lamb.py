"""LAMB (You et al. 2020, arXiv:1904.00962, algorithm 2): every bit of optim_ext.LAMB."""

import optim_ext
from optim_ext.math import norm, sqrt


@optim_ext.rule(state=("exp_avg", "exp_avg_sq"))
def LAMB(param, grad, exp_avg, exp_avg_sq, *, step, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
    exp_avg = betas[0] * exp_avg + (1 - betas[0]) * grad
    exp_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * grad * grad
    denom = sqrt(exp_avg_sq) * (1 / sqrt(1 - betas[1] ** step)) + eps
    update = exp_avg * (1 / (1 - betas[0] ** step)) / denom
    if weight_decay != 0:
        update = update + weight_decay * param
    ratio = norm(param) / norm(update) if norm(param) > 0 and norm(update) > 0 else 1.0
    return param - lr * ratio * update, exp_avg, exp_avg_sq
