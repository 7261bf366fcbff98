"""The frame of an optimizer around one formula, without anything that makes it fast."""

import torch


def as_real(tensor):
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


class Plain(torch.optim.Optimizer):
    """A subclass says how a parameter's state starts and how one parameter is updated, in tensor arithmetic."""

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":  # torch gives every optimizer a default for it
                    group.setdefault(name, value)
            for p in group["params"]:
                if "step" in self.state.get(p, {}):
                    self.state[p]["step"] = torch.as_tensor(float(self.state[p]["step"]))

    @torch.no_grad()
    def step(self, closure=None):
        """One step; the loss if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p].update(self.start(p, group))
                grad = as_real(p.grad)
                self.update(as_real(p), -grad if group["maximize"] else grad, self.state[p], group)
        return loss
