"""What a process has of an optimizer's DTensors, seen as plain groups and state that a step works on."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Container, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optim_ext import _sharding
from optim_ext._load import _C
from optim_ext._precision import parts, values
from optim_ext._precision.options import PLACE, ROUNDING_KEY, SCALE
from optim_ext._step.base import Group
from optim_ext._step.owners import Owners
from optim_ext._step.whole_norms import WholeNorms
from optim_ext._tables import TABLES

if TYPE_CHECKING:
    from optim_ext._step.sharded import ShardedStep


def why_whole(optimizer: ShardedStep, group: Group) -> str | None:
    """Why the DTensors of a group are not seen by their local tensors, but left to torch; None if they are.

    Raises:
        RuntimeError: a parameter is a sum that has not been made (Partial), which nobody can step.
    """
    seen: set[int] = set()
    for index, p in enumerate(group["params"]):
        if not _sharding.is_dtensor(p):
            continue
        name, spec = optimizer._described(group, index), p._spec
        _sharding.refuse_partial(spec, name)
        local = _sharding.local_part(p)
        if local is None:
            return f"{name}: its local tensor is a {type(p._local_tensor).__name__}, which has operations of its own"
        if group.get("differentiable"):
            return f"{name}: it is a DTensor, and differentiable=True records its step"
        if not optimizer._takes_dense:
            return f"{name}: it is a DTensor, whose gradient is not sparse"
        if id(local) in seen and sum(p is other for other in group["params"]) == 1:
            return f"{name}: it shares its local tensor with another DTensor"
        seen.add(id(local))
    return None


class LocalView:
    """Plain groups and state in the place of an optimizer's, some of whose parameters are DTensors.

    Made for the objects that the optimizer has, and good as long as it has them. Between steps the stand-ins are without
    memory; what a step was given for gradients of another layout is kept for the next one with the same gradients, as
    long as those are there.
    """

    def __init__(self, optimizer: ShardedStep, lent: dict[int, Lent] | None):
        self.plan: Any = None  # on what is seen here
        self.written = self.has_made_state = False
        self.lent: dict[int, Lent] = lent or {}  # by the identity of the gradient
        self.groups: list[Group] = []
        self.whole_groups: list[Group] = []  # the optimizer's own, while it has those of the view
        # DTensors that have a stand-in, which are not kept alive: the optimizer has them as long as this view is good.
        self.wholes: list[weakref.ref[Any]] = []
        self.names: list[str] = []
        self._stand_ins: dict[int, Tensor] = {}  # by the identity of the DTensor
        self._whole_of: dict[Tensor, weakref.ref[Any]] = {}
        for group in optimizer.param_groups:
            params = group["params"]
            if _sharding.holds_dtensors([group]) and why_whole(optimizer, group) is None:
                params = [self._stand_in_for(optimizer, group, index) for index in range(len(params))]
            self.groups.append({**group, "params": list(params)})
        self.state: defaultdict[Any, Any] = defaultdict(dict)
        self.scalars = TABLES[optimizer._op].scalar_state
        self.copies: dict[Tensor, set[str]] = {}  # by stand-in the keys of state of which every process has the whole
        self._note(optimizer)
        self._spread_norm: _sharding.SpreadNorm | None = None
        self.owners = Owners(optimizer, self)
        self._measured: list[bool] = []  # by group
        self.norms: WholeNorms | None = None  # of parts, where the rule takes norms

    def whole_of(self, p: Tensor) -> Any:
        """The DTensor that a tensor stands in for, or None."""
        return self._whole_of[p]() if p in self._whole_of else None

    def name_of(self, p: Tensor) -> str:
        return next(name for stand_in, name in zip(self._whole_of, self.names, strict=True) if stand_in is p)

    def _stand_in_for(self, optimizer: ShardedStep, group: Group, index: int) -> Tensor:
        p = group["params"][index]
        if not _sharding.is_dtensor(p):
            return p  # type: ignore[no-any-return]
        if id(p) not in self._stand_ins:
            self._stand_ins[id(p)] = stand_in = _stand_in(p)
            self.wholes.append(weakref.ref(p))
            self.names.append(optimizer._described(group, index))
            self._whole_of[stand_in] = self.wholes[-1]
        return self._stand_ins[id(p)]

    def _note(self, optimizer: ShardedStep) -> None:
        """What the optimizer's state has, seen from here; entries of plain parameters are its own."""
        others = []
        entries: dict[Any, Any] = {}
        self._known: dict[int, Tensor] = {}  # what DTensors of the state are seen as, by their identity
        names = dict(zip(self._stand_ins, self.names, strict=True))
        for p, entry in optimizer.state.items():
            stand_in = self._stand_ins.get(id(p))
            if stand_in is None:
                entries[p] = entry
                continue
            seen = self.state[stand_in] if stand_in in self.state else {}
            for key, value in entry.items():
                part, stands_in = self._seen_value(names[id(p)], p, key, value, seen.get(key))
                seen[key] = part
                if part is not value:
                    self._known[id(value)] = part
                if stands_in:
                    others.append((value, part))
            for key in [key for key in seen if key not in entry and key != PLACE]:
                del seen[key]
            entries[stand_in] = seen
        self.state.clear()
        self.state.update(entries)
        params = [(whole(), self._stand_ins[id(whole())]) for whole in self.wholes]
        kind = _sharding.dtensor_type()
        self.parts = _C.DTensorParts(kind, optimizer.param_groups, optimizer.state, params, others)

    def _seen_value(self, name: str, p: Any, key: str, value: Any, seen: Any) -> tuple[Any, bool]:
        """What a step is given for a value of the state of DTensor ``p``, and whether that stands in for a part of it."""
        if not _sharding.is_dtensor(value):
            plain: Tensor | None = value if isinstance(value, Tensor) else None
            if plain is None or key in self.scalars or plain.dim() == 0 or key == ROUNDING_KEY:
                return value, False
            raise RuntimeError(
                f"{name}: its state '{key}' is a tensor of shape {tuple(plain.shape)}, expected a DTensor laid out as the "
                "parameter; load it by torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
            )
        local = _sharding.local_part(value)
        if local is None:
            raise RuntimeError(f"{name}: its state '{key}' has a {type(value._local_tensor).__name__} as local tensor")
        if key.endswith(SCALE) and _sharding.is_alike(value._spec, parts.scale_spec(p)):
            return (seen if isinstance(seen, Tensor) else _stand_in(value)), True
        is_copied = not _sharding.sharding_groups(value._spec) and not _sharding.is_partial(value._spec)
        if is_copied and key in self.scalars:
            return local, False
        if is_copied and value.shape != p.shape and value._spec.mesh == p._spec.mesh:  # one row or column of it, say
            self.copies.setdefault(self._stand_ins[id(p)], set(self.scalars)).add(key)
            return (seen if isinstance(seen, Tensor) else _stand_in(value)), True
        if not _sharding.is_alike(value._spec, p._spec):
            raise RuntimeError(
                f"{name}: its state '{key}' has {_sharding.described(value._spec)} and shape {tuple(value.shape)}, expected "
                f"{_sharding.described(p._spec)} and shape {tuple(p.shape)} as the parameter; load it by "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
            )
        return (seen if isinstance(seen, Tensor) else _stand_in(value)), True

    def read_options(self, optimizer: ShardedStep) -> None:
        """Bring the options of the groups up to date; they may have been scheduled."""
        for seen, group in zip(self.groups, optimizer.param_groups, strict=True):
            params = seen["params"]
            if len(seen) != len(group):
                seen.clear()
            seen.update(group)
            seen["params"] = params
        measured = [optimizer._measures(group) for group in self.groups]
        if measured == self._measured:
            return
        self._measured = measured
        params = [p for group, taken in zip(self.groups, measured, strict=True) if taken for p in group["params"]]
        parts = [(p, self.whole_of(p)) for p in params if p in self._whole_of]
        cut = [(p, whole) for p, whole in parts if _sharding.is_cut(whole._spec)]
        twice = [p for p, count in Counter(p for p, _ in cut).items() if count > 1]
        if twice:
            raise RuntimeError(
                f"{self.name_of(twice[0])}: it is in the optimizer twice, which a rule about the norm of a tensor that is cut "
                "does not take; list it once"
            )
        self.norms = WholeNorms(cut) if cut else None

    def lend_others(self, others: list[int], agreement: Agreement) -> None:
        """Gradients that are not known to be laid out as their parameters: those that are after all, and those that are
        brought to that layout, once for the norm and the step.

        Raises:
            RuntimeError: a gradient is of another kind or on another mesh; while the processes come to an agreement, each
                of them raises it for all.
        """
        wanted: dict[int, Any] = {}
        problems: dict[int, str] = {}
        for number in others:
            p: Any = self.wholes[number]()
            grad, name = p.grad, self.names[number]
            problem = grad_problem(p, grad)
            if problem is not None:
                problems[number] = f"gradient of {name}: {problem}"
            elif _sharding.is_alike(grad._spec, p._spec):
                self.parts.know(number, grad._spec)
                self.parts.lend_grad(number, _sharding.local(grad))
            else:
                wanted[number] = grad
        if agreement.is_due:
            self._agree(problems, wanted, agreement)
        for problem in problems.values():
            raise RuntimeError(problem)
        self._relay(wanted)

    def _relay(self, wanted: dict[int, Any]) -> None:
        lent: dict[int, Lent] = {}
        to_do: list[tuple[int, Any, Any]] = []
        for number, grad in wanted.items():
            p: Any = self.wholes[number]()
            before = self.lent.get(id(grad))
            if before is not None and before.is_current(grad):
                lent[id(grad)] = before
                self.parts.lend_grad(number, before.part)
            else:
                to_do.append((number, p._spec, grad))
        parts = _sharding.relaid([grad for _, _, grad in to_do], [spec for _, spec, _ in to_do])
        for (number, _, grad), part in zip(to_do, parts, strict=True):
            before = self.lent.get(id(grad))
            if before is not None and before.is_of(grad):  # written in place, and so is what was made of it
                part = before.part.copy_(part)
            lent[id(grad)] = Lent(grad, part)
            self.parts.lend_grad(number, part)
        self.lent = lent

    def _agree(self, problems: dict[int, str], wanted: dict[int, Any], agreement: Agreement) -> None:
        specs = [whole()._spec for whole in self.wholes]  # type: ignore[union-attr]
        kinds = [
            GradKind.REFUSED
            if i in problems
            else GradKind.RELAID
            if i in wanted
            else GradKind.NONE
            if stand_in.grad is None
            else GradKind.ALIKE
            for i, stand_in in enumerate(self._stand_ins.values())
        ]
        groups = [_sharding.mesh_groups(spec) for spec in specs]
        needed = {
            i
            for i, p in enumerate(self._whole_of)
            if self.owners.owns(p) or (self.norms is not None and p in self.norms)
        }
        agree(kinds, problems, groups, _sharding.reduction_device(specs), self.names, agreement, needed)

    def by_local_tensor(self) -> dict[int, Tensor]:
        """The stand-ins of parameters by the identity of the local tensors that they stand in for."""
        found = {}
        for whole in self.wholes:
            p: Any = whole()
            found[id(p._local_tensor)] = self._stand_ins[id(p)]
        return found

    def norm(self, norm_type: float, process_group: Any = None) -> Tensor:
        """The norm of the gradients of all groups, of all processes' parts: shape ()."""
        return self._norms().norm(norm_type, process_group)

    @property
    def device(self) -> torch.device:
        """Where the norm is."""
        return self._norms().device

    def on_any_process(self, found_inf: Tensor) -> Tensor:
        """What GradScaler has found, or 1 where it has on another process: shape and dtype as given."""
        return self._norms().largest(found_inf)

    def _norms(self) -> _sharding.SpreadNorm:
        if self._spread_norm is None:
            specs = {stand_in: whole()._spec for stand_in, whole in self._whole_of.items()}  # type: ignore[union-attr]
            groups = {stand_in: _sharding.sharding_groups(spec) for stand_in, spec in specs.items()}
            params = [p for group in self.groups for p in group["params"]]
            device = _sharding.reduction_device(specs.values())
            self._spread_norm = _sharding.SpreadNorm([(p, groups.get(p, ())) for p in params], device)
        return self._spread_norm

    def give_state(self, optimizer: ShardedStep) -> None:
        """Bring the optimizer's own state up to date with what a step has made, replaced or removed here."""
        changed = False
        for key in [key for key in optimizer.state if self._stand_ins.get(id(key), key) not in self.state]:
            del optimizer.state[key]
            changed = True
        for p, seen in self.state.items():
            whole = self.whole_of(p)
            if whole is None:
                if optimizer.state.get(p) is not seen:
                    optimizer.state[p] = seen
                    changed = True
                continue
            changed |= self._give_entry(optimizer.state.setdefault(whole, {}), whole, p, seen)
        if changed:
            self._note(optimizer)
            self.parts.take_back(False)

    def _give_entry(self, entry: dict[str, Any], whole: Any, stand_in: Tensor, seen: dict[str, Any]) -> bool:
        changed = False
        for key in [key for key in entry if key not in seen]:
            del entry[key]
            changed = True
        for key, value in seen.items():
            own = entry.get(key)
            if key == PLACE:
                continue
            if own is value or (own is not None and value is self._known.get(id(own))):
                continue
            changed = True
            copied = self.copies.get(stand_in, self.scalars)
            if values.is_ours(key):
                entry[key] = parts.wrapped(key, value, whole)
            elif isinstance(value, Tensor) and key not in copied and value.shape == stand_in.shape:
                entry[key] = _sharding.wrapped(value.detach(), whole)  # and `value` stands in for it
            elif isinstance(value, Tensor) and value.dim() > 0:
                entry[key] = _sharding.wrapped_copy(value.detach(), whole)
            else:
                entry[key] = value
        return changed


