"""The include law of csrc/README.md: a room includes what stands above it in this table, and knows what its line allows.

Prints each line that breaks it, and exits with 1 if there are any.
"""

import re
import sys
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"

# In the order in which a room may include those above it. `rules`, `storage` and `memory` know nobody.
ROOMS = ["rules", "storage", "memory", "device", "kernels", "call", "ops", "host"]
ALONE = {"rules", "storage", "memory"}

TORCH = r'#include *[<"](torch|ATen|c10)\b'
PYTHON = r'#include *[<"](Python|pybind11|torch/csrc/(autograd/python_|utils/pybind|Exceptions|python_headers))|\b(py::|PyObject\b)'
DISPATCHER = r'#include *[<"](torch/library|ATen/core/dispatch/)|\bTORCH_LIBRARY|\btorch::Library\b|\bDispatcher::'
REGISTERS = r'#include *[<"]torch/library|\bTORCH_LIBRARY|\btorch::Library\b'
CUDA = r"<<<|\bcuda[A-Z]|\b(threadIdx|blockIdx|gridDim)\b|\b__(shared|global|grid_constant|sync|shfl|threadfence)"

OTHERS = r"#include *<(?!cstdint>)"

# room -> what it must not say, and why
FORBIDDEN = {
    "rules": [(TORCH, "torch"), (PYTHON, "Python"), (CUDA, "CUDA")],
    "storage": [(TORCH, "torch"), (PYTHON, "Python"), (CUDA, "CUDA"), (OTHERS, "headers but <cstdint>")],
    "memory": [(TORCH, "torch"), (PYTHON, "Python"), (CUDA, "CUDA")],
    "device": [(TORCH, "torch"), (PYTHON, "Python")],
    "kernels": [(TORCH, "torch"), (PYTHON, "Python"), (CUDA, "CUDA")],
    "call": [(PYTHON, "Python"), (DISPATCHER, "dispatcher"), (CUDA, "CUDA")],
    "ops": [(PYTHON, "Python"), (CUDA, "CUDA")],
    "host": [(REGISTERS, "registration of ops"), (CUDA, "CUDA")],
}


def broken(path: Path) -> list[tuple[int, str, str]]:
    """The lines of a file that break the law, with the reason."""
    room = path.relative_to(CSRC).parts[0]
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.lstrip().startswith("//"):
            continue
        found += [
            (number, line, f"{room}/ knows no {what}") for pattern, what in FORBIDDEN[room] if re.search(pattern, line)
        ]
        if included := re.match(r'\s*#include *"([^"]+)"', line):
            target = (path.parent / included[1]).resolve()
            if not target.is_relative_to(CSRC):
                continue
            other = target.relative_to(CSRC).parts[0]
            if other != room and (room in ALONE or ROOMS.index(other) > ROOMS.index(room)):
                found.append((number, line, f"{room}/ does not include {other}/"))
    return found


def main() -> int:
    sources = [path for path in sorted(CSRC.rglob("*")) if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    count = 0
    for path in sources:
        if path.parent == CSRC:
            continue  # the module itself, which knows everybody
        for number, line, reason in broken(path):
            count += 1
            print(f"{path.relative_to(CSRC.parent)}:{number}: {line.strip()}\n    {reason} (csrc/README.md)")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
