"""Compiled rules on disk: one file each, that is there as a whole or not at all.

A file is only taken if it belongs to this user and is what was written, by a checksum in front: a library that was cut
short would kill the process when it is mapped. What has been checked is loaded from memory, so that the folder may be on a
file system that nothing is executed from, and a file may be replaced at any time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

_MAGIC = b"optim_ext rule 1\n"
_LONGEST_WAIT = 60.0  # for another process that builds the same; then this one builds a copy of its own
_STALE = 3600.0  # seconds after which what a killed build has left is removed

_private: Path | None = None
_loads = itertools.count(1)


def folder() -> Path:
    """Where compiled rules are kept: the first of ``$OPTIM_EXT_CACHE``, ``$XDG_CACHE_HOME/optim_ext`` and
    ``~/.cache/optim_ext`` that this user alone can write to, else a temporary folder of this process."""
    global _private
    found, problems = chosen()
    if found is not None:
        return found
    if _private is None or not _private.is_dir():
        _private = Path(tempfile.mkdtemp(prefix="optim_ext-"))
        warnings.warn(
            f"compiled rules are kept for this process only, in {_private}: {'; '.join(problems)}. Set OPTIM_EXT_CACHE to a "
            "folder of your own",
            stacklevel=2,
        )
    return _private


def chosen() -> tuple[Path | None, list[str]]:
    """The first folder that will do, if there is one, and what is wrong with those that would come before."""
    candidates = []
    if os.environ.get("OPTIM_EXT_CACHE"):
        candidates.append(Path(os.environ["OPTIM_EXT_CACHE"]))
    if os.environ.get("XDG_CACHE_HOME"):
        candidates.append(Path(os.environ["XDG_CACHE_HOME"], "optim_ext"))
    candidates.append(Path(os.path.expanduser("~"), ".cache", "optim_ext"))
    problems: list[str] = []
    for candidate in candidates:
        problem = _problem_with(candidate)
        if problem is None:
            return candidate, problems
        problems.append(f"{candidate} {problem}")
    return None, problems


def _problem_with(candidate: Path) -> str | None:
    try:
        candidate.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = candidate.stat()
        if not stat.S_ISDIR(found.st_mode):
            return "is no folder"
        if found.st_uid != os.geteuid():
            return "belongs to another user"
        if found.st_mode & 0o022:
            return "can be written by others"
        if not os.access(candidate, os.W_OK | os.X_OK):
            return "cannot be written"
        with tempfile.TemporaryFile(dir=candidate):
            return None
    except OSError as error:
        return f"cannot be used ({error.strerror or error})"


def find(key: str) -> bytes | None:
    """A library as it was stored, if it is there and whole."""
    path = folder() / f"{key}.rule"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with open(descriptor, "rb") as file:
        if os.fstat(file.fileno()).st_uid != os.geteuid():
            return None
        try:
            content = file.read()
        except OSError:
            return None
    library = _opened(content)
    if library is None:
        with contextlib.suppress(OSError):
            path.unlink()
    return library


def _sealed(library: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(library).hexdigest().encode() + b"\n" + library


def _opened(content: bytes) -> bytes | None:
    head = len(_MAGIC) + 65
    library = content[head:]
    return library if content[:head] == _sealed(library)[:head] else None


def find_or_build(key: str, build: Callable[[Path], bytes]) -> bytes:
    """The library of this key, built in a temporary folder if there is none. Of several processes that want the same, one
    builds while the others wait."""
    found = find(key)
    if found is not None:
        return found
    where = folder()
    _remove_stale(where)
    with _locked(where / f"{key}.lock"):
        found = find(key)  # by who held the lock before
        if found is not None:
            return found
        with tempfile.TemporaryDirectory(prefix="build-", dir=where) as name:
            library = build(Path(name))
            made = Path(name, "rule")
            with contextlib.suppress(OSError):  # a full disk: there is nothing to keep, but something to run
                made.write_bytes(_sealed(library))
                made.chmod(0o600)
                os.replace(made, where / f"{key}.rule")
    return library


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that goes with its holder, however that ends; or go on without, where there are no locks, or where another
    holds it for too long."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        yield
        return
    try:
        end = time.monotonic() + _LONGEST_WAIT
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EINTR) or time.monotonic() > end:
                    break
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def _remove_stale(where: Path) -> None:
    with contextlib.suppress(OSError):
        for entry in os.scandir(where):
            if entry.name.startswith("build-") and entry.stat().st_mtime < time.time() - _STALE:
                shutil.rmtree(entry.path, ignore_errors=True)


@contextlib.contextmanager
def loadable(library: bytes) -> Iterator[str]:
    """A path that the loader finds these bytes under, in memory. No two are the same: it takes a path that it has seen
    before for the library it has loaded before."""
    count = next(_loads)
    try:
        descriptor = os.memfd_create("optim_ext rule", os.MFD_CLOEXEC)
    except (AttributeError, OSError):
        with tempfile.TemporaryDirectory(prefix="optim_ext-") as name:
            path = Path(name, f"rule-{count}.so")
            path.write_bytes(library)
            yield str(path)
        return
    with open(descriptor, "wb") as file:
        file.write(library)
        file.flush()
        yield f"/proc/self/fd{'/' * count}{descriptor}"
