"""``python -m optim_ext compile pkg.mod:Name [option=value ...]``: compiles rules ahead, for images and login nodes."""

from __future__ import annotations

import ast
import importlib
import os
import sys
from typing import Any

from optim_ext._rules import cache
from optim_ext._rules.compiler import CannotCompile
from optim_ext._rules.errors import RuleError
from optim_ext._rules.optimizer import RuleOptimizer

_USAGE = "usage: python -m optim_ext compile pkg.mod:Name [option=value ...]"


def compile_rules(arguments: list[str]) -> int:
    """The exit status: 1 where something could not be compiled, 2 where it is not understood what to compile."""
    targets = [argument for argument in arguments if "=" not in argument]
    if not targets:
        print(_USAGE, file=sys.stderr)
        return 2
    options = dict(_option(argument) for argument in arguments if "=" in argument)
    sys.path.insert(0, os.getcwd())  # as python -m does for what it runs
    status = 0
    for target in targets:
        try:
            _find(target).compile(**options)
        except (CannotCompile, RuleError, TypeError, ValueError) as error:
            print(f"{target}: {error}", file=sys.stderr)
            status = max(status, 1)
        except (ImportError, AttributeError, LookupError) as error:
            print(f"{target}: {error}\n{_USAGE}", file=sys.stderr)
            status = 2
        else:
            print(f"{target}: compiled, in {cache.folder()}")
    return status


def _option(argument: str) -> tuple[str, Any]:
    name, _, text = argument.partition("=")
    try:
        return name, ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return name, text


def _find(target: str) -> type[RuleOptimizer]:
    module, colon, name = target.partition(":")
    if not colon:
        raise LookupError(f"{target!r} names no rule")
    found = getattr(importlib.import_module(module), name)
    if not (isinstance(found, type) and issubclass(found, RuleOptimizer)):
        raise LookupError(f"{name} of {module} is no rule")
    return found
