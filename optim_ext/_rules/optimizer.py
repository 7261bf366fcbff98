"""The class that every rule's optimizer is a subclass of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optim_ext._averaging.step import StepAveraging
from optim_ext._beyond_torch import BeyondTorch, _count
from optim_ext._constructor import refuse_unknown
from optim_ext._grad_control import StepControls
from optim_ext._load import _C
from optim_ext._precision import options as precision_options
from optim_ext._rules import cuda
from optim_ext._rules.compiler import CannotCompile, compile_now, compile_soon
from optim_ext._rules.definition import (
    DEFINITIONS,
    Definition,
    Variant,
    arranged,
    constant_while_tracing,
    state_keys_of,
)
from optim_ext._rules.function_step import FunctionStep
from optim_ext._rules.native_text import Kernels, cuda_unit_of, unit_of
from optim_ext._rules.options import ADDED
from optim_ext._rules.self_check import becoming_negative
from optim_ext._step import Group


def _compile_in_time(variant: Variant) -> None:
    """Have a variant that is about to step compiled in the background, if that is what was asked for."""
    if variant.definition.backend == "auto":
        compile_soon(variant)


def _name_of(index: int, constants: tuple[Any, ...]) -> str:
    """What compiled graphs call a variant."""
    return DEFINITIONS[index].variant(constants).name


def _reason_while_tracing(
    index: int, constants: tuple[Any, ...], on_cpu: bool, on_gpus: tuple[tuple[int, bool], ...], keeps: bool
) -> str | None:
    """Why a graph takes the function of a rule; it waits for what is compiled for GPUs.

    on_gpus: where parameters are, and whether they are computed in double.
    keeps: whether some may be kept in another way than the rule sees them.
    """
    definition = DEFINITIONS[index]
    variant = definition.variant(constants)
    if on_cpu:
        _compile_in_time(variant)
    for gpu, in_double in on_gpus:
        device, kinds = torch.device("cuda", gpu), cuda.kinds_of([in_double], averaging=False, keeps=keeps)
        if definition.backend in ("auto", "compiled"):
            cuda.load_in_time(variant, device, kinds, wait=True)
        reason = cuda.reason_against(variant, device, kinds)
        if reason is not None:
            return f"a parameter is on {device}, and {reason}"
    return None


constant_while_tracing(_name_of)
constant_while_tracing(_reason_while_tracing)


class RuleOptimizer(BeyondTorch, FunctionStep):  # type: ignore[misc]  # each has a step, the first one calls the second
    """Base of the classes that :func:`optim_ext.rule` makes."""

    _definition: ClassVar[Definition]

    def __init__(self, params: ParamsT, *args: Any, **kwargs: Any) -> None:
        try:
            bound = self._definition.signature.bind(params, *args, **kwargs)
        except TypeError as error:
            refuse_unknown(type(self), kwargs)
            raise TypeError(f"{type(self).__name__}() {error}") from None
        bound.apply_defaults()
        options = {name: value for name, value in bound.arguments.items() if name != "params"}
        added = {name: options.pop(name) for name in ADDED}
        if options["fused"] and options["differentiable"]:
            raise RuntimeError("`fused` does not support `differentiable`")
        if options["fused"] and options["foreach"]:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        self._definition.options.validate(options)
        super().__init__(params, options, **added)
        if options["fused"]:
            self._step_supports_amp_scaling = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            variant = self._variant(group)  # a rule is refused before training begins
        except BaseException:
            self._take_back_group()
            raise
        if self._definition.backend == "compiled":
            kinds = {p.device.type for p in group["params"]}
            if "cpu" in kinds:
                compile_now(variant)
            if "cuda" in kinds:
                self._load_kernels(group, wait=True)

    @property
    def _native_how(self) -> str:
        ways = set()
        for group in self.param_groups:
            variant = self._variant(group)
            if any(p.device.type == "cuda" for p in group["params"]):
                ways.add("compiled for CUDA")
            if any(p.device.type == "cpu" for p in group["params"]):
                why = f" ({variant.problem})" if variant.problem else ""
                ways.add("compiled" if variant.compiled else f"interpreted{why}")
        return f"one call of optim_ext::rule_ per device, {' and '.join(sorted(ways))}"

    def _variant(self, group: Group) -> Variant:
        definition = self._definition
        return definition.variant(definition.options.constants_of(group))

    def _torch_reason(self, group: Group, ahead: bool = False) -> str | None:
        reason = super()._torch_reason(group, ahead)
        if reason is not None:
            return reason
        if self._definition.backend == "torch":
            return 'the rule has backend="torch"'
        if all(p.device.type == "cpu" for p in group["params"]):
            return None
        variant = self._variant(group)
        for index, p in enumerate(group["params"]):
            if p.device.type == "cpu" or not (p.grad is not None or (ahead and p.requires_grad)):
                continue
            if p.device.type != "cuda":
                problem: str | None = "rules have kernels for the CPU and CUDA"
            else:
                kinds, waits = self._kinds(group, [index]), ahead and self._keeps(group)
                problem = cuda.reason_against(variant, p.device, kinds, waits) or self._too_many_tensors(
                    group, p.device
                )
            if problem is not None:
                return f"{self._described(group, index)}: it is on {p.device}, and {problem}"
        return None

    def _too_many_tensors(self, group: Group, device: torch.device) -> str | None:
        values = self._definition.options.numbers_of(group, self._entries)
        count = sum(isinstance(value, Tensor) and value.device == device for value in values)
        if count <= cuda.MOST_TENSOR_OPTIONS:
            return None
        return f"{count} of its options are tensors there, of which kernels take {cuda.MOST_TENSOR_OPTIONS}"

    def _planning_step(self, signature: list[Any], controls: StepControls, averaging: StepAveraging | None) -> None:
        for group in self.param_groups:
            kinds = {p.device.type for p in group["params"]}
            if "cpu" in kinds and self._definition.backend == "auto":
                compile_soon(self._variant(group))
            if "cuda" in kinds and self._definition.backend in ("auto", "compiled"):
                # What a function in torch's operations cannot do is worth waiting for.
                asked = controls.grad_scale, controls.found_inf, controls.grad_factor
                self._load_kernels(group, wait=self._keeps(group) or any(value is not None for value in asked))
        super()._planning_step(signature, controls, averaging)

    def _load_kernels(self, group: Group, wait: bool) -> None:
        """Have a group's rule run on its GPUs, now or soon; with backend="compiled" now."""
        if super()._torch_reason(group) is not None:
            return
        variant = self._variant(group)
        for device in {p.device for p in group["params"] if p.device.type == "cuda"}:
            kinds = self._kinds(group, [index for index, p in enumerate(group["params"]) if p.device == device])
            if self._definition.backend == "auto":
                cuda.load_in_time(variant, device, kinds, wait)
            elif not torch.cuda.is_current_stream_capturing():
                cuda.load_now(variant, device, kinds)

    def _kinds(self, group: Group, indices: Iterable[int]) -> frozenset[Kernels]:
        """The kernels that steps of some parameters need."""
        kept = {index: self._has_companions(group, index) for index in indices}
        in_double = [self._is_in_double(group["params"][index]) for index, keeps in kept.items() if not keeps]
        return cuda.kinds_of(in_double, self._asked().averaging is not None, any(kept.values()))

    def _has_companions(self, group: Group, index: int) -> bool:
        """Whether something lies beside a parameter and its state."""
        keeping = self._keeping(group, index) if self._keeps(group) else None
        return keeping is not None and bool(keeping.companions)

    def _is_in_double(self, p: Tensor) -> bool:
        """Whether a parameter is stepped in double: where one of the tensors that a kernel is given is in double."""
        dtypes = [p.dtype, self._definition.state_dtype, p.grad.dtype if p.grad is not None else None]
        dtypes += [value.dtype for key, value in self.state.get(p, {}).items() if key in self._definition.states]
        return torch.float64 in dtypes or torch.complex128 in dtypes

    def _takes_rows(self, group: Group) -> bool:
        return super()._takes_rows(group) and not self._variant(group).has_norms

    @classmethod
    def _keeps_otherwise(cls) -> bool:
        return cls._definition.state_dtype is None

    def _check_precision(self, group: Group) -> None:
        definition, number = self._definition, self._number_of(group)
        if not self._keeps(group):
            return
        if definition.state_dtype is not None:
            raise ValueError(
                f"group {number}: {type(self).__name__} keeps its state in {definition.state_dtype}, as its decorator says, and "
                "takes no param_precision and state_precision; make the rule without state_dtype"
            )
        super()._check_precision(group)
        kept = [self._keeping(group, index) for index in range(len(group["params"]))]
        coded = {key for keeping in kept if keeping for key, precision in keeping.state if precision == "q8"}
        rounded = {key for keeping in kept if keeping for key, precision in keeping.state if precision == "bf16"}
        variant = self._variant(group)
        never = cuda.reason_never(variant)
        for index, (p, keeping) in enumerate(zip(group["params"], kept, strict=True)):
            if never is not None and keeping is not None and p.device.type == "cuda":
                raise ValueError(
                    f"{self._described(group, index)}: it is on {p.device}, where param_precision and state_precision need the "
                    f"kernels of {type(self).__name__}, and {never}; use 'native' for both"
                )
        measured = {key for place, key in enumerate(definition.states) if place + 2 in variant.norms} & coded
        if measured:
            raise ValueError(
                f"group {number}: {type(self).__name__} takes the norm of {min(measured)!r}, which cannot be in 8 bits then"
            )
        # By their names: what is said to have no sign is rounded as if it had none.
        unsigned = [key for key in definition.states if key in coded | rounded and precision_options.has_no_sign(key)]
        for key in becoming_negative(variant, group, unsigned) if unsigned else ():
            raise ValueError(
                f"group {number}: the state {key!r} of {type(self).__name__} becomes negative, and what has this name is kept "
                "without a sign; give it another name"
            )

    def _measures(self, group: Group) -> bool:
        return self._variant(group).has_norms

    def _state_keys(self, group: Group) -> tuple[str | None, ...]:
        definition = self._definition
        return state_keys_of(definition.index, definition.options.constants_of(group))

    def _hypers(self, group: Group) -> tuple[Any, ...]:
        numbers, variant = self._definition.options.numbers_of(group, self._entries), self._variant(group)
        return (variant.number, bool(group["maximize"]), *numbers)

    def _entries(self, group: Mapping[str, Any], option: str, count: int) -> tuple[Any, ...]:
        return self._values(dict(group) if not isinstance(group, dict) else group, option, count)

    def _signature(self, group: Group) -> tuple[Any, ...]:
        return *super()._signature(group), self._variant(group).number

    def _first_state(self, group: Group, p: Tensor) -> dict[str, Any]:
        definition = self._definition
        # On the device where a step may be captured, or skipped.
        device = p.device if group["capturable"] or group["fused"] else torch.device("cpu")
        made: dict[str, Any] = {}
        scalars = dict(zip(definition.scalars, definition.first_scalars(group), strict=True))
        for key in self._state_keys(group):
            if key == "step":
                made[key] = _count(0.0, device)
            elif key in scalars:
                made[key] = _count(scalars[key], device)
            elif key is not None:
                made[key] = self._started(group, p, key)
        return made

    def _begins_as_the_parameter(self) -> bool:
        return any(start == "param" or callable(start) for start in self._definition.states.values())

    def _started(self, group: Group, p: Tensor, key: str) -> Tensor:
        definition = self._definition
        start, dtype = definition.states[key], definition.state_dtype or p.dtype
        if p.is_complex():
            dtype = dtype.to_complex()
        if callable(start):
            return start(p.detach(), group).detach()
        if start == "param":
            return p.detach().to(dtype, copy=True, memory_format=torch.preserve_format)
        value = group[start] if isinstance(start, str) else start
        started = torch.zeros_like(p, dtype=dtype)
        if isinstance(value, Tensor) or value != 0:
            (torch.view_as_real(started) if started.is_complex() else started).add_(
                value.reshape(()) if isinstance(value, Tensor) else value
            )
        return started

    def _undo_casts(self, saved: dict[str, Any]) -> None:
        super()._undo_casts(saved)
        if self._definition.state_dtype is None:
            return
        for group, its in zip(self.param_groups, saved["param_groups"], strict=True):
            for p, number in zip(group["params"], its["params"], strict=True):
                for key, value in saved["state"].get(number, {}).items():
                    if key in self._definition.states and isinstance(value, Tensor):
                        self.state[p][key] = value.to(self.state[p][key].device)

    def _traced_torch_reason(self, group: Group) -> str | None:
        reason = super()._traced_torch_reason(group)
        if reason is not None:
            return reason
        definition, stepped = self._definition, [p for p in group["params"] if p.grad is not None]
        wide = definition.state_dtype is torch.float64
        gpus = tuple(
            {
                (p.device.index, wide or p.dtype in (torch.float64, torch.complex128)): None
                for p in stepped
                if p.device.type == "cuda"
            }
        )
        on_cpu = any(p.device.type == "cpu" for p in stepped)
        constants, keeps = definition.options.constants_of(group), self._keeps(group)
        return _reason_while_tracing(definition.index, constants, on_cpu, gpus, keeps)

    def _traced_call(self, group: Group, lists: list[list[Tensor]], controls: dict[str, Any]) -> None:
        definition = self._definition
        count = len(definition.states)
        params, grads, *state = lists
        steps = state.pop() if definition.options.counts_steps else []
        numbers = (-1.0 if group["maximize"] else 1.0, *definition.options.numbers_of(group, self._entries))
        torch.ops.optim_ext.rule_(
            params,
            grads,
            *arranged(state[:count], state[count:], list),
            steps,
            rule=_name_of(definition.index, definition.options.constants_of(group)),
            hypers=[self._as_tensor(number) for number in numbers],
            **controls,
        )

    @classmethod
    def source(cls, kind: Literal["cpu", "cuda"] = "cpu", **options: Any) -> str:
        """The native text of the rule.

        Args:
            kind: for which kind of device.
            options: those that are compiled in (truth values, strings, None), where not as by default; and
                param_precision and state_precision, with which there is another kernel for CUDA.

        Raises:
            ValueError: another kind.
            TypeError: the rule has no such option.
        """
        if kind not in ("cpu", "cuda"):
            raise ValueError(f"kind is {kind!r}, expected 'cpu' or 'cuda'")
        keeps = cls._taken_out_of(options)
        variant = cls._variant_with(options)
        if kind == "cpu":
            return unit_of(variant.struct, _C.isa())
        if variant.has_norms:
            raise ValueError(f"{cls.__name__} takes norms, and such rules have kernels for the CPU")
        return cuda_unit_of(variant.struct, variant.rule_bytes, Kernels(in_double=False, averaging=False, kept=keeps))

    @classmethod
    def compile(cls, device: str = "cpu", **options: Any) -> None:
        """Compile the rule now, and keep what comes out, so that later processes with the same cache start with it.

        Args:
            device: ``"cpu"``, in the way that suits the machine at hand; ``"cuda"``, for the GPUs at hand; or their
                architecture, such as ``"sm_90"``, where there is none.
            options: those that are compiled in (truth values, strings, None), where not as by default; and
                param_precision and state_precision, with which there is one more kernel to compile for GPUs.

        Raises:
            ValueError: another device.
            TypeError: the rule has no such option.
            RuntimeError: there is no compiler, or it fails, or there is no GPU.
        """
        keeps = cls._taken_out_of(options)
        variant, kinds = cls._variant_with(options), cuda.kinds_of((False, True), averaging=False, keeps=keeps)
        if device == "cpu":
            compile_now(variant)
        elif device == "cuda":
            if not torch.cuda.is_available():
                raise CannotCompile('there is no GPU; say for which architecture to compile, such as "sm_90"')
            for index in range(torch.cuda.device_count()):
                cuda.load_now(variant, torch.device("cuda", index), kinds)
        elif re.fullmatch(r"sm_\d+", device):
            for kind in sorted(kinds):
                cuda.image_of(variant, int(device.removeprefix("sm_")), kind)
        else:
            raise ValueError(f"device is {device!r}, expected 'cpu', 'cuda' or an architecture such as 'sm_90'")

    @classmethod
    def _taken_out_of(cls, options: dict[str, Any]) -> bool:
        """Take out what says in which precision parameters and state are kept. Gives whether it asks for anything."""
        asked = {name: options.pop(name) for name in precision_options.DEFAULTS if name in options}
        precision_options.check(asked, cls.__name__)
        return bool(precision_options.given(asked))

    @classmethod
    def _variant_with(cls, options: Mapping[str, Any]) -> Variant:
        definition = cls._definition
        for name in options.keys() - definition.options.defaults.keys():
            raise TypeError(f"{cls.__name__} has no option {name!r}")
        chosen = {**definition.options.defaults, **options}
        definition.options.validate(chosen)
        return definition.variant(definition.options.constants_of(chosen))
