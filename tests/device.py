"""The device that tests put their tensors on, in one place: the CPU, or what OPTIM_EXT_TEST_DEVICE names. `make double`
runs on CUDA tensors with it whatever does not speak of the CPU (docs/gpu.md)."""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from on_double import ON_DOUBLE
from torch.utils._device import _device_constructors

DEVICE = torch.device(os.environ.get("OPTIM_EXT_TEST_DEVICE", "cpu"))
ON_CPU = DEVICE.type == "cpu"

_TESTS = str(Path(__file__).parent) + os.sep
_REFERENCE = _TESTS + "reference" + os.sep


@functools.cache
def _has_accelerator() -> bool:
    """Asked where it is needed: a process that has asked cannot be forked into one that uses a GPU."""
    return torch.accelerator.is_available()


def seed_all(seed: int) -> None:
    """torch.manual_seed of the generators there are. Without an accelerator that keeps the number for each kind of one that
    may come, with the stack it was called from as text: ten times the work of the rest, for ever."""
    if _has_accelerator():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def _is_a_test(frame: Any) -> bool:
    """Whether a test runs in this frame, or a module it makes. Optimizers, torch's too, say themselves where their state
    lies, and torch.set_default_device would take that choice from them."""
    file = frame.f_code.co_filename
    if file.startswith(_TESTS):
        return not file.startswith(_REFERENCE)
    return frame.f_globals.get("__name__", "").startswith("torch.nn.modules.")


def _on_device(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        said = kwargs.get("device") is not None or kwargs.get("out") is not None
        if said or torch.compiler.is_compiling() or not _is_a_test(sys._getframe(1)):
            return make(*args, **kwargs)
        if kwargs.get("generator") is None:
            return make(*args, **{**kwargs, "device": DEVICE})
        numbers = make(*args, **kwargs)  # which are the generator's, whatever the device
        return numbers.detach().to(DEVICE).requires_grad_(numbers.requires_grad)

    return made


def put_test_tensors_there() -> None:
    """Makes torch.ones and its like put there what tests ask for without naming a device; and makes torch's optimizers take
    their loop over parameters unless told otherwise, as they do on the CPU: that is what results are held against."""
    if ON_CPU:
        return
    if ON_DOUBLE:
        import cuda_double  # noqa: F401  takes over torch's operations; of pytest it is a plugin
    from torch._dynamo.eval_frame import skip_code

    for make in _device_constructors():
        if getattr(torch, make.__name__, None) is make:
            made = _on_device(make)
            skip_code(made.__code__)  # called on its own; Dynamo itself makes tensors by it, for ever if it compiled it
            setattr(torch, make.__name__, made)
    for module in [module for name, module in sys.modules.items() if name.startswith("torch.optim.")]:
        if hasattr(module, "_default_to_fused_or_foreach"):
            module._default_to_fused_or_foreach = lambda *_, **__: (False, False)
