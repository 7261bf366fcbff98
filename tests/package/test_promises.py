"""docs/promises.md: every test, benchmark and section that it names is there, and every section of the pages is in it."""

import ast
import re
from functools import cache

import pytest
from pages import LINK, PAGES, ROOT, headings, name_of, table_rows
from ranks import cases_in

PAGE = ROOT / "docs/promises.md"
# What can promise something: not the reference, which is made of docstrings.
PROMISING = [page for page in PAGES if page == ROOT / "README.md" or (page.parent == ROOT / "docs" and page != PAGE)]
COLUMNS = ["promise", "made in", "held by", "not covered"]


def rows():
    return table_rows(PAGE)


def links(text):
    """(page, anchor or None) of the links into the project."""
    found = []
    for _, _, target in LINK.findall(text):
        if "://" not in target:
            path, _, name = target.partition("#")
            found.append(((PAGE.parent / path).resolve() if path else PAGE, name or None))
    return found


def listed_as_promising_nothing():
    return links(PAGE.read_text().partition("\n## Sections that promise nothing\n")[2])


@cache
def named_in_file(path):
    """The tests of a file: of a module its functions, of a program for several processes the cases that it lists."""
    if path.name.endswith("cases.py"):
        return set(cases_in(path))
    if not path.name.startswith("test_"):
        return set()  # pytest does not look there
    return {
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def missing(words):
    """Those of the names, in the order in which a cell has them, that nothing in the project bears."""
    file, lost = None, []
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    for word in words:
        if word.startswith("make "):
            known = word.removeprefix("make ") in targets
        elif "::" in word:
            path, _, name = word.partition("::")
            file = ROOT / path if path else file
            known = file is not None and file.is_file() and name in named_in_file(file)
        else:
            known = re.fullmatch(r"benchmarks/\w+\.(py|sh)|tests/cpp/test_\w+\.cpp", word) and (ROOT / word).is_file()
        if not known:
            lost.append(word)
    return lost


def holders(row):
    """The names in the cell of what holds a promise, but for what is in brackets; none where it says so."""
    return re.findall(r"`([^`]+)`", re.sub(r"\([^()]*\)", "", row[COLUMNS.index("held by")]))


def test_there_are_rows_and_each_has_four_cells():
    assert len(rows()) > 80
    for row in rows():
        assert len(row) == len(COLUMNS) and all(row), row
    assert len({row[0] for row in rows()}) == len(rows())


@pytest.mark.parametrize("row", rows(), ids=[row[0] for row in rows()])
def test_what_holds_a_promise_is_there(row):
    names = holders(row)
    assert names or row[COLUMNS.index("held by")] == "nothing yet"
    assert missing(names) == []
    # What else a row mentions is there, too.
    assert missing(word for word in re.findall(r"`([^`]+)`", row[COLUMNS.index("not covered")]) if "::" in word) == []


def test_a_name_that_is_gone_is_found():
    renamed = [
        "tests/optim/test_step.py::test_layouts_of_old",
        "tests/optim/test_of_old.py::test_layouts",
        "::test_layouts",
    ]
    assert missing(renamed) == renamed
    assert missing(["tests/optim/test_step.py::test_layouts", "::test_versions_of_old"]) == ["::test_versions_of_old"]
    # Helpers are no tests, nor are cases that no process runs.
    assert missing(["tests/distributed/dtensor_cases.py::fsdp"]) != []
    assert missing(["benchmarks/of_old.py", "tests/cpp/test_of_old.cpp", "make old"]) != []


def test_links_lead_somewhere():
    for page, name in links(PAGE.read_text()):
        assert page.exists(), page
        assert name is None or name in headings(page, 6), f"{page.name} has no section #{name}"
    for row in rows():
        assert links(row[COLUMNS.index("made in")]), row[0]


@pytest.mark.parametrize("page", PROMISING, ids=map(name_of, PROMISING))
def test_every_section_is_in_a_row_or_in_the_list(page):
    def named_in(found):
        return {name for where, name in found if where == page}

    promising = named_in(found for row in rows() for found in links(row[COLUMNS.index("made in")]))
    silent = named_in(listed_as_promising_nothing())
    assert set(headings(page, 2)) - promising - silent == set()
    assert promising & silent == set(), "promises something and is listed as promising nothing"


def test_readers_find_the_page():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        assert "(docs/promises.md)" in page.read_text()
