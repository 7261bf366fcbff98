"""The project's Markdown pages: their links, headings, pictures and blocks of code."""

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "csrc/README.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
]
LINK = re.compile(r"(!?)\[([^]]*)\]\(([^)\s]+)\)")
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")


class Block(NamedTuple):
    """A block of code: its language, its lines, the number of the first one, and why it is not run."""

    language: str
    lines: list[str]
    first_line: int
    not_run: str | None


def name_of(page):
    return str(page.relative_to(ROOT))


@cache
def taken_apart(page):
    """The lines outside of blocks of code, and the blocks."""
    text, blocks, block, before = [], [], None, ""
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if line.lstrip().startswith("```"):
            if block is None:
                reason = NOT_RUN.fullmatch(before.strip())
                block = Block(line.strip().removeprefix("```"), [], number + 1, reason and reason[1])
            else:
                blocks.append(block)
                block = None
        elif block is not None:
            block.lines.append(line)
        else:
            text.append(line)
        before = line
    assert block is None, f"{name_of(page)}: a block of code does not end"
    return text, blocks


def blocks(page):
    return taken_apart(page)[1]


def links(page):
    """(is a picture, text, target) of each link; what is within backquotes is none."""
    text = re.sub(r"`[^`\n]*`", "``", "\n".join(taken_apart(page)[0]))
    return [(bool(mark), words, target) for mark, words, target in LINK.findall(text)]


def anchor(heading):
    """As GitHub makes it, and the site."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@cache
def headings(page, depth=6):
    """The anchors of a page's headings of up to so many #. One that occurs again gets a number, as on GitHub."""
    found = []
    for line in taken_apart(page)[0]:
        if match := re.fullmatch(rf"#{{1,{depth}}} (.+)", line):
            name = anchor(match[1])
            again = sum(re.fullmatch(rf"{re.escape(name)}(-\d+)?", other) is not None for other in found)
            found.append(f"{name}-{again}" if again else name)
    return found


def table_rows(page):
    """The cells of each row of the page's tables, without heads."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in taken_apart(page)[0] if line[:1] == "|"]
    rulers = [index for index, row in enumerate(rows) if set("".join(row)) <= set("-: ")]
    heads = {index - 1 for index in rulers}
    return [row for index, row in enumerate(rows) if index not in heads and index not in rulers]
