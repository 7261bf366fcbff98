"""What the commands of ``python -m optim_ext`` share: options as words, and things named by where they are."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any


def option(word: str) -> tuple[str, Any]:
    """``name=value``: a Python literal, else the text as it is."""
    name, _, text = word.partition("=")
    try:
        return name, ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return name, text


def find(target: str) -> Any:
    """What ``pkg.mod:name`` or ``FILE.py:name`` names.

    Raises:
        LookupError: it has no colon.
        ImportError, AttributeError, OSError: there is no such module, file or name.
    """
    place, colon, name = target.rpartition(":")
    if not colon:
        raise LookupError(f"{target!r} is neither pkg.mod:name nor FILE.py:name")
    if not place.endswith(".py"):
        _look_in(os.getcwd())  # as python -m does for what it runs
        return getattr(importlib.import_module(place), name)
    path = Path(place).resolve()
    _look_in(str(path.parent))  # as python does for a file that it runs
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{place} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return getattr(module, name)


def _look_in(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)
