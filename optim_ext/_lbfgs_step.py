"""One step of L-BFGS: torch's control flow around native sweeps over the whole history."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optim_ext._line_search import Length, Point, rounded_to, strong_wolfe
from optim_ext._load import _C

_OPS = torch.ops.optim_ext
# torch's: pairs of less curvature than this do not join the history.
_LEAST_CURVATURE = 1e-10
# Restarts after which a step gives up. Until the loss falls each begins ten times shorter than the one before.
_MOST_RESTARTS = 12
# Bytes from which a history may lie in huge pages, and bytes of it that are allocated together. Sweeps over many vectors
# read a fifth more per second from huge pages than from small ones.
_HUGE_PAGE, _BLOCK = 2 << 20, 32 << 20
# One number for all parameters, or one number, tensor or None for each of them.
Bound = float | Tensor | Sequence["float | Tensor | None"] | None


@dataclass(frozen=True)
class Method:
    """The options of one step."""

    lr: float
    scales: tuple[float, ...]  # of the groups' learning rates, relative to the largest
    max_iter: int
    max_eval: int
    tolerance_grad: float
    tolerance_change: float
    history_size: int
    line_search_fn: str | None = None
    maximize: bool = False
    strict_max_eval: bool = False
    recover: bool = False
    damping: float | None = None
    history_dtype: torch.dtype | None = None
    bounded: bool = False


class Norms(NamedTuple):
    """Of a vector: its largest magnitude, the sum of its magnitudes, its product with another one."""

    largest: float
    total: float
    product: float


class Buffers:
    """Vectors of one kind, used again when given back; about `count` of them are needed."""

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device, count: int) -> None:
        self._numel, self._dtype, self._device = numel, dtype, device
        size = numel * dtype.itemsize
        self._at_once = min(count, _BLOCK // size + 1) if device.type == "cpu" and count * size > _HUGE_PAGE else 0
        self._own: dict[int, Tensor] = {}
        self._free: list[Tensor] = []

    def take(self) -> Tensor:
        if not self._free:
            if self._at_once > 0:
                self._free = _C.vectors_of_one_block(self._at_once, self._numel, self._dtype)
            else:
                self._free = [torch.empty(self._numel, dtype=self._dtype, device=self._device)]
            self._own.update((id(tensor), tensor) for tensor in self._free)
        return self._free.pop()

    def give(self, tensor: Tensor) -> None:
        """Take back a vector nobody needs any more. Those that did not come from here are left alone."""
        if id(tensor) in self._own:
            self._free.append(tensor)

    def owns(self, tensor: Tensor) -> bool:
        return id(tensor) in self._own

    def has_lent(self) -> bool:
        return len(self._own) > len(self._free)

    def disown(self) -> None:
        """Everything that was taken stays with its taker."""
        self._own = {id(tensor): tensor for tensor in self._free}


def span_of(tensor: Tensor) -> int:
    """Elements from the first to the last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def working_dtype(params: list[Tensor]) -> torch.dtype:
    """What the vectors are computed in: the parameters' common floating point type, float32 at least."""
    dtype = torch.float32
    for p in params:
        dtype = torch.promote_types(dtype, p.dtype.to_real())
    return dtype


