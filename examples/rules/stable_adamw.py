"""StableAdamW (Wortsman et al. 2023, arXiv:2304.13013, algorithm 2): AdamW, slower where the second moment lags behind."""

import optim_ext
from optim_ext.math import lerp, maximum, rms, sqrt


@optim_ext.rule(state=("exp_avg", "exp_avg_sq"))
def StableAdamW(
    param, grad, exp_avg, exp_avg_sq, *, step, lr=1e-3, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.01,
):  # fmt: skip
    exp_avg = lerp(exp_avg, grad, (1 - betas[0]) / (1 - betas[0] ** step))
    exp_avg_sq = lerp(exp_avg_sq, grad**2, (1 - betas[1]) / (1 - betas[1] ** step))
    rate = lr / maximum(1.0, rms(grad / maximum(sqrt(exp_avg_sq), eps)))
    return param * (1 - rate * weight_decay) - rate * (exp_avg / (sqrt(exp_avg_sq) + eps)), exp_avg, exp_avg_sq
