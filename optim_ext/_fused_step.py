"""The mixin that replaces ``step()`` of a ``torch.optim`` class by one native call per parameter group and device.

Everything else (constructor, validation, hooks, ``state_dict``) stays torch's own. State lives in ``optimizer.state[p]``
as ordinary tensors under torch's keys; torch's own ``_init_group`` creates it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from optim_ext._load import _C
from optim_ext.swa_utils import AveragedModel, StepAveraging, step_averaging

Group = dict[str, Any]
# What one op call needs besides tensors: which entries of group["params"], and the op's hyper-parameters in order.
Call = tuple[list[int], tuple[Any, ...]]

# The hyper-parameters of each op in order, and whether the op takes them as tensors.
_HYPERS = {
    op: [
        (argument.name, isinstance(argument.type, torch.TensorType))
        for argument in getattr(torch.ops.optim_ext, op).default._schema.arguments
        if argument.kwarg_only and not argument.has_default_value()
    ]
    for op in _C.step_ops()
}

# Torch's check that an optimizer met inside a CUDA graph is capturable; newer versions gave it another name.
_HEALTH_CHECK: Callable[[Optimizer], None] = (
    getattr(Optimizer, "_accelerator_graph_capture_health_check", None) or Optimizer._cuda_graph_capture_health_check
)

# Implementations of __torch_function__ that leave a tensor an ordinary one.
_PLAIN = (getattr(Tensor.__torch_function__, "__func__", None), torch.nn.Parameter.__torch_function__)


def _grad_mode_of_defaults(step: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``step`` without autograd, or with it for ``differentiable=True``, as torch's optimizers do."""

    @functools.wraps(step)
    def wrapper(self: FusedStep, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(bool(self.defaults.get("differentiable", False))):
            return step(self, *args, **kwargs)

    return wrapper


class FusedStep(Optimizer):
    """Base of the native optimizers: put it in front of the ``torch.optim`` class whose rule it replaces.

    A subclass names its op and says, per group, where the op's state lists come from and what the hyper-parameters are:

    * ``_op``: name of the op in ``torch.ops.optim_ext``.
    * ``_state_keys(group)``: for each list after ``params`` and ``grads``, in the order of the op's schema and of torch's
      ``_init_group``, the key in ``state[p]``, or None where this group has no such state.
    * ``_hypers(group)``: the hyper-parameters in the order of the op's schema.
    * ``_takes_sparse(group)``: whether the op takes sparse gradients under these options.
    """

    _op: ClassVar[str]
    _torch_takes_sparse: ClassVar[bool] = False  # whether torch's code does, as long as there is no weight decay
    _bare_torch_step: ClassVar[Callable[..., Any]]  # torch's, without what our step() is wrapped in already
    _plan: _C.Plan | None
    _averaging: StepAveraging | None
    _init_group: Callable[..., Any]  # torch's: creates missing state and gathers a group's tensors

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        after_mixin = cls.__mro__[cls.__mro__.index(FusedStep) + 1 :]
        step = next(base.__dict__["step"] for base in after_mixin if "step" in base.__dict__)
        cls._bare_torch_step = staticmethod(inspect.unwrap(step))

    def _state_keys(self, group: Group) -> tuple[str | None, ...]:
        raise NotImplementedError

    def _hypers(self, group: Group) -> tuple[Any, ...]:
        raise NotImplementedError

    def _takes_sparse(self, group: Group) -> bool:
        return False

    @_grad_mode_of_defaults
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step.

        Args:
            closure: re-evaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            What the closure returned, or None without one.

        Raises:
            RuntimeError: a gradient or state tensor has the wrong dtype, device, layout or shape, or tensors overlap.
            ValueError: a hyper-parameter is NaN.

        Nothing has been written when one of these is raised.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            self._traced_step()
            averaging = self.__dict__.get("_averaging")
            if averaging is not None:
                averaging.update()
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
        saved with the optimizer: call it again on a copy, and after loading one by pickle.

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
        self._averaging = None if averaged is None else step_averaging(averaged, model, self)

    def _eager_step(self) -> None:
        signature: list[Any] = [self._signature(group) for group in self.param_groups]
        common = self._common()
        averaging = self.__dict__.get("_averaging")
        weight = None
        if averaging is not None:
            signature.append(averaging.pairing())
            weight = averaging.weight(common[1])
        plan = self.__dict__.get("_plan")
        if plan is not None and plan.signature == signature:
            hypers = [self._hypers(group) for group in self.param_groups]
            if averaging is not None and weight is not None:
                plan.besides.run(weight, common[1], check_only=True)
            if plan.step(self.state, self.param_groups, hypers, *common, weight):
                if averaging is not None:
                    averaging.finish(weight, plan.besides, common[1])
                return
        self._plan = None
        self._planning_step(signature, common, averaging, weight)

    def _signature(self, group: Group) -> tuple[Any, ...]:
        """The options a plan is built for: where one changes, the plan is built anew."""
        flags = (group.get(name) for name in ("differentiable", "capturable", "fused"))
        return (self._state_keys(group), self._takes_sparse(group), *flags)

    def _common(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What every op takes besides its own arguments: (grad_scale, found_inf, grad_factor).

        The first two are GradScaler's, which it leaves on optimizers that were made with ``fused=True``.
        """
        if not any(group.get("fused") for group in self.param_groups):
            return None, None, None
        return getattr(self, "grad_scale", None), getattr(self, "found_inf", None), None

    def _planning_step(
        self,
        signature: list[Any],
        common: tuple[Tensor | None, Tensor | None, Tensor | None],
        averaging: StepAveraging | None,
        weight: float | Tensor | None,
    ) -> None:
        """Step where there is no plan yet: decide each group's path, make missing state, build the plan, run it."""
        by_torch = [group for group in self.param_groups if self._torch_reason(group) is not None]
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
                for members, values in self._prepare(group):
                    reusable &= len(members) == len(group["params"])
                    calls.append((index, members, self._state_keys(group), self._takes_sparse(group)))
                    hypers.append(values)
            averages: dict[Tensor, Tensor] = {}
            if averaging is not None and not by_torch:
                averages = averaging.in_step(p for group in self.param_groups for p in group["params"])
            state = self._planned_state()
            plan = _C.Plan(self._op, self.param_groups, state, calls, averages)
            arguments = (state, self.param_groups, hypers, *common, weight)
            if by_torch:
                plan.step(*arguments, check_only=True)
                self._torch_step(by_torch)
            elif averaging is not None:
                plan.besides = averaging.besides(averages)
                if weight is not None:
                    plan.besides.run(weight, common[1], check_only=True)
            if not plan.step(*arguments):
                raise RuntimeError(f"the state of {type(self).__name__} changed while it was being prepared")
            if averaging is not None and by_torch:
                averaging.update(common[1])
            elif averaging is not None:
                averaging.finish(weight, plan.besides, common[1])
        except BaseException:
            _restore(self.state, before)
            raise
        if reusable and not by_torch:
            plan.signature = signature
            self._plan = plan

    def _prepare(self, group: Group) -> list[Call]:
        """Let torch create missing state, and return the op calls for the step that is being prepared."""
        self._init_group(group, *([] for _ in range(2 + len(self._state_keys(group)))))
        return [(list(range(len(group["params"]))), self._hypers(group))]

    def _planned_state(self) -> dict[Any, Any]:
        """The state as a plan is to find it: every entry of ``_state_keys`` a tensor."""
        return self.state

    def _torch_reason(self, group: Group, ahead: bool = False) -> str | None:
        """Why ``group`` takes torch's own code, or None if it runs natively.

        ``ahead`` also looks at parameters that have no gradient yet.
        """
        if group.get("differentiable"):
            return "differentiable=True: the step itself is recorded by autograd"
        for index, p in enumerate(group["params"]):
            if p.grad is None and not (ahead and p.requires_grad):
                continue
            problem = _C.unsupported(p) if _is_plain(p) else "it is a tensor subclass with operations of its own"
            if problem is not None:
                return f"parameter {index}: {problem}"
            if group.get("capturable"):
                if p.device.type == "cpu":
                    return f"parameter {index}: capturable=True is for parameters on an accelerator; torch refuses it on the CPU"
                counter = self.state[p].get("step") if p in self.state else None
                if isinstance(counter, Tensor) and counter.device != p.device:
                    return (
                        f"parameter {index}: capturable=True needs its step counter on {p.device}; torch refuses others"
                    )
            if p.grad is not None:
                takes_sparse = self._takes_sparse(group) and not group.get("fused")  # with fused, torch refuses
                problem = _C.unsupported_grad(p.grad, takes_sparse)
                if problem is None and p.grad.is_sparse and not p.is_contiguous():
                    problem = "it is sparse, and its parameter is not contiguous"
                if problem is not None:
                    return f"gradient of parameter {index}: {problem}"
        return None

    def _torch_step(self, groups: list[Group]) -> None:
        """Run torch's own step on ``groups``, without firing the step hooks a second time."""
        if self._torch_takes_sparse and not torch.compiler.is_compiling():
            self._check_sparse(groups)
        if self._bare_torch_step is inspect.unwrap(Optimizer.step):
            reason = self._torch_reason(groups[0])
            raise RuntimeError(f"{type(self).__name__} runs natively only, and torch has no code for it: {reason}")
        all_groups = self.param_groups
        counters = [(entry["step"], entry["step"].clone()) for entry in self.state.values() if _has_counter(entry)]
        self.param_groups = groups
        try:
            self._bare_torch_step(self)
        except BaseException:
            for counter, count in counters:  # torch counts before it refuses
                counter.copy_(count)
            raise
        finally:
            self.param_groups = all_groups

    def _check_sparse(self, groups: list[Group]) -> None:
        """Refuse what torch would refuse only when it gets there, with the parameters before it written."""
        for group in groups:
            if group["weight_decay"] == 0:
                continue
            for index, p in enumerate(group["params"]):
                if p.grad is not None and p.grad.is_sparse:
                    names = group.get("param_names")
                    number = next(i for i, other in enumerate(self.param_groups) if other is group)
                    which = f"'{names[index]}'" if names else f"{index} of group {number}"
                    raise RuntimeError(
                        f"parameter {which}: weight_decay option is not compatible with sparse gradients, "
                        f"found {group['weight_decay']}, expected 0"
                    )

    def _traced_step(self) -> None:
        """The step as torch.compile sees it: torch's gathering (which Dynamo knows) and the op itself."""
        op = getattr(torch.ops.optim_ext, self._op)
        for group in self.param_groups:
            lists: list[list[Tensor]] = [[] for _ in range(2 + len(self._state_keys(group)))]
            self._init_group(group, *lists)
            if lists[0]:
                op(*lists, **self._named_hypers(group))

    def _named_hypers(self, group: Group) -> dict[str, Any]:
        """The hyper-parameters as the op's schema wants them. A number becomes a tensor by a product: that is how a
        compiler keeps a number it has seen to change as an input of the graph; any other way compiles its value in."""
        named = zip(_HYPERS[self._op], self._hypers(group), strict=True)
        return {
            name: torch.ones((), dtype=torch.float64) * value if is_tensor and not isinstance(value, Tensor) else value
            for (name, is_tensor), value in named
        }


def _has_counter(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("step"), Tensor) and not entry["step"].requires_grad


def _is_plain(tensor: Tensor) -> bool:
    implementation = type(tensor).__torch_function__
    return getattr(implementation, "__func__", implementation) in _PLAIN


def _restore(state: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Undo lazy state creation after a step that failed: the same entries, and the same inner dicts, as before."""
    for key in list(state):
        if key not in before:
            del state[key]
        elif isinstance(state[key], dict):
            state[key].clear()
            state[key].update(before[key])
