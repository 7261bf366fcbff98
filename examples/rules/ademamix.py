"""AdEMAMix (Pagliardini et al. 2024, arXiv:2409.03137, algorithm 1): a fast and a slow momentum; the slow one comes in over
``warmup`` steps, if there are any."""

import optim_ext
from optim_ext.math import exp, lerp, log, minimum, sqrt


@optim_ext.rule(state=("exp_avg", "exp_avg_slow", "exp_avg_sq"), check={"alpha": lambda alpha: alpha >= 0})
def AdEMAMix(
    param, grad, exp_avg, exp_avg_slow, exp_avg_sq, *, step,
    lr=1e-3, betas=(0.9, 0.999, 0.9999), alpha=5.0, warmup=0, eps=1e-8, weight_decay=0.0,
):  # fmt: skip
    beta1, beta2, beta3 = betas
    if warmup > 0:
        done = minimum(step / warmup, 1.0)
        alpha = alpha * done
        beta3 = minimum(exp(log(beta1) * log(beta3) / ((1 - done) * log(beta3) + done * log(beta1))), beta3)
    exp_avg, exp_avg_slow = lerp(exp_avg, grad, 1 - beta1), lerp(exp_avg_slow, grad, 1 - beta3)
    exp_avg_sq = lerp(exp_avg_sq, grad * grad, 1 - beta2)
    denom = sqrt(exp_avg_sq) / sqrt(1 - beta2**step) + eps
    param = param * (1 - lr * weight_decay) - lr * ((exp_avg / (1 - beta1**step) + alpha * exp_avg_slow) / denom)
    return param, exp_avg, exp_avg_slow, exp_avg_sq
