"""Sophia-G (Liu et al. 2023, arXiv:2305.14342, algorithm 3): a momentum, divided by an estimate of the curvature, clipped.

The estimate is made outside of the step, every ten steps or so, from gradients of a loss with sampled labels::

    for p in model.parameters():
        optimizer.state[p]["hessian"].lerp_(batch_size * p.grad**2, 1 - 0.99)
"""

import optim_ext
from optim_ext.math import lerp, minimum, sign


@optim_ext.rule(state=("exp_avg", "hessian"))
def SophiaG(param, grad, exp_avg, hessian, *, lr=1e-4, beta=0.965, rho=0.04, eps=1e-15, weight_decay=0.1):
    exp_avg = lerp(exp_avg, grad, 1 - beta)
    length = minimum(abs(exp_avg) / (rho * hessian + eps), 1.0)
    return param * (1 - lr * weight_decay) - lr * sign(exp_avg) * length, exp_avg, hessian
