"""Tiger (Su 2023, https://kexue.fm/archives/9512): the sign of a momentum, with one state."""

import optim_ext
from optim_ext.math import sign


@optim_ext.rule(state=("exp_avg",))
def Tiger(param, grad, exp_avg, *, lr=1e-3, beta=0.965, weight_decay=0.01):
    exp_avg = beta * exp_avg + (1 - beta) * grad
    return param * (1 - lr * weight_decay) - lr * sign(exp_avg), exp_avg
