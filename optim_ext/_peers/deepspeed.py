"""DeepSpeed: ZeRO's state, as the universal checkpoint has it or as the processes have saved it (stages 1 and 2)."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optim_ext._peers.assembling import Found, assembled, check_optimizer
from optim_ext._step import FusedStep

_MASTER, _STEP = "fp32", "step"
_LAYOUTS = (
    "the folder of a universal checkpoint (python -m deepspeed.checkpoint.ds_to_universal makes it of any stage), or the "
    "contents of all *zero_pp_rank_*_optim_states.pt files of stage 1 or 2, in the order of the ranks"
)


def from_deepspeed(
    source: str | os.PathLike[str] | Sequence[Mapping[str, Any]], optimizer: FusedStep, *, step: int | None = None
) -> dict[str, Any]:
    """The state of an optimizer under DeepSpeed's ZeRO, as a state_dict that ``optimizer`` loads, with its float32
    masters: an optimizer with ``param_precision`` goes on from them.

    Load the model's weights before: a master that does not round to its parameter is older than that, and not used.

    Args:
        source: the folder of a universal checkpoint (it holds ``zero/``); or, of stage 1 and 2, what ``torch.load`` makes
            of each process's ``*zero_pp_rank_*_optim_states.pt``, in the order of the ranks (reading those needs DeepSpeed).
        optimizer: this package's optimizer of the same rule, made of ``model.named_parameters()``; it is not written to.
            Its options stay its own.
        step: how many steps there were, where the checkpoint does not say it (universal ones of older versions).

    Raises:
        TypeError: ``optimizer`` is none of this package's.
        ValueError: it has no names; another layout; a parameter that the checkpoint does not have, or has in another
            size; by the parameter's name.
    """
    check_optimizer("from_deepspeed", optimizer)
    by_name = {}
    for number, group in enumerate(optimizer.param_groups):
        if "param_names" not in group:
            raise ValueError(
                f"group {number} of this {type(optimizer).__name__} has no names, by which DeepSpeed keeps state: make it "
                "of model.named_parameters()"
            )
        for index, name in enumerate(group["param_names"]):
            by_name[name] = number, index, group["params"][index]
    if isinstance(source, (str, os.PathLike)):
        found = _of_folder(Path(source), by_name, step)
    elif isinstance(source, (list, tuple)) and source and all(isinstance(rank, Mapping) for rank in source):
        found = _of_ranks(source, by_name, step)
    else:
        raise ValueError(f"from_deepspeed takes {_LAYOUTS}; found {type(source).__name__}")
    missing = [name for name, (*_, p) in by_name.items() if name not in found and p.requires_grad]
    if missing:
        raise ValueError(
            f"the checkpoint has no state of parameter {missing[0]!r}; it has {', '.join(sorted(found)[:5])}"
        )
    return assembled(
        optimizer, {by_name[name][:2]: one for name, one in found.items() if name in by_name}, lambda _: {}
    )


def _of_folder(folder: Path, names: Mapping[str, Any], step: int | None) -> dict[str, Found]:
    zero = folder / "zero" if (folder / "zero").is_dir() else folder
    found = {}
    for name in names:
        files = {path.stem: path for path in (zero / name).glob("*.pt")}
        if files:
            values = {key: _load(path) for key, path in files.items()}
            counted = values.pop(_STEP, step)
            found[name] = Found(values, counted, values.pop(_MASTER, None))
    if not found:
        raise ValueError(f"{folder} has no folder for a parameter in zero/: from_deepspeed takes {_LAYOUTS}")
    return found


def _load(path: Path) -> Any:
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return loaded["param"] if isinstance(loaded, Mapping) else loaded


def _of_ranks(ranks: Sequence[Mapping[str, Any]], names: Mapping[str, Any], step: int | None) -> dict[str, Found]:
    """Each process has a part of one flat tensor for each group and key; which elements are whose it says itself."""
    parts: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    steps: dict[str, Any] = {}
    for rank, saved in enumerate(ranks):
        state = saved.get("optimizer_state_dict", saved)
        base = state.get("base_optimizer_state")
        needed = ("single_partition_of_fp32_groups", "param_slice_mappings")
        if not isinstance(base, Mapping) or any(key not in state for key in needed):
            has = ", ".join(map(repr, state))
            raise ValueError(f"what process {rank} has saved holds {has}: from_deepspeed takes {_LAYOUTS}")
        for number, mapping in enumerate(state["param_slice_mappings"]):
            flat = {key: value for key, value in base["state"].get(number, {}).items() if key != _STEP}
            flat[_MASTER] = state["single_partition_of_fp32_groups"][number]
            counted = base["state"].get(number, {}).get(_STEP, base["param_groups"][number].get(_STEP, step))
            for name, place in mapping.items():
                steps[name] = counted
                for key, value in flat.items():
                    parts[name][key].append(value.detach()[place.start : place.start + place.numel])
    found = {}
    for name, of_key in parts.items():
        if name not in names:
            continue
        p = names[name][-1]
        values = {}
        for key, pieces in of_key.items():
            whole = torch.cat([piece.cpu() for piece in pieces])
            if whole.numel() != p.numel():
                raise ValueError(
                    f"parameter {name!r}: its {key!r} has {whole.numel()} elements in what {len(ranks)} processes have "
                    f"saved, expected {p.numel()}: hand over those of all processes, in the order of their ranks"
                )
            values[key] = whole.view(p.shape)
        master = values.pop(_MASTER)
        found[name] = Found(values, steps[name], master)
    return found
