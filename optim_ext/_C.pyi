"""Types of the compiled module."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optim_ext._averaging.step import Besides

class Plan:
    """What one optimizer hands to its op, gathered once; verified against the optimizer at every step."""

    signature: Any
    besides: AveragePlan | Besides
    of_shards: bool
    may_skip: bool
    steps_as_before: int  # how many steps were taken without another look at what a tensor is
    def __init__(
        self,
        op: str,
        param_groups: list[dict[str, Any]],
        state: dict[Any, Any],
        calls: list[tuple[int, list[int], tuple[str | None, ...], bool, bool, tuple[Any, ...]]],
        averages: dict[Tensor, Tensor] = ...,
        partial: set[str] = ...,
        numbers: set[str] = ...,
    ) -> None: ...
    def step(
        self,
        state: dict[Any, Any],
        param_groups: list[dict[str, Any]],
        hypers: list[tuple[Any, ...]],
        controls: tuple[Tensor | None, Tensor | None, Tensor | None, float | Tensor | None],
        check_only: bool = False,
        norms: Any = None,
    ) -> bool:
        """Step, or return False with nothing written where the plan no longer describes the optimizer. ``norms``: of
        tensors of which this process has parts, see :class:`optim_ext._step.whole_norms.WholeNorms`."""
    def remember_options(self, param_groups: list[dict[str, Any]], names: Mapping[str, Any]) -> None:
        """Note the options from which the hyper-parameters of the next step will be taken; of these, `names` matter."""
    def repeat(self, state: dict[Any, Any], param_groups: list[dict[str, Any]]) -> bool:
        """Step as the last time, without controls; False, with nothing written, if more than gradients, counts and rates
        has changed."""

def is_observed() -> bool: ...
def counts_versions_directly() -> bool: ...
def reads_dicts_directly() -> bool: ...

class AveragePlan:
    """What an averaged model hands to average_, gathered once; is_current() compares two module trees with it."""

    def __init__(
        self,
        trees: list[list[torch.nn.Module]],
        names: list[str],
        averages: list[Tensor],
        params: list[Tensor],
    ) -> None: ...
    def is_current(self, *roots: torch.nn.Module) -> bool: ...
    def run(self, weight: float | Tensor, found_inf: Tensor | None = None, check_only: bool = False) -> None: ...

def describe(param_groups: Sequence[Mapping[str, Any]], group: int, index: int) -> str: ...

class GradMarks:
    """The gradients of param_groups as they are now, held weakly."""

    def __init__(self, param_groups: Iterable[Mapping[str, Any]]) -> None: ...
    def writes_since(self, param_groups: Iterable[Mapping[str, Any]]) -> int | None:
        """How often all gradients have been written in place since; -1 if not all alike, None if they are others."""

def grad_norm(
    param_groups: Iterable[Mapping[str, Any]],
    norm_type: float = 2.0,
    max_norm: float | None = None,
    skip_nonfinite: bool = False,
    skip_above: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    skips: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...
def unfinished_grad_norm(param_groups: Iterable[Mapping[str, Any]], norm_type: float) -> Tensor: ...
def any_of_type(param_groups: Iterable[Mapping[str, Any]], type: type) -> bool: ...
def reads_dtensors_directly(type: type) -> bool: ...

MOST_NORMS: int  # that a rule takes of each parameter

class WholeParts:
    """Tensors that are parts of wholes of which a step takes norms, and the numbers of elements of these."""

    def __init__(self, params: list[Tensor], numels: list[int]) -> None: ...

class DTensorParts:
    """The DTensors among an optimizer's parameters and state, with stand-ins made of their local tensors."""

    def __init__(
        self,
        type: type,
        param_groups: list[dict[str, Any]],
        state: dict[Any, Any],
        params: list[tuple[Any, Tensor]],
        others: list[tuple[Any, Tensor]],
    ) -> None: ...
    def lend(
        self, param_groups: list[dict[str, Any]], state: dict[Any, Any], with_state: bool = True
    ) -> list[int] | None:
        """Give stand-ins the memory and gradients they stand for. The numbers of the parameters with gradients of another
        layout, which are not there yet; None where the optimizer has other objects."""

    def lend_grad(self, number: int, grad: Tensor) -> None: ...
    def know(self, number: int, spec: Any) -> None: ...
    def take_back(self, written: bool) -> None: ...

