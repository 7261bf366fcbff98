"""Rules on CUDA tensors: kernels that NVRTC compiles, which torch's CUDA builds bring along.

Compiling needs no GPU and may take place in the background. Kernels are loaded, and compared with the interpreter on the CPU,
in the thread that steps and between two steps, as nothing of that may happen while a graph is captured.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from optim_ext._load import _C
from optim_ext._rules import cache
from optim_ext._rules.compiler import (
    CannotCompile,
    compile_in_background,
    hash_of_headers,
    include_paths,
    run_compiler,
)
from optim_ext._rules.definition import Variant
from optim_ext._rules.errors import RuleError
from optim_ext._rules.native_text import KINDS_OF_KERNELS, Kernels, cuda_unit_of
from optim_ext._rules.self_check import check_on_gpu

# As setup.py has nvcc compile the kernels of built-in rules. What -fmad, -prec and -ftz say is what makes bits equal.
FLAGS = ("-std=c++20", "-default-device", "--fmad=false", "--prec-sqrt=true", "--prec-div=true", "--ftz=false")
MOST_TENSOR_OPTIONS = 4  # that a launch has room for (kernels/cuda/batch.h)
OLDEST_ARCHITECTURE = 70
_OLDEST_NVRTC = (12, 1)  # kernels take more than 4 KB of arguments


@dataclass(frozen=True)
class Nvrtc:
    path: str
    version: tuple[int, int]


def find_nvrtc() -> Nvrtc:
    """What ``$OPTIM_EXT_NVRTC`` names, else the NVRTC of the CUDA that torch was built for: one that the loader knows, or that
    of the packages beside torch.

    Raises:
        CannotCompile: there is none.
    """
    if torch.version.cuda is None:
        raise CannotCompile("torch is built without CUDA")
    return _nvrtc_of(torch.version.cuda.split(".")[0], os.environ.get("OPTIM_EXT_NVRTC"))


@functools.cache
def _nvrtc_of(major: str, asked: str | None) -> Nvrtc:
    name = f"libnvrtc.so.{major}"
    packages = [Path(folder, "nvidia") for folder in (str(Path(torch.__file__).parents[1]), *sys.path)]
    inside = [str(Path(package, part, "lib", name)) for package in packages for part in (f"cu{major}", "cuda_nvrtc")]
    for candidate in [asked] if asked else [name, *inside]:
        try:
            library = ctypes.CDLL(candidate)
        except OSError:
            continue
        numbers = ctypes.c_int(), ctypes.c_int()
        library.nvrtcVersion(*map(ctypes.byref, numbers))
        version = numbers[0].value, numbers[1].value
        if version < _OLDEST_NVRTC:
            raise CannotCompile(f"NVRTC {version[0]}.{version[1]} is too old, 12.1 is needed")
        return Nvrtc(_loaded_from(name) if candidate == name else candidate, version)
    if asked:
        raise CannotCompile(f"OPTIM_EXT_NVRTC is {asked}, which is no NVRTC")
    raise CannotCompile(f"there is no NVRTC ({name}); torch's package nvidia-cuda-nvrtc has it")


def _loaded_from(name: str) -> str:
    """Where a library lies that this process has loaded."""
    found = re.search(rf"\S+/{re.escape(name)}\S*$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    return found[0] if found else name


def image_of(variant: Variant, architecture: int, kind: Kernels, politely: bool = False) -> bytes:
    """Kernels of a variant for GPUs of an architecture such as 90, compiled or found compiled.

    Raises:
        CannotCompile: the rule has none, or there is no NVRTC, or it fails.
    """
    if variant.has_norms:
        raise CannotCompile("rules that take norms have kernels for the CPU")
    if architecture < OLDEST_ARCHITECTURE:
        raise CannotCompile(f"kernels need compute capability 7.0 or newer, found sm_{architecture}")
    known = variant.images.get((architecture, kind))
    if known is not None:
        return known
    unit, nvrtc = cuda_unit_of(variant.struct, variant.rule_bytes, kind), find_nvrtc()
    if not sys.executable:
        raise CannotCompile("NVRTC is run by a Python of its own, and sys.executable names none")
    nice = shutil.which("nice") if politely else None
    script = Path(__file__).with_name("nvrtc_process.py")
    command = [*([nice, "-n", "10"] if nice else []), sys.executable, "-I", "-S", str(script), nvrtc.path]
    # NVRTC looks for its other half by name only.
    folders = [str(Path(nvrtc.path).parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(folders)}

    def build(where: Path) -> bytes:
        text, image = where / "rule.cu", where / "rule.image"
        text.write_text(unit)
        options = (*FLAGS, *(f"-I{path}" for path in include_paths()))
        run_compiler([*command, str(text), str(image), str(architecture), *options], environment)
        return image.read_bytes()

    said = [unit, f"sm_{architecture}", f"{nvrtc.path} {nvrtc.version}", " ".join(FLAGS), hash_of_headers("cuda")]
    key = hashlib.sha256("\0".join(said).encode()).hexdigest()
    try:
        image = cache.find_or_build(key, build)
    except OSError as error:
        raise CannotCompile(f"a compiled rule cannot be stored: {error}") from error
    variant.images[architecture, kind] = image
    return image


def architecture_of(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def kinds_of(in_double: Iterable[bool], averaging: bool, keeps: bool = False) -> frozenset[Kernels]:
    """Those that a step needs.

    in_double: of its parameters, without those that are kept in another way than the rule sees them.
    keeps: whether there are such.
    """
    each = [*(Kernels(number, False) for number in in_double), *([Kernels(False, False, kept=True)] if keeps else [])]
    return frozenset(kind._replace(averaging=averages) for kind in each for averages in {False, averaging})


def runs_on(variant: Variant, device: torch.device, kinds: frozenset[Kernels]) -> bool:
    """Whether its kernels are loaded there."""
    return kinds <= variant.on_gpus.get(device.index, frozenset())


def load_now(variant: Variant, device: torch.device, kinds: frozenset[Kernels]) -> None:
    """Have a variant run on a GPU from now on, and wait until it does.

    Raises:
        CannotCompile: it has no kernels, or they cannot be compiled or loaded.
        RuleError: they do not do what the rule does.
    """
    if runs_on(variant, device, kinds):
        return
    architecture = architecture_of(device)
    loaded = variant.on_gpus.get(device.index, frozenset())
    together = loaded | kinds
    images = [image_of(variant, architecture, kind) if kind in together else b"" for kind in KINDS_OF_KERNELS]
    name = f"{variant.name} on cuda:{device.index}, {' '.join(sorted(kind.name for kind in together))}"
    try:
        number = _C.define_rule_on_gpu(name, variant.number, device.index, images)
    except RuntimeError as error:
        raise CannotCompile(str(error)) from error
    check_on_gpu(variant, name, device, kinds - loaded)
    _C.run_rule_on_gpu_by(variant.number, number, device.index)
    variant.on_gpus[device.index] = together


def load_in_time(variant: Variant, device: torch.device, kinds: frozenset[Kernels], wait: bool) -> None:
    """The same where a step is about to be taken. Without `wait` what is not compiled yet is compiled in the background; what
    goes wrong is noted as the variant's problem with these kernels on this GPU: others may run."""
    if variant.has_norms or runs_on(variant, device, kinds) or (device, kinds) in variant.gpu_problems:
        return
    if torch.cuda.is_current_stream_capturing():
        return
    architecture = architecture_of(device)
    try:
        if wait or all((architecture, kind) in variant.images for kind in kinds):
            load_now(variant, device, kinds)
            return
    except (CannotCompile, RuleError) as error:
        variant.gpu_problems[device, kinds] = str(error).splitlines()[0]
        return

    def compile_politely() -> None:
        try:
            for kind in sorted(kinds):
                image_of(variant, architecture, kind, politely=True)
        except CannotCompile as error:
            variant.gpu_problems[device, kinds] = str(error).splitlines()[0]

    compile_in_background((variant, device, kinds), compile_politely)


def reason_never(variant: Variant) -> str | None:
    """Why a rule runs natively on no GPU; None if it may."""
    if variant.has_norms:
        return "rules that take norms have kernels for the CPU"
    if variant.definition.backend == "interpreted":
        return 'the rule has backend="interpreted", which is for the CPU'
    return None


def reason_against(
    variant: Variant, device: torch.device, kinds: frozenset[Kernels], waits: bool = False
) -> str | None:
    """Why a rule does not run natively on a GPU as things are; None if it does.

    waits: it is about a step that waits until its kernels are compiled.
    """
    never = reason_never(variant)
    if never is not None or runs_on(variant, device, kinds):
        return never
    # Those of a group are loaded together, and what is asked for may be what one of its parameters needs.
    found = (text for (where, of), text in [*variant.gpu_problems.items()] if where == device and kinds <= of)
    problem = next(found, None)
    if problem is not None or waits:
        return problem
    if torch.cuda.is_current_stream_capturing():
        return f"its kernels for {device} are loaded between steps: take one before a graph is captured"
    return f"its kernels for {device} are not compiled yet"
