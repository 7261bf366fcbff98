"""``python -m optim_ext compile pkg.mod:Name [option=value ...]``: compiles rules ahead, for images and login nodes."""

from __future__ import annotations

import sys

from optim_ext import _command_line
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
    options = dict(_command_line.option(argument) for argument in arguments if "=" in argument)
    status = 0
    for target in targets:
        try:
            _find(target).compile(**options)
        except (CannotCompile, RuleError, TypeError, ValueError) as error:
            print(f"{target}: {error}", file=sys.stderr)
            status = max(status, 1)
        except (ImportError, AttributeError, LookupError, OSError) as error:
            print(f"{target}: {error}\n{_USAGE}", file=sys.stderr)
            status = 2
        else:
            print(f"{target}: compiled, in {cache.folder()}")
    return status


def _find(target: str) -> type[RuleOptimizer]:
    found = _command_line.find(target)
    if not (isinstance(found, type) and issubclass(found, RuleOptimizer)):
        module, _, name = target.rpartition(":")
        raise LookupError(f"{name} of {module} is no rule")
    return found
