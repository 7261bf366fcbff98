"""The mixin that replaces ``step()`` of a ``torch.optim`` class by one native call per parameter group and device.

Everything else (constructor, validation, hooks, ``state_dict``) stays torch's own. State lives in ``optimizer.state[p]``
as ordinary tensors under torch's keys; torch's own ``_init_group`` creates it.
"""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, TypeVar, overload

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from optim_ext import _grad_control, _joint
from optim_ext._grad_control import GradPolicy, Verdict
from optim_ext._load import _C
from optim_ext._native_step import ADDED_TO_ALL, Controls, NativeStep
from optim_ext._tables import TABLES
from optim_ext.swa_utils import AveragedModel, StepAveraging, step_averaging

Group = dict[str, Any]
Loss = TypeVar("Loss")  # whatever a closure returns
# What every op takes besides its own arguments: (grad_scale, found_inf, grad_factor).
Common = tuple[Tensor | None, Tensor | None, Tensor | None]
# What one op call needs besides tensors: which entries of group["params"], and the op's hyper-parameters in order.
Call = tuple[list[int], tuple[Any, ...]]

# Torch's check that an optimizer met inside a CUDA graph is capturable; newer versions gave it another name.
_HEALTH_CHECK: Callable[[Optimizer], None] = (
    getattr(Optimizer, "_accelerator_graph_capture_health_check", None) or Optimizer._cuda_graph_capture_health_check
)

_NOT_COMPILED = (
    "clip_grad_norm cannot be used with a compiled step: it would have to remember a norm from one graph for the next. "
    "Use set_grad_policy(max_norm=...), which is compiled into the step"
)

# What help() says of each class.
_ADDS = f"""\
* ``clip_grad_norm(max_norm)`` instead of ``torch.nn.utils.clip_grad_norm_``: the next ``step()`` clips as it updates.
* ``set_grad_policy(max_norm=, skip_nonfinite=, skip_above=)``: every step clips, or is skipped, by the gradients' norm.
{ADDED_TO_ALL}"""

# Why a differentiable step takes torch's code.
_RECORDED = "differentiable=True: the step itself is recorded by autograd"

# What a step makes of a group's options.
_FROM_OPTIONS = ("_state_keys", "_hypers", "_takes_sparse", "_signature", "_verdict", "_step_as_told", "_values")

_PLANS_KEPT = 32  # of an optimizer whose groups are stepped some at a time

_COUNTED_IN = (torch.float32, torch.float64)  # step counters

# Implementations of __torch_function__ that leave a tensor an ordinary one.
_PLAIN = (getattr(Tensor.__torch_function__, "__func__", None), torch.nn.Parameter.__torch_function__)


