"""LARS, algorithm 1 of You, Gitman & Ginsburg 2017 (arXiv:1708.03888), the learning rate outside of the buffer."""

import torch

from reference.plain import Plain, as_real


class LARS(Plain):
    def __init__(
        self,
        params,
        lr=1e-3,
        momentum=0.9,
        weight_decay=0.0,
        trust_coefficient=1e-3,
        eps=1e-8,
        *,
        nesterov=False,
        maximize=False,
    ):
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient}
        super().__init__(params, {**options, "eps": eps, "nesterov": nesterov, "maximize": maximize})

    def start(self, p, group):
        return {"momentum_buffer": torch.zeros_like(p, memory_format=torch.preserve_format)}

    def update(self, p, grad, state, group):
        buffer, decay = as_real(state["momentum_buffer"]), group["weight_decay"]
        norms = p.double().norm().item(), grad.double().norm().item()
        rate = 1.0
        if norms[0] > 0 and norms[1] > 0:
            rate = group["trust_coefficient"] * norms[0] / (norms[1] + decay * norms[0] + group["eps"])
        if decay != 0:
            grad = grad + decay * p
        scaled = rate * grad
        buffer.copy_(group["momentum"] * buffer + scaled)
        p.sub_(float(group["lr"]) * (scaled + group["momentum"] * buffer if group["nesterov"] else buffer))
