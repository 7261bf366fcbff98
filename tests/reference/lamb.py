"""LAMB, algorithm 2 of You et al. 2020 (arXiv:1904.00962), with the identity for its scaling function."""

import torch

from reference.plain import Plain, as_real


class LAMB(Plain):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, *, maximize=False):
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        )

    def start(self, p, group):
        return {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
        }

    def update(self, p, grad, state, group):
        (beta1, beta2), m, v = group["betas"], as_real(state["exp_avg"]), as_real(state["exp_avg_sq"])
        state["step"] += 1
        t = state["step"].item()
        m.copy_(beta1 * m + (1 - beta1) * grad)
        v.copy_(beta2 * v + (1 - beta2) * grad * grad)
        update = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + group["eps"])
        if group["weight_decay"] != 0:
            update = update + group["weight_decay"] * p
        norms = p.double().norm().item(), update.double().norm().item()
        ratio = norms[0] / norms[1] if norms[0] > 0 and norms[1] > 0 else 1.0
        p.sub_(float(group["lr"]) * ratio * update)
