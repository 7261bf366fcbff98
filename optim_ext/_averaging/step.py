"""An averaged model that the steps of an optimizer keep up to date."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn import Module
from torch.optim import swa_utils

from optim_ext._averaging.pairing import Pairing, average_plan, native_of
from optim_ext._averaging.rules import AveragingRule, weight_of
from optim_ext._load import _C
from optim_ext._precision import values
from optim_ext.swa_utils import AveragedModel

_AT_ONCE = 1 << 22  # elements whose values are made for one call

State = Mapping[Tensor, Mapping[str, Any]]


class Besides:
    """What a step has to average besides what it does on its own: tensors as they are, and the float32 values of
    parameters that are kept in something besides themselves. A value is a tensor of its own, made for its turn."""

    def __init__(self, as_they_are: list[tuple[str, Tensor, Tensor]], by_value: list[tuple[str, Tensor, Tensor]]):
        self._plan, self._checks = average_plan(as_they_are), average_plan(by_value)
        # Like a plan, this keeps nothing alive that is replaced.
        self._by_value = [(name, weakref.ref(average), weakref.ref(p)) for name, average, p in by_value]

    def run(self, weight: float | Tensor, found_inf: Tensor | None = None, check_only: bool = False) -> None:
        """As :class:`_C.AveragePlan` does it, with the tensors as they are; the others are checked only."""
        self._plan.run(weight, found_inf, check_only)
        if check_only:
            self._checks.run(weight, found_inf, check_only)

    def average_values(self, weight: float | Tensor, found_inf: Tensor | None, state: State) -> None:
        for entries in self._turns(state):
            average_plan(entries).run(weight, found_inf)

    def _turns(self, state: State) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
        entries: list[tuple[str, Tensor, Tensor]] = []
        elements = 0
        for name, *references in self._by_value:
            average, p = (reference() for reference in references)
            if average is None or p is None:
                raise RuntimeError(f"'{name}': it was replaced while its average was being updated")
            entries.append((name, average, values.param_value(p, state[p] if p in state else {})))
            elements += p.numel()
            if elements >= _AT_ONCE:
                yield entries
                entries, elements = [], 0
        if entries:
            yield entries


class StepAveraging:
    """An averaged model as the step of one optimizer keeps it up to date; with ``masters``, by the values of parameters
    that are kept in something besides themselves."""

    def __init__(self, averaged: AveragedModel, model: Module, masters: bool = False):
        self.averaged, self.model, self.masters = averaged, model, masters
        self.pairing()

    def pairing(self) -> Pairing:
        return self.averaged._pairing(self.model)

    def native(self) -> list[tuple[str, Tensor, Tensor]]:
        """What a kernel averages. Looked up where it is needed: nothing here keeps replaced tensors alive."""
        kinds = ("parameters", "buffers") if self.averaged.use_buffers else ("parameters",)
        matched = itertools.chain.from_iterable(self.averaged._matched(self.model, kind) for kind in kinds)
        return list(native_of(matched))

    def weight(self, found_inf: Tensor | None) -> float | Tensor | None:
        """What average_ is to be given at this step; None where it is not this step's turn."""
        if not self.averaged._is_due():
            return None
        n_averaged = self.averaged.n_averaged
        if found_inf is not None and found_inf.device.type != "cpu" and n_averaged.device != found_inf.device:
            # Whether this step counts is known there only.
            self.averaged.n_averaged = n_averaged.to(found_inf.device)
        return weight_of(self._rule(), self.averaged.n_averaged)

    def is_by_value(self, p: Tensor, state: State) -> bool:
        """Whether a parameter's average is of what it and its twin are together."""
        return self.masters and p in state and values.has_twin(p, state[p])

    def in_step(self, params: Iterable[Tensor], stand_ins: Mapping[int, Tensor], state: State) -> dict[Tensor, Tensor]:
        """The averages of an optimizer's parameters, but of those it updates twice in a step, or only some rows of, and
        of those that are averaged by value. ``stand_ins``: by which tensors a step knows local tensors of DTensors, by identity."""
        times: dict[Tensor, int] = {}
        for p in params:
            times[p] = times.get(p, 0) + (2 if p.grad is not None and p.grad.is_sparse else 1)
        known = ((stand_ins.get(id(current), current), average) for _, average, current in self.native())
        return {
            current: average
            for current, average in known
            if times.get(current) == 1 and not self.is_by_value(current, state)
        }

    def besides(
        self, in_step: dict[Tensor, Tensor], stand_ins: Mapping[int, Tensor], state: State
    ) -> _C.AveragePlan | Besides:
        known = ((entry, stand_ins.get(id(entry[2]), entry[2])) for entry in self.native())
        left = [(entry, current) for entry, current in known if current not in in_step]
        as_they_are = [entry for entry, current in left if not self.is_by_value(current, state)]
        if len(as_they_are) == len(left):
            return average_plan(as_they_are)
        # A stand-in has the memory of what it stands in for while a step is taken.
        by_value = [(*entry[:2], current) for entry, current in left if self.is_by_value(current, state)]
        return Besides(as_they_are, by_value)

    @torch.no_grad()
    def finish(
        self,
        pairing: Pairing,
        weight: float | Tensor | None,
        besides: _C.AveragePlan | Besides,
        found_inf: Tensor | None,
        state: State,
    ) -> None:
        """What the step itself has not averaged, and the counters. ``pairing`` and ``state`` are this step's."""
        skipped = found_inf is not None and found_inf.device.type == "cpu" and float(found_inf) == 1.0
        if weight is not None and not skipped:
            n_averaged = self.averaged.n_averaged
            besides.run(weight, found_inf)
            if isinstance(besides, Besides):
                besides.average_values(weight, found_inf, state)
            pairing.finish(self._rule(), n_averaged, weight, found_inf)
            n_averaged.add_(1 if found_inf is None or found_inf.device.type == "cpu" else found_inf.reshape(()) != 1)
        self.averaged._calls += 1

    @_disable_dynamo  # torch.compiler.disable imports the whole compiler where it decorates
    def update(
        self,
        found_inf: Tensor | None = None,
        state: State | None = None,
        stand_ins: Mapping[int, Tensor] | None = None,
    ) -> None:
        """After a step that could not average: the update on its own."""
        pairing = self.pairing()
        plan = pairing.plan if state is None or not self.masters else self.besides({}, stand_ins or {}, state)
        self.finish(pairing, self.weight(found_inf), plan, found_inf, state or {})

    def _rule(self) -> AveragingRule:
        rule = self.averaged._rule()
        if rule is None:
            raise ValueError("an average with an avg_fn or multi_avg_fn of its own cannot be part of a step")
        return rule


