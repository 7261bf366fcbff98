"""The step as torch.compile sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optim_ext import _grad_control
from optim_ext._grad_control import Verdict
from optim_ext._step.base import Group
from optim_ext._step.controls import NOT_COMPILED
from optim_ext._step.planning import move
from optim_ext._step.sharded import ShardedStep
from optim_ext._step.torch_path import RECORDED
from optim_ext._tables import TABLES


class TracedStep(ShardedStep):
    def _traced_step(self) -> Tensor | None:
        """The step as torch.compile sees it: torch's gathering (which Dynamo knows) and the op itself.

        Returns what says whether it was skipped.
        """
        reasons = [self._traced_torch_reason(group) for group in self.param_groups]
        for group, reason in zip(self.param_groups, reasons, strict=True):
            # A step is compiled anew where an option changes that has been looked at, so these are in any case. A number that
            # has changed before is one in general to a compiler, but not where it is put into a set.
            if self._keeps(group):
                {group.get("min_q8_size")}
                if reason is not None:
                    self._refuse_precision(group, reason)
        by_torch = [group for group, reason in zip(self.param_groups, reasons, strict=True) if reason is not None]
        if by_torch:
            self._refuse_controls(next(reason for reason in reasons if reason is not None))
            self._torch_step(by_torch)
        verdict = self._traced_verdict()
        for group, reason in zip(self.param_groups, reasons, strict=True):
            if reason is not None:
                continue
            way, is_last = 0, False
            while not is_last:
                lists: list[list[Tensor]] = [[] for _ in range(2 + len(self._state_keys(group)))]
                companions: list[Tensor] = []
                is_last = self._init_group(group, *lists, companions, way=way)
                if lists[0]:
                    self._traced_call(group, lists, self._traced_controls(verdict, companions))
                way += 1
        verdict.record()
        return verdict.found_inf

    def _traced_call(self, group: Group, lists: list[list[Tensor]], controls: dict[str, Any]) -> None:
        getattr(torch.ops.optim_ext, self._op)(
            *([tensor for tensor in one if tensor is not None] for one in lists),
            **self._named_hypers(group),
            **controls,
        )

    @staticmethod
    def _traced_controls(verdict: Verdict, companions: list[Tensor]) -> dict[str, Any]:
        """The arguments that an op has whatever its rule."""
        controls = {
            "grad_scale": verdict.grad_scale,
            "found_inf": verdict.found_inf,
            "grad_factor": verdict.grad_factor,
        }
        return {**controls, "companions": companions} if companions else controls

    def _init_group(self, group: Any, *lists: Any, **named: Any) -> Any:
        """Torch's. A compiler does not trace what has this name, but runs it as it traces a step.

        With ``way=k`` it gathers those parameters only whose state is kept in the k-th of the group's ways, what lies beside
        them in one more list, and returns whether this was the last way.
        """
        way: int | None = named.pop("way", None)
        if way is None:
            return super()._init_group(group, *lists, **named)
        is_kept = way > 0 or self._make_kept_state(group) is not None
        if not is_kept:
            super()._init_group(group, *([] for _ in lists[:-1]), **named)  # makes what there is none of
        for p in group["params"]:
            # Where the compiler moves counts before it gathers the next ones: those that are in the graph must stay.
            move(self.state.get(p, {}), TABLES[self._op].scalar_state, p.device)
        if is_kept:
            return self._gather_way(group, way, *lists)
        super()._init_group(group, *lists[:-1], **named)
        return True

    def _gather_way(self, group: Group, number: int, *lists: list[Any]) -> bool:
        """Put the parameters that are kept in one of the group's ways, in the order of these, and what belongs to them into
        the lists; whether it is the last way."""
        members = [index for index, p in enumerate(group["params"]) if p.grad is not None]
        ways = self._ways(group, members) or (None,) * len(members)
        every = list(dict.fromkeys(ways))
        if not every:
            return True
        params, grads, *state, companions = lists
        keys, beside = every[number] or (self._state_keys(group), ())
        chosen = [group["params"][index] for index, way in zip(members, ways, strict=True) if way == every[number]]
        params += chosen
        grads += [p.grad for p in chosen]
        for key, values in zip(keys, state, strict=True):
            if key is None:
                continue
            optional = key in TABLES[self._op].partial_state
            found = [self.state[p].get(key) for p in chosen]
            if not optional and any(value is None for value in found):
                raise RuntimeError(self._what_is_missing())
            values += [value for value in found if value is not None]
        for key in beside:
            companions += [self.state[p][key] for p in chosen]
        return number + 1 == len(every)

    def _traced_torch_reason(self, group: Group) -> str | None:
        """As _torch_reason, for what a compiler can trace."""
        if group.get("differentiable"):
            return RECORDED
        if any(p.grad is not None and _grad_control.is_sharded(p) for p in group["params"]):
            return "a parameter is a tensor subclass that intercepts its operations"
        return None

    def _traced_verdict(self) -> Verdict:
        if self._asked().armed is not None:
            raise RuntimeError(NOT_COMPILED)
        return self._verdict()

    def _named_hypers(self, group: Group) -> dict[str, Any]:
        """The hyper-parameters as the op's schema wants them."""
        named = zip(TABLES[self._op].hypers, self._hypers(group), strict=True)
        return {name: self._as_tensor(value) if kind == "tensor" else value for (name, kind), value in named}

    @staticmethod
    def _as_tensor(value: Any) -> Tensor:
        """A number becomes a tensor by a product: that is how a compiler keeps a number it has seen to change as an input of
        the graph; any other way compiles its value in."""
        return value if isinstance(value, Tensor) else torch.ones((), dtype=torch.float64) * value
