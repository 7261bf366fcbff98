"""QHAdam (Ma and Yarats 2018, arXiv:1810.06801, section 4): averages of the moments with what is new."""

import optim_ext
from optim_ext.math import lerp, sqrt


@optim_ext.rule(state=("exp_avg", "exp_avg_sq"))
def QHAdam(param, grad, exp_avg, exp_avg_sq, *, step, lr=1e-3, betas=(0.995, 0.999), nus=(0.7, 1.0), eps=1e-8):
    exp_avg = lerp(exp_avg, grad, 1 - betas[0])
    exp_avg_sq = lerp(exp_avg_sq, grad * grad, 1 - betas[1])
    over = (1 - nus[0]) * grad + nus[0] / (1 - betas[0] ** step) * exp_avg
    under = (1 - nus[1]) * grad * grad + nus[1] / (1 - betas[1] ** step) * exp_avg_sq
    return param - lr * (over / (sqrt(under) + eps)), exp_avg, exp_avg_sq