class Workspace:
    """The parameters as one vector, memory for more of them, and the history's dot products. A cache: the state holds
    all that matters, and what is here is checked against it."""

    def __init__(self, params: list[Tensor], sizes: list[int], bounds: list[Any], method: Method) -> None:
        self.params = params
        self.seen = [(p.shape, p.dtype, p.device) for p in params]
        self.device = params[0].device
        for index, p in enumerate(params):
            if p.device != self.device:
                raise RuntimeError(
                    f"LBFGS needs all parameters on one device: {index} is on {p.device}, not {self.device}"
                )
            if p.numel() > 0 and span_of(p) < p.numel():
                raise RuntimeError(f"parameter {index} has elements that share memory, so it cannot be moved; clone it")
        self.dtype = dtype = working_dtype(params)
        self.numels = [p.numel() * (2 if p.is_complex() else 1) for p in params]
        self.numel = sum(self.numels)
        self.offsets = [0, *itertools.accumulate(self.numels)][:-1]
        self.history_dtype = method.history_dtype or dtype
        vectors, rows = 6, 2 * method.history_size
        self.vectors = Buffers(self.numel, dtype, self.device, vectors + rows * (self.history_dtype == dtype))
        self.rows = (
            self.vectors if self.history_dtype == dtype else Buffers(self.numel, self.history_dtype, self.device, rows)
        )
        self.sizes, self.bounds, self.scales = sizes, bounds, method.scales
        self.bound_versions = _versions(bounds)
        ends = list(itertools.accumulate(sum(numels) for numels in self._in_groups(self.numels)))
        held = [
            slice(*ends) for ends, scale in zip(itertools.pairwise([0, *ends]), self.scales, strict=True) if scale == 0
        ]
        self.held = held  # parts of the vectors that belong to groups with a rate of zero
        self.metric = self._metric()
        self.box: Any = None
        self.gram: _C.LbfgsGram | None = None
        self._summed: list[tuple[Tensor, int]] = []  # the rows the Gram matrices were made of, with their versions
        self.best: Best | None = None
        self.warned = False

    def what_changed(self, params: list[Tensor]) -> str | None:
        for index, (p, known, seen) in enumerate(zip(params, self.params, self.seen, strict=False)):
            now = (p.shape, p.dtype, p.device)
            if p is known and now != seen:
                return f"parameter {index} changed from {_described(seen)} to {_described(now)}"
        return None

    def serves(self, params: list[Tensor], sizes: list[int], bounds: list[Any], method: Method) -> bool:
        return (
            len(params) == len(self.params)
            and all(a is b for a, b in zip(params, self.params, strict=True))
            and sizes == self.sizes
            and all(a is b for a, b in zip(bounds, self.bounds, strict=True))
            and _versions(bounds) == self.bound_versions
            and method.scales == self.scales
            and (method.history_dtype or self.dtype) == self.history_dtype
        )

    def _metric(self) -> Tensor | None:
        if all(scale == 1.0 for scale in self.scales):
            return None
        return torch.cat([
            torch.full((sum(numels),), scale, dtype=self.dtype, device=self.device)
            for numels, scale in zip(self._in_groups(self.numels), self.scales, strict=True)
        ])  # fmt: skip

    def _in_groups(self, of_params: list[int]) -> list[list[int]]:
        each = iter(of_params)
        return [list(itertools.islice(each, size)) for size in self.sizes]

    def has_lent(self) -> bool:
        """Whether vectors are out that were never given back."""
        return self.vectors.has_lent() or self.rows.has_lent()

    def disown(self) -> None:
        self.vectors.disown()
        self.rows.disown()

    def read(self, into: Tensor) -> None:
        _C.lbfgs_read(into, self.params, self.offsets)

    def gather(self, into: Tensor, negate: bool) -> None:
        """The gradients as one vector; zeros for parameters without."""
        if _C.lbfgs_read_grads(into, self.params, self.offsets, negate):
            return
        for index, p in enumerate(self.params):
            if p.grad is not None and p.grad.shape != p.shape:
                raise RuntimeError(
                    f"parameter {index} of LBFGS has shape {list(p.shape)}, its gradient {list(p.grad.shape)}"
                )
        there = [(offset, p.grad) for offset, p in zip(self.offsets, self.params, strict=True) if p.grad is not None]
        grads = [grad if grad.layout is torch.strided else grad.to_dense() for _, grad in there]
        _OPS.lbfgs_gather_(into, grads, [offset for offset, _ in there], negate=negate)

    def move(self, d: Tensor, t: float, origin: Tensor | None = None) -> None:
        _C.lbfgs_move(self.params, d, t, origin)

    def norms(self, vector: Tensor, other: Tensor | None = None) -> Norms:
        return Norms(*_OPS.lbfgs_norms(vector, other).tolist())

    def loss_and_norms(self, loss: Tensor, vector: Tensor, other: Tensor | None) -> tuple[float, Norms]:
        """The same and a loss on the same device, which is waited for once."""
        norms = _OPS.lbfgs_norms(vector, other)
        number, *of_vector = torch.cat([loss.detach().reshape(1).to(norms.dtype), norms]).tolist()
        return number, Norms(*of_vector)

    def gram_of(self, old_dirs: list[Tensor], old_stps: list[Tensor]) -> _C.LbfgsGram:
        """The dot products of a history: those at hand, or, where it came from elsewhere, computed anew."""
        rows = [*old_dirs, *old_stps]
        known = self.gram is not None and len(rows) == len(self._summed)
        if not known or any(a is not b or a._version != v for a, (b, v) in zip(rows, self._summed, strict=True)):
            self.gram = _C.LbfgsGram()
            for count, y in enumerate(old_dirs, start=1):
                y = y.to(self.dtype)
                dots = _OPS.lbfgs_dots(y, old_dirs[:count], old_stps[:count], metric=self.metric)
                self.gram.append_dots(dots.cpu())
        assert self.gram is not None
        return self.gram

    def remember(self, old_dirs: list[Tensor], old_stps: list[Tensor]) -> None:
        self._summed = [(row, row._version) for row in (*old_dirs, *old_stps)]


