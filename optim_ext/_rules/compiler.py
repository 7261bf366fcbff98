"""Rules compiled by the C++ compiler at hand: at once, or in the background while the interpreter steps."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import queue
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Hashable
from pathlib import Path

from optim_ext._load import _C
from optim_ext._rules import cache
from optim_ext._rules.definition import Variant
from optim_ext._rules.errors import RuleError
from optim_ext._rules.native_text import unit_of
from optim_ext._rules.self_check import check_same_bits

_LONGEST_BUILD = 600.0  # seconds; it is for compilers that hang, not for machines that are busy
_HERE = Path(__file__).resolve().parents[1]


class CannotCompile(RuntimeError):
    """There is no compiler, or it fails."""


def include_paths() -> list[str]:
    """Folders with the headers that compiled rules include: ``rules/rule.h``, ``kernels/operand.h`` and so on.

    Returns:
        What a compiler is given with ``-I``.
    """
    installed = _HERE / "csrc"
    return [str(installed if installed.is_dir() else _HERE.parent / "csrc")]


@functools.cache
def _flags() -> tuple[str, ...]:
    flags = Path(include_paths()[0], "compile_flags.txt").read_text().split()
    return (*(flag for flag in flags if flag != "-fopenmp"), "-shared", "-fPIC", "-w")


@functools.cache
def hash_of_headers(kind: str) -> str:
    """A hash of everything a rule is compiled with for the CPU, or for CUDA."""
    found = hashlib.sha256()
    folders = ["rules", "storage", "kernels", f"kernels/{kind}", *(["device", "device/cuda"] if kind == "cuda" else [])]
    for folder in sorted(folders):
        inside = os.path.join(include_paths()[0], folder)
        for name in sorted(name for name in os.listdir(inside) if name.endswith(".h")):
            with open(os.path.join(inside, name), "rb", buffering=0) as file:
                found.update(f"{folder}/{name}\0".encode() + file.read())
    return found.hexdigest()


def find_compiler() -> tuple[list[str], str]:
    """The command of the compiler, and what identifies it, without running it.

    Raises:
        CannotCompile: there is none.
    """
    asked = os.environ.get("CXX")
    for words in [shlex.split(asked)] if asked else [["c++"], ["g++"], ["clang++"]]:
        path = shutil.which(words[0])
        if path is not None:
            found = os.stat(path)
            return [path, *words[1:]], f"{os.path.realpath(path)} {found.st_size} {found.st_mtime_ns} {words[1:]}"
    raise CannotCompile(
        f"the C++ compiler {asked} is missing" if asked else "there is no C++ compiler (c++, g++, clang++)"
    )


def try_compiler(command: list[str]) -> None:
    """Have the compiler say its version.

    Raises:
        CannotCompile: it does not.
    """
    try:
        subprocess.run([*command, "--version"], capture_output=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotCompile(f"the C++ compiler {command[0]} does not run: {error}") from None


class _Running:
    """The compilers that run now: they end with this process."""

    def __init__(self) -> None:
        self.lock, self.all, self.is_over = threading.Lock(), set[subprocess.Popen[str]](), False

    def run(self, command: list[str], environment: dict[str, str] | None) -> None:
        with self.lock:
            if self.is_over:
                raise CannotCompile("the process ends")
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                env=environment,
            )
            self.all.add(process)
        try:
            output, _ = process.communicate(timeout=_LONGEST_BUILD)
        except subprocess.TimeoutExpired:
            raise CannotCompile(f"the compiler took longer than {_LONGEST_BUILD:.0f} s") from None
        finally:
            self.end(process)
        if process.returncode != 0:
            raise CannotCompile(f"{shlex.join(command)} fails with status {process.returncode}:\n{output[-4000:]}")

    def end(self, process: subprocess.Popen[str]) -> None:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        with self.lock:
            self.all.discard(process)

    def end_all(self) -> None:
        with self.lock:
            self.is_over, running = True, list(self.all)
        for process in running:
            self.end(process)


_running = _Running()


def run_compiler(command: list[str], environment: dict[str, str] | None = None) -> None:
    """Run a compiler to its end.

    Raises:
        CannotCompile: it fails.
    """
    _running.run(command, environment)


def compile_now(variant: Variant, politely: bool = False) -> None:
    """Compile a variant, or find it compiled, and let it run from now on.

    Raises:
        CannotCompile: there is no compiler, or it fails, or what it made cannot be loaded.
        RuleError: what it made does not do what the rule does.
    """
    if variant.compiled:
        return
    isa = _C.isa()
    unit = unit_of(variant.struct, isa)
    compiler, identity = find_compiler()
    nice = shutil.which("nice") if politely else None
    command = [*([nice, "-n", "10"] if nice else []), *compiler, *_flags(), *(f"-I{path}" for path in include_paths())]

    def build(where: Path) -> bytes:
        try_compiler(compiler)
        source, library = where / "rule.cpp", where / "rule.so"
        source.write_text(unit)
        run_compiler([*command, str(source), "-o", str(library)])
        return library.read_bytes()

    key = hashlib.sha256(
        "\0".join([unit, isa, identity, " ".join(_flags()), hash_of_headers("cpu")]).encode()
    ).hexdigest()
    try:
        library = cache.find_or_build(key, build)
    except OSError as error:
        raise CannotCompile(f"a compiled rule cannot be stored: {error}") from error
    name = f"{variant.name} compiled"
    try:
        with cache.loadable(library) as path:
            number = _C.define_compiled_rule(name, variant.number, path)
    except RuntimeError as error:
        raise CannotCompile(str(error)) from error
    check_same_bits(variant, name)
    _C.run_rule_by(variant.number, number)
    variant.compiled, variant.problem = True, None


class Background:
    """One thread that compiles what has been asked for."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.wanted: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.asked: set[Hashable] = set()
        self.thread: threading.Thread | None = None

    def want(self, what: Hashable, work: Callable[[], None]) -> None:
        with self.lock:
            if what in self.asked:
                return
            self.asked.add(what)
            self.wanted.put(work)
            if self.thread is None:
                self.thread = threading.Thread(target=self._work, name="optim_ext rules", daemon=True)
                self.thread.start()

    def stop(self) -> None:
        """Wait until the thread is in no torch code any more; compilers have been ended before."""
        if self.thread is not None:
            self.wanted.put(None)
            self.thread.join(10.0)

    def _work(self) -> None:
        while True:
            work = self.wanted.get()
            if work is None or _running.is_over:
                return
            work()


_background = Background()


@atexit.register
def _end() -> None:
    _running.end_all()
    _background.stop()


def compile_soon(variant: Variant) -> None:
    """Have a variant compiled in the background. Until then, and where that fails, it is interpreted: with the same bits."""

    def compile_politely() -> None:
        try:
            compile_now(variant, politely=True)
        except (CannotCompile, RuleError) as error:
            variant.problem = str(error).splitlines()[0]

    if not variant.compiled:
        compile_in_background(variant, compile_politely)


def compile_in_background(what: Hashable, work: Callable[[], None]) -> None:
    """Have work done by the thread that compiles, once for each `what`. It does not raise."""
    _background.want(what, work)


def _start_anew() -> None:
    """A child of fork() has neither the thread nor the compilers of its parent."""
    global _background, _running
    _background, _running = Background(), _Running()


os.register_at_fork(after_in_child=_start_anew)
