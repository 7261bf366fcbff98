"""How a rule is refused: with file, line, column and the text of the line, so that Python prints the caret."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, NoReturn


class RuleError(SyntaxError):
    """A rule that cannot run natively, and where in it the reason lies."""

    @property
    def line(self) -> int | None:
        """The line of the file that the reason lies in."""
        return self.lineno


class Source:
    """The text of a function, and where it comes from."""

    def __init__(self, function: Callable[..., Any], text: str | None = None) -> None:
        self.function = function
        if text is None:
            try:
                lines, self.first_line = inspect.getsourcelines(function)
            except (OSError, TypeError):
                raise RuleError(
                    f"rule {function.__name__!r}: its source is not at hand; define it in a file or a notebook cell, or pass "
                    "source="
                ) from None
            text = "".join(lines)
            self.file = inspect.getsourcefile(function) or "<unknown>"
        else:
            self.first_line, self.file = 1, "<source>"
        self.lines = text.splitlines()
        dedented = textwrap.dedent(text)
        self._indent = len(self.lines[0]) - len(dedented.splitlines()[0]) if dedented else 0
        try:
            tree = ast.parse(dedented)
        except SyntaxError as error:
            raise RuleError(f"rule {function.__name__!r}: {error.msg}", self._place(error.lineno or 1, 0)) from None
        found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        named = [node for node in found if node.name == function.__name__]
        if not named:
            raise RuleError(
                f"rule {function.__name__!r}: its source is no function of this name, but {text.strip()[:60]!r}"
            )
        self.definition: ast.FunctionDef = named[0]

    def refuse(self, node: Any, problem: str) -> NoReturn:
        line = getattr(node, "lineno", self.definition.lineno)
        raise RuleError(
            f"rule {self.function.__name__!r}: {problem}",
            self._place(line, getattr(node, "col_offset", 0), getattr(node, "end_lineno", None), node),
        )

    def text_of(self, node: ast.AST) -> str:
        return ast.unparse(node)

    def line_of(self, node: Any) -> int:
        return self.first_line + int(getattr(node, "lineno", 1)) - 1

    def _place(
        self, line: int, column: int, end_line: int | None = None, node: Any = None
    ) -> tuple[str, int, int, str, int, int]:
        """What SyntaxError takes; ast counts columns in bytes of the text without its indent."""
        text = self.lines[line - 1] if line <= len(self.lines) else ""

        def characters(offset: int) -> int:
            return len(text[self._indent :].encode()[:offset].decode(errors="ignore")) + self._indent + 1

        end = getattr(node, "end_col_offset", None)
        last = characters(end) if end is not None and end_line == line else len(text) + 1
        number = self.first_line + line - 1
        return self.file, number, characters(column), text + "\n", number, last
