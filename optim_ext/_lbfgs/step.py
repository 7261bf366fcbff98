"""One step of L-BFGS: torch's control flow. Vectors are the history's, an object of C++, which an iteration calls three
times at most: to go along a new direction, for the gradient there, and where a search has to move again."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from optim_ext._lbfgs.geometry import geometry_of
from optim_ext._lbfgs.line_search import Length, Point, rounded_to
from optim_ext._lbfgs.workspace import Method, Workspace
from optim_ext._load import _C

# Restarts after which a step gives up. Until the loss falls each begins ten times shorter than the one before.
_MOST_RESTARTS = 12


class Step:
    """One call of ``step``."""

    def __init__(
        self,
        states: dict[Tensor, Any],
        work: Workspace,
        method: Method,
        closure: Callable[[], Any],
        is_to_skip: Callable[[Workspace], bool] = lambda work: False,
    ) -> None:
        self.states, self.work, self.method, self.closure, self.is_to_skip = states, work, method, closure, is_to_skip
        self.history = work.history
        # For all that torch has tensors of the parameters' dtype for. A search that overflows there can be recovered from.
        self.rounded = rounded_to(work.dtype, saves_overflow=method.recover)
        self.tolerance_grad, self.tolerance_change = map(self.rounded, (method.tolerance_grad, method.tolerance_change))
        self.geometry = geometry_of(work, method, self.rounded)
        self.is_skipped = False
        self.evals = 0
        self.has_news = False  # whether the state has to learn of more than counts
        self.loss: float
        self.here: _C.LbfgsEvaluation  # the gradient where the loss is that
        self.largest: float  # how far that is from a minimum
        self.total: float
        self.d_largest: float
        self.slope: float
        # As in the state:
        self.has_direction: bool
        self.t: float
        self.prev_loss: float
        self.restarts: int

    def run(self) -> Any:
        self.geometry.enter()
        try:
            return self._run()
        finally:
            self.geometry.leave(has_begun=self.evals > 0)

    def _run(self) -> Any:
        given, self.loss, self.here = self._evaluate()
        self.is_skipped = self.is_to_skip(self.work)
        if self.is_skipped:
            return given
        self.evals = 1
        self.kept: dict[str, Any] = self.states[self.work.params[0]]  # torch keeps it under the first parameter
        self.state = self.work.local_state(self.kept)
        self._load()
        self.state["func_evals"] = self.state.get("func_evals", 0) + 1
        self.state.setdefault("n_iter", 0)
        try:
            self._measure()
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
            self.work.give_state(self.kept, self.state)
        return given

    def _iterate(self) -> None:
        method, state = self.method, self.state
        for iteration in itertools.count(1):
            if not iteration <= method.max_iter:  # which may be any number, as in torch
                break
            state["n_iter"] += 1
            self.has_news = True
            last = iteration == method.max_iter
            may_move = self._may_move()
            self._depart(may_move)
            if method.recover and not (math.isfinite(self.slope) and math.isfinite(self.d_largest)):
                if self._restart():
                    continue
                break
            if self.slope > -self.tolerance_change:
                break
            if not may_move:
                self.t = 0.0
                break
            spent = self._step_taken(last) if method.line_search_fn is None else self._search()
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

    def _depart(self, may_move: bool) -> None:
        """Go along a new direction: in an empty history along the gradient, no further than lr, all magnitudes of it taken
        together."""
        is_first = self.state["n_iter"] == 1 or not self.has_direction or self._was_restarted()
        last_length, self.t = self.t, self._first_length() if is_first else self.method.lr
        self.prev_loss = self.loss
        self.d_largest, self.slope, _ = self.geometry.depart(
            self.here, is_first, last_length, self.t if may_move else None, -self.tolerance_change
        )
        self.has_direction = True

    def _was_restarted(self) -> bool:
        """Whether the step before ended in a restart (see `_save`)."""
        return self.method.recover and self.t == 0.0 and self.history.pairs == 0

    def _first_length(self) -> float:
        rounded, lr = self.rounded, self.method.lr
        share = rounded(1.0 / rounded(self.total)) if self.total > 0.0 else 1.0
        length = Length(rounded(share * rounded(lr))) if share < 1.0 else lr
        return length * 0.1**self.restarts if self.restarts > 0 else length

    # Evaluations

    def _evaluate(self, along_direction: bool = False) -> tuple[Any, float, _C.LbfgsEvaluation]:
        """The loss as the closure gives it and as the number to minimise, and the gradient, with its product with the
        direction. A GPU is waited for once."""
        work, device, given = self.work, self.work.device, self.closure()
        waits_once = (
            isinstance(given, Tensor)
            and given.device == device != torch.device("cpu")
            and given.is_floating_point()
            and given.numel() == 1
        )
        if not waits_once:
            try:
                loss = float(given)
            except (TypeError, ValueError, RuntimeError) as error:
                raise type(error)(f"the closure of LBFGS has to return the loss, one number: {error}") from error
        work.look()
        with_norms = given if waits_once else None
        if work.parts is not None and not waits_once:
            with_norms = torch.tensor(loss, dtype=torch.float64, device=device)
        here = self.history.evaluate(work.moved, self.method.maximize, along_direction, with_norms)
        if with_norms is not None:
            loss = here.loss
        return given, -loss if self.method.maximize else loss, here

    def _measure(self) -> None:
        """Note how far the point is from a minimum."""
        self.largest, self.total = self.geometry.measure(self.here)

    def _is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.largest)

    # The state, which has torch's keys

    def _load(self) -> None:
        """Take the state up. It may come from torch, or from a checkpoint of another dtype."""
        state = self.state
        self.has_direction = self.history.load(state, self.method.history_size)
        self.t = float(state.get("t") or 0.0)
        self.prev_loss = float(state.get("prev_loss") or 0.0)
        self.restarts = state.get("restarts", 0)

    def _save(self) -> None:
        if not self.has_news:  # as in torch, a step without an iteration leaves what it was given, to the bit
            return
        state = self.state
        if not self.has_direction and state.get("d") is not None:  # after a restart: a step of no length, for torch too
            self.history.stand_still(self.here)
            self.has_direction, self.t, self.prev_loss = True, 0.0, self.loss
        if self.has_direction:
            has_al = state["n_iter"] > 1
            self.history.save(state, float(self.t), self.prev_loss, self.method.history_size, has_al)
        if 0 < self.restarts <= _MOST_RESTARTS:
            state["restarts"] = self.restarts
        else:
            state.pop("restarts", None)

    def _forget(self) -> None:
        """An empty history, as at the very beginning."""
        self.has_news = True
        self.history.forget()
        self.has_direction = False

    # Moves

    def _max_ls(self) -> int:
        """Evaluations of a search after its first."""
        return self.method.max_eval - self.evals - (1 if self.method.strict_max_eval else 0)

    def _may_move(self) -> bool:
        """Whether the evaluations that a move needs may still be made. With ``recover`` each is followed by one: otherwise
        nobody would know whether it led uphill."""
        if self.method.line_search_fn is not None:
            return self._max_ls() >= 0
        return not (self.method.recover and self._is_spent())

    def _is_spent(self) -> bool:
        return self.method.strict_max_eval and self.evals >= self.method.max_eval

    def _step_taken(self, last: bool) -> int:
        """After a step of given length; returns how often the closure was called. In the last iteration it is not: a
        stochastic one would give another function's value."""
        self.t, self.d_largest = self.geometry.arrive(self.t, self.d_largest)
        if self._is_spent() or (last and not self.method.recover):
            return 0
        _, self.loss, self.here = self._evaluate()
        self._measure()
        return 1

    def _search(self) -> int:
        """From the first point of a search, where the parameters are, to its last; returns how often the closure was
        called."""
        geometry, is_there = self.geometry, True

        def evaluate(t: float) -> Point:
            nonlocal is_there
            if not is_there:
                geometry.place(t)
            is_there = False
            _, loss, here = self._evaluate(along_direction=True)
            return Point(t, loss, geometry.slope_at(here), here)

        start = Point(0.0, self.loss, self.slope, self.here)
        try:
            point, spent = geometry.search(evaluate, start, self.t, self.d_largest, self._max_ls())
        except BaseException:
            self.history.move_to_origin(self.work.moved)
            self.t = 0.0
            if self.state["n_iter"] == 1:  # there has been no first iteration then: the next one is it
                self.state["n_iter"] = 0
                self._forget()
            raise
        # Also where the last point looked at is the one to go to: what the closure has written to parameters meanwhile
        # (by a clamp, say) is no part of a search, and no version counter tells of a write through ``param.data``.
        geometry.place(point.t)
        self.loss, self.here = point.loss, point.at
        self.t, self.d_largest = geometry.arrive(point.t, self.d_largest)
        self._measure()
        return spent

    # Recovery

    def _note_best(self, anew: bool = False) -> None:
        """Keep a copy of the lowest point. In a new step the function may be another one: what came before counts no
        more."""
        best = self.work.best_loss
        if not self.method.recover or not (anew or best is None or self.loss < best):
            return
        if not anew:
            self.restarts = 0
        self.work.best_loss = self.loss
        self.history.note_best(self.work.moved, self.here)

    def _restart(self) -> bool:
        """Back to the best point with an empty history, from where steps begin shorter; False to stop there."""
        work, best = self.work, self.work.best_loss
        if not work.warned:
            work.warned = True
            where = "where it began" if best is None else f"at the best point seen, of loss {best:g}"
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
        self._measure()
        return self.restarts <= _MOST_RESTARTS

    def _go_back_to(self, best: float) -> None:
        self.here, self.loss = self.history.go_to_best(self.work.moved), best

    def _end_at_best(self) -> None:
        """A step without line search may have passed by the best point. The history stays; what led away from there is
        noted as a step of no length, which adds nothing to it."""
        best = self.work.best_loss
        if not self.method.recover or best is None or self.loss <= best:
            return
        self._go_back_to(best)
        self.history.set_previous(self.here)
        self.t, self.prev_loss = 0.0, self.loss
