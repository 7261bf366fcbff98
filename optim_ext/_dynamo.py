"""What torch.compile is to leave alone, said without importing it: that takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch._C._dynamo import eval_frame

F = TypeVar("F", bound=Callable[..., object])


def never_traced(function: F) -> F:
    """Keep Dynamo from compiling this function and all that it calls, where it finds them being run.

    After a graph break in ``optimizer.step`` it would otherwise compile each function of an eager step by itself, and stumble
    over a DTensor's stand-ins, which have no memory. This is `torch.compiler.disable` at no cost for a call. A torch whose
    internals have other names compiles them as before.
    """
    names = ("set_code_exec_strategy", "_FrameExecStrategy", "_FrameAction")
    if all(hasattr(eval_frame, name) for name in names):
        skip = eval_frame._FrameAction.SKIP
        eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return function
