"""What `make matrix` finds, tells and counts as a failure, without a build."""

import runpy
import sys
from types import SimpleNamespace

import pytest


@pytest.fixture
def matrix(root, tmp_path, monkeypatch):
    """The names of .ci/matrix.py, whose folders lie elsewhere."""
    monkeypatch.syspath_prepend(root / ".ci")
    names = runpy.run_path(str(root / ".ci/matrix.py"))
    (tmp_path / "tree").mkdir()
    (tmp_path / "build").mkdir()
    monkeypatch.setitem(names["Row"].make.__globals__, "ROOT", tmp_path)
    monkeypatch.setitem(names["Row"].make.__globals__, "FOLDER", tmp_path / "build/matrix")
    return SimpleNamespace(**names)


def made(matrix, name):
    row = matrix.Row(name, every=20, workers=1)
    row.make()
    return row


def test_this_python_is_found(matrix):
    assert matrix.find_python(f"{sys.version_info.major}.{sys.version_info.minor}") == sys.executable


def test_a_python_that_is_missing_is_told_and_no_failure(matrix, tmp_path):
    row = made(matrix, "2.13.0/3.99")
    assert row.cells() == ["2.13.0", "3.99", "", "", "", "no Python 3.99 is installed"]
    assert row.is_good()
    assert not (tmp_path / "build/matrix").exists()


def test_a_torch_that_cannot_be_had_is_told_in_pips_words(matrix, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    row = made(matrix, "2.13.0")
    assert "torch==2.13.0" in row.cells()[-1]
    assert row.is_good()
    assert not (tmp_path / "build/matrix").exists()


def test_failures_and_faults_are_in_the_table_and_make_a_row_bad(matrix):
    rows = [matrix.Row(f"2.{minor}.0/3.11", every=20, workers=1) for minor in (11, 12, 13)]
    rows[0].result.update(built_in_s=300, tested_in_s=90, passed=70, failed=[])
    rows[1].result.update(built_in_s=301, tested_in_s=90, passed=69, failed=["tests.optim.test_step::test_layouts"])
    rows[2].result.update(fault="building failed, see build/matrix-2.13.0-3.11.log")
    assert [row.is_good() for row in rows] == [True, False, False]
    assert matrix.table(rows).splitlines()[2:] == [
        "| 2.11.0 | 3.11 | 300 | 70 | 0 | |",
        "| 2.12.0 | 3.11 | 301 | 69 | 1 | |",
        "| 2.13.0 | 3.11 | | | | building failed, see build/matrix-2.13.0-3.11.log |",
    ]


def test_a_report_is_counted_and_none_is_a_fault(matrix, tmp_path):
    row, report = matrix.Row("2.13.0", every=20, workers=1), tmp_path / "report.xml"
    for went_well in (True, False):
        with pytest.raises(matrix.Failed, match="without a result"):
            row.count(report, went_well)
    cases = '<testcase classname="t" name="a"/><testcase classname="t" name="b"><{0}/></testcase>'
    for kind, went_well, failed in (("skipped", True, []), ("failure", False, ["t::b"]), ("error", False, ["t::b"])):
        report.write_text(f"<testsuites><testsuite>{cases.format(kind)}</testsuite></testsuites>")
        row.count(report, went_well)
        assert (row.result["passed"], row.result["failed"]) == (2 - len(failed), failed)
    report.write_text("<testsuites><testsuite/></testsuites>")
    with pytest.raises(matrix.Failed, match="without a result"):  # no test at all
        row.count(report, True)
