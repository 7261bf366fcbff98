"""apex: its fused optimizers, optimizers under amp, and FP16_Optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optim_ext._peers.assembling import MASTER, Found, assembled, check_layout, check_optimizer, each_entry
from optim_ext._step import FusedStep
from optim_ext._tables import TABLES

_LAYOUTS = (
    "the state_dict() of FusedAdam, FusedLAMB, FusedSGD, FusedAdagrad or of an optimizer under amp ('state', "
    "'param_groups'), or of FP16_Optimizer ('optimizer_state_dict', 'fp32_from_fp16'); gather sharded state "
    "(DistributedFusedAdam) into one of these first"
)
_NOT_OPTIONS = frozenset({"params", "step", "capturable", "foreach", "fused", "differentiable"})


def from_apex(
    state_dict: Mapping[str, Any],
    optimizer: FusedStep,
    *,
    masters: Iterable[Tensor] | None = None,
    step: int | None = None,
) -> dict[str, Any]:
    """The state of an optimizer of apex, as a state_dict that ``optimizer`` loads, with its float32 masters where there
    are any: an optimizer with ``param_precision`` goes on from them. apex itself is not needed.

    Load the model's weights before: a master that does not round to its parameter is older than that, and not used.

    Args:
        state_dict: what ``state_dict()`` returned, of ``FusedAdam``, ``FusedLAMB``, ``FusedSGD``, ``FusedAdagrad``, of an
            optimizer that ``amp.initialize`` has had, or of ``FP16_Optimizer``.
        optimizer: this package's optimizer of the same rule over the same parameters in the same groups; it is not
            written to. Options that the checkpoint has not stay its own.
        masters: one for each parameter in order, as ``amp.master_params(optimizer)`` yields them: under amp they are no
            part of the state_dict.
        step: how many steps there were, where the checkpoint does not say it (``FusedAdagrad``).

    Raises:
        TypeError: ``optimizer`` is none of this package's.
        ValueError: another layout, other parameters, ``bias_correction=False``; by the parameter's name where it is about
            one.
    """
    check_optimizer("from_apex", optimizer)
    by_place: dict[tuple[int, int], Tensor] = {}
    if isinstance(state_dict, Mapping) and {"optimizer_state_dict", "fp32_from_fp16"} <= state_dict.keys():
        by_place = _masters_of_halves(optimizer, state_dict["fp32_from_fp16"])
        state_dict = state_dict["optimizer_state_dict"]
    check_layout("from_apex", state_dict, _LAYOUTS)
    if masters is not None:
        by_place |= _masters_of_all(optimizer, list(masters))
    found = {place: Found(master=master) for place, master in by_place.items()}
    for number, index, group, entry in each_entry(optimizer, state_dict):
        if not group.get("bias_correction", True):
            raise ValueError(
                f"group {number} of the checkpoint has bias_correction=False: {type(optimizer).__name__} corrects always"
            )
        where = optimizer._described(optimizer.param_groups[number], index)
        values = {key: value for key, value in entry.items() if isinstance(value, Tensor) and key != "step"}
        master = values.pop(MASTER, by_place.get((number, index)))
        if unknown := values.keys() - TABLES[optimizer._op].places.keys():
            raise ValueError(
                f"{where}: the checkpoint has {min(unknown)!r}, which {type(optimizer).__name__} does not keep; "
                f"from_apex takes {_LAYOUTS}"
            )
        found[number, index] = Found(values, entry.get("step", group.get("step", step)), master)
    groups = state_dict["param_groups"]
    return assembled(
        optimizer,
        found,
        lambda number: {name: value for name, value in groups[number].items() if name not in _NOT_OPTIONS},
    )


def _masters_of_all(optimizer: FusedStep, masters: Sequence[Tensor]) -> dict[tuple[int, int], Tensor]:
    places = [
        (number, index) for number, group in enumerate(optimizer.param_groups) for index in range(len(group["params"]))
    ]
    if len(places) != len(masters):
        raise ValueError(f"masters has {len(masters)} tensors, expected one for each of {len(places)} parameters")
    return dict(zip(places, masters, strict=True))


def _masters_of_halves(optimizer: FusedStep, of_groups: Sequence[Sequence[Tensor]]) -> dict[tuple[int, int], Tensor]:
    """FP16_Optimizer lists, group by group, the masters of those parameters that have 16 bits."""
    found = {}
    if len(of_groups) != len(optimizer.param_groups):
        raise ValueError(
            f"fp32_from_fp16 has {len(of_groups)} groups, and this {type(optimizer).__name__} "
            f"{len(optimizer.param_groups)}: make it with the same groups"
        )
    for number, (group, masters) in enumerate(zip(optimizer.param_groups, of_groups, strict=True)):
        halves = [index for index, p in enumerate(group["params"]) if p.dtype in (torch.float16, torch.bfloat16)]
        if len(halves) != len(masters):
            raise ValueError(
                f"fp32_from_fp16 has {len(masters)} masters for group {number}, which has {len(halves)} parameters of 16 "
                "bits: convert the model before the optimizer is made"
            )
        found.update({(number, index): master for index, master in zip(halves, masters, strict=True)})
    return found
