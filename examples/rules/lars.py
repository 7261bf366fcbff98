"""LARS (You, Gitman & Ginsburg 2017, arXiv:1708.03888, algorithm 1): every bit of optim_ext.LARS, whose learning rate stays
out of the momentum buffer."""

import optim_ext
from optim_ext.math import norm


@optim_ext.rule(state=("momentum_buffer",), check={"trust_coefficient": lambda coefficient: coefficient >= 0})
def LARS(
    param, grad, momentum_buffer, *, lr=1e-3, momentum=0.9, weight_decay=0.0, trust_coefficient=1e-3, eps=1e-8,
    nesterov=False,
):  # fmt: skip
    size, slope = norm(param), norm(grad)
    rate = trust_coefficient * size / (slope + weight_decay * size + eps) if size > 0 and slope > 0 else 1.0
    if weight_decay != 0:
        grad = grad + weight_decay * param
    grad = rate * grad
    momentum_buffer = momentum * momentum_buffer + grad
    return param - lr * (grad + momentum * momentum_buffer if nesterov else momentum_buffer), momentum_buffer