def unsupported(tensor: Tensor) -> str | None: ...
def unsupported_grad(grad: Tensor, takes_sparse: bool = False) -> str | None: ...
def vectors_of_one_block(count: int, numel: int, dtype: torch.dtype) -> list[Tensor]: ...
def isa() -> str: ...
def rules() -> list[str]: ...
def step_ops() -> dict[str, dict[str, Any]]:
    """The ops an optimizer steps with, by name: ``lists`` of tensors as (argument, key of state, role), ``hypers`` as
    (argument, kind, option, index in the tuple there or None), ``is_element_wise`` and ``takes_companions``."""

class LbfgsEvaluation:
    """A gradient as one vector, with its largest magnitude, the sum of its magnitudes, its product with the direction, and
    the loss where it was read together with them (else NaN)."""

    @property
    def grad(self) -> Tensor: ...
    @property
    def loss(self) -> float: ...
    @property
    def largest(self) -> float: ...
    @property
    def total(self) -> float: ...
    @property
    def product(self) -> float: ...

class LbfgsHistory:
    """State and history of one L-BFGS problem, whose parameters are handed in with every call."""

    def __init__(
        self,
        offsets: list[int],
        numel: int,
        dtype: torch.dtype,
        row_dtype: torch.dtype,
        device: torch.device,
        history_size: int,
        metric: Tensor | None,
        held: list[tuple[int, int]],
        counted: int | None = None,
        groups: list[tuple[str, int]] = ...,
    ) -> None: ...
    def load(self, state: Mapping[str, Any], history_size: int) -> bool:
        """Go on from a state, its own of the last time or another; whether there is a direction."""

    def save(self, state: Mapping[str, Any], t: float, prev_loss: float, history_size: int, has_al: bool) -> None: ...
    def disown(self) -> None:
        """No tensor that the state has is written again."""

    def evaluate(
        self, params: list[Tensor], negate: bool, along_direction: bool, loss: Tensor | None = None
    ) -> LbfgsEvaluation: ...
    def depart(
        self,
        params: list[Tensor],
        here: LbfgsEvaluation,
        history_size: int,
        anew: bool,
        last_length: float,
        damping: float | None,
        keeps_origin: bool,
        t: float | None,
        least_slope: float,
        only_if_finite: bool,
        is_held: Tensor | None = None,
    ) -> tuple[float, float, bool]:
        """Largest magnitude and slope of the new direction, and whether the parameters were moved along it."""

    def forget(self) -> None: ...
    def stand_still(self, here: LbfgsEvaluation) -> None: ...
    def set_previous(self, here: LbfgsEvaluation) -> None: ...
    def move(self, params: list[Tensor], t: float, from_origin: bool) -> None: ...
    def move_to_origin(self, params: list[Tensor]) -> None: ...
    def move_to(self, params: list[Tensor], point: Tensor) -> None: ...
    def read(self, params: list[Tensor]) -> Tensor: ...
    def note_best(self, params: list[Tensor], here: LbfgsEvaluation) -> None: ...
    def go_to_best(self, params: list[Tensor]) -> LbfgsEvaluation: ...
    @property
    def pairs(self) -> int: ...
    @property
    def vectors(self) -> int: ...
    @property
    def d(self) -> Tensor: ...
    @property
    def origin(self) -> Tensor: ...

def define_rule_op(
    class_name: str, state: list[tuple[str, str]], hypers: list[tuple[str, int | None]]
) -> tuple[str, dict[str, Any]]:
    """The op, as plans take it, of a class whose rule is written in Python, and its table as in step_ops()."""

def define_rule(name: str, code: dict[str, Any]) -> int:
    """A variant of a rule; the number of the one that is there already where the name is known."""

def define_compiled_rule(name: str, of: int, path: str) -> int:
    """The same variant, run by the library at a path."""

def run_rule_by(number: int, other: int | None) -> None:
    """What a variant is run by from now on: what another one is, or the interpreter."""

def define_rule_on_gpu(name: str, of: int, gpu: int, images: list[bytes]) -> int:
    """The same variant, run on one GPU by kernels that were compiled for it, one image of each kind; empty where there is
    none."""

def run_rule_on_gpu_by(number: int, other: int, gpu: int) -> None:
    """What a variant is run by on a GPU from now on: what another one is."""
