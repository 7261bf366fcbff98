"""Eager steps: plans, which are made once and step as long as they hold, and what has to be there for one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from optim_ext import _grad_control
from optim_ext._averaging.step import StepAveraging
from optim_ext._dynamo import never_traced
from optim_ext._grad_control import StepControls
from optim_ext._load import _C
from optim_ext._native_step import Controls
from optim_ext._precision import options
from optim_ext._precision.options import CODES
from optim_ext._step.base import Group
from optim_ext._step.controls import ControlledStep
from optim_ext._step.whole_norms import WholeNorms
from optim_ext._tables import TABLES

_PLANS_KEPT = 32  # of an optimizer whose groups are stepped some at a time


class PlannedStep(ControlledStep):
    _plan: _C.Plan | None  # of the last step
    _options_say_all: ClassVar[bool] = False  # equal options mean equal hyper-parameters: no user's code makes them

    @never_traced
    def _eager_step(self) -> None:
        if not self._repeats_step():
            self._step_anew()

    def _step_anew(self) -> None:
        """Step where more may have changed than gradients, counts and rates."""
        if not self._in_plain_containers():
            with self._plain_containers():
                return self._eager_step()
        self._step_in_plain_containers()

    def _step_in_plain_containers(self) -> None:
        asked = self._asked()
        if asked.armed is None and asked.policy is None and asked.averaging is None:
            return self._controlled_step()
        if len(self.param_groups) < asked.groups:
            raise RuntimeError(
                f"this step has {len(self.param_groups)} of {asked.groups} parameter groups, but clip_grad_norm, "
                "set_grad_policy and average_into are about all of them: a norm of some is not the model's. Where a "
                "framework steps group by group (DeepSpeed's ZeRO), clip and average there; if the other groups are gone "
                "for good, call the method again"
            )
        if (asked.averaging is None and asked.policy is None) or not self._only_makes_state():
            return self._controlled_step()
        self._controls = Controls()
        try:
            self._controlled_step()
        finally:
            self._controls = asked

    def _repeats_step(self) -> bool:
        """Step as the last time, if nothing is asked of this step and only rates, counts and gradients have changed."""
        asked, plan = self._asked(), self.__dict__.get("_plan")
        if plan is None or asked.armed is not None or asked.policy is not None or asked.averaging is not None:
            return False
        attributes = self.__dict__
        if attributes.get("grad_scale") is not None or attributes.get("found_inf") is not None:
            return False
        if not plan.repeat(self.state, self.param_groups):
            return False
        asked.by_scaler, asked.last_skip = False, None
        return True

    def _only_makes_state(self) -> bool:
        """Whether this is the step by which torch.distributed.checkpoint makes state: the first one, with rates and
        gradients of zero. To averages and policies it is none. Waits for gradients on a GPU where rates are zero only."""
        return (
            self.__dict__.get("_plan") is None
            and not self.state
            and all(is_zero_on_the_host(group.get("lr")) for group in self.param_groups)
            and not any(
                bool((p.grad != 0).any()) for group in self.param_groups for p in group["params"] if p.grad is not None
            )
        )

    def _controlled_step(self) -> None:
        verdict = self._verdict()
        try:
            self._step_as_told(verdict.controls)
        except BaseException:
            verdict.take_back()
            raise
        verdict.record()
        self._asked().note(verdict)

    def _step_as_told(self, controls: StepControls) -> None:
        signature: list[Any] = [self._signature(group) for group in self.param_groups]
        averaging = self._asked().averaging
        pairing = None
        if averaging is not None:
            pairing = averaging.pairing()
            signature += [pairing, averaging.masters]
            controls = controls._replace(average_weight=averaging.weight(controls.found_inf))
        arguments = signature, controls, averaging, pairing
        last = self.__dict__.get("_plan")
        if last is not None and self._step_by(last, *arguments):
            return
        other = self._plans_of_others().get(self._key_of_groups())
        if other is not None and other is not last and self._step_by(other, *arguments):
            self._plan = other
            return
        self._plan = None
        self._planning_step(signature, controls, averaging)

    def _step_by(
        self,
        plan: _C.Plan,
        signature: list[Any],
        controls: StepControls,
        averaging: StepAveraging | None,
        pairing: Any,
    ) -> bool:
        """Step by a plan, or return False without having written anything where it is not one for this step."""
        if plan.signature != signature or not (plan.may_skip or controls.found_inf is None):
            return False
        if averaging is None and self._options_say_all:
            plan.remember_options(self.param_groups, self.defaults)
        hypers = [self._hypers(group) for group in self.param_groups]
        if averaging is not None and controls.average_weight is not None:
            plan.besides.run(controls.average_weight, controls.found_inf, check_only=True)
        try:
            if not plan.step(self.state, self.param_groups, hypers, controls, norms=self._whole_norms()):
                return False
        except RuntimeError:
            norms = self._whole_norms()
            has_asked = norms is not None and norms.has_asked  # the other processes do not ask once more
            if has_asked or all(self._torch_reason(g) is None and not self._keeps(g) for g in self.param_groups):
                raise
            return False  # what a plan is refused may be torch's by now, or is to be brought into another form
        if averaging is not None and pairing is not None:
            averaging.finish(pairing, controls.average_weight, plan.besides, controls.found_inf, self.state)
        return True

    def _plans_of_others(self) -> dict[tuple[int, ...], _C.Plan]:
        """The last plan of each set of groups that was stepped, where they are stepped some at a time."""
        plans: dict[tuple[int, ...], _C.Plan] = self.__dict__.setdefault("_plans", {})
        return plans

    def _forget_params(self) -> None:
        self._plan = None
        self.__dict__.pop("_plans", None)
        super()._forget_params()

    def _key_of_groups(self) -> tuple[int, ...]:
        """A set of groups by its first parameters. That it is the same set is for the plan to say."""
        return tuple(id(group["params"][0]) if group["params"] else 0 for group in self.param_groups)

    def _keep(self, plan: _C.Plan) -> None:
        self._plan = plan
        plans, key = self._plans_of_others(), self._key_of_groups()
        plans.pop(key, None)
        if len(plans) == _PLANS_KEPT:
            del plans[next(iter(plans))]
        plans[key] = plan

    def _in_plain_containers(self) -> bool:
        """Whether groups, their parameters and the state are in dicts and lists, as torch makes them."""
        groups = self.param_groups
        for group in groups:  # no generator: this is part of every step
            if not (isinstance(group, dict) and isinstance(group["params"], (list, tuple))):
                return False
        return isinstance(groups, list) and isinstance(self.state, dict)

    @contextmanager
    def _plain_containers(self) -> Iterator[None]:
        """Torch takes any mappings and iterables, a plan dicts and lists: copies of that kind take their place for one
        step, and what was made or replaced in the state's is put into the caller's own."""
        groups, state = self.param_groups, self.state
        entries = {p: dict(entry) if _is_other_mapping(entry) else entry for p, entry in state.items()}
        self.param_groups = [{**group, "params": list(group["params"])} for group in groups]
        self.state = defaultdict(dict, entries)
        try:
            yield
            made = self.state
        finally:
            self.param_groups, self.state = groups, state
        for p, entry in made.items():
            own = state[p] if p in state else None
            if own is None:
                state[p] = entry
            elif own is not entry:
                for key in [key for key, value in entry.items() if own.get(key) is not value]:
                    own[key] = entry[key]

    def _signature(self, group: Group) -> tuple[Any, ...]:
        """The options a plan is built for: where one changes, the plan is built anew."""
        get = group.get
        flags = get("differentiable"), get("capturable"), get("fused")
        kept = options.given(group)
        # What is kept beside a parameter depends on its dtype, which a module may be given between steps.
        dtypes = [p.dtype for p in group["params"]] if kept else None
        return self._state_keys(group), self._steps_rows(group), *flags, kept, dtypes

    def _planning_step(self, signature: list[Any], controls: StepControls, averaging: StepAveraging | None) -> None:
        """Step where there is no plan yet: decide each group's path, make missing state, build the plan, run it."""
        if any(_is_other_mapping(entry) for entry in self.state.values()):
            with self._plain_containers():
                self._planning_step(signature, controls, averaging)
            self._plan = None  # it is of copies
            return
        by_torch = [group for group in self.param_groups if self._torch_reason(group) is not None]
        if by_torch:
            self._refuse_controls(self._torch_reason(by_torch[0]))
            for group in by_torch:
                self._refuse_precision(group, self._torch_reason(group))
        before = {key: dict(value) if isinstance(value, dict) else value for key, value in self.state.items()}
        try:
            if len(by_torch) == len(self.param_groups) > 0:
                self._torch_step(by_torch)
                if averaging is not None:
                    averaging.update(controls.found_inf, self.state)
                return
            reusable = True
            calls, hypers = [], []
            for index, group in enumerate(self.param_groups):
                if any(group is other for other in by_torch):
                    continue
                prepared = self._prepare(group)
                if controls.found_inf is not None:
                    self._count_on_device(group)
                for members, values in prepared:
                    reusable &= len(members) == len(group["params"])
                    takes = self._steps_rows(group), self._takes_dense
                    ways = self._ways(group, members)
                    calls.append((index, members, self._state_keys(group), *takes, ways))
                    hypers.append(values)
            averages: dict[Tensor, Tensor] = {}
            if averaging is not None and not by_torch:
                averages = averaging.in_step(
                    (p for group in self.param_groups for p in group["params"]), self._stand_ins(), self.state
                )
            kinds = set(TABLES[self._op].partial_state), set(self._number_state)
            arguments = (self.state, self.param_groups, hypers, controls)
            plan = _C.Plan(self._op, self.param_groups, self.state, calls, averages, *kinds)
            if by_torch:
                plan.step(*arguments, check_only=True)
                self._torch_step(by_torch)
                # Torch's step may have made state, which a plan made before it takes for a change of its own.
                plan = _C.Plan(self._op, self.param_groups, self.state, calls, averages, *kinds)
            elif averaging is not None:
                plan.besides = averaging.besides(averages, self._stand_ins(), self.state)
                if controls.average_weight is not None:
                    plan.besides.run(controls.average_weight, controls.found_inf, check_only=True)
            if not plan.step(*arguments, norms=self._whole_norms()):
                raise RuntimeError(self._what_is_missing())
            if averaging is not None and by_torch:
                averaging.update(controls.found_inf, self.state)
            elif averaging is not None:
                weight, found_inf = controls.average_weight, controls.found_inf
                averaging.finish(averaging.pairing(), weight, plan.besides, found_inf, self.state)
        except BaseException:
            _restore(self.state, before)
            raise
        if _skipped(controls.found_inf):
            _restore(self.state, before)  # also of what was made for a first step
        elif reusable and not by_torch:
            plan.signature = signature
            plan.may_skip = controls.found_inf is not None
            plan.of_shards = any(_grad_control.is_flat_shard(p) for group in self.param_groups for p in group["params"])
            self._keep(plan)

    def _whole_norms(self) -> WholeNorms | None:
        """What a rule about norms asks for where this process has parts of the tensors."""
        return None

    def _stand_ins(self) -> dict[int, Tensor]:
        """By which tensors this step knows local tensors of DTensors, by the identity of these."""
        return {}

    def _what_is_missing(self) -> str:
        """Why no plan can be made although ``_init_group`` has made what state there was none of."""
        for group in self.param_groups:
            keys = [
                key for key in self._state_keys(group) if key is not None and key not in TABLES[self._op].partial_state
            ]
            for index, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                for key in keys:
                    counted = key in self._number_state
                    entry = self.state[p] if p in self.state else {}
                    value = entry.get(key, entry.get(key + CODES))
                    if not isinstance(value, (Tensor, float, int) if counted else Tensor):
                        expected = "a number" if counted else "a tensor"
                        return f"{self._described(group, index)}: its state '{key}' is {value!r}, expected {expected}"
        return (
            f"gradients or state of {type(self).__name__} were replaced during its step, by another thread: step when it "
            "has ended"
        )

    def _count_on_device(self, group: Group) -> None:
        """Move what counts the steps of a parameter to its device, where it is decided whether a step counts. Later steps
        count there, too: a count that moved back and forth would be waited for."""
        keys = TABLES[self._op].scalar_state.intersection(key for key in self._state_keys(group) if key is not None)
        for index, p in enumerate(group["params"]):
            if p.device.type == "cpu" or p not in self.state:
                continue
            entry = self.state[p]
            if not self._number_state.isdisjoint(entry):
                raise RuntimeError(
                    f"{self._described(group, index)}: {type(self).__name__} counts steps in Python numbers, but whether "
                    f"this one is skipped is known on {p.device} only; use set_grad_policy without skip_nonfinite and "
                    "skip_above"
                )
            move(entry, keys, p.device)


def move(entry: dict[str, Any], keys: Iterable[str], device: torch.device) -> None:
    """Move tensors of the state from the CPU to a device, without waiting for it."""
    for key in keys:
        value = entry.get(key)
        if isinstance(value, Tensor) and value.device.type == "cpu" and device.type != "cpu":
            entry[key] = value.to(device, non_blocking=True)


def _is_other_mapping(entry: Any) -> bool:
    return not isinstance(entry, dict) and isinstance(entry, Mapping)


def is_zero_on_the_host(lr: Any) -> bool:
    """A rate on a GPU is not read: those of that step are numbers or on the CPU."""
    return lr is not None and not (isinstance(lr, Tensor) and lr.device.type != "cpu") and float(lr) == 0.0


def _skipped(found_inf: Tensor | None) -> bool:
    """Whether the step was skipped, as far as the host can know without waiting."""
    return found_inf is not None and found_inf.device.type == "cpu" and found_inf.item() == 1


def _restore(state: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Undo lazy state creation after a step that failed: the same entries, and the same inner dicts, as before."""
    for key in list(state):
        if key not in before:
            del state[key]
        elif isinstance(state[key], dict):
            state[key].clear()
            state[key].update(before[key])
