"""Looks through the pages of a built site: what they refer to is there, nothing comes from another server, pictures say what
they show.

    python .ci/site/check.py build/site
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {("img", "src"), ("script", "src"), ("source", "src"), ("iframe", "src"), ("link", "href")}


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.references: list[tuple[str, str, str]] = []  # tag, attribute, target
        self.problems: list[str] = []
        self.has_heading = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.has_heading |= tag == "h1"
        self.ids |= {value for key, value in attrs if key in ("id", "name") and value}
        self.references += [(tag, key, found[key] or "") for key in ("href", "src") if key in found]
        if tag == "img" and not (found.get("alt") or "").strip():
            self.problems.append(f"{found.get('src')} has no alt text")


def problems_of(site: Path) -> Iterator[str]:
    pages = {path: Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    if len(pages) < 20:
        yield f"there are {len(pages)} pages only"
    for path, page in pages.items():
        name = path.relative_to(site)
        if not page.has_heading:
            yield f"{name}: no heading"
        yield from (f"{name}: {problem}" for problem in page.problems)
        if name.name == "404.html":
            continue  # its addresses begin at the root of a server
        for tag, attribute, target in page.references:
            parts = urlsplit(target)
            if parts.scheme in ("data", "mailto"):
                continue
            if parts.scheme or parts.netloc:
                if (tag, attribute) in LOADED:
                    yield f"{name}: {target} comes from another server"
                continue
            found = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            found = found / "index.html" if found.is_dir() else found
            if not found.is_file():
                yield f"{name}: {target} is not there"
            elif parts.fragment and found in pages and unquote(parts.fragment) not in pages[found].ids:
                yield f"{name}: {target} names no place on that page"


def main(site: str) -> int:
    problems = list(problems_of(Path(site).resolve()))
    print("\n".join(problems) or f"{site}: everything that pages refer to is there")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
