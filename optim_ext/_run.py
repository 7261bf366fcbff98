"""``python -m optim_ext run script.py [arguments]``, or ``-m module``: a program as Python itself would run it, with
``torch.optim``'s names for the optimizers of this package."""

from __future__ import annotations

import builtins
import importlib.util
import io
import os
import pkgutil
import sys
from types import CodeType, ModuleType
from typing import Any

from optim_ext._patch import patch_torch

USAGE = (
    "usage: python -m optim_ext run script.py [arguments ...]\n       python -m optim_ext run -m module [arguments ...]"
)


def run(arguments: list[str]) -> int:
    """Run a program; what it exits with or raises is passed on.

    Returns:
        The exit status where it has ended, or 2 where there is nothing to run, 1 where there is no such module.
    """
    is_module = arguments[:1] == ["-m"]
    target, *others = (arguments[1:] if is_module else arguments) or [""]
    if not target or (target.startswith("-") and not is_module):
        print(USAGE, file=sys.stderr)
        return 2
    sys.argv[:] = ["-m" if is_module else target, *others]
    try:
        code, names = _module(target) if is_module else _script(target)
    except _NothingToRun as error:
        print(f"{sys.executable}: {error}", file=sys.stderr)
        return error.status
    if is_module:
        sys.argv[0] = names["__file__"]
    program = ModuleType("__main__")
    vars(program).update(names, __name__="__main__", __builtins__=builtins)
    sys.modules["__main__"] = program
    patch_torch()
    exec(code, vars(program))
    return 0


class _NothingToRun(Exception):
    def __init__(self, problem: str, status: int) -> None:
        super().__init__(problem)
        self.status = status


def _script(path: str) -> tuple[CodeType, dict[str, Any]]:
    """A file, or a folder or archive that has a __main__.py."""
    importer = pkgutil.get_importer(os.path.abspath(path))
    if os.path.isdir(path) or _is_archive(importer):
        _begin_path_with(os.path.abspath(path))
        spec = importer.find_spec("__main__") if importer is not None else None
        if spec is None:
            raise _NothingToRun(f"can't find '__main__' module in {path!r}", 1)
        return _code_of(spec, path)
    try:
        with io.open_code(os.path.abspath(path)) as file:
            text = file.read()
    except OSError as error:
        raise _NothingToRun(
            f"can't open file {os.path.abspath(path)!r}: [Errno {error.errno}] {error.strerror}", 2
        ) from None
    _begin_path_with(os.path.dirname(os.path.realpath(path)))
    place = os.path.join(os.getcwd(), path)
    names = {
        "__file__": place,
        "__cached__": None,
        "__doc__": None,
        "__loader__": None,
        "__package__": None,
        "__spec__": None,
    }
    return compile(text, place, "exec", dont_inherit=True), names


def _is_archive(importer: Any) -> bool:
    return type(importer).__name__ == "zipimporter"


def _begin_path_with(folder: str) -> None:
    """In place of the folder that ``python -m`` has put there."""
    if not getattr(sys.flags, "safe_path", False) and not sys.flags.isolated:
        sys.path[0] = folder


def _module(name: str) -> tuple[CodeType, dict[str, Any]]:
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            name += ".__main__"
            spec = importlib.util.find_spec(name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise _NothingToRun(
            f"Error while finding module specification for {name!r} ({type(error).__name__}: {error})", 1
        ) from None
    if spec is None:
        raise _NothingToRun(f"No module named {name}", 1)
    return _code_of(spec, name)


def _code_of(spec: Any, name: str) -> tuple[CodeType, dict[str, Any]]:
    code = spec.loader.get_code(spec.name) if hasattr(spec.loader, "get_code") else None
    if code is None:
        raise _NothingToRun(f"No code object available for {name}", 1)
    return code, {
        "__file__": spec.origin,
        "__cached__": spec.cached,
        "__doc__": None,
        "__loader__": spec.loader,
        "__package__": spec.parent,
        "__spec__": spec,
    }
