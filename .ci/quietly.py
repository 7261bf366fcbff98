"""Runs a build: ``python .ci/quietly.py LOG COMMAND...``. Shows how far it is; all that it says goes to the file LOG, whose
end is shown, and whose name is told, where the build fails."""

import re
import subprocess
import sys
import time
from pathlib import Path

LINES_ON_FAILURE = 40
SECONDS_BETWEEN_LINES = 20  # where they cannot take each other's place


def main(log, *command):
    log = Path(log)
    log.parent.mkdir(parents=True, exist_ok=True)
    start = shown = time.monotonic()
    on_terminal = sys.stdout.isatty()
    print(f"building optim_ext (log: {log})", flush=True)
    with log.open("w", buffering=1) as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        for line in process.stdout:
            file.write(line)
            done = re.match(r"\s*\[(\d+)/(\d+)\] ", line)  # as ninja counts
            now = time.monotonic()
            if done and (on_terminal or now - shown >= SECONDS_BETWEEN_LINES or done[1] == done[2]):
                shown = now
                progress = f"compiled {done[1]} of {done[2]} files, {now - start:.0f} s"
                print(f"\r{progress}" if on_terminal else progress, end="" if on_terminal else "\n", flush=True)
        status = process.wait()
    if on_terminal:
        print()
    if status != 0:
        print("".join(log.read_text().splitlines(keepends=True)[-LINES_ON_FAILURE:]))
        print(f"the build failed after {time.monotonic() - start:.0f} s; all of its output is in {log.resolve()}")
    else:
        print(f"built in {time.monotonic() - start:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
