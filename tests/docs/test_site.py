""".ci/site/check.py finds what is wrong with a built site."""

import sys

import pytest
from pages import ROOT

sys.path.insert(0, str(ROOT / ".ci/site"))

import check


def problems_of(body, site):
    for number in range(25):
        (site / f"{number}.html").write_text("<h1 id='top'>Page</h1>")
    (site / "folder").mkdir()
    (site / "folder/index.html").write_text("<h1 id='here'>Folder</h1>")
    (site / "page.html").write_text(f"<h1>Page</h1>{body}")
    return list(check.problems_of(site))


@pytest.mark.parametrize(
    "body, problem",
    [
        ("<a href='none.html'>x</a>", "none.html is not there"),
        ("<a href='1.html#none'>x</a>", "names no place on that page"),
        ("<a href='#none'>x</a>", "names no place on that page"),
        ("<img src='none.png' alt='A picture'>", "none.png is not there"),
        ("<img src='data:image/png;base64,' alt=''>", "has no alt text"),
        ("<img src='data:image/png;base64,'>", "has no alt text"),
        ("<script src='https://example.org/x.js'></script>", "comes from another server"),
        ("<link rel='stylesheet' href='//example.org/x.css'>", "comes from another server"),
    ],
)
def test_a_fault_is_found(body, problem, tmp_path):
    (found,) = problems_of(body, tmp_path)
    assert found.startswith("page.html: ") and problem in found


def test_what_is_right_is_passed(tmp_path):
    right = "<a href='1.html#top'>x</a><a href='folder/#here'>x</a><a href='https://example.org'>x</a><a href='.'>x</a>"
    assert problems_of(right, tmp_path) == ["page.html: . is not there"]
    (tmp_path / "index.html").write_text("<h1>Start</h1>")
    assert list(check.problems_of(tmp_path)) == []


def test_a_page_without_a_heading_and_a_site_without_pages_are_faults(tmp_path):
    (tmp_path / "page.html").write_text("<p>words</p>")
    assert list(check.problems_of(tmp_path)) == ["there are 1 pages only", "page.html: no heading"]