def _versions(bounds: Any) -> list[int]:
    """Of all tensors among the bounds: they may be changed in place."""
    if isinstance(bounds, Tensor):
        return [bounds._version]
    if isinstance(bounds, (list, tuple)):
        return [version for bound in bounds for version in _versions(bound)]
    return []


def _described(seen: tuple[torch.Size, torch.dtype, torch.device]) -> str:
    shape, dtype, device = seen
    return f"{list(shape)} {dtype} on {device}"


@dataclass
class Best:
    """The lowest point seen, kept for ``recover``."""

    loss: float
    params: Tensor
    grad: Tensor


class _Lease:
    """A vector, with its norms, that goes back to its buffers when the last reference to it goes."""

    def __init__(self, buffers: Buffers, tensor: Tensor, norms: Norms) -> None:
        self.buffers: Buffers | None = buffers
        self.tensor, self.norms = tensor, norms

    def keep(self) -> Tensor:
        self.buffers = None
        return self.tensor

    def __del__(self) -> None:
        if self.buffers is not None:
            self.buffers.give(self.tensor)


class Step:
    """One call of ``step``."""

    def __init__(
        self,
        states: dict[Tensor, Any],
        work: Workspace,
        method: Method,
        closure: Callable[[], Any],
        is_to_skip: Callable[[], bool] = lambda: False,
    ) -> None:
        self.states, self.work, self.method, self.closure, self.is_to_skip = states, work, method, closure, is_to_skip
        self.is_skipped = False
        # For all that torch has tensors of the parameters' dtype for. A search that overflows there can be recovered from.
        self.rounded = rounded_to(work.dtype, saves_overflow=method.recover)
        self.tolerance_grad, self.tolerance_change = map(self.rounded, (method.tolerance_grad, method.tolerance_change))
        self.evals = 0
        self.restarts = 0
        self.has_news = False  # whether the state has to learn of more than counts
        self.loss: float
        self.grad: Tensor
        self.d: Tensor | None
        self.prev_grad: Tensor | None
        self.t: float

    def run(self) -> Any:
        given, self.loss, self.grad, norms = self._evaluate()
        self.is_skipped = self.is_to_skip()
        if self.is_skipped:
            self.work.vectors.give(self.grad)
            return given
        self.evals = 1
        self.state: dict[str, Any] = self.states[self.work.params[0]]  # torch keeps it under the first parameter
        self.state["func_evals"] = self.state.get("func_evals", 0) + 1
        self.state.setdefault("n_iter", 0)
        self._load()
        try:
            self._measure(norms)
            if self.method.recover and not self._is_finite():
                if not self._restart():
                    return given
            else:
                self._note_best(anew=True)
            self.first_loss = self.loss
            if not self.largest <= self.tolerance_grad:
                self._iterate()
                self._end_at_best()
        finally:
            self._save()
        return given

    def _iterate(self) -> None:
        method, state = self.method, self.state
        for iteration in itertools.count(1):
            if not iteration <= method.max_iter:  # which may be any number, as in torch
                break
            state["n_iter"] += 1
            self.has_news = True
            last = iteration == method.max_iter
            is_fresh = state["n_iter"] == 1 or self.d is None or self._was_restarted()
            if is_fresh:
                self._forget()
            else:
                self._add_pair()
            self._set_direction()
            self.prev_grad, self.prev_loss = self.grad, self.loss
            self.t = self._first_length() if is_fresh else method.lr
            if method.recover and not (math.isfinite(self.slope) and math.isfinite(self.d_largest)):
                if self._restart():
                    continue
                break
            if self.slope > -self.tolerance_change:
                break
            spent = self._just_move(last) if method.line_search_fn is None else self._search()
            if spent is None:
                self.t = 0.0
                break
            self.evals += spent
            state["func_evals"] += spent
            is_over = last or self.evals >= method.max_eval
            if method.recover and not (self._is_finite() and self.loss <= self.first_loss):
                if self._restart() and not is_over:
                    continue
                break
            self._note_best()
            if is_over or self.largest <= self.tolerance_grad:
                break
            if self.rounded(abs(self.t) * self.d_largest) <= self.tolerance_change:
                break
            if abs(self.loss - self.prev_loss) < method.tolerance_change:
                break

    def _was_restarted(self) -> bool:
        """Whether the step before ended in a restart (see `_save`)."""
        return self.method.recover and self.t == 0.0 and not self.old_dirs

    def _first_length(self) -> float:
        """Of a step without a history: no longer than lr, all magnitudes of it taken together."""
        rounded, lr = self.rounded, self.method.lr
        share = rounded(1.0 / rounded(self.total)) if self.total > 0.0 else 1.0
        length = Length(rounded(share * rounded(lr))) if share < 1.0 else lr
        return length * 0.1**self.restarts if self.restarts > 0 else length

    # Evaluations

    def _evaluate(self, along: Tensor | None = None) -> tuple[Any, float, Tensor, Norms]:
        """The loss as the closure gives it and as the number to minimise, the gradient, and its norms and product with
        ``along``. A GPU is waited for once."""
        work, given = self.work, self.closure()
        waits_once = (
            isinstance(given, Tensor)
            and given.device == work.device != torch.device("cpu")
            and given.is_floating_point()
            and given.numel() == 1
        )
        if not waits_once:
            try:
                loss = float(given)
            except (TypeError, ValueError, RuntimeError) as error:
                raise type(error)(f"the closure of LBFGS has to return the loss, one number: {error}") from error
        grad = work.vectors.take()
        work.gather(grad, self.method.maximize)
        if waits_once:
            loss, norms = work.loss_and_norms(given, grad, along)
        else:
            norms = work.norms(grad, along)
        return given, -loss if self.method.maximize else loss, grad, norms

    def _measure(self, norms: Norms) -> None:
        """Note how far the gradient is from zero; ``norms`` are its own."""
        self.largest, self.total, _ = norms

    def _is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.largest)

    # The state, which has torch's keys

    def _load(self) -> None:
        """Take the state up. It may come from torch, or from a checkpoint of another dtype."""
        state, work = self.state, self.work

        def fitting(tensor: Tensor, dtype: torch.dtype) -> Tensor:
            return tensor.to(device=work.device, dtype=dtype).contiguous()

        size = self.method.history_size
        both = [state.get(key) or [] for key in ("old_dirs", "old_stps")]
        self.outlived = [row for rows in both for row in rows[:-size]]  # of a larger history than this one
        self.old_dirs, self.old_stps = ([fitting(row, work.history_dtype) for row in rows[-size:]] for rows in both)
        self.gram = work.gram_of(self.old_dirs, self.old_stps)
        self.d = None if state.get("d") is None else fitting(state["d"], work.dtype)
        self.prev_grad = self.d if self.d is None else fitting(state["prev_flat_grad"], work.dtype)
        self.t = float(state.get("t") or 0.0)
        self.prev_loss = float(state.get("prev_loss") or 0.0)
        self.restarts = state.get("restarts", 0)

    def _save(self) -> None:
        state, work, gram = self.state, self.work, self.gram
        work.remember(self.old_dirs, self.old_stps)
        if not self.has_news:  # as in torch, a step without an iteration leaves what it was given, to the bit
            work.vectors.give(self.grad)
            return
        for row in self.outlived:
            work.rows.give(row)
        if self.d is None and state.get("d") is not None:  # after a restart: a step of no length, for torch too
            self.d, self.t, self.prev_grad, self.prev_loss = self.grad.neg(), 0.0, self.grad, self.loss
        if self.d is not None:
            count = gram.count
            alpha = gram.alpha if len(gram.alpha) == count else [0.0] * count
            numbers = [*(1.0 / ys for ys in gram.curvatures), *alpha, gram.h_diag]
            scalars = torch.tensor(numbers, dtype=work.dtype, device=work.device).unbind()
            state["d"], state["t"] = self.d, float(self.t)
            state["old_dirs"], state["old_stps"] = self.old_dirs, self.old_stps
            state["ro"], state["H_diag"] = list(scalars[:count]), scalars[-1] if count > 0 else 1
            state["prev_flat_grad"], state["prev_loss"] = self.prev_grad, self.prev_loss
            if state["n_iter"] > 1:
                state["al"] = [*scalars[count:-1], *[None] * (self.method.history_size - count)]
        if 0 < self.restarts <= _MOST_RESTARTS:
            state["restarts"] = self.restarts
        else:
            state.pop("restarts", None)
        if self.grad is not self.prev_grad:
            work.vectors.give(self.grad)

    # Directions

    def _forget(self) -> None:
        """An empty history, as at the very beginning."""
        work = self.work
        self.has_news = True
        for row in (*self.old_dirs, *self.old_stps):
            work.rows.give(row)
        self.old_dirs, self.old_stps = [], []
        self.gram = work.gram = _C.LbfgsGram()
        for vector in (self.d, self.prev_grad):
            if vector is not None and vector is not self.grad:
                work.vectors.give(vector)
        self.d = self.prev_grad = None

    def _add_pair(self) -> None:
        """The last step and the change of the gradient join the history, and all dot products with the gradient are
        taken. The memory of the direction and of the gradient before becomes that of the new rows."""
        work, size = self.work, self.method.history_size
        grad, prev_grad, d, weights = self._ingredients()
        reuse = work.rows.owns(prev_grad) and work.rows.owns(d)
        y, s = (prev_grad, d) if reuse else (work.rows.take(), work.rows.take())
        dots = _OPS.lbfgs_pair_(
            y, s, grad, prev_grad, d, self.old_dirs, self.old_stps,
            metric=work.metric, t=self.t, grad_weight=weights[0], prev_weight=weights[1],
        )  # fmt: skip
        is_new = self.gram.push(dots.cpu(), size, _LEAST_CURVATURE)
        if not reuse:
            work.vectors.give(prev_grad)
            work.vectors.give(d)
        if is_new and len(self.old_dirs) == size:
            work.rows.give(self.old_dirs.pop(0))
            work.rows.give(self.old_stps.pop(0))
        if is_new:
            self.old_dirs.append(y)
            self.old_stps.append(s)
        else:
            work.rows.give(y)
            work.rows.give(s)

    def _ingredients(self) -> tuple[Tensor, Tensor, Tensor, tuple[float, float]]:
        """The gradient, the one before, the direction between them, and the weights of both gradients in the pair."""
        assert self.prev_grad is not None and self.d is not None
        return self.grad, self.prev_grad, self.d, self._damped() if self.method.damping is not None else (1.0, 1.0)

    def _damped(self) -> tuple[float, float]:
        """Powell's weights. What he mixes in, B s, is -t times the gradient before, as d is minus its product with H."""
        assert self.prev_grad is not None and self.method.damping is not None
        before, after = (self.work.norms(grad, self.d).product for grad in (self.prev_grad, self.grad))
        sy, sbs = self.t * (after - before), -self.t * self.t * before
        if not (sbs > 0.0 and sy < self.method.damping * sbs):
            return 1.0, 1.0
        theta = (1.0 - self.method.damping) * sbs / (sbs - sy)
        return theta, theta + (1.0 - theta) * self.t

    def _set_direction(self) -> None:
        self.d = self.work.vectors.take()
        norms = self._combine(self.d, self.grad)
        if self.work.held:
            for part in self.work.held:  # steps from when their rate was another one may lead there
                self.d[part].zero_()
            norms = _OPS.lbfgs_norms(self.d, self.grad)
        self.d_largest, _, slope = norms.tolist()
        self.slope = self.rounded(slope)

    def _combine(self, d: Tensor, grad: Tensor) -> Tensor:
        norms: Tensor = _OPS.lbfgs_combine_(
            d, grad, self.old_dirs, self.old_stps, coefficients=self.gram.coefficients(), metric=self.work.metric
        )
        return norms

    # Moves

    def _just_move(self, last: bool) -> int | None:
        """A step of given length; returns how often the closure was called, None where there is no step. In the last
        iteration it is not called: a stochastic one would give another function's value. With ``recover`` it is, as
        otherwise nobody knows whether the step led uphill."""
        is_spent = self.method.strict_max_eval and self.evals >= self.method.max_eval
        if is_spent and self.method.recover:
            return None
        self._advance()
        if is_spent or (last and not self.method.recover):
            return 0
        _, self.loss, self.grad, norms = self._evaluate()
        self._measure(norms)
        return 1

    def _advance(self) -> None:
        assert self.d is not None
        self.work.move(self.d, self.t)

    def _search(self) -> int | None:
        """A step of searched length; returns how often the closure was called, None where it must not be any more."""
        method, work = self.method, self.work
        max_ls = method.max_eval - self.evals - (1 if method.strict_max_eval else 0)
        if max_ls < 0:
            return None
        origin = work.vectors.take()
        work.read(origin)

        def evaluate(t: float) -> Point:
            self._place(origin, t)
            slope = self._predicted(origin)
            _, loss, grad, norms = self._evaluate(self.d)
            return Point(t, loss, self._slope_at(norms, slope), _Lease(work.vectors, grad, norms))

        current = _Lease(work.vectors, self.grad, Norms(self.largest, self.total, self.slope))
        current.keep()
        try:
            point, spent = self._line_search(evaluate, Point(0.0, self.loss, self.slope, current), max_ls)
        except BaseException:
            work.move(origin, 0.0, origin)
            work.vectors.give(origin)
            self.t = 0.0
            if self.state["n_iter"] == 1:  # there has been no first iteration then: the next one is it
                self.state["n_iter"] = 0
                self._forget()
            raise
        # Also where the last point looked at is the one to go to: what the closure has written to parameters meanwhile
        # (by a clamp, say) is no part of a search, and no version counter tells of a write through ``param.data``.
        self._place(origin, point.t)
        self.t, self.loss, self.grad = point.t, point.loss, point.at.keep()
        self._arrive(origin)
        work.vectors.give(origin)
        self._measure(point.at.norms)
        return spent

    def _line_search(self, evaluate: Callable[[float], Point], start: Point, max_ls: int) -> tuple[Point, int]:
        method = self.method
        return strong_wolfe(evaluate, start, self.t, self.d_largest, max_ls, self.rounded, guarded=method.recover)

    def _place(self, origin: Tensor, t: float) -> None:
        """Move to the point at ``t``."""
        assert self.d is not None
        self.work.move(self.d, t, origin)

    def _predicted(self, origin: Tensor) -> float:
        """What is known of the slope where the last move led, before the closure is called."""
        return 0.0

    def _slope_at(self, norms: Norms, known: float) -> float:
        return self.rounded(norms.product)

    def _arrive(self, origin: Tensor) -> None:
        """After the last move of a search."""

    # Recovery

    def _note_best(self, anew: bool = False) -> None:
        """Keep a copy of the lowest point. In a new step the function may be another one: what came before counts no
        more."""
        work = self.work
        if not self.method.recover or not (anew or work.best is None or self.loss < work.best.loss):
            return
        if not anew:
            self.restarts = 0
        if work.best is None:
            work.best = Best(self.loss, work.vectors.take(), work.vectors.take())
        work.best.loss = self.loss
        work.read(work.best.params)
        work.best.grad.copy_(self.grad)

    def _restart(self) -> bool:
        """Back to the best point with an empty history, from where steps begin shorter; False to stop there."""
        work, best = self.work, self.work.best
        if not work.warned:
            work.warned = True
            where = "where it began" if best is None else f"at the best point seen, of loss {best.loss:g}"
            warnings.warn(
                "LBFGS met a loss or gradient that is not finite, or a loss above the one its step began with; it goes "
                f"on {where} without its history (further occurrences are not reported)",
                stacklevel=2,
            )
        self.restarts += 1
        if best is None:
            return False
        self._go_back_to(best)
        self._forget()
        self._measure(work.norms(self.grad))
        return self.restarts <= _MOST_RESTARTS

    def _go_back_to(self, best: Best) -> None:
        self.work.move(best.params, 0.0, best.params)
        if self.grad is self.prev_grad:
            self.grad = self.work.vectors.take()
        self.grad.copy_(best.grad)
        self.loss = best.loss

    def _end_at_best(self) -> None:
        """A step without line search may have passed by the best point. The history stays; what led away from there is
        noted as a step of no length, which adds nothing to it."""
        best = self.work.best
        if not self.method.recover or best is None or self.loss <= best.loss:
            return
        self._go_back_to(best)
        assert self.prev_grad is not None
        self.prev_grad.copy_(self.grad)
        self.t, self.prev_loss = 0.0, self.loss
