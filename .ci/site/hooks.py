"""What MkDocs is told of this project: the start page is README.md, a link that leaves docs/ leads to a page made of the
file or folder it names, and formulas become MathML, which browsers show without a script."""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"^ *```.*?^ *```", re.M | re.S)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)
# A table or list right below a line of text, which is none of its own.
BELOW_TEXT = re.compile(r"^((?![|\s]|[-*] |\d+\. |<!--).*\S.*)\n(?=\|.*\n\|[-:| ]+\n|[-*] |\d+\. )", re.M)
CELL = re.compile(r"<td[^>]*>.*?</td>", re.S)
CODE = re.compile(r"(?<=<code>)[^<]+(?=</code>)")
BREAKABLE = re.compile(r"::|[/_]")
LANGUAGES = {".py": "python", ".sh": "sh"}


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made of what lies outside of docs/, and what these link to in turn."""
    found = {"README.md"}
    waiting = [posixpath.join("docs", file.src_uri) for file in files.documentation_pages()] + ["README.md"]
    while waiting:
        path = waiting.pop()
        if not path.endswith(".md"):
            continue
        for target in targets(path, (ROOT / path).read_text()):
            if not target.startswith("docs/") and target not in found and (ROOT / target).exists():
                found.add(target)
                waiting.append(target)
    for path in sorted(found):
        files.append(File.generated(config, place_of(path), content=text_of(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Has links lead to the pages of the site, wherever in the project a page comes from, and tables and lists be seen as on
    GitHub, which wants no empty line before them."""
    own = path_of(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        target = link[2]
        if is_outside(target):
            return link[0]
        place = posixpath.relpath(place_of(resolved(own, target)), posixpath.dirname(page.file.src_uri) or ".")
        return f"{link[1]}{place}{link[3] or ''}{link[4]}"

    return outside_of_code(markdown, lambda text: LINK.sub(moved, BELOW_TEXT.sub(r"\1\n\n", text)))


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Formulas, and places where long names in narrow cells of tables may be broken."""

    def shown(formula: re.Match[str]) -> str:
        display = "block" if formula[2] == "[" else "inline"
        return convert(html.unescape(formula[3]), display=display)

    return CELL.sub(lambda cell: CODE.sub(breakable, cell[0]), FORMULA.sub(shown, content))


def breakable(code: re.Match[str]) -> str:
    return BREAKABLE.sub(r"\g<0><wbr>", code[0])


def targets(path: str, text: str) -> Iterator[str]:
    """What a page links to, relative to the project."""
    for link in LINK.finditer(FENCE.sub("", text)):
        if not is_outside(link[2]):
            yield resolved(path, link[2])


def is_outside(target: str) -> bool:
    return "://" in target or target.startswith("mailto:")


def resolved(path: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), target))


def place_of(path: str) -> str:
    """Where a file or folder of the project is on the site."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def path_of(place: str) -> str:
    """The other way round."""
    if place == "index.md":
        return "README.md"
    if not place.startswith("source/"):
        return f"docs/{place}"
    path = place.removeprefix("source/")
    return path if (ROOT / path).exists() else path.removesuffix(".md")


def text_of(path: Path) -> str:
    """A page: Markdown as it is, a program as a block of code, a folder as all of its programs."""
    if path.suffix == ".md":
        return path.read_text()
    if path.is_dir():
        parts = [f"## {file.name}\n\n{code_of(file)}" for file in sorted(path.glob("*.py"))]
        return "\n\n".join([f"# {path.relative_to(ROOT)}", *parts])
    return f"# {path.relative_to(ROOT)}\n\n{code_of(path)}"


def code_of(path: Path) -> str:
    return f"```{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text()}```\n"


def outside_of_code(markdown: str, change: Any) -> str:
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])
