"""Python programs in processes of their own that need not import what takes seconds: each is a fork of one process that
has it, and that has neither run anything nor started a thread."""

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

# Runs in the process that is forked: python -c SERVER MODULE... Its standard input is a socket: with a line of JSON for each
# program come the three files it is to have as standard ones, and its process is answered; then others may ask how it ended.
SERVER = """
import atexit, importlib, json, os, runpy, socket, sys, traceback

def run(asked):
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = asked["argv"]
    paths = filter(None, asked["environment"].get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = dict.fromkeys([asked["folder"], *paths, *sys.path])
    if asked["code"] is None:
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        exec(compile(asked["code"], "<string>", "exec"), {"__name__": "__main__"})

def exit_code(asked):
    try:
        run(asked)
        return 0
    except SystemExit as exit:
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()

def started(asked, files):
    child = os.fork()
    if child == 0:
        channel.close()
        for stream, file in enumerate(files):
            os.dup2(file, stream)
        os.closerange(min(files), max(files) + 1)
        os._exit(exit_code(asked))
    for file in files:
        os.close(file)
    return child

def ended(asked):
    child, status = os.waitpid(asked["ended"], 0 if asked["wait"] else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if child else None

channel = socket.socket(fileno=os.dup(0))
for name in sys.argv[1:]:
    importlib.import_module(name)
while True:
    line, files = b"", []
    while not line.endswith(b"\\n"):
        part, more, _, _ = socket.recv_fds(channel, 65536, 3)
        if not part:
            sys.exit()
        line, files = line + part, files + more
    asked = json.loads(line)
    answer = ended(asked) if "ended" in asked else started(asked, files)
    channel.sendall(json.dumps(answer).encode() + b"\\n")
"""


class Forked:
    """Programs that find the given modules imported."""

    def __init__(self, *modules, **environment):
        self.environment = os.environ | environment
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVER, *modules],
                cwd="/",
                env=self.environment,
                stdin=theirs,
                start_new_session=True,
            )
        self.channel, self.answers = ours, ours.makefile("r")

    def ask(self, asked, files=(), timeout=None):
        """What the process answers, in so many seconds."""
        socket.send_fds(self.channel, [json.dumps(asked).encode() + b"\n"], files)
        with selectors.DefaultSelector() as answers:
            answers.register(self.channel, selectors.EVENT_READ)
            if not answers.select(timeout):
                self.stop()
                raise TimeoutError(f"no answer in {timeout} seconds")
        answer = self.answers.readline()
        assert answer, "the process that is forked is gone"
        return json.loads(answer)

    def start(self, *argv, files, code=None, cwd="/", environment=None):
        """Begins a program whose standard input, output and errors are the open files."""
        argv = [str(word) for word in argv]
        asked = {
            "argv": argv if code is None else ["-c", *argv],
            "code": code,
            "folder": "" if code is not None else str(Path(argv[0]).parent),
            "cwd": str(cwd),
            "environment": self.environment if environment is None else environment,
        }
        return Fork(self, self.ask(asked, files))

    def run(self, *argv, timeout=300, **how):
        """Like subprocess.run, of a script and its arguments, or of code and the arguments it finds behind "-c"."""
        with TemporaryDirectory() as folder:
            paths = {name: Path(folder, name) for name in ("stdout", "stderr")}
            with open(os.devnull) as nothing, paths["stdout"].open("w") as output, paths["stderr"].open("w") as errors:
                fork = self.start(*argv, files=[file.fileno() for file in (nothing, output, errors)], **how)
            return SimpleNamespace(
                returncode=fork.wait(timeout), **{name: path.read_text() for name, path in paths.items()}
            )

    def run_module(self, name, *argv, **how):
        """What ``python -m`` does."""
        code = f"import runpy; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"
        return self.run(*argv, code=code, **how)

    def stop(self):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.channel.close()


class Fork:
    """A program that has been started."""

    def __init__(self, forked, pid):
        self.forked, self.pid, self.exit_code = forked, pid, None

    def wait(self, timeout):
        """The exit code. Whoever waits for nothing else may lose all programs to one that takes too long."""
        self.exit_code = self.forked.ask({"ended": self.pid, "wait": True}, timeout=timeout)
        return self.exit_code

    def ends_within(self, seconds):
        """Whether it does; its exit code is known then."""
        end = time.monotonic() + seconds
        while self.exit_code is None and time.monotonic() < end:
            self.exit_code = self.forked.ask({"ended": self.pid, "wait": False})
            time.sleep(0.01)
        return self.exit_code is not None

    def kill(self):
        if self.exit_code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait(None)