def step_averaging(averaged: Any, model: Module | None, optimizer: Any, masters: bool = False) -> StepAveraging:
    """``averaged`` bound to ``optimizer``, or an error that says why it cannot be."""
    if isinstance(averaged, swa_utils.AveragedModel) and not isinstance(averaged, AveragedModel):
        raise TypeError(
            "this is torch.optim.swa_utils.AveragedModel; use optim_ext.swa_utils.AveragedModel, which loads its state_dict"
        )
    if not isinstance(averaged, AveragedModel):
        raise TypeError(f"expected an optim_ext.swa_utils.AveragedModel, got {type(averaged).__name__}")
    if averaged._rule() is None:
        raise ValueError(
            "this average has an avg_fn or multi_avg_fn of its own; call its update_parameters() after the step, or use "
            "one of optim_ext.swa_utils' functions"
        )
    attached = averaged.__dict__.get("_optimizer", lambda: None)()
    if attached is not None and attached._asked() is not optimizer._asked() and attached._asked().averaging is not None:
        raise ValueError("another optimizer updates this average in its step; detach it with average_into(None)")
    if model is None:
        model = averaged.__dict__.get("_source", lambda: None)()
        if model is None:
            raise ValueError("the model behind this average is not known any more; pass it as model=")
    averaging = StepAveraging(averaged, model, masters)
    params = {p for group in optimizer.param_groups for p in group["params"]}
    for name, average, current in averaging.native():
        if current in params and average.device != current.device:
            raise ValueError(
                f"parameter '{name}' is on {current.device} and its average on {average.device}: a step can average on "
                "one device only; call update_parameters() after the step"
            )
    if params.isdisjoint(model.parameters()):
        raise ValueError("none of the optimizer's parameters belongs to the averaged model")
    averaged.__dict__["_optimizer"] = weakref.ref(optimizer)
    return averaging
