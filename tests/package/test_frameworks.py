"""What `make frameworks` stands on, and that no other call of pytest goes where frameworks are needed."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path("tests/frameworks")


def output(*command, cwd, check=True):
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_they_are_collected_only_where_their_folder_is_named(root, tmp_path):
    """By the rule of pyproject.toml, in a project with a test here and one there."""
    shutil.copy(root / "pyproject.toml", tmp_path)
    (tmp_path / FOLDER).mkdir(parents=True)
    (tmp_path / "tests/test_plain.py").write_text("def test_plain(): pass\n")
    (tmp_path / FOLDER / "test_there.py").write_text("import a_framework_that_is_missing\ndef test_there(): pass\n")
    collect = (sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider")
    for named in ((), ("tests",)):
        found = output(*collect, *named, cwd=tmp_path)
        assert "test_plain" in found and "test_there" not in found
    assert "No module named 'a_framework_that_is_missing'" in output(*collect, FOLDER, cwd=tmp_path, check=False)


def test_every_framework_has_one_version(root):
    """But for torchvision, whose version torch's decides."""
    lines = (root / FOLDER / "requirements.txt").read_text().splitlines()
    wanted = [line for line in lines if not line.startswith("#") and line != "torchvision"]
    assert wanted and all(re.fullmatch(r"[\w.-]+(\[\w+\])?==[\w.]+", line) for line in wanted)


def test_every_file_of_tests_is_on_the_page(root):
    page = (root / "docs/frameworks.md").read_text()
    files = [file.name for file in (root / FOLDER).glob("test_*.py")]
    assert len(files) > 10
    assert [name for name in files if f"(../tests/frameworks/{name})" not in page] == []


@pytest.fixture(scope="module")
def environment(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("environment") / "above"
    output(sys.executable, root / ".ci/stand_on.py", folder, cwd=root)
    return folder


def test_an_environment_that_stands_on_another_has_its_packages(environment, root):
    """Those that are installed in place, too."""
    code = "import sys, torch, pip, pytest; print(sys.prefix, torch.__file__, pytest.__file__, sep='\\n')"
    prefix, *files = output(environment / "bin/python", "-c", code, cwd="/").split()
    assert Path(prefix).samefile(environment)
    assert [Path(file) for file in files] == [Path(module.__file__) for module in (torch, pytest)]


def test_what_is_installed_above_comes_first(environment):
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(output(environment / "bin/python", "-c", code, cwd="/").strip())
    (own / "filelock.py").write_text("here = True\n")
    assert output(environment / "bin/python", "-c", "import filelock; print(filelock.here)", cwd="/") == "True\n"
