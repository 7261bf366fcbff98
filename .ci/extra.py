"""Prints what an extra of pyproject.toml needs, without optim_ext itself: ``python .ci/extra.py test``."""

import re
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

EXTRAS = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"][
    "optional-dependencies"
]


def needs_of(extra):
    for requirement in EXTRAS[extra]:
        other = re.fullmatch(r"optim_ext\[(\w+)\]", requirement)
        yield from needs_of(other[1]) if other else [requirement]


if __name__ == "__main__":
    print("\n".join(needs_of(sys.argv[1])))
