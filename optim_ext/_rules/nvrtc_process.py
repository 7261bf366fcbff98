"""Compiles one text by NVRTC, in a process of its own: it can be ended, does not share its memory with training, and takes
no thread's place. Run as ``python nvrtc_process.py LIBRARY TEXT IMAGE ARCHITECTURE OPTION...``; prints what NVRTC has to say.
"""

import ctypes
import sys
from pathlib import Path

# Of the standard library NVRTC has nothing; what kernels take of it is in device/cuda/runtime_compiled.h.
_EMPTY_HEADERS = (b"cstdint", b"type_traits", b"utility")


def main(library: str, text: str, image: str, architecture: str, *options: str) -> int:
    nvrtc = ctypes.CDLL(library)
    program = ctypes.c_void_p()
    count = len(_EMPTY_HEADERS)
    texts, names = (ctypes.c_char_p * count)(*[b""] * count), (ctypes.c_char_p * count)(*_EMPTY_HEADERS)
    source = Path(text).read_bytes()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"rule.cu", count, texts, names) != 0:
        print("NVRTC cannot begin")
        return 1
    target, is_binary = _target(nvrtc, int(architecture))
    given = [f"--gpu-architecture={target}".encode(), *(option.encode() for option in options)]
    failed = nvrtc.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given)) != 0
    print(_output(nvrtc, program, "ProgramLog").decode(errors="replace").rstrip("\0\n"))
    if failed:
        return 1
    # The driver takes PTX as text, with a zero behind it.
    Path(image).write_bytes(_output(nvrtc, program, "CUBIN") if is_binary else _output(nvrtc, program, "PTX"))
    return 0


def _target(nvrtc: ctypes.CDLL, wanted: int) -> tuple[str, bool]:
    """Machine code for the GPU, or, of one that is newer than this NVRTC, what its driver makes machine code of."""
    count = ctypes.c_int()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(known)
    if wanted in known:
        return f"sm_{wanted}", True
    older = [number for number in known if number < wanted]
    return f"compute_{max(older, default=wanted)}", False


def _output(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