def _grad_mode_of_defaults(step: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``step`` without autograd, or with it for ``differentiable=True``, as torch's optimizers do."""

    @functools.wraps(step)
    def wrapper(self: FusedStep, *args: Any, **kwargs: Any) -> Any:
        recorded = bool(self.defaults.get("differentiable", False))
        if torch.compiler.is_compiling() or recorded:
            with torch.set_grad_enabled(recorded):
                return step(self, *args, **kwargs)
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # what the context does, at half its cost
        try:
            return step(self, *args, **kwargs)
        finally:
            torch._C._set_grad_enabled(before)

    return wrapper


class _AskedByScaler:
    """``_step_supports_amp_scaling`` of an optimizer that is not fused, which has no such attribute. GradScaler.step asks
    for it before it unscales the gradients, without raising their versions: what was taken of them may be void then."""

    def __get__(self, optimizer: FusedStep | None, owner: type) -> Any:
        if optimizer is not None:
            optimizer._asked().by_scaler = True
        raise AttributeError("_step_supports_amp_scaling")


class FusedStep(NativeStep):
    """Base of the native optimizers: put it in front of the ``torch.optim`` class whose rule it replaces.

    A subclass names its op, whose table says where its state lists and its hyper-parameters come from, and what a table
    cannot say:

    * ``_op``: name of the op in ``torch.ops.optim_ext``.
    * ``_state_keys(group)``: for each list after ``params`` and ``grads``, in the order of the op's schema and of torch's
      ``_init_group``, the key in ``state[p]``, or None where this group has no such state.
    * ``_hypers(group)``: the hyper-parameters in the order of the op's schema, where they are not options as they are.
    * ``_number_state``: the keys among these under which torch keeps a Python number, a count of steps.
    * ``_takes_sparse(group)``: whether the op takes sparse gradients under these options.
    * ``_takes_dense``: False where ``_init_group`` refuses dense gradients.
    """

    _op: ClassVar[str]
    _number_state: ClassVar[frozenset[str]] = frozenset()
    _takes_dense: ClassVar[bool] = True
    _step_supports_amp_scaling = _AskedByScaler()  # torch's constructors set the attribute where it is fused
    _on_torchs_path: bool = False  # while torch's own step runs
    _bare_torch_step: ClassVar[Callable[..., Any]]  # torch's, without what our step() is wrapped in already
    _measures_tensors: ClassVar[bool] = False  # the rule needs norms of whole parameters
    _options_say_all: ClassVar[bool] = False  # equal options mean equal hyper-parameters: no user's code makes them
    _plan: _C.Plan | None  # of the last step
    _init_group: Callable[..., Any]  # torch's: creates missing state and gathers a group's tensors

    def __init_subclass__(cls, **kwargs: Any) -> None:
        own = "_op" in cls.__dict__  # not of a user's subclass
        super().__init_subclass__(adds=_ADDS if own else None, **kwargs)
        after_mixin = cls.__mro__[cls.__mro__.index(FusedStep) + 1 :]
        step = next(base.__dict__["step"] for base in after_mixin if "step" in base.__dict__)
        cls._bare_torch_step = staticmethod(inspect.unwrap(step))
        ours = (getattr(cls, name).__module__.partition(".")[0] == "optim_ext" for name in _FROM_OPTIONS)
        cls._options_say_all = all(ours)

    @property
    def _native_how(self) -> str:
        return f"one call of optim_ext::{self._op} per device"

    def _state_keys(self, group: Group) -> tuple[str | None, ...]:
        return TABLES[self._op].state_keys

    def _hypers(self, group: Group) -> tuple[Any, ...]:
        values: list[Any] = []
        for option, count in TABLES[self._op].options:
            if count == 0:
                values.append(group[option])
            else:
                values.extend(self._values(group, option, count))
        return tuple(values)

    def _takes_sparse(self, group: Group) -> bool:
        return False

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @_grad_mode_of_defaults
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step.

        Args:
            closure: re-evaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            What the closure returned, or None without one.

        Raises:
            RuntimeError: a gradient or state tensor has the wrong dtype, device, layout or shape, or tensors overlap; or
                ``param_groups`` holds some of the groups only, and ``clip_grad_norm``, ``set_grad_policy`` or
                ``average_into`` was asked for when there were more.
            ValueError: a hyper-parameter is NaN, or an option of several values (``betas``) holds another number of them.

        Nothing has been written when one of these is raised.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            found_inf = self._traced_step()
            averaging = self._asked().averaging
            if averaging is not None:
                averaging.update(found_inf)
        else:
            if "capturable" in self.defaults:  # without the option torch captures the step as it is, and so do we
                _HEALTH_CHECK(self)
            self._eager_step()
        return loss

    def average_into(self, averaged: AveragedModel | None, model: Module | None = None) -> None:
        """Let every step also update an average of the model: ``step()`` then does what ``step()`` followed by
        ``averaged.update_parameters(model)`` does, bit for bit, with one pass over the parameters.

        All of the model's parameters are averaged, also those without a gradient and those this optimizer does not
        have, and its buffers as ``averaged`` treats them. A step that ``found_inf`` skips leaves the average and its
        count alone. Groups that take torch's own code, and compiled steps, are followed by the update on its own. Not
        saved with the optimizer: call it again on a copy, and after loading one by pickle. The step by which
        torch.distributed.checkpoint makes state (the first, with rates and gradients of zero) is not averaged.

        Args:
            averaged: an :class:`optim_ext.swa_utils.AveragedModel` that averages natively (the mean, or this package's
                EMA functions), on the parameters' devices; None: average no more.
            model: the model to average, by default the one ``averaged`` was made from or updated with last.

        Raises:
            TypeError: ``averaged`` is not such a model.
            ValueError: it has an averaging function of its own, does not match the model, is on another device, belongs
                to another optimizer, or its model is not known.
        """
        self._plan = None
        self._ask().averaging = None if averaged is None else step_averaging(averaged, model, self)

    def clip_grad_norm(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Clip the gradients of the next step by their norm: instead of ``torch.nn.utils.clip_grad_norm_``.

        One native reduction over the gradients of all groups. The factor ``max_norm / (norm + 1e-6)``, at most one, is
        applied inside the next ``step()``, once; ``p.grad`` stays as it is. A second call replaces the first,
        ``zero_grad()`` drops it. It is about the gradient tensors that are there when it is called: it is void if the
        step finds none of them (after ``model.zero_grad()`` and another backward pass); if they have been written in
        place, the step takes the norm again of what it finds. Several optimizers of one model are clipped by one norm
        with :func:`optim_ext.utils.clip_optimizers`.

        Args:
            max_norm: the largest norm allowed, at least 0.
            norm_type: 1, 2 or inf.
            error_if_nonfinite: raise where the norm is infinite or NaN (reads the norm on the host).

        Returns:
            The norm of all gradients viewed as one vector, 0 if there are none: float32 (float64 if there are float64
            gradients), shape (), on the device of the first gradient. Nothing waits for it. Without
            ``scaler.unscale_(optimizer)`` before it, gradients are still scaled by ``GradScaler`` here; the step then
            turns this tensor into the norm of the unscaled gradients, which is what it clips by.

        Raises:
            ValueError: ``max_norm`` is negative or NaN, or another ``norm_type``.
            RuntimeError: no native norm for a gradient (a subclass such as DTensor, or a shard of FSDP), a norm that is
                not finite with ``error_if_nonfinite``, or a policy that is shared with other optimizers.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError(_NOT_COMPILED)
        controls = self._ask()
        controls.armed = None
        controls.armed = _grad_control.arm(self, max_norm, norm_type, error_if_nonfinite)
        return controls.armed.returned

    @overload
    def set_grad_policy(self) -> None: ...

    @overload
    def set_grad_policy(
        self, *, max_norm: float, norm_type: float = ..., skip_nonfinite: bool = ..., skip_above: float | None = ...
    ) -> GradPolicy: ...

    @overload
    def set_grad_policy(
        self,
        *,
        max_norm: float | None = ...,
        norm_type: float = ...,
        skip_nonfinite: Literal[True],
        skip_above: float | None = ...,
    ) -> GradPolicy: ...

    @overload
    def set_grad_policy(
        self, *, max_norm: float | None = ..., norm_type: float = ..., skip_nonfinite: bool = ..., skip_above: float
    ) -> GradPolicy: ...

    @overload
    def set_grad_policy(
        self,
        *,
        max_norm: float | None = ...,
        norm_type: float = ...,
        skip_nonfinite: bool = ...,
        skip_above: float | None = ...,
    ) -> GradPolicy | None: ...

    def set_grad_policy(
        self,
        *,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        skip_nonfinite: bool = False,
        skip_above: float | None = None,
    ) -> GradPolicy | None:
        """Clip and skip at every ``step()``, for frameworks that call nothing else. Without arguments: no longer.

        The norm is taken inside the step, and what becomes of it is decided on its device. A skipped step writes
        nothing: no parameter, state, step count or average. The policy is not part of ``state_dict()``.

        Args:
            max_norm: gradients enter the update multiplied by ``max_norm / (norm + 1e-6)`` where that is below one.
            norm_type: 1, 2 or inf.
            skip_nonfinite: skip a step whose norm is infinite or NaN.
            skip_above: skip a step unless its norm is at most this.

        Returns:
            The policy, also as ``grad_policy``: ``last_norm``, ``last_step_skipped`` and ``skipped_steps`` are tensors
            that say what happened. None without arguments.

        Raises:
            ValueError: a limit is negative or NaN, or another ``norm_type``.

        ``clip_grad_norm`` takes the place of ``max_norm`` and of the norm for the step it arms. Skipping needs step
        counts where it is decided: a step that may be skipped moves those of parameters on a GPU there, to stay.
        ``SparseAdam``, which counts in Python numbers, cannot skip on a GPU. The state that a first step makes is there
        also if a GPU skips it: zeros and counts of zero, from which the next step starts as from none.
        """
        asked = max_norm is not None or skip_nonfinite or skip_above is not None
        self._replace_policy(GradPolicy(max_norm, norm_type, skip_nonfinite, skip_above) if asked else None)
        return self.grad_policy

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        controls = self._asked()
        controls.armed = controls.turn = None

    zero_grad.__doc__ = Optimizer.zero_grad.__doc__

    def _undo_casts(self, saved: dict[str, Any]) -> None:
        """One number for a whole parameter is kept in torch's default precision, not in the parameter's. Of step counts
        torch knows that."""
        numbers = TABLES[self._op].scalar_state - {"step"}
        if not numbers:
            return
        for group, its in zip(self.param_groups, saved["param_groups"], strict=True):
            for p, number in zip(group["params"], its["params"], strict=True):
                for key, value in saved["state"].get(number, {}).items():
                    if key in numbers and isinstance(value, Tensor):
                        self.state[p][key] = value.to(self.state[p][key].device)

    def add_param_group(self, param_group: Group) -> None:
        self._asked()  # there from the constructor on, which adds the first group
        super().add_param_group(param_group)
        self._ask()

    add_param_group.__doc__ = Optimizer.add_param_group.__doc__

    def _eager_step(self) -> None:
        if self._repeats_step():
            return
        if not self._in_plain_containers():
            with self._plain_containers():
                return self._eager_step()
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
        asked.by_scaler = False
        return True

    def _only_makes_state(self) -> bool:
        """Whether this is the step by which torch.distributed.checkpoint makes state: the first one, with rates and
        gradients of zero. To averages and policies it is none. Waits for gradients on a GPU where rates are zero only."""
        return (
            self.__dict__.get("_plan") is None
            and not self.state
            and all(_is_zero_on_the_host(group.get("lr")) for group in self.param_groups)
            and not any(
                bool((p.grad != 0).any()) for group in self.param_groups for p in group["params"] if p.grad is not None
            )
        )

    def _controlled_step(self) -> None:
        verdict = self._verdict()
        try:
            self._step_as_told(verdict.common)
        except BaseException:
            verdict.take_back()
            raise
        verdict.record()
        controls = self._asked()
        controls.armed, controls.by_scaler = None, False

    def _step_as_told(self, common: Common) -> None:
        signature: list[Any] = [self._signature(group) for group in self.param_groups]
        averaging = self._asked().averaging
        pairing = weight = None
        if averaging is not None:
            pairing = averaging.pairing()
            signature.append(pairing)
            weight = averaging.weight(common[1])
        arguments = signature, common, averaging, pairing, weight
        last = self.__dict__.get("_plan")
        if last is not None and self._step_by(last, *arguments):
            return
        other = self._plans_of_others().get(self._key_of_groups())
        if other is not None and other is not last and self._step_by(other, *arguments):
            self._plan = other
            return
        self._plan = None
        self._planning_step(signature, common, averaging, weight)

    def _step_by(
        self,
        plan: _C.Plan,
        signature: list[Any],
        common: Common,
        averaging: StepAveraging | None,
        pairing: Any,
        weight: float | Tensor | None,
    ) -> bool:
        """Step by a plan, or return False without having written anything where it is not one for this step."""
        if plan.signature != signature or not (plan.may_skip or common[1] is None):
            return False
        if averaging is None and self._options_say_all:
            plan.remember_options(self.param_groups, self.defaults)
        hypers = [self._hypers(group) for group in self.param_groups]
        if averaging is not None and weight is not None:
            plan.besides.run(weight, common[1], check_only=True)
        try:
            if not plan.step(self.state, self.param_groups, hypers, *common, weight):
                return False
        except RuntimeError:
            if all(self._torch_reason(group) is None for group in self.param_groups):
                raise
            return False  # what a plan is refused may be torch's by now
        if averaging is not None and pairing is not None:
            averaging.finish(pairing, weight, plan.besides, common[1])
        return True

    def _plans_of_others(self) -> dict[tuple[int, ...], _C.Plan]:
        """The last plan of each set of groups that was stepped, where they are stepped some at a time."""
        plans: dict[tuple[int, ...], _C.Plan] = self.__dict__.setdefault("_plans", {})
        return plans

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
        return self._state_keys(group), self._takes_sparse(group), *flags

    def _verdict(self) -> Verdict:
        """What this step is told of its gradients: by GradScaler, by ``clip_grad_norm`` and by the standing policy.

        GradScaler leaves word on optimizers that were made with ``fused=True``, whatever their groups say by now.
        """
        grad_scale = found_inf = None
        if self.__dict__.get("_step_supports_amp_scaling", False) or any(
            group.get("fused") for group in self.param_groups
        ):
            grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        asked = self._asked()
        if asked.armed is None and asked.policy is None:
            return Verdict(grad_scale, found_inf)
        if asked.policy is not None and asked.policy._sharing is not None:
            return _joint.judge_turn(self, asked.policy, grad_scale, found_inf)
        return _grad_control.judge(self, asked.armed, asked.policy, grad_scale, found_inf)

    def _planning_step(
        self, signature: list[Any], common: Common, averaging: StepAveraging | None, weight: float | Tensor | None
    ) -> None:
        """Step where there is no plan yet: decide each group's path, make missing state, build the plan, run it."""
        if any(_is_other_mapping(entry) for entry in self.state.values()):
            with self._plain_containers():
                self._planning_step(signature, common, averaging, weight)
            self._plan = None  # it is of copies
            return
        by_torch = [group for group in self.param_groups if self._torch_reason(group) is not None]
        if by_torch:
            self._refuse_controls(self._torch_reason(by_torch[0]))
        before = {key: dict(value) if isinstance(value, dict) else value for key, value in self.state.items()}
        try:
            if len(by_torch) == len(self.param_groups) > 0:
                self._torch_step(by_torch)
                if averaging is not None:
                    averaging.update(common[1])
                return
            reusable = True
            calls, hypers = [], []
            for index, group in enumerate(self.param_groups):
                if any(group is other for other in by_torch):
                    continue
                prepared = self._prepare(group)
                if common[1] is not None:
                    self._count_on_device(group)
                for members, values in prepared:
                    reusable &= len(members) == len(group["params"])
                    takes = self._takes_sparse(group), self._takes_dense
                    calls.append((index, members, self._state_keys(group), *takes))
                    hypers.append(values)
            averages: dict[Tensor, Tensor] = {}
            if averaging is not None and not by_torch:
                averages = averaging.in_step(p for group in self.param_groups for p in group["params"])
            kinds = set(TABLES[self._op].partial_state), set(self._number_state)
            arguments = (self.state, self.param_groups, hypers, *common, weight)
            plan = _C.Plan(self._op, self.param_groups, self.state, calls, averages, *kinds)
            if by_torch:
                plan.step(*arguments, check_only=True)
                self._torch_step(by_torch)
                # Torch's step may have made state, which a plan made before it takes for a change of its own.
                plan = _C.Plan(self._op, self.param_groups, self.state, calls, averages, *kinds)
            elif averaging is not None:
                plan.besides = averaging.besides(averages)
                if weight is not None:
                    plan.besides.run(weight, common[1], check_only=True)
            if not plan.step(*arguments):
                raise RuntimeError(self._what_is_missing())
            if averaging is not None and by_torch:
                averaging.update(common[1])
            elif averaging is not None:
                averaging.finish(averaging.pairing(), weight, plan.besides, common[1])
        except BaseException:
            _restore(self.state, before)
            raise
        if _skipped(common):
            _restore(self.state, before)  # also of what was made for a first step
        elif reusable and not by_torch:
            plan.signature = signature
            plan.may_skip = common[1] is not None
            plan.of_shards = any(_grad_control.is_flat_shard(p) for group in self.param_groups for p in group["params"])
            self._keep(plan)

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
                    value = self.state[p].get(key) if p in self.state else None
                    if not isinstance(value, (Tensor, float, int) if counted else Tensor):
                        expected = "a number" if counted else "a tensor"
                        return f"{self._described(group, index)}: its state '{key}' is {value!r}, expected {expected}"
        return (
            f"gradients or state of {type(self).__name__} were replaced during its step, by another thread: step when it "
            "has ended"
        )

    def _described(self, group: Group, index: int) -> str:
        """A parameter as every message names it: by its name, or by its place."""
        return _C.describe(self.param_groups, self._number_of(group), index)

    def _number_of(self, group: Group) -> int:
        return next(i for i, other in enumerate(self.param_groups) if other is group)

    def _values(self, group: Group, option: str, count: int) -> tuple[Any, ...]:
        """An option that holds ``count`` values. (Torch finds out when its step unpacks them.)"""
        values = group[option]
        if type(values) is tuple and len(values) == count:
            return values
        try:
            found = tuple(values)
        except TypeError:
            raise TypeError(
                f"{option} of group {self._number_of(group)} is {values!r}, expected {count} values"
            ) from None
        if len(found) != count:
            raise ValueError(
                f"{option} of group {self._number_of(group)} has {len(found)} values, expected {count}: {values!r}"
            )
        return found

    def _refuse_controls(self, reason: str | None) -> None:
        """Raise where torch's own code is to run, for the reason given, which knows nothing of factors and skipping."""
        if self._asked().armed is not None or self.grad_policy is not None:
            raise RuntimeError(
                f"clip_grad_norm and set_grad_policy need a native step, but torch's own code would run ({reason}); "
                "use torch.nn.utils.clip_grad_norm_ with this optimizer"
            )

    def _prepare(self, group: Group) -> list[Call]:
        """Let torch create missing state, and return the op calls for the step that is being prepared."""
        self._init_group(group, *([] for _ in range(2 + len(self._state_keys(group)))))
        return [(list(range(len(group["params"]))), self._hypers(group))]

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
            for key in keys:
                value = entry.get(key)
                if isinstance(value, Tensor) and value.device.type == "cpu":
                    entry[key] = value.to(p.device, non_blocking=True)

    def _torch_reason(self, group: Group, ahead: bool = False) -> str | None:
        """Why ``group`` takes torch's own code, or None if it runs natively.

        ``ahead`` also looks at parameters that have no gradient yet.
        """
        if group.get("differentiable"):
            return _RECORDED
        for index, p in enumerate(group["params"]):
            if p.grad is None and not (ahead and p.requires_grad):
                continue
            problem = _C.unsupported(p) if _is_plain(p) else "it is a tensor subclass with operations of its own"
            if problem is None and self._measures_tensors and _grad_control.is_flat_shard(p):
                problem = "it is a shard of FSDP, whose norm is not that of the parameter"
            if problem is not None:
                return f"{self._described(group, index)}: {problem}"
            entry = self.state[p] if p in self.state else {}
            if not isinstance(entry, Mapping):
                raise RuntimeError(f"{self._described(group, index)}: its state is {entry!r}, expected a dict")
            if self._has_torch_step() and (key := _in_its_own_memory(p, entry)) is not None:
                return f"{self._described(group, index)}: its state {key!r} lies in its own memory"
            counter = entry.get("step")
            if self._has_torch_step() and isinstance(counter, Tensor) and counter.dtype not in _COUNTED_IN:
                return f"{self._described(group, index)}: its step counter is of {counter.dtype}"
            if group.get("capturable"):
                if p.device.type == "cpu":
                    return (
                        f"{self._described(group, index)}: capturable=True is for parameters on an accelerator; torch "
                        "refuses it on the CPU"
                    )
                if isinstance(counter, Tensor) and counter.device != p.device:
                    return (
                        f"{self._described(group, index)}: capturable=True needs its step counter on {p.device}; torch "
                        "refuses others"
                    )
            if p.grad is not None:
                takes_sparse = self._takes_sparse(group) and not group.get("fused")  # with fused, torch refuses
                problem = _C.unsupported_grad(p.grad, takes_sparse)
                if problem is None and p.grad.is_sparse and not p.is_contiguous():
                    problem = "it is sparse, and its parameter is not contiguous"
                if problem is not None:
                    return f"gradient of {self._described(group, index)}: {problem}"
        return None

    def _has_torch_step(self) -> bool:
        return self._bare_torch_step is not inspect.unwrap(Optimizer.step)

    def _torch_step(self, groups: list[Group]) -> None:
        """Run torch's own step on ``groups``, without firing the step hooks a second time."""
        if not torch.compiler.is_compiling():
            self._check_sparse(groups)
        if not self._has_torch_step():
            reason = self._torch_reason(groups[0])
            raise RuntimeError(f"{type(self).__name__} runs natively only, and torch has no code for it: {reason}")
        all_groups = self.param_groups
        counters = [(entry["step"], entry["step"].clone()) for entry in self.state.values() if _has_counter(entry)]
        self.param_groups, self._on_torchs_path = groups, True
        try:
            self._bare_torch_step(self)
        except BaseException:
            for counter, count in counters:  # torch counts before it refuses
                counter.copy_(count)
            raise
        finally:
            self.param_groups, self._on_torchs_path = all_groups, False

    def _check_sparse(self, groups: list[Group]) -> None:
        """Refuse what torch would refuse only when it gets there, with the parameters before it written."""
        for group in groups:
            if group.get("weight_decay", 0) == 0 or not self._takes_sparse({**group, "weight_decay": 0, "momentum": 0}):
                continue
            for index, p in enumerate(group["params"]):
                if p.grad is not None and p.grad.is_sparse:
                    raise RuntimeError(
                        f"{self._described(group, index)}: weight_decay option is not compatible with sparse gradients, "
                        f"found {group['weight_decay']}, expected 0"
                    )

    def _traced_step(self) -> Tensor | None:
        """The step as torch.compile sees it: torch's gathering (which Dynamo knows) and the op itself.

        Returns what says whether it was skipped.
        """
        op = getattr(torch.ops.optim_ext, self._op)
        reasons = [self._traced_torch_reason(group) for group in self.param_groups]
        by_torch = [group for group, reason in zip(self.param_groups, reasons, strict=True) if reason is not None]
        if by_torch:
            self._refuse_controls(next(reason for reason in reasons if reason is not None))
            self._torch_step(by_torch)
        verdict = self._traced_verdict()
        for group, reason in zip(self.param_groups, reasons, strict=True):
            if reason is not None:
                continue
            lists: list[list[Tensor]] = [[] for _ in range(2 + len(self._state_keys(group)))]
            self._init_group(group, *lists)
            if lists[0]:
                op(
                    *([tensor for tensor in one if tensor is not None] for one in lists),
                    **self._named_hypers(group),
                    grad_scale=verdict.grad_scale,
                    found_inf=verdict.found_inf,
                    grad_factor=verdict.grad_factor,
                )
        verdict.record()
        return verdict.found_inf

    @staticmethod
    def _traced_torch_reason(group: Group) -> str | None:
        """As _torch_reason, for what a compiler can trace."""
        if group.get("differentiable"):
            return _RECORDED
        if any(p.grad is not None and _grad_control.is_sharded(p) for p in group["params"]):
            return "a parameter is a tensor subclass that intercepts its operations"
        return None

    def _traced_verdict(self) -> Verdict:
        if self._asked().armed is not None:
            raise RuntimeError(_NOT_COMPILED)
        return self._verdict()

    def _named_hypers(self, group: Group) -> dict[str, Any]:
        """The hyper-parameters as the op's schema wants them. A number becomes a tensor by a product: that is how a
        compiler keeps a number it has seen to change as an input of the graph; any other way compiles its value in."""
        named = zip(TABLES[self._op].hypers, self._hypers(group), strict=True)
        return {
            name: torch.ones((), dtype=torch.float64) * value
            if kind == "tensor" and not isinstance(value, Tensor)
            else value
            for (name, kind), value in named
        }


def _is_other_mapping(entry: Any) -> bool:
    return not isinstance(entry, dict) and isinstance(entry, Mapping)


def _has_counter(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("step"), Tensor) and not entry["step"].requires_grad


def _in_its_own_memory(p: Tensor, entry: Mapping[str, Any]) -> str | None:
    """The key of state that a parameter was made to share: ``p.data = state["ax"]``. Torch's code, which writes one after
    the other, gives that a meaning; a kernel that writes both at once does not."""
    if p.numel() == 0 or p.device.type == "meta":
        return None
    place = p.data_ptr()
    return next((key for key, value in entry.items() if isinstance(value, Tensor) and _begins_at(value, place)), None)


def _begins_at(tensor: Tensor, place: int) -> bool:
    return (
        type(tensor) is Tensor and tensor.layout == torch.strided and tensor.numel() > 0 and tensor.data_ptr() == place
    )


def _is_zero_on_the_host(lr: Any) -> bool:
    """A rate on a GPU is not read: those of that step are numbers or on the CPU."""
    return lr is not None and not (isinstance(lr, Tensor) and lr.device.type != "cpu") and float(lr) == 0.0


def _is_plain(tensor: Tensor) -> bool:
    implementation = type(tensor).__torch_function__
    return getattr(implementation, "__func__", implementation) in _PLAIN


def _skipped(common: Common) -> bool:
    """Whether the step was skipped, as far as the host can know without waiting."""
    found_inf = common[1]
    return found_inf is not None and found_inf.device.type == "cpu" and found_inf.item() == 1


def _restore(state: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Undo lazy state creation after a step that failed: the same entries, and the same inner dicts, as before."""
    for key in list(state):
        if key not in before:
            del state[key]
        elif isinstance(state[key], dict):
            state[key].clear()
            state[key].update(before[key])
