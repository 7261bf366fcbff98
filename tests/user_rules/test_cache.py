"""Compiled rules on disk: whole or not there, this user's, and never a reason to hang, crash or run something else."""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest

from optim_ext._rules import cache

LIBRARY = b"\x7fELF" + bytes(range(256)) * 40
FAULTS = int(os.environ.get("OPTIM_EXT_CACHE_FAULTS", "60"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIM_EXT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def build(where):
    (where / "rule.so").write_bytes(LIBRARY)
    return (where / "rule.so").read_bytes()


def never(where):
    raise AssertionError("this is in the cache")


def test_what_was_built_is_found_again(folder):
    assert cache.find_or_build("key", build) == LIBRARY
    assert cache.find_or_build("key", never) == LIBRARY == cache.find("key")
    assert sorted(path.name for path in folder.iterdir()) == ["key.lock", "key.rule"]
    assert (folder.stat().st_mode & 0o777, (folder / "key.rule").stat().st_mode & 0o777) == (0o700, 0o600)


@pytest.mark.parametrize("keep", [0, 10, 80, 1000, len(LIBRARY) + 81])
def test_a_file_that_was_cut_short_is_built_anew(folder, keep):
    cache.find_or_build("key", build)
    path = folder / "key.rule"
    path.write_bytes(path.read_bytes()[:keep])
    assert cache.find("key") is None
    assert cache.find_or_build("key", build) == LIBRARY == cache.find("key")


def test_a_file_with_another_byte_is_built_anew(folder):
    cache.find_or_build("key", build)
    path = folder / "key.rule"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert cache.find_or_build("key", build) == LIBRARY == cache.find("key")


def test_a_link_is_not_followed(folder, tmp_path):
    cache.find_or_build("key", build)
    (folder / "key.rule").rename(tmp_path / "elsewhere")
    (folder / "key.rule").symlink_to(tmp_path / "elsewhere")
    assert cache.find("key") is None


def test_a_failing_build_leaves_nothing(folder):
    def fail(where):
        (where / "half").write_text("x")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cache.find_or_build("key", fail)
    assert [path.name for path in folder.iterdir()] == ["key.lock"]


def test_what_a_killed_build_left_is_removed_later(folder):
    folder.mkdir(mode=0o700)
    (folder / "build-old").mkdir()
    (folder / "build-new").mkdir()
    os.utime(folder / "build-old", (0, 0))
    cache.find_or_build("key", build)
    assert sorted(path.name for path in folder.iterdir()) == ["build-new", "key.lock", "key.rule"]


def test_a_folder_that_others_can_write_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setenv("OPTIM_EXT_CACHE", str(tmp_path / "open"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg/optim_ext"


def test_without_a_folder_a_private_one_is_used_and_said_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for name in ("OPTIM_EXT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "file"))
    monkeypatch.setattr(cache, "_private", None)
    with pytest.warns(
        UserWarning, match=r"kept for this process only, in .*; .* Set OPTIM_EXT_CACHE to a folder of your own"
    ):
        first = cache.folder()
    assert cache.folder() == first and first.stat().st_mode & 0o777 == 0o700
    assert cache.find_or_build("key", build) == LIBRARY


def test_without_locks_it_is_built_without(folder, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert cache.find_or_build("key", build) == LIBRARY == cache.find("key")


def test_a_lock_that_is_held_too_long_is_not_waited_for(folder, monkeypatch):
    monkeypatch.setattr(cache, "_LONGEST_WAIT", 0.2)
    folder.mkdir(mode=0o700)
    with open(folder / "key.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        began = time.monotonic()
        assert cache.find_or_build("key", build) == LIBRARY
        assert 0.2 <= time.monotonic() - began < 30


def test_a_full_disk_is_no_reason_not_to_run(folder, monkeypatch):
    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    library = cache.find_or_build("other", build)

    def build_in_memory(where):
        monkeypatch.setattr(Path, "write_bytes", full)
        return library

    assert cache.find_or_build("key", build_in_memory) == LIBRARY
    assert cache.find("key") is None


def test_every_load_has_a_path_of_its_own():
    """The loader takes a path that it knows for what it has loaded from there."""
    paths = set()
    for _ in range(3):
        with cache.loadable(LIBRARY) as path:
            assert Path(path).read_bytes() == LIBRARY
            paths.add(path)
    assert len(paths) == 3


def test_a_library_is_loadable_without_memory_files(monkeypatch):
    def none(*_):
        raise OSError(errno.ENOSYS, "not implemented")

    monkeypatch.setattr(os, "memfd_create", none)
    with cache.loadable(LIBRARY) as path:
        assert Path(path).read_bytes() == LIBRARY


def work(folder, seed, results):
    """One of several processes that want the same libraries, while they are damaged under their hands."""
    os.environ["OPTIM_EXT_CACHE"] = str(folder)
    draw = random.Random(seed)
    for _ in range(200):
        key = f"key{draw.randrange(3)}"

        def slowly(where, key=key):
            with open(where / "rule.so", "wb") as file:
                for part in range(0, len(LIBRARY), 1000):
                    file.write(LIBRARY[part : part + 1000])
                    time.sleep(draw.random() * 1e-4)
            return (where / "rule.so").read_bytes() + key.encode()

        found = cache.find_or_build(key, slowly)
        results.put((key, hashlib.sha256(found).hexdigest()))


def test_faults_at_random_times_hurt_nobody(folder):
    """Processes are killed, files cut short, removed and replaced: what is found is always what belongs to its key."""
    context, draw = multiprocessing.get_context("fork"), random.Random(0)
    expected = {f"key{k}": hashlib.sha256(LIBRARY + f"key{k}".encode()).hexdigest() for k in range(3)}
    results = context.SimpleQueue()
    seeds = iter(range(10**6))

    def start():
        process = context.Process(target=work, args=(folder, next(seeds), context.SimpleQueue()), daemon=True)
        process.start()
        return process

    witness = context.Process(target=work, args=(folder, -1, results), daemon=True)
    processes = [start() for _ in range(8)]
    witness.start()
    for _ in range(FAULTS):
        fault = draw.choice(["kill", "cut", "remove", "junk", "folder"])
        time.sleep(draw.random() * 0.02)
        if fault == "kill":
            victim = draw.randrange(len(processes))
            processes[victim].kill()
            processes[victim].join()
            processes[victim] = start()
            continue
        with contextlib.suppress(OSError):
            path = draw.choice([*folder.iterdir()])
            if fault == "cut":
                os.truncate(path, draw.randrange(path.stat().st_size + 1))
            elif fault == "remove":
                path.unlink()
            elif fault == "junk":
                path.write_bytes(os.urandom(300))
            elif path.name.startswith("build-"):
                for inside in itertools.islice(path.iterdir(), 1):  # unless it is empty by now
                    inside.unlink()
    seen = set()
    end = time.monotonic() + 120
    while witness.is_alive() and time.monotonic() < end:
        while not results.empty():
            seen.add(results.get())
        time.sleep(0.01)
    while not results.empty():
        seen.add(results.get())
    for process in processes:
        process.kill()
        process.join()
    assert witness.exitcode == 0
    assert seen and all(expected[key] == digest for key, digest in seen)
