"""A training script with every public method, as a user's type checker sees it: ``make lint`` checks it with mypy and
pyright, both strict. ``assert_type`` says what each call has to return; nothing here is run."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import optim_ext
import optim_ext as optim
from optim_ext import GradPolicy, GroupNorms, GroupReport, NonFinite, explain, lr_scheduler, swa_utils, utils

model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
inputs = torch.randn(8, 4)


def loss_of_model() -> Tensor:
    loss: Tensor = model(inputs).square().mean()
    return loss


def evaluate() -> float:
    loss = loss_of_model()
    loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
    return float(loss)


def closure_of_lbfgs() -> Tensor:
    loss = loss_of_model()
    loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
    return loss


def every_class() -> list[optim.Optimizer]:
    params = list(model.parameters())
    groups: list[dict[str, Any]] = [{"params": params, "lr": 1e-3}, {"params": [inputs]}]
    return [
        optim.Adadelta(params, lr=1.0, rho=0.9, eps=1e-6),
        optim.Adafactor(params, lr=1e-2),
        optim.Adagrad(params, lr=1e-2, lr_decay=0.1),
        optim.Adam(params, lr=1e-3, betas=(0.9, 0.999), amsgrad=True),
        optim.Adamax(params, lr=1e-3),
        optim.AdamW(params, lr=torch.tensor(1e-3), weight_decay=0.1, fused=True),
        optim.ASGD(params),
        optim.LAMB(params, lr=1e-3, betas=(0.9, 0.99)),
        optim.LARS(params, lr=1e-3, momentum=0.9, nesterov=True),
        optim.Lion(params, lr=1e-4, weight_decay=0.1),
        optim.Muon(params, lr=1e-3),
        optim.NAdam(model.named_parameters()),
        optim.RAdam(groups),
        optim.RMSprop(params, centered=True),
        optim.Rprop(params),
        optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
        optim.SparseAdam(params),
    ]


def options_of_every_class() -> list[optim.Optimizer]:
    """Those that come with each constructor, as a type checker sees them: wrong ones are errors."""
    params = list(model.parameters())
    optim.AdamW(params, max_norm="1.0")  # type: ignore[arg-type]
    optim.AdamW(params, lr="fast")  # type: ignore[arg-type]
    optim.Lion(params, skip_nonfinit=True)  # type: ignore[call-arg]
    optim.LBFGS(params, param_precision="master")  # type: ignore[call-arg]
    return [
        optim.AdamW(params, 1e-3, max_norm=1.0, norm_type=math.inf, skip_nonfinite=True, skip_above=None),
        optim.SGD(params, lr=0.1, max_norm=None, param_precision="remainder"),
        optim.Adam(params, state_precision={"exp_avg": "q8"}, rounding_seed=1, min_q8_size=64),
        optim.LAMB(params, lr=1e-3, max_norm=1.0),
        optim.Muon(params, skip_above=10.0),
        optim.LBFGS(params, lr=1, skip_nonfinite=True),
    ]


def train(optimizer: optim.AdamW | optim.SGD | optim.Lion | optim.Muon | optim.SparseAdam) -> None:
    """What FusedStep gives to each class."""
    assert_type(optimizer.step(), None)
    assert_type(optimizer.step(evaluate), float)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    assert_type(optimizer.step(grads=gradients), None)
    optimizer.step(grads={"0.weight": inputs, "0.bias": None})
    optimizer.step(grads={inputs: inputs})
    optimizer.step(grads=torch.autograd.grad(loss_of_model(), list(model.parameters())))
    assert_type(optimizer.clip_grad_norm(1.0), Tensor)
    assert_type(optimizer.clip_grad_norm(1.0, norm_type=math.inf, error_if_nonfinite=True), Tensor)
    optimizer.zero_grad()
    optimizer.zero_grad(set_to_none=False)

    policy = optimizer.set_grad_policy(max_norm=1.0, norm_type=2.0, skip_nonfinite=True, skip_above=100.0)
    assert_type(policy.last_norm, Tensor | None)
    assert_type(policy.last_step_skipped, Tensor | None)
    assert_type(policy.skipped_steps, Tensor)
    optimizer.set_grad_policy(skip_nonfinite=True).skipped_steps.item()
    optimizer.set_grad_policy(skip_above=100.0).skipped_steps.item()
    assert_type(optimizer.set_grad_policy(), None)
    if optimizer.grad_policy is not None:
        assert_type(optimizer.grad_policy.max_norm, float | None)

    assert_type(optimizer.last_norm, Tensor | None)
    assert_type(optimizer.last_step_skipped, Tensor | None)
    assert_type(optimizer.skipped_steps, Tensor)
    assert_type(optimizer.find_nonfinite(), list[NonFinite])
    for found in optimizer.find_nonfinite():
        print(f"{found.parameter}: {found.grad + found.value}")
    with optimizer.measure_step() as norms:
        optimizer.step()
    assert_type(norms, list[GroupNorms])
    assert_type(norms[0].update / norms[0].param, Tensor)
    assert_type(norms[0].grad, Tensor)

    optimizer.load_state_dict(optimizer.state_dict(), copy=True)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": [inputs], "lr": 1e-2})
    optimizer.drop(inputs)
    optimizer.drop(model.parameters())
    optimizer.drop(["0.weight"])
    optimizer.drop(model.named_parameters())
    optimizer.param_groups[0]["lr"] = 0.5


def schedule(optimizer: optim.AdamW) -> None:
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    scheduler.step()
    optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10).step()


def average(optimizer: optim.Adam) -> None:
    decay = swa_utils.get_warmup_decay(0.9999)
    ema = swa_utils.AveragedModel(
        model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay), dtype=torch.float32, update_every=2, match="name"
    )
    optimizer.average_into(ema)
    optimizer.average_into(ema, model)
    optimizer.average_into(None)
    ema.update_parameters(model)
    ema.copy_to(model)
    with ema.swap_into(model) as swapped:
        assert_type(swapped, nn.Module)
    swa_utils.AveragedModel(model, avg_fn=swa_utils.get_ema_avg_fn(0.99))
    swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_swa_multi_avg_fn())
    swa_utils.AveragedModel(model, avg_fn=swa_utils.get_swa_avg_fn())
    swa_utils.get_power_decay(0.9)
    swa_utils.SWALR(optimizer, swa_lr=0.05).step()
    swa_utils.update_bn([inputs], ema)


def second_order() -> None:
    lbfgs = optim.LBFGS(
        model.parameters(),
        lr=1,
        max_iter=20,
        history_size=10,
        line_search_fn="strong_wolfe",
        strict_max_eval=True,
        recover=True,
        damping=0.2,
        history_dtype=torch.bfloat16,
        bounds=(0.0, None),
    )
    assert_type(lbfgs.step(closure_of_lbfgs), Tensor)
    assert_type(lbfgs.step(evaluate), float)
    lbfgs.load_state_dict(lbfgs.state_dict())


def look_at(optimizer: optim.Optimizer) -> None:
    for report in explain(optimizer):
        assert_type(report, GroupReport)
        print(f"{report.group}: {report.native}, {report.reason}")
    with utils.measure_step(optimizer) as norms:
        assert_type(norms, list[GroupNorms])
    assert_type(utils.find_nonfinite(optimizer), list[NonFinite])
    assert_type(utils.find_nonfinite(model.parameters()), list[NonFinite])
    assert_type(utils.find_nonfinite(model.named_parameters()), list[NonFinite])
    assert_type(optim_ext.build_info(), dict[str, Any])
    assert_type(optim_ext.__version__, str)


def clip() -> None:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert_type(utils.get_total_norm(grads, 2.0), Tensor)
    assert_type(utils.clip_grad_norm_(model.parameters(), 1.0), Tensor)
    assert_type(optim_ext.utils.clip_grad_value_(model.parameters(), 1.0), None)


def patched() -> None:
    assert_type(optim_ext.patch_torch(allow_existing=True), optim_ext.TorchPatch)
    with optim_ext.patch_torch() as patch:
        assert_type(patch, optim_ext.TorchPatch)
    assert_type(patch.undo(), None)


def clip_together(muon: optim.Muon, adamw: optim.AdamW) -> None:
    assert_type(utils.clip_optimizers([muon, adamw], 1.0, norm_type=math.inf), Tensor)
    assert_type(utils.share_grad_policy([muon, adamw], max_norm=1.0, skip_nonfinite=True), GradPolicy)


def as_torch_has_them() -> None:
    """The modules and functions of torch.optim's modules, and ours where torch's class is asked for."""
    from optim_ext.adam import Adam, adam
    from optim_ext.lr_scheduler import StepLR
    from optim_ext.optimizer import Optimizer

    optimizer: torch.optim.Adam = Adam(model.parameters())
    base: Optimizer = optimizer
    StepLR(base, 1).step()
    print(adam)
