"""``python -m optim_ext run``: a program as Python itself runs it, but for its optimizers."""

import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

import optim_ext

LOOK = """
import os, sys, __main__
if "optim_ext" in sys.modules:  # Python itself need not import torch, which takes seconds, to show the rest
    import torch
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    print(type(optimizer).__module__.split(".")[0])
print(sys.argv, sys.path[0], __name__, __file__, __package__, __spec__ and __spec__.name)
print(__main__.__dict__ is globals(), sys.modules["__main__"] is __main__)
"""


@pytest.fixture
def folder(tmp_path):
    """Scripts, a module and a package to run."""
    (tmp_path / "program").mkdir()
    files = {
        "script.py": LOOK,
        "program/__init__.py": "",
        "program/__main__.py": "from program import part\n" + LOOK,
        "program/part.py": LOOK,
        "leaves.py": "import sys\nsys.exit(int(sys.argv[1]))",
        "fails.py": "def broken():\n    raise KeyError('no such key')\n\nbroken()",
        "latin.py": b"# -*- coding: latin-1 -*-\nprint(ascii('\xe4'))",
        "wrong.py": "def (",
        "pickles.py": """
            import multiprocessing, pickle, torch
            class Thing:
                value = 3
            def value(thing):
                return thing.value
            if __name__ == "__main__":
                assert pickle.loads(pickle.dumps(Thing())).value == 3
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    print(pool.map(value, [Thing()]))
        """,
        "exits.py": """
            import atexit, __main__
            atexit.register(lambda: print("at exit", __main__.kept))
            kept = "kept"
        """,
    }
    for name, text in files.items():
        data = text if isinstance(text, bytes) else textwrap.dedent(text).encode()
        (tmp_path / name).write_bytes(data)
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir/__main__.py").write_text(LOOK)
    with zipfile.ZipFile(tmp_path / "archive.pyz", "w") as archive:
        archive.writestr("__main__.py", LOOK)
    return tmp_path


def python(folder, *arguments):
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(Path(optim_ext.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["script.py", "--lr", "0.1", "-m"],
        ["./program/../script.py"],
        ["-m", "program", "a"],
        ["-m", "program.part", "--b"],
        ["dir"],
        ["archive.pyz", "x"],
    ],
    ids=" ".join,
)
def test_a_program_sees_what_python_shows_it(folder, arguments):
    plain, ours = python(folder, *arguments), python(folder, "-m", "optim_ext", "run", *arguments)
    assert plain.returncode == 0, plain.stderr
    assert ours.returncode == 0, ours.stderr
    assert ours.stdout.startswith("optim_ext\n") and ours.stdout.replace("optim_ext\n", "") == plain.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["leaves.py", "7"],
        ["fails.py"],
        ["wrong.py"],
        ["latin.py"],
        ["missing.py"],
        ["-m", "missing_module"],
        ["-m", "leaves.missing"],
        ["pickles.py"],
        ["exits.py"],
    ],
    ids=" ".join,
)
def test_it_ends_as_under_python(folder, arguments, with_optim_ext):
    plain = python(folder, *arguments)
    if arguments[0] in ("pickles.py", "exits.py"):  # of which Python itself does a part
        ours = python(folder, "-m", "optim_ext", "run", *arguments)
    else:
        ours = with_optim_ext.run_module("optim_ext", "run", *arguments, cwd=folder)
    assert ours.returncode == plain.returncode, ours.stderr
    assert ours.stdout == plain.stdout
    if plain.stderr:
        assert ours.stderr.splitlines()[-1] == plain.stderr.splitlines()[-1]


@pytest.mark.parametrize("arguments", [[], ["-m"], ["--help"]], ids=["nothing", "-m", "an option"])
def test_nothing_to_run(folder, arguments, with_optim_ext):
    done = with_optim_ext.run_module("optim_ext", "run", *arguments, cwd=folder)
    assert done.returncode == 2 and done.stderr.startswith("usage: python -m optim_ext run script.py")