class GradKind(IntEnum):
    """Kinds of gradients, as processes tell one another of them."""

    NONE = 0
    ALIKE = 1
    RELAID = 2
    REFUSED = 3


@dataclass
class Agreement:
    """Whether the processes of an optimizer know that they have gradients of one kind. They ask each other before the first
    step; later only where gradients have to be brought to other layouts, and where no GPU has to be waited for."""

    is_first: bool = True
    relays: bool = False

    @property
    def is_due(self) -> bool:
        return self.is_first or self.relays


def agree(
    kinds: Sequence[GradKind],
    problems: Container[int],
    groups: Sequence[_sharding.Groups],
    device: torch.device,
    names: Sequence[str],
    agreement: Agreement,
    needed: Container[int] = (),
) -> None:
    """Find out whether the processes have gradients of one kind, before any of them waits for the others.

    Args:
        kinds: for each parameter what its gradient is here.
        problems: which of them are refused here, for a reason that is known.
        groups: for each parameter the process groups in which those meet that have a part or a copy.
        device: where collectives want their numbers.
        names: of the parameters.
        agreement: what they know.
        needed: of which parameters the rule takes the whole or its norm, so that no part may be missing.

    Raises:
        RuntimeError: another process refuses a gradient, or some have none, or one of another layout, and all have to join.
    """
    agreement.is_first = False
    if not any(groups):
        return
    both = torch.tensor([[kind, -kind] for kind in kinds], dtype=torch.float64)
    found = _sharding.Reduction(groups, device).largest_of_finite(both).tolist()
    for i, (most, least) in enumerate(found):
        if most == GradKind.REFUSED and i not in problems:
            raise RuntimeError(f"gradient of {names[i]}: another process refuses it; see the error there")
        if i in needed and least == -GradKind.NONE and most != GradKind.NONE:
            raise RuntimeError(
                f"gradient of {names[i]}: some processes have none, and the rule is about the whole of it"
            )
        if most == GradKind.RELAID and least != -GradKind.RELAID:
            raise RuntimeError(
                f"gradient of {names[i]}: it has to be brought to the layout of the parameter, which all processes have to "
                "join, but some of them have no gradient or one of another layout"
            )
    agreement.relays = any(most == GradKind.RELAID for most, _ in found) and device.type == "cpu"


