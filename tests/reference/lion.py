"""Lion, algorithm 2 of Chen et al. 2023 (arXiv:2302.06675)."""

import torch


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, *, maximize=False):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, (beta1, beta2), decay = float(group["lr"]), group["betas"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                theta, grad, average = (
                    torch.view_as_real(t) if t.is_complex() else t for t in (p, p.grad, state["exp_avg"])
                )
                if group["maximize"]:
                    grad = -grad
                update = (average * beta1 + grad * (1 - beta1)).sign()
                theta.sub_(lr * (update + decay * theta))
                average.mul_(beta2).add_(grad, alpha=1 - beta2)
        return loss
