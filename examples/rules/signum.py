"""Signum (Bernstein et al. 2018, arXiv:1802.04434, algorithm 2): the sign of a momentum."""

import optim_ext
from optim_ext.math import sign


@optim_ext.rule(state=("momentum_buffer",))
def Signum(param, grad, momentum_buffer, *, lr=1e-3, momentum=0.9, weight_decay=0.0):
    momentum_buffer = momentum * momentum_buffer + (1 - momentum) * grad
    return param - lr * (sign(momentum_buffer) + weight_decay * param), momentum_buffer
