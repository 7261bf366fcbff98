"""Whether tests of tests/cuda run on the double of the CUDA runtime (docs/gpu.md), where what is large for a GPU's sake is
smaller: repetitions are a twentieth, lengths a sixteenth. What a number decides, such as whether a table fits into kernel
arguments, stays as it is."""

import os

ON_DOUBLE = "CUDA_DOUBLE_HOME" in os.environ


def repetitions(count: int) -> int:
    return max(1, count // 20) if ON_DOUBLE else count


def length(count: int) -> int:
    return max(1, count // 16) if ON_DOUBLE else count
