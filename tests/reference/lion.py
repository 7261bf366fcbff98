"""Lion, algorithm 2 of Chen et al. 2023 (arXiv:2302.06675)."""

import torch

from reference.plain import Plain, as_real


class Lion(Plain):
    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, *, maximize=False):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})

    def start(self, p, group):
        return {"exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format)}

    def update(self, p, grad, state, group):
        (beta1, beta2), average, lr = group["betas"], as_real(state["exp_avg"]), float(group["lr"])
        update = (beta1 * average + (1 - beta1) * grad).sign()
        p.mul_(1 - lr * group["weight_decay"]).sub_(lr * update)
        average.copy_(beta2 * average + (1 - beta2) * grad)
