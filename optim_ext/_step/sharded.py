"""DTensor parameters (FSDP2, tensor parallelism, HSDP): each process steps its own part of them.

While such an optimizer steps, its groups and state are seen through a view of plain tensors: stand-ins for the local
tensors of parameters, gradients and state, on which everything else works as it does on one process. What a step makes
of state becomes DTensors laid out as their parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from optim_ext import _sharding
from optim_ext._grad_control import StepControls, Verdict
from optim_ext._load import _C
from optim_ext._step.base import Group
from optim_ext._step.local_view import Agreement, LocalView, why_whole
from optim_ext._step.planning import PlannedStep, is_zero_on_the_host
from optim_ext._step.whole_norms import WholeNorms


class ShardedStep(PlannedStep):
    _view: LocalView | None  # of the last step
    _viewing: LocalView | None = None  # while param_groups and state are those of a view

    def _step_in_plain_containers(self) -> None:
        if self._viewing is not None or not self._has_dtensors():
            return super()._step_in_plain_containers()
        with self._local_view() as view:
            before = self._plan
            self._eager_step()
            view.written = True
            view.lent.clear()  # what clip_grad_norm had brought to the parameters' layout has been used
            view.has_made_state = self._plan is None or self._plan is not before

    def _step_as_told(self, controls: StepControls) -> None:
        view = self._viewing
        if view is not None and view.norms is not None:
            return self._step_by_norms(view.norms, controls)
        if view is None or not view.owners:
            return super()._step_as_told(controls)
        asked = self._asked()
        averaging, asked.averaging = asked.averaging, None
        try:
            view.owners.make_state(self, view)
            with view.owners.whole(self, view):
                super()._step_as_told(controls)
        finally:
            asked.averaging = averaging
        if averaging is not None:
            averaging.update(controls.found_inf, self.state, self._stand_ins())

    def _step_by_norms(self, norms: WholeNorms, controls: StepControls) -> None:
        norms.has_asked = False
        try:
            super()._step_as_told(controls)
        except Exception:
            if not norms.has_asked:
                norms.refuse()
            raise

    def _whole_norms(self) -> WholeNorms | None:
        return None if self._viewing is None else self._viewing.norms

    def _has_dtensors(self) -> bool:
        # A view finds out by itself whether it still is one of these groups.
        return self.__dict__.get("_view") is not None or _sharding.holds_dtensors(self.param_groups)

    @contextmanager
    def _seen_locally(self) -> Iterator[None]:
        if self._viewing is not None or torch.compiler.is_compiling() or not self._has_dtensors():
            yield
        elif self._in_plain_containers():
            with self._local_view(with_state=False):
                yield
        else:
            with self._plain_containers(), self._local_view(with_state=False):
                yield

    @contextmanager
    def _local_view(self, with_state: bool = True) -> Iterator[LocalView]:
        """Within the block groups and state are what this process has of them, with gradients laid out as parameters.
        Without state, that is not to be looked at."""
        view: LocalView | None = self.__dict__.pop("_view", None)  # whatever fails, the next step looks anew
        others = None if view is None else view.parts.lend(self.param_groups, self.state, with_state)
        if view is None or others is None:
            view = LocalView(self, None if view is None else view.lent)
            others = view.parts.lend(self.param_groups, self.state, with_state)
            if others is None:
                raise RuntimeError(
                    "parameters or state were replaced during the step, by another thread: step when it ends"
                )
        whole = self.param_groups, self.state
        try:
            agreement = self.__dict__.setdefault("_agreement", Agreement())
            if agreement.is_due and self._makes_state_only():
                agreement = Agreement(is_first=False)
            view.read_options(self)
            view.lend_others(others, agreement)
            view.whole_groups = self.param_groups
            self.param_groups, self.state, self._plan, self._viewing = view.groups, view.state, view.plan, view
            view.written = view.has_made_state = False
            yield view
        finally:
            if self._viewing is not None:
                view.plan = self._plan
                self._plan = self._viewing = None
            self.param_groups, self.state = whole
            view.whole_groups = []
            view.parts.take_back(view.written)
        if view.has_made_state:
            view.give_state(self)
        self._view = view if view.wholes else None

    def _dtensor_of(self, p: Tensor) -> Any:
        whole = None if self._viewing is None else self._viewing.whole_of(p)
        return super()._dtensor_of(p) if whole is None else whole

    def _stand_ins(self) -> dict[int, Tensor]:
        return {} if self._viewing is None else self._viewing.by_local_tensor()

    def _makes_state_only(self) -> bool:
        """Whether this is the step by which torch.distributed.checkpoint makes state, in which nothing is communicated."""
        return not self.state and all(is_zero_on_the_host(group.get("lr")) for group in self.param_groups)

    def _torch_reason(self, group: Group, ahead: bool = False) -> str | None:
        # In a view the only DTensors are those that it leaves to torch.
        reason = why_whole(self, group) if _sharding.holds_dtensors([group]) else None
        if reason is not None:
            return reason
        if self._viewing is not None or not _sharding.holds_dtensors([group]):
            return super()._torch_reason(group, ahead)
        for index, p in enumerate(group["params"]):
            local = _sharding.local_part(p) if _sharding.is_dtensor(p) else p
            problem = None if local is None or not p.requires_grad else _C.unsupported(local)
            if problem is not None:
                return f"{self._described(group, index)}: {problem}"
        return None

    def _native_how_of(self, group: Group) -> str:
        how = super()._native_how_of(group)
        specs = [p._spec for p in group["params"] if _sharding.is_dtensor(p)]
        if not specs:
            return how
        is_cut = any(map(_sharding.sharding_groups, specs))
        what = "whole tensors at their owners" if is_cut and self._needs_whole_tensors(group) else "this process's part"
        if is_cut and self._measures(group):
            what += " by norms of the whole"
        ranks = max(math.prod(_sharding.shard_counts(spec)) for spec in specs)
        return f"{how}, on {what}: {len(specs)} of {len(group['params'])} parameters are DTensors, " + (
            f"sharded over {ranks} processes" if ranks > 1 else "of which every process has the whole"
        )

    def _verdict(self) -> Verdict:
        found_inf = self.__dict__.get("found_inf")
        if self._viewing is not None and found_inf is not None:
            # GradScaler has asked the processes that share the first gradient; all have to come to one decision.
            self.found_inf: Tensor = self._viewing.on_any_process(found_inf)
        return super()._verdict()

    def zero_grad(self, set_to_none: bool = True) -> None:
        view = self.__dict__.get("_view")
        if view is not None:
            view.lent.clear()
        super().zero_grad(set_to_none)

    zero_grad.__doc__ = PlannedStep.zero_grad.__doc__

    def _forget_params(self) -> None:
        self.__dict__.pop("_view", None)
        super()._forget_params()

    def average_into(self, averaged: Any, model: Any = None, *, masters: bool = False) -> None:
        self.__dict__.pop("_view", None)  # its plan may be another
        super().average_into(averaged, model, masters=masters)

    average_into.__doc__ = PlannedStep.average_into.__doc__
