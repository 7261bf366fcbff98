"""Loads the native module, or says in one sentence why it cannot be loaded and which command mends that."""

import importlib
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

_BUILD = "in optim_ext's source folder run: pip install --no-build-isolation --no-deps --force-reinstall ."
_HERE = Path(__file__).resolve().parent


def build_info() -> dict[str, Any]:
    """What this build was made for and with: torch, CUDA and compiler versions, flags, GPU architectures, date.

    Raises:
        ImportError: optim_ext has not been built.
    """
    try:
        return dict(importlib.import_module("optim_ext._build_info").BUILD_INFO)
    except ModuleNotFoundError as error:
        if (_HERE.parent / "setup.py").exists():
            raise ImportError(
                f"{_HERE} is optim_ext's source and has no native module; run Python in another folder, where an installed "
                "optim_ext is found, or build this one in place: pip install --no-build-isolation --no-deps -e ."
            ) from error
        raise ImportError(f"optim_ext has no native module yet; {_BUILD}") from error


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _check_build(info: dict[str, Any]) -> None:
    """Raises ImportError where the build and the running torch cannot be trusted to fit, before anything is linked."""
    found, found_cuda = str(torch.__version__), torch.version.cuda
    same_torch = _minor(info["torch"]) == _minor(found)
    same_cuda = info["cuda"] is None or (found_cuda or "").split(".")[0] == info["cuda"].split(".")[0]
    if not (same_torch and same_cuda):
        raise ImportError(
            f"optim_ext was built for torch {info['torch']} (CUDA: {info['cuda'] or 'not built'}), but found "
            f"torch {found} (CUDA: {found_cuda or 'none'}); to rebuild, {_BUILD}"
        )


def _fail(error: ImportError) -> NoReturn:
    """Raise it, or have ``python -m optim_ext doctor`` say it, which has to work where nothing else does."""
    words = sys.orig_argv
    for place, word in enumerate(words):
        if word.startswith("-") and word.endswith("m") and words[place + 1 : place + 3] == ["optim_ext", "doctor"]:
            from optim_ext import _doctor

            sys.exit(_doctor.main(words[place + 3 :], error))
    raise error


try:
    _check_build(build_info())
except ImportError as error:
    _fail(error)
try:
    from optim_ext import _C as _C  # the same name once more: others take it from here
except ImportError as error:
    info = build_info()
    cannot = ImportError(
        f"optim_ext's native module, built for torch {info['torch']} and Python {info['python']}, cannot be loaded "
        f"with torch {torch.__version__} ({error}); to rebuild, {_BUILD}"
    )
    cannot.__cause__ = error
    _fail(cannot)
