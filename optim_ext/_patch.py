"""``torch.optim``'s names for these optimizers, in programs that nobody edits.

Torch's classes stay the objects they are: what changes is what calling one of them makes. So it does not matter who took
the class from where and when, ``isinstance`` and ``issubclass`` mean what they meant, and classes derived from torch's keep
torch's step.
"""

from __future__ import annotations

import gc
from types import TracebackType
from typing import Any

import torch
from torch.optim import Optimizer

import optim_ext
from optim_ext._native_step import NativeStep

_active: list[TorchPatch] = []
_is_installed = False


def replacements() -> dict[type, type]:
    """By torch's class, the one of this package that has its name and is derived from it."""
    found = {}
    for name in torch.optim.__all__:
        theirs, ours = getattr(torch.optim, name), getattr(optim_ext, name)
        if ours is not theirs and isinstance(ours, type) and issubclass(ours, NativeStep) and issubclass(ours, theirs):
            found[theirs] = ours
    return found


class TorchPatch:
    """What :func:`patch_torch` returns: in force until :meth:`undo`, or until the end of a ``with`` block."""

    def undo(self) -> None:
        """Torch's classes make their own optimizers again, once every patch is undone. Those made meanwhile stay what
        they are. A second call does nothing."""
        if self in _active:
            _active.remove(self)

    def __enter__(self) -> TorchPatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def patch_torch(*, allow_existing: bool = False) -> TorchPatch:
    """Have ``torch.optim.AdamW(...)`` and the others make this package's optimizers, for code that names torch's::

        optim_ext.patch_torch()
        trainer = Trainer(model, TrainingArguments(optim="adamw_torch"))

        with optim_ext.patch_torch():  # or for a while
            build_optimizer(model)

    Calling a class of ``torch.optim`` that this package has natively makes an object of the class of the same name here,
    which is derived from it. The arguments are the same, and those this package adds are taken, too. Everything else is
    as before: ``torch.optim.AdamW`` is the same class, objects of it that exist already, copies and pickles of these
    and classes derived from it keep torch's step, and ``torch.optim.swa_utils`` is torch's.

    Args:
        allow_existing: go on where optimizers of torch exist already. They stay torch's.

    Returns:
        An object with ``undo()``, which is a context manager, too. Patches may be nested.

    Raises:
        RuntimeError: there are optimizers already that this would have made native. Nothing is changed then.
    """
    native = replacements()
    if not allow_existing:
        _refuse_existing(native)
    _install(native)
    patch = TorchPatch()
    _active.append(patch)
    return patch


def _install(native: dict[type, type]) -> None:
    """Have all optimizers be made here. For good: Python keeps calling a ``__new__`` that a class once had, so this one
    does what ``object`` does where no patch is in force."""
    global _is_installed
    if _is_installed:
        return
    _is_installed = True

    def make(cls: type, *args: Any, **kwargs: Any) -> Any:
        # Copying and unpickling come without arguments.
        made = native.get(cls, cls) if _active and (args or kwargs) else cls
        following = super(Optimizer, cls).__new__  # type: ignore[misc]
        return following(made) if following is object.__new__ else following(made, *args, **kwargs)

    Optimizer.__new__ = staticmethod(make)  # type: ignore[method-assign]


def _refuse_existing(native: dict[type, type]) -> None:
    counts: dict[str, int] = {}
    for thing in gc.get_objects():
        if type(thing) in native:
            name = type(thing).__name__
            counts[name] = counts.get(name, 0) + 1
    if counts:
        listed = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        raise RuntimeError(
            f"optimizers of torch.optim exist already ({listed}) and would stay torch's: call patch_torch() before they "
            "are made, or patch_torch(allow_existing=True)"
        )
