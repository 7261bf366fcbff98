"""Python programs in processes of their own that need not import what takes seconds: each is a fork of one process that
has it, and that has neither run anything nor started a thread."""

import json
import os
import selectors
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

# Runs in the process that is forked: python -c SERVER MODULE... It reads a line of JSON for each program and answers with
# its exit code.
SERVER = """
import atexit, importlib, json, os, runpy, sys, traceback

def run(asked):
    for stream, path in ((1, asked["stdout"]), (2, asked["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
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

for name in sys.argv[1:]:
    importlib.import_module(name)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os._exit(exit_code(json.loads(line)))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forked:
    """Programs that find the given modules imported."""

    def __init__(self, *modules, **environment):
        self.environment = os.environ | environment
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, *modules],
            cwd="/",
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *argv, code=None, cwd="/", environment=None, timeout=300):
        """Like subprocess.run, of a script and its arguments, or of code and the arguments it finds behind "-c"."""
        argv = [str(word) for word in argv]
        with TemporaryDirectory() as folder:
            outputs = {name: f"{folder}/{name}" for name in ("stdout", "stderr")}
            asked = {
                "argv": argv if code is None else ["-c", *argv],
                "code": code,
                "folder": "" if code is not None else str(Path(argv[0]).parent),
                "cwd": str(cwd),
                "environment": self.environment if environment is None else environment,
                **outputs,
            }
            print(json.dumps(asked), file=self.process.stdin, flush=True)
            with selectors.DefaultSelector() as answers:
                answers.register(self.process.stdout, selectors.EVENT_READ)
                if not answers.select(timeout):
                    self.stop()
                    raise TimeoutError(f"{argv or code} after {timeout} seconds")
            answer = self.process.stdout.readline()
            texts = {name: Path(path).read_text() for name, path in outputs.items() if Path(path).exists()}
        assert answer, "the process that is forked is gone"
        return SimpleNamespace(returncode=int(answer), **texts)

    def run_module(self, name, *argv, **how):
        """What ``python -m`` does."""
        code = f"import runpy; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"
        return self.run(*argv, code=code, **how)

    def stop(self):
        try:
            os.killpg(self.process.pid, 9)
        except ProcessLookupError:
            pass
        self.process.communicate()
