"""MARS-AdamW (Yuan et al. 2024, arXiv:2411.10438, algorithm 2, approximate, without clipping by the norm of a tensor): AdamW
of gradients that are corrected by how they have changed."""

import optim_ext
from optim_ext.math import lerp, sqrt, where


@optim_ext.rule(state=("exp_avg", "exp_avg_sq", "last_grad"))
def MARS(
    param, grad, exp_avg, exp_avg_sq, last_grad, *, step,
    lr=3e-3, betas=(0.95, 0.99), gamma=0.025, eps=1e-8, weight_decay=0.0,
):  # fmt: skip
    change = where(step == 1, 0.0, grad - last_grad)
    corrected = grad + gamma * betas[0] / (1 - betas[0]) * change
    exp_avg = lerp(exp_avg, corrected, 1 - betas[0])
    exp_avg_sq = lerp(exp_avg_sq, corrected**2, 1 - betas[1])
    denom = sqrt(exp_avg_sq) / sqrt(1 - betas[1] ** step) + eps
    param = param * (1 - lr * weight_decay) - lr / (1 - betas[0] ** step) * (exp_avg / denom)
    return param, exp_avg, exp_avg_sq, grad
