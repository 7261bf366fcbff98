"""One row per optimizer. Shared tests are parametrised from these rows; a new optimizer is a new row and nothing else."""

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import reference
import torch

import optim_ext

Options = dict[str, Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Tolerance:
    """How close parameters and state stay to torch's for-loop in the same dtype over the shared runs."""

    rtol: float
    atol: float


_TOLERANCES = {
    torch.float64: Tolerance(1e-11, 1e-12),
    torch.complex128: Tolerance(1e-11, 1e-12),
    torch.float32: Tolerance(2e-5, 2e-6),
    torch.complex64: Tolerance(2e-5, 2e-6),
    torch.bfloat16: Tolerance(3e-2, 3e-2),
    torch.float16: Tolerance(5e-3, 5e-3),
}


@dataclass(frozen=True)
class Spec:
    """`name` is the class here and in torch.optim, or in tests/reference for what torch does not have or does not do
    for every shape; `op` lives in torch.ops.optim_ext; `state` gives the keys of a parameter's state for a set of
    options; `grid` are this project's own option sets, to which optim_db's are added."""

    name: str
    op: str
    state: Callable[[Options], set[str]]
    grid: tuple[Options, ...]
    typical: Options  # one set that uses every list of the op, for tests that are not about options
    half_options: Options = field(default_factory=dict)  # what float16 needs so as not to overflow in torch itself
    fused: bool = True  # whether torch's constructor has the flag
    betas: bool = False
    numbers: frozenset[str] = frozenset({"step"})  # state of one element, whatever the parameter's shape
    whole_tensors: bool = False  # the formula holds norms of whole tensors, so it matters how elements are grouped
    sparse: Options | None = None  # options under which torch takes sparse gradients
    tolerances: dict[torch.dtype, Tolerance] = field(default_factory=lambda: _TOLERANCES)
    is_real: bool = False  # takes no complex parameters
    reads_numbers: bool = False  # torch's code reads values of tensors, which fake and meta tensors do not have
    # Options with the defaults that depend on a parameter's dtype spelled out.
    for_dtype: Callable[[Options, torch.dtype], Options] = lambda options, dtype: options
    # The shape of a parameter's state, given its key and the parameter's shape; None where it has none under this key.
    state_shape: Callable[[str, Shape], Shape | None] = lambda key, shape: shape

    def takes(self, dtype: torch.dtype) -> bool:
        return not (self.is_real and dtype.is_complex)

    @property
    def id(self) -> str:
        return self.name

    @property
    def ours(self) -> type[torch.optim.Optimizer]:
        return getattr(optim_ext, self.name)

    def tensors(self, options: Options) -> set[str]:
        """State of the parameter's own shape."""
        return self.state(options) - self.numbers

    def state_of(self, shape: Shape, options: Options) -> dict[str, Shape]:
        """The state of a parameter of this shape but for its numbers: keys, in order, and shapes."""
        shapes = {key: self.state_shape(key, tuple(shape)) for key in sorted(self.tensors(options))}
        return {key: found for key, found in shapes.items() if found is not None}

    def keys_of(self, shape: Shape, options: Options) -> list[str]:
        """The keys of all of its state, in order."""
        return sorted({*self.state_of(shape, options), *(self.numbers & self.state(options))})

    def number(self, key: str, step: float) -> torch.Tensor:
        """A value for state of one element."""
        return torch.tensor(step if key == "step" else 0.5)

    @property
    def checkpoint_dtype(self) -> torch.dtype:
        """One in which a loaded optimizer goes on bit by bit: torch casts all numbers but `step` to the parameter's."""
        return torch.float64 if self.numbers <= {"step"} else torch.float32

    @property
    def base(self) -> type[torch.optim.Optimizer]:
        """The class ours is derived from."""
        return getattr(torch.optim, self.name, torch.optim.Optimizer)

    def accepts(self, option: str) -> bool:
        """Whether torch's class has the option."""
        return option in inspect.signature(self.torch).parameters

    @property
    def differentiable(self) -> bool:
        """Whether torch's class has the flag."""
        return self.accepts("differentiable")

    @property
    def scales_in_step(self) -> bool:
        """Whether torch's class, when fused, tells GradScaler to leave unscaling to the step."""
        if not self.fused:
            return False
        fused = self.torch([torch.zeros(1, requires_grad=True)], fused=True)
        return getattr(fused, "_step_supports_amp_scaling", False)

    @property
    def takes_late_params(self) -> bool:
        """Whether torch's class makes state for parameters that come after its constructor (all do in 2.13)."""
        if self.name != "Adagrad":
            return True
        optimizer = torch.optim.Adagrad([torch.zeros(1, requires_grad=True)])
        late = torch.zeros(1, requires_grad=True)
        late.grad = torch.ones(1)
        optimizer.add_param_group({"params": [late]})
        try:
            optimizer.step()
        except KeyError:
            return False
        return True

    def fused_writes_all(self, dtype: torch.dtype) -> bool:
        """Whether torch's fused step updates every element on the CPU (2.13's SGD does not in half precision)."""
        param = torch.ones(100, dtype=dtype, requires_grad=True)
        param.grad = torch.ones_like(param)
        self.torch([param], lr=0.5, fused=True).step()
        return bool((param != 1).all())

    @property
    def in_torch(self) -> bool:
        return hasattr(torch.optim, self.name)

    @property
    def torch(self) -> type[torch.optim.Optimizer]:
        return getattr(reference, self.name, None) or getattr(torch.optim, self.name)

    def options_on(self, device: str) -> list[Options]:
        """Every option set of the row: the grid, and what torch's own tests use on this kind of device."""
        if not self.in_torch:
            return [*self.grid]
        listed = _listed_by_torch(self.name)
        return [*self.grid, *(entry.kwargs for entry in listed.optim_inputs_func(device=device))]

    @property
    def options(self) -> list[Options]:
        return self.options_on("cpu")

    @property
    def device_steps(self) -> Options:
        """The option with which torch keeps step counters where the parameters are; none where nothing is counted."""
        return {"capturable": True} if self.accepts("capturable") else {"fused": True} if self.fused else {}

    @property
    def error_inputs(self) -> list[Any]:
        if not self.in_torch:
            return []
        return _listed_by_torch(self.name).optim_error_inputs_func("cpu", torch.float32)

    @property
    def flags(self) -> list[Options]:
        """Every value of the flags by which torch chooses an implementation."""
        if not self.in_torch:
            return [{}]
        flags: list[Options] = [{}, {"foreach": False}, {"foreach": True}]
        return [*flags, {"fused": False}, {"fused": True}] if self.fused else flags


def _listed_by_torch(name: str) -> Any:
    """What torch's own tests know of an optimizer. Their module takes seconds to import, and not every process asks."""
    from torch.testing._internal.common_optimizers import optim_db

    return next(info for info in optim_db if info.optim_cls.__name__ == name)


@dataclass(frozen=True)
class Case:
    spec: Spec
    options: Options

    @property
    def id(self) -> str:
        shown = ",".join(f"{key}={_short(value)}" for key, value in self.options.items())
        return f"{self.spec.name}({shown})"


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return "-".join(map(_short, value))
    if isinstance(value, torch.Tensor):
        return f"tensor{list(value.shape)}{str(value.dtype)[-2:]}"
    return str(value).replace(" ", "")


def grid(*also: Options, allowed: Callable[[Options], bool] = lambda options: True, **axes: Iterable[Any]) -> tuple:
    """The single sets, and then every combination of the axes that is allowed."""
    sets = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    return (*also, *(options for options in sets if allowed(options)))


TENSOR_LRS = [
    {"lr": torch.tensor(0.01)},
    {"lr": torch.tensor([0.01], dtype=torch.float64)},
    {"lr": torch.tensor([[0.01]])},
]
TENSOR_BETAS = {"betas": (torch.tensor([[[0.8]]]), torch.tensor([0.95], dtype=torch.float64))}


def factored_shape(key: str, shape: Shape) -> Shape | None:
    """Of Adafactor's state: matrices have a row_var and a col_var, vectors a variance."""
    if key in ("row_var", "col_var"):
        return None if len(shape) < 2 else (*shape[:-1], 1) if key == "row_var" else (*shape[:-2], 1, shape[-1])
    return shape if key != "variance" or len(shape) < 2 else None


SPECS = [
    Spec(
        "SGD",
        op="sgd_",
        state=lambda options: {"momentum_buffer"} if options.get("momentum", 0) != 0 else set(),
        grid=grid(
            *TENSOR_LRS,
            {"lr": 0.0, "momentum": 0.9},
            lr=[0.05],
            momentum=[0, 0.9],
            dampening=[0, 0.3],
            weight_decay=[0, 0.1],
            nesterov=[False, True],
            maximize=[False, True],
            allowed=lambda o: not o["nesterov"] or (o["momentum"] > 0 and o["dampening"] == 0),
        ),
        typical={"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
        sparse={"lr": 0.05},
    ),
    Spec(
        "Adam",
        op="adam_",
        state=lambda o: {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if o.get("amsgrad") else set()),
        grid=grid(
            *TENSOR_LRS,
            TENSOR_BETAS,
            {"lr": torch.tensor(0.01), **TENSOR_BETAS, "amsgrad": True},
            {"betas": (0.0, 0.0)},
            {"betas": (0.3, 0.6), "eps": 1e-3},
            {"lr": 0.0, "weight_decay": 0.1},
            lr=[0.01],
            weight_decay=[0, 0.1],
            amsgrad=[False, True],
            maximize=[False, True],
            decoupled_weight_decay=[False, True],
        ),
        typical={"lr": 0.01, "weight_decay": 0.1, "amsgrad": True},
        half_options={"eps": 1e-3},
        betas=True,
    ),
    Spec(
        "AdamW",
        op="adamw_",
        state=lambda o: {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if o.get("amsgrad") else set()),
        grid=grid(
            *TENSOR_LRS,
            TENSOR_BETAS,
            {"betas": (0.3, 0.6), "eps": 1e-3},
            lr=[0.01],
            weight_decay=[0, 0.1],
            amsgrad=[False, True],
            maximize=[False, True],
        ),
        typical={"lr": 0.01, "weight_decay": 0.1, "amsgrad": True},
        half_options={"eps": 1e-3},
        betas=True,
    ),
    Spec(
        "RMSprop",
        op="rmsprop_",
        state=lambda o: (
            {"step", "square_avg"}
            | ({"grad_avg"} if o.get("centered") else set())
            | ({"momentum_buffer"} if o.get("momentum", 0) > 0 else set())
        ),
        grid=grid(
            *TENSOR_LRS,
            {"alpha": 0.5, "eps": 1e-3, "centered": True},
            {"alpha": 0.0},
            lr=[0.01],
            weight_decay=[0, 0.1],
            momentum=[0, 0.9],
            centered=[False, True],
            maximize=[False, True],
        ),
        typical={"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9, "centered": True},
        half_options={"eps": 1e-3},
        fused=False,
    ),
    Spec(
        "Adagrad",
        op="adagrad_",
        state=lambda o: {"step", "sum"},
        grid=grid(
            *TENSOR_LRS,
            {"eps": 1e-3},
            lr=[0.05],
            lr_decay=[0, 0.5],
            weight_decay=[0, 0.1],
            initial_accumulator_value=[0, 0.2],
            maximize=[False, True],
        ),
        typical={"lr": 0.05, "lr_decay": 0.5, "weight_decay": 0.1},
        half_options={"eps": 1e-3},
        sparse={"lr": 0.05, "lr_decay": 0.1},
    ),
    Spec(
        "Adadelta",
        op="adadelta_",
        state=lambda o: {"step", "square_avg", "acc_delta"},
        grid=grid(
            *TENSOR_LRS,
            {"rho": 0.5, "eps": 1e-3},
            lr=[1.0],
            weight_decay=[0, 0.1],
            maximize=[False, True],
        ),
        typical={"lr": 0.5, "weight_decay": 0.1},
        half_options={"eps": 1e-3},
        fused=False,
    ),
    Spec(
        "Adamax",
        op="adamax_",
        state=lambda o: {"step", "exp_avg", "exp_inf"},
        grid=grid(
            *TENSOR_LRS,
            {"betas": (0.3, 0.6), "eps": 1e-3},
            {"betas": (0.0, 0.0)},
            lr=[0.01],
            weight_decay=[0, 0.1],
            maximize=[False, True],
        ),
        typical={"lr": 0.01, "weight_decay": 0.1},
        half_options={"eps": 1e-3},
        fused=False,
    ),
    Spec(
        "NAdam",
        op="nadam_",
        state=lambda o: {"step", "mu_product", "exp_avg", "exp_avg_sq"},
        grid=grid(
            *TENSOR_LRS,
            {"betas": (0.3, 0.6), "eps": 1e-3, "momentum_decay": 0.1},
            {"betas": (0.0, 0.0)},
            lr=[0.01],
            weight_decay=[0, 0.1],
            maximize=[False, True],
            decoupled_weight_decay=[False, True],
        ),
        typical={"lr": 0.01, "weight_decay": 0.1},
        half_options={"eps": 1e-3},
        fused=False,
        numbers=frozenset({"step", "mu_product"}),
    ),
    Spec(
        "RAdam",
        op="radam_",
        state=lambda o: {"step", "exp_avg", "exp_avg_sq"},
        grid=grid(
            *TENSOR_LRS,
            {"betas": (0.3, 0.6), "eps": 1e-3},
            {"betas": (0.9, 0.9)},
            lr=[0.01],
            weight_decay=[0, 0.1],
            maximize=[False, True],
            decoupled_weight_decay=[False, True],
        ),
        typical={"lr": 0.01, "weight_decay": 0.1},
        half_options={"eps": 1e-3},
        fused=False,
    ),
    Spec(
        "Rprop",
        op="rprop_",
        state=lambda o: {"step", "prev", "step_size"},
        grid=grid(
            *TENSOR_LRS,
            {"etas": (0.25, 2.0), "step_sizes": (1e-3, 0.5)},
            lr=[0.01],
            maximize=[False, True],
        ),
        typical={"lr": 0.01},
        fused=False,
    ),
    Spec(
        "ASGD",
        op="asgd_",
        state=lambda o: {"step", "eta", "mu", "ax"},
        grid=grid(
            *TENSOR_LRS,
            {"lr": 0.05, "lambd": 0.1, "alpha": 0.5, "t0": 2},
            lr=[0.05],
            weight_decay=[0, 0.1],
            maximize=[False, True],
            t0=[1e6, 1],
        ),
        typical={"lr": 0.05, "weight_decay": 0.1, "t0": 1},
        fused=False,
        reads_numbers=True,
        numbers=frozenset({"step", "eta", "mu"}),
    ),
    Spec(
        "Adafactor",
        whole_tensors=True,
        op="adafactor_",
        state=lambda o: {"step", "row_var", "col_var", "variance"},
        state_shape=factored_shape,
        grid=grid(
            *TENSOR_LRS,
            {"lr": 0.5, "beta2_decay": -0.5, "eps": (1e-3, 0.1), "d": 1.5},
            {"lr": 0.5, "eps": (0.5, 0.0)},
            {"lr": 0.0, "weight_decay": 0.1},
            lr=[0.05],
            weight_decay=[0, 0.1],
            maximize=[False, True],
        ),
        typical={"lr": 0.05, "weight_decay": 0.1, "eps": (1e-4, 1e-3)},
        half_options={"eps": (1e-3, 1e-3)},  # by default that of the first parameter's dtype counts for all
        fused=False,
        is_real=True,
        reads_numbers=True,
        for_dtype=lambda options, dtype: {"eps": (torch.finfo(dtype).eps, 1e-3), **options},
    ),
    Spec(
        "Lion",
        op="lion_",
        state=lambda o: {"exp_avg"},
        grid=grid(
            *TENSOR_LRS,
            {"betas": (0.3, 0.6)},
            {"betas": (0.0, 0.0)},
            lr=[0.01],
            weight_decay=[0, 0.1],
            maximize=[False, True],
        ),
        typical={"lr": 0.01, "weight_decay": 0.1},
        fused=False,
    ),
    Spec(
        "LAMB",
        whole_tensors=True,
        op="lamb_",
        state=lambda o: {"step", "exp_avg", "exp_avg_sq"},
        grid=grid(
            *TENSOR_LRS,
            {"betas": (0.3, 0.6), "eps": 1e-3},
            lr=[0.01],
            weight_decay=[0, 0.1],
            maximize=[False, True],
        ),
        typical={"lr": 0.01, "weight_decay": 0.1},
        half_options={"eps": 1e-3},
        fused=False,
    ),
    Spec(
        "LARS",
        whole_tensors=True,
        op="lars_",
        state=lambda o: {"momentum_buffer"},
        grid=grid(
            *TENSOR_LRS,
            {"momentum": 0.0, "eps": 0.1, "lr": 0.1},
            lr=[0.1],
            weight_decay=[0, 0.1],
            momentum=[0.9],
            nesterov=[False, True],
            maximize=[False, True],
            trust_coefficient=[0.1],
        ),
        typical={"lr": 0.1, "weight_decay": 0.1, "trust_coefficient": 0.1},
        fused=False,
    ),
]


@functools.cache
def cases() -> list[Case]:
    """Every option set of every row."""
    return [Case(spec, options) for spec in SPECS for options in spec.options]


def _variants() -> list[Case]:
    """One option set for each set of state tensors an optimizer may keep, the one with most switches on, and one with a
    tensor lr: for tests that are about state and lists rather than about formulas."""
    found: dict[Any, Case] = {}
    for spec in SPECS:
        for options in spec.grid:
            tensor = any(isinstance(value, torch.Tensor) for value in options.values())
            found[spec.name, tensor, () if tensor else frozenset(spec.state(options))] = Case(spec, options)
    return list(found.values())


VARIANTS = _variants()
