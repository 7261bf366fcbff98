"""L-BFGS."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn import Module

from optim_ext import _grad_control, _sharding
from optim_ext._averaging.step import step_averaging
from optim_ext._drop import Dropped
from optim_ext._grad_control import GradPolicy
from optim_ext._lbfgs import parts
from optim_ext._lbfgs.step import Step
from optim_ext._lbfgs.workspace import Bound, Method, Workspace, span_of, working_dtype
from optim_ext._load import _C
from optim_ext._native_step import ADDED_TO_ALL, NativeStep
from optim_ext._step.base import Group, Loss
from optim_ext._step.torch_path import is_plain
from optim_ext.swa_utils import AveragedModel

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from optim_ext._constructor import PolicyOptions

_OWN_OPTIONS = ("strict_max_eval", "recover", "damping", "history_dtype", "bounds")
# Options that describe the method, not a parameter: every group has the same. torch has `maximize` since 2.14.
_COMMON = ("max_iter", "max_eval", "tolerance_grad", "tolerance_change", "history_size", "line_search_fn", "maximize")

# Why controls that change gradients are refused.
_NOT_CLIPPED = (
    "LBFGS does not clip: its line search and its history need the gradient of the loss the closure returns. Bound the "
    "step instead (lr, line_search_fn='strong_wolfe', bounds), or clip inside the closure what the loss is made of"
)


_ADDS = f"""\
* ``set_grad_policy(skip_nonfinite=, skip_above=)``: a step is skipped by the norm of the gradient it begins with.
{ADDED_TO_ALL}"""


class LBFGS(NativeStep, torch.optim.LBFGS, adds=_ADDS):
    """L-BFGS (Liu & Nocedal 1989), torch's optimizer with a native iteration.

    The arguments up to ``maximize`` (in versions of torch that have it) are those of :class:`torch.optim.LBFGS`, and so
    are the closure, the results, the counts of evaluations and the state, which loads both ways. ``params`` may also
    be several groups with a learning rate each: the ratio of a group's rate to the largest one scales its part of the
    initial inverse Hessian. Everything below is off by default.

    Args:
        strict_max_eval: never call the closure more than ``max_eval`` times in a step. (torch's line search may
            overshoot; a step without line search calls it at least twice.)
        recover: when the loss or the gradient becomes non-finite, or the loss rises above the one the step began with,
            go back to the best point seen, forget the history and go on from there with shorter steps; warns once. The
            line search treats non-finite values as too high. Every step ends at the best point it has seen, so one
            without line search evaluates its last point too.
        damping: mix the model's own curvature into pairs that have less than this share of it, as Powell (1978); 0.2 is
            usual. Keeps the history positive definite without a line search.
        history_dtype: ``torch.bfloat16`` stores the history at 2 bytes an element. Sums are taken in double all the
            same. Directions get the three digits of that format, which costs some iterations more near the solution.
        bounds: ``(lower, upper)``, each None, a number, or one number, tensor or None for each parameter. The parameters
            stay within them: projected L-BFGS. Groups may differ in them. With ``line_search_fn='strong_wolfe'`` the
            search then shortens the step along the projected path (Bertsekas 1982) instead.

    Internally parameters form one vector of their common floating point type, float32 at least; complex ones count as
    pairs of real ones. Dot products are summed in double, in one fixed order for every number of threads.

    Of parameters that are DTensors, of one mesh, each process keeps its part of every vector; sums are of all parts, and
    the loss is the mean over the processes of the mesh, as gradients are in data-parallel training. All of them call
    ``step`` and take the same decisions. There are no bounds then. State is DTensors, which go on with as many processes.

    After an exception of the closure in the middle of a step the parameters are where the last completed iteration
    left them, and the state fits them; bad input is found before anything is written.
    """

    _no_joint_norm = "LBFGS evaluates gradients within its step and does not clip"

    if TYPE_CHECKING:

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = ...,
            max_iter: int = ...,
            max_eval: int | None = ...,
            tolerance_grad: float = ...,
            tolerance_change: float = ...,
            history_size: int = ...,
            line_search_fn: str | None = ...,
            *,
            maximize: bool = ...,
            strict_max_eval: bool = ...,
            recover: bool = ...,
            damping: float | None = ...,
            history_dtype: torch.dtype | None = ...,
            bounds: tuple[Bound, Bound] | None = ...,
            **added: Unpack[PolicyOptions],
        ) -> None: ...

    else:

        def __init__(
            self,
            params: Any,
            *args: Any,
            strict_max_eval: bool = False,
            recover: bool = False,
            damping: float | None = None,
            history_dtype: torch.dtype | None = None,
            bounds: tuple[Bound, Bound] | None = None,
            **kwargs: Any,
        ) -> None:
            further: list[Group] = []
            super().__init__(params if isinstance(params, Tensor) else _first_group(params, further), *args, **kwargs)
            own = {
                "strict_max_eval": bool(strict_max_eval),
                "recover": bool(recover),
                "damping": damping,
                "history_dtype": history_dtype,
                "bounds": bounds,
            }
            # Only what was asked for: without these a state_dict has torch's own keys.
            self.defaults.update({name: value for name, value in own.items() if _is_on(value)})
            for group in self.param_groups:
                self._fill_in(group)
            for group in further:
                self.add_param_group(group)
            self._method()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.pop("_workspace", None)
        self._params = self.param_groups[0]["params"]  # torch's own step looks there
        self._numel_cache = None
        for group in self.param_groups:
            self._fill_in(group)

    def _fill_in(self, group: Group) -> None:
        for name in _OWN_OPTIONS:
            if name in self.defaults:
                group.setdefault(name, self.defaults[name])

    def state_dict(self) -> dict[str, Any]:
        """The state and the options, under torch's keys. Later steps do not write to its tensors."""
        if "_workspace" in self.__dict__:
            self._workspace.history.disown()  # its tensors may be kept: they are not written again
        return super().state_dict()

    def average_into(self, averaged: AveragedModel | None, model: Module | None = None) -> None:
        """Update an average of the model after every ``step()``, however many iterations it had; None: no more.

        A skipped step and one that raises leave the average and its count alone. Not saved with the optimizer.

        Args:
            averaged: an :class:`optim_ext.swa_utils.AveragedModel` that averages natively.
            model: the model to average, by default the one ``averaged`` was made from or updated with last.

        Raises:
            TypeError: ``averaged`` is not such a model.
            ValueError: it has an averaging function of its own, does not match the model, is on another device, belongs
                to another optimizer, or its model is not known.
        """
        self._ask().averaging = None if averaged is None else step_averaging(averaged, model, self)

    def clip_grad_norm(self, *args: Any, **kwargs: Any) -> None:
        """Refused: L-BFGS needs the gradient itself.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(_NOT_CLIPPED)

    def set_grad_policy(
        self,
        *,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        skip_nonfinite: bool = False,
        skip_above: float | None = None,
    ) -> GradPolicy | None:
        """Skip steps by the norm of the gradient they begin with. Without arguments: no longer.

        The closure is called once; a skipped step then writes no parameter, state or average. What happens further on in
        a step is up to the line search and ``recover``. The policy is not part of ``state_dict()``.

        Args:
            max_norm: refused, as by ``clip_grad_norm``.
            norm_type: 1, 2 or inf.
            skip_nonfinite: skip a step whose norm is infinite or NaN.
            skip_above: skip a step unless its norm is at most this.

        Returns:
            The policy, also as ``grad_policy``; None without arguments.

        Raises:
            RuntimeError: ``max_norm`` was given.
            ValueError: ``skip_above`` is negative or NaN, or another ``norm_type``.
        """
        self._replace_policy(self._policy_of(max_norm, norm_type, skip_nonfinite, skip_above))
        return self.grad_policy

    def _policy_of(
        self, max_norm: float | None, norm_type: float, skip_nonfinite: bool, skip_above: float | None
    ) -> GradPolicy | None:
        if max_norm is not None:
            raise RuntimeError(_NOT_CLIPPED)
        return super()._policy_of(max_norm, norm_type, skip_nonfinite, skip_above)

    def drop(self, params: Dropped | Iterable[Dropped]) -> None:
        """Remove parameters. The others start anew: the history is one of all parameters together, of which no part is left.

        Args:
            params: as of every optimizer here.

        Raises:
            ValueError, TypeError: as of every optimizer here. Nothing has been removed then.
        """
        super().drop(params)

    def _keep_members(self, group: Group, kept: list[int]) -> None:
        super()._keep_members(group, kept)
        if group.get("bounds") is not None:
            group["bounds"] = tuple(
                [side[index] for index in kept] if isinstance(side, Sequence) else side for side in group["bounds"]
            )

    def _forget_params(self) -> None:
        self.__dict__.pop("_workspace", None)
        self.state.clear()
        self._params = self.param_groups[0]["params"]
        self._numel_cache = None
        super()._forget_params()

    def _is_to_skip(self, workspace: Workspace) -> bool:
        """What the policy makes of the gradients that are there. Waits for the device."""
        policy = self._asked().policy
        if policy is None:
            return False
        if workspace.parts is None:
            verdict = _grad_control.judge(self, None, policy, None, None)
        else:
            norm = workspace.parts.norm(policy.norm_type)
            verdict = _grad_control.verdict_of_norm(norm, policy, None, None, None)
        verdict.record()
        return bool(policy.last_step_skipped)

    def _undo_casts(self, saved: dict[str, Any]) -> None:
        """All state has the type the parameters are computed in: float32 for 16-bit ones. A bfloat16 history stays one
        where ``history_dtype`` says so."""
        kept = saved["state"].get(saved["param_groups"][0]["params"][0], {})
        params = [p for group in self.param_groups for p in group["params"]]
        if not params or params[0] not in self.state or self._torch_reason(self.param_groups[0]) is not None:
            return
        state, dtype = self.state[params[0]], working_dtype(params)
        stored = self.param_groups[0].get("history_dtype") or dtype
        for key in kept.keys() & {"d", "prev_flat_grad", "old_dirs", "old_stps", "ro", "al", "H_diag"}:
            state[key] = _cast(kept[key], params[0].device, stored if key in ("old_dirs", "old_stps") else dtype)

    def _method(self) -> Method:
        """The options as they stand, checked."""
        options = [
            {name: group[name] for name in _COMMON if name in group}
            | {name: group[name] for name in _OWN_OPTIONS if _is_on(group.get(name))}
            for group in self.param_groups
        ]
        bounded = any([group.pop("bounds", None) is not None for group in options])  # each group has its own
        for index, group in enumerate(options):
            for name in (*_COMMON, *_OWN_OPTIONS):
                mine, first = group.get(name), options[0].get(name)
                if mine != first and not (mine != mine and first != first):  # NaN is NaN
                    raise ValueError(f"all groups of LBFGS need the same {name}: group {index} has {mine}")
        rates = [float(group["lr"]) for group in self.param_groups]
        if not all(rate >= 0.0 for rate in rates):
            raise ValueError(f"Invalid learning rate: {next(rate for rate in rates if not rate >= 0.0)}")
        method = Method(
            lr=max(rates),
            scales=tuple(rate / max(rates) if max(rates) > 0 else 1.0 for rate in rates),
            bounded=bounded,
            **options[0],
        )
        if method.history_size < 1:
            raise ValueError(f"Invalid history_size: {method.history_size}, at least 1 is needed")
        if method.history_dtype not in (None, torch.bfloat16):
            raise ValueError(f"Invalid history_dtype: {method.history_dtype}, only torch.bfloat16 is supported")
        if method.damping is not None and not 0.0 < method.damping < 1.0:
            raise ValueError(f"Invalid damping: {method.damping}, expected a number between 0 and 1")
        if method.recover and method.strict_max_eval and method.max_eval < 2:
            raise ValueError(
                f"Invalid max_eval: {method.max_eval}, with recover and strict_max_eval a step needs 2: where it begins "
                "and where it leads"
            )
        if method.damping is not None and method.bounded:
            raise ValueError("damping and bounds cannot be combined: a projected step is not the model's own")
        return method

    def _torch_reason(self, group: Group, ahead: bool = False) -> str | None:
        """Why the step takes torch's own code, or None if it runs natively."""
        params = [p for each in self.param_groups for p in each["params"]]
        if _sharding.holds_dtensors(self.param_groups):
            reason = parts.why_whole(params)
            if reason is not None:
                return reason
            params = [_sharding.local_part(p) if _sharding.is_dtensor(p) else p for p in params]
        for index, p in enumerate(params):
            problem = _C.unsupported(p) if is_plain(p) else "it is a tensor subclass with operations of its own"
            if problem is not None:
                return f"parameter {index}: {problem}"
        if _share_memory(params):
            return "parameters share memory"
        return None

    @property
    def _native_how(self) -> str:
        return "optim_ext::lbfgs_pair_ and lbfgs_combine_ in every iteration"

    @_disable_dynamo  # torch.compiler.disable imports the whole compiler where it decorates
    @torch.no_grad()
    def step(self, closure: Callable[[], Loss]) -> Loss:  # type: ignore[override]
        """Perform up to ``max_iter`` iterations.

        Args:
            closure: re-evaluates the model with gradients enabled and returns the loss: a number, or a tensor of one
                element.

        Returns:
            The first loss, as the closure returned it.

        Raises:
            TypeError: there is no closure, or it returns no number.
            RuntimeError: ``line_search_fn`` is unknown, or a parameter is not what it was in the step before (shape, dtype,
                device, layout), has elements that share memory, or a gradient of another shape; of DTensors one is
                Partial, a gradient is none or of another mesh, or there are bounds.
            RuntimeError, ValueError: the loss has several elements.
            ValueError: an option is invalid.
        """
        if not callable(closure):
            raise TypeError(f"LBFGS.step needs a closure that re-evaluates the model, found {closure!r}")
        method = self._method()
        if method.line_search_fn not in (None, "strong_wolfe"):
            raise RuntimeError("only 'strong_wolfe' is supported")
        params = [p for group in self.param_groups for p in group["params"]]
        if not params:
            with torch.enable_grad():
                return closure()
        reason = self._torch_reason(self.param_groups[0])
        if reason is not None:
            by_torch: Loss = self._torch_step(closure, reason)
            return by_torch
        if method.bounded and _sharding.holds_dtensors(self.param_groups):
            raise RuntimeError("LBFGS takes no bounds for DTensors; leave them out, or clamp inside the model")
        workspace = self._workspace_for(params, method)
        step = Step(self.state, workspace, method, torch.enable_grad()(closure), self._is_to_skip)
        first: Loss = step.run()
        averaging = self._asked().averaging
        if averaging is not None and not step.is_skipped:
            averaging.update()
        return first

    def _torch_step(self, closure: Callable[[], Any], reason: str) -> Any:
        beyond = [name for name in _OWN_OPTIONS if _is_on(self.param_groups[0].get(name))]
        beyond += ["several groups"] if len(self.param_groups) > 1 else []
        asked = self._asked()
        beyond += ["set_grad_policy"] if asked.policy is not None else []
        beyond += ["average_into"] if asked.averaging is not None else []
        if beyond:
            raise RuntimeError(f"LBFGS has no native step here ({reason}), and torch's has no {', '.join(beyond)}")
        step = torch.optim.LBFGS.step
        return (step.__wrapped__ if getattr(step, "hooked", False) else step)(self, closure)  # type: ignore[attr-defined]

    def _workspace_for(self, params: list[Tensor], method: Method) -> Workspace:
        """What is kept from step to step, made anew where it no longer fits; errors where the state does not fit."""
        sizes = [len(group["params"]) for group in self.param_groups]
        bounds = [group.get("bounds") for group in self.param_groups]
        workspace: Workspace | None = self.__dict__.get("_workspace")
        state = self.state.get(params[0], {})
        if workspace is not None:
            changed = workspace.what_changed(params)
            if changed is not None and state.get("prev_flat_grad") is not None:
                raise RuntimeError(f"{changed} since the last step of LBFGS; optimizer.state.clear() starts anew")
            if changed is not None or not workspace.serves(params, sizes, bounds, method):
                workspace = None
        if workspace is None:
            workspace = Workspace(params, sizes, bounds, method)
            before: Workspace | None = self.__dict__.get("_workspace")
            workspace.warned = before is not None and before.warned
            self._workspace = workspace
        kept = workspace.local_state(state).get("prev_flat_grad")
        if kept is not None and (kept.numel() != workspace.numel or kept.device != workspace.device):
            raise RuntimeError(
                f"the state of LBFGS is for {kept.numel()} numbers on {kept.device}, the parameters have "
                f"{workspace.numel} on {workspace.device}; optimizer.state.clear() starts anew"
            )
        return workspace


def _first_group(params: Iterable[Any], further: list[Group]) -> Iterator[Any]:
    """What torch's constructor may see, which takes one group only: the others go to `further`. A generator, as torch
    looks at the options before it looks at params."""
    given = list(params)
    if len(given) > 1 and all(isinstance(group, dict) for group in given):
        further += given[1:]
        given = given[:1]
    yield from given


def _is_on(value: Any) -> bool:
    """Whether an option was asked for. Compared by identity: 0 is a number (if not a valid one), bounds may be tensors."""
    return value is not None and value is not False


def _share_memory(params: list[Tensor]) -> bool:
    """Whether two of the parameters are one, or lie within each other: they may not be moved independently."""
    spans = sorted((p.data_ptr(), span_of(p) * p.element_size()) for p in params if p.numel())
    overlap = any(begin + size > after for (begin, size), (after, _) in itertools.pairwise(spans))
    return overlap or len({id(p) for p in params}) < len(params)


def _cast(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [_cast(entry, device, dtype) for entry in value]
    return value.to(device, dtype) if isinstance(value, Tensor) else value