def grad_problem(p: Any, grad: Any) -> str | None:
    """Why a gradient cannot be that of DTensor ``p``."""
    if not _sharding.is_dtensor(grad):
        return (
            f"it is a {type(grad).__name__}, and the parameter a DTensor with {_sharding.described(p._spec)}; expected a "
            "DTensor"
        )
    if _sharding.local_part(grad) is None:
        return f"its local tensor is a {type(grad._local_tensor).__name__}, which has operations of its own"
    if grad._spec.mesh != p._spec.mesh:
        return (
            f"it has {_sharding.described(grad._spec)}, on another mesh than the parameter, which has "
            f"{_sharding.described(p._spec)}"
        )
    return None


class Lent:
    """The gradient of a parameter in the parameter's layout, for as long as that gradient is there and unchanged."""

    def __init__(self, grad: Any, part: Tensor):
        self.part = part
        self._grad, self._versions = weakref.ref(grad), _versions(grad)

    def is_of(self, grad: Any) -> bool:
        return self._grad() is grad

    def is_current(self, grad: Any) -> bool:
        return self.is_of(grad) and _versions(grad) == self._versions


def _versions(grad: Any) -> tuple[int, int]:
    """Operations on a DTensor count as writes of it alone, those on what to_local() gives as writes of its part."""
    return grad._version, grad._local_tensor._version


def _stand_in(dtensor: Any) -> Tensor:
    local = _sharding.local_part(dtensor)
    assert local is not None
    with torch.no_grad():
        return local.detach()
