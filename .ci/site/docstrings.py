"""What griffe is told of this package's docstrings: they are written for help(), with Sphinx's roles and literal blocks, as
torch's are, and a class that has torch's docstring says where that is."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

TORCHS = re.compile(r"torch\.optim\.(\w+)\.__doc__")
ROLE = re.compile(r":(class|func|meth|attr|mod):`~?([^`]+)`")
FORMULA = re.compile(r":math:`([^`]+)`")
DISPLAYED = re.compile(r"^( *)\.\. math::[ ]*\n((?:\1 +.*\n?|\s*\n)+)", re.M)
LITERAL = re.compile(r"::\n\n((?:(?: {4,}.*)?\n)*(?: {4,}.*))", re.M)
EXAMPLE = re.compile(r"^Example::?\n", re.M)
RETURNS = re.compile(r"^(Returns:\n +)(?=\S)", re.M)


class Docstrings(griffe.Extension):
    def __init__(self) -> None:
        super().__init__()
        self.constructors: dict[str, griffe.Function] = {}

    def on_function_instance(self, *, node: Any, func: griffe.Function, **kwargs: Any) -> None:
        """Of two constructors the first one counts, which is for type checkers and says all arguments."""
        if func.name == "__init__":
            first = self.constructors.setdefault(func.path, func)
            func.parameters, func.returns = first.parameters, first.returns

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.is_class and "__doc__" in obj.members:
            torchs = TORCHS.search(str(obj.members["__doc__"].value))
            if torchs:
                obj.docstring = griffe.Docstring(of_torchs_class(torchs[1]), parent=obj)
        if obj.docstring is not None:
            text = as_markdown(obj.docstring.value)
            if obj.is_function and obj.returns is not None:  # what is returned is described, not named
                text = RETURNS.sub(lambda found: f"{found[1]}{obj.returns}: ", text)
            obj.docstring.value = text


def of_torchs_class(name: str) -> str:
    page = f"https://docs.pytorch.org/docs/stable/generated/torch.optim.{name}.html"
    return (
        f"[`torch.optim.{name}`]({page}) with a native step: arguments, their defaults (shown as `...`), state, errors and "
        "results are torch's. The arguments that this package adds are above, at the head of the page."
    )


def as_markdown(text: str) -> str:
    text = DISPLAYED.sub(lambda found: f"\n{found[1]}$${' '.join(found[2].split())}$$\n\n", text)
    text = FORMULA.sub(r"$\1$", text)
    text = ROLE.sub(r"`\2`", text)
    text = EXAMPLE.sub("**Example**::\n", text)
    return LITERAL.sub(fenced, text)


def fenced(block: re.Match[str]) -> str:
    code = textwrap.dedent(block[1]).strip("\n")
    language = "pycon" if code.startswith(">>>") else "python"
    return f":\n\n```{language}\n{code}\n```"
