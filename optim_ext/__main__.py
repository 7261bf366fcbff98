"""``python -m optim_ext``: a report to paste into a bug report, ending in a self-test of a few seconds.

The exit status is 1 where the self-test finds an optimizer that differs from torch.optim's or, where torch has none, from
its formula.

``python -m optim_ext doctor [--json]``: the report, and what to mend; the exit status is 1 where something is wrong.

``python -m optim_ext memory FILE.py:factory [option=value ...]``: the bytes that a model and its optimizer will take.

``python -m optim_ext run script.py [arguments]`` or ``run -m module``: runs a program whose ``torch.optim`` is this package.

``python -m optim_ext compile pkg.mod:Name [option=value ...]``: compiles a rule ahead.
"""

import sys

from optim_ext import _doctor, _report
from optim_ext._memory import memory_command
from optim_ext._rules.command import compile_rules
from optim_ext._run import run

COMMANDS = {"compile": compile_rules, "doctor": _doctor.main, "memory": memory_command, "run": run}


def main() -> int:
    command = COMMANDS.get(sys.argv[1]) if len(sys.argv) > 1 else None
    if command is not None:
        return command(sys.argv[2:])
    for line in _report.lines(_report.facts()):
        print(line)
    failures = 0
    for test in _report.self_test():
        print(test)
        failures += not test.good
    print(f"self-test {'passed' if failures == 0 else f'failed {failures} times'}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
