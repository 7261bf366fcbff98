"""Schedule-Free SGD (Defazio et al. 2024, arXiv:2405.15682, equations 5 to 7, with warmup as in its appendix).

Parameters are where gradients are taken (y). What is to be evaluated (x) lies beyond: ``torch.lerp(y, z, 1 - 1 / beta)``.
"""

import optim_ext
from optim_ext.math import lerp, minimum


@optim_ext.rule(state={"z": "param"}, scalars={"weight_sum": 0.0})
def ScheduleFreeSGD(param, grad, z, weight_sum, *, step, lr=1.0, beta=0.9, warmup_steps=10, weight_decay=0.0):
    rate = lr * minimum(step / warmup_steps, 1.0)
    grad = grad + weight_decay * param
    weight_sum = weight_sum + rate**2
    weight = rate**2 / weight_sum
    param = lerp(param, z, weight) + rate * (beta * (1 - weight) - 1) * grad
    return param, z - rate * grad, weight_sum
