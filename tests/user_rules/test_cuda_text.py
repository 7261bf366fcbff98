"""Rules as text for CUDA, without a GPU: run on fibers as C++, and compiled by the real NVRTC where torch has brought one along."""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from examples.test_rules import FOLDER, load
from user_rules.twins import TWINS

import optim_ext
from optim_ext._rules import compiler, cuda
from optim_ext._rules.native_text import Kernels, cuda_unit_of
from optim_ext._rules.self_check import by_op, gradient, start_of

pytestmark = pytest.mark.about_the_cpu("text is looked at, and run on fibers beside the interpreter")
ROOT = Path(optim_ext.__file__).resolve().parents[1]
CORE = ROOT / "tests/cpp/cuda_double"

EXAMPLES = {path.stem: load(path.stem) for path in sorted(FOLDER.glob("*.py"))}
WRITTEN = {**EXAMPLES, **{f"{name} again": of.made for name, of in TWINS.items() if name != "AdamW"}}
ELEMENT_WISE = {name: made for name, made in WRITTEN.items() if not made._variant_with({}).has_norms}


def test_a_class_shows_its_text_for_cuda():
    text = EXAMPLES["tiger"].source("cuda")
    assert text.startswith('#include "kernels/cuda/one_rule.h"\n')
    assert "OPTIM_EXT_EXPORT_SWEEP(optim_ext_sweep_float, optim_ext::written::Rule, float, false)" in text
    assert "OPTIM_EXT_EXPORT_ADVANCE(optim_ext::written::Rule, 72)" in text
    kept = EXAMPLES["tiger"].source("cuda", param_precision="auto")
    assert kept.startswith('#include "kernels/cuda/one_kept_rule.h"\n')
    assert "OPTIM_EXT_EXPORT_KEPT_SWEEP(optim_ext_kept_sweep_float, optim_ext::written::Rule, false)" in kept
    assert "OPTIM_EXT_EXPORT_KEPT_ADVANCE(optim_ext::written::Rule, 72)" in kept
    with pytest.raises(ValueError, match="kind is 'tpu', expected 'cpu' or 'cuda'"):
        EXAMPLES["tiger"].source("tpu")
    with pytest.raises(ValueError, match="LAMB takes norms, and such rules have kernels for the CPU"):
        EXAMPLES["lamb"].source("cuda")


@pytest.mark.only_where(torch.version.cuda is None, reason="torch is built for CUDA")
def test_without_cuda_there_is_nothing_to_compile_for_it():
    with pytest.raises(RuntimeError, match="torch is built without CUDA"):
        EXAMPLES["tiger"].compile("sm_90")
    with pytest.raises(RuntimeError, match='there is no GPU; say for which architecture to compile, such as "sm_90"'):
        EXAMPLES["tiger"].compile("cuda")


# ---- on fibers ----

MOST_OPERANDS, MOST_SCALARS = 10, 2
STORAGES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class Given(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p * MOST_OPERANDS),
        ("scalars", ctypes.c_void_p * MOST_SCALARS),
        ("average", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("storage", ctypes.c_uint8),
    ]


@pytest.fixture(scope="module")
def fibers(tmp_path_factory):
    """The double's core, compiled once."""
    folder = tmp_path_factory.mktemp("fibers")
    flags = ["g++", "-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-w", "-DOPTIM_EXT_DEVICE_DOUBLE"]
    flags += [f"-I{ROOT / 'csrc'}", f"-I{CORE}"]
    sources = [CORE / name for name in ("fiber.cpp", "grid.cpp", "at_once.cpp")]
    sources.append(ROOT / "csrc/kernels/cuda/advance.cu")
    objects = []
    for source in sources:
        objects.append(folder / f"{source.stem}.o")
        subprocess.run([*flags, "-xc++", "-c", source, "-o", objects[-1]], check=True)

    def build(made):
        name = made.__name__
        unit = folder / f"{name}.cu"
        unit.write_text(made.source("cuda"))
        library = folder / f"{name}.so"
        command = [*flags, "-shared", f'-DRULE_UNIT="{unit}"', ROOT / "tests/user_rules/on_fibers.cpp", *objects]
        subprocess.run([*command, "-o", library], check=True)
        found = ctypes.CDLL(str(library))
        found.step_on_fibers.restype = ctypes.c_long
        return found

    return build


def given(values, grad, scalars, average, used):
    one = Given()
    operands = [values[0], grad, *(value if there else None for value, there in zip(values[1:], used, strict=True))]
    for place, operand in enumerate(operands):
        one.data[place] = operand.data_ptr() if operand is not None else None
    for place, scalar in enumerate(scalars):
        one.scalars[place] = scalar.data_ptr()
    one.average = average.data_ptr() if average is not None else None
    one.numel, one.storage = values[0].numel(), STORAGES[values[0].dtype]
    return one


ON_FIBERS = ["adan", "schedule_free_sgd", "grams", "NAdam again", "Rprop again"]


@pytest.mark.parametrize("name", ON_FIBERS)
def test_on_fibers_a_rule_has_the_bits_of_the_interpreter(name, fibers):
    """Every storage, scalars and step counts on the device, averages, a scale and a skipped step."""
    made = WRITTEN[name]
    library, variant, definition = fibers(made), made._variant_with({}), made._definition
    options = definition.options.with_constants(variant.constants)
    numbers = [1.0, *map(float, definition.options.numbers_of(options, lambda group, key, count: tuple(group[key])))]
    numbers = (ctypes.c_double * len(numbers))(*numbers)
    generator = torch.Generator().manual_seed(3)
    for dtype in STORAGES:
        for averaging in (False, True):
            param = torch.randn(257, generator=generator, dtype=torch.float64).to(dtype)
            expected, scalars = [param, *start_of(definition, param, options)], definition.first_scalars(options)
            expected_average = param * 2 if averaging else None
            values = [value.clone() for value in expected]
            own_scalars = [torch.tensor(scalar, dtype=torch.float64) for scalar in scalars]
            average = expected_average.clone() if averaging else None
            for step in range(1, 4):
                grad = gradient(generator).clamp(-100, 100).to(dtype)
                count = ctypes.c_double(step)
                one = given(values, grad, own_scalars, average, variant.used)

                def run(skip, one=one, count=count, seed=step):
                    found_inf = ctypes.c_float(skip)
                    weight = ctypes.c_double(0.25)
                    arguments = ctypes.byref(one), ctypes.c_int64(1), numbers, ctypes.c_int64(len(numbers))
                    pointers = ctypes.byref(count), weight, None, ctypes.byref(found_inf)
                    return library.step_on_fibers(*arguments, *pointers, ctypes.c_uint64(seed))

                before = [value.clone() for value in values]
                assert run(skip=1.0) == 1
                assert all(map(torch.equal, values, before))
                assert run(skip=0.0) == 1
                expected, scalars = by_op(
                    variant, variant.name, expected, grad, scalars, step, options, average=expected_average
                )
                expected_average = expected.pop() if averaging else None
                for mine, other in zip([*values, average], [*expected, expected_average], strict=True):
                    assert mine is other or torch.equal(mine.nan_to_num(), other.nan_to_num())
                assert [float(scalar) for scalar in own_scalars] == scalars


# ---- by NVRTC ----


def real_nvrtc():
    """That of torch's packages; not the stand-in of the double, which the loader would find first."""
    major = (torch.version.cuda or "0").split(".")[0]
    folder = Path(torch.__file__).parents[1] / "nvidia"
    found = [*folder.glob(f"cu{major}/lib/libnvrtc.so.{major}"), *folder.glob(f"cuda_nvrtc/lib/libnvrtc.so.{major}")]
    return str(found[0]) if found else None


REAL_NVRTC = real_nvrtc()
by_nvrtc = pytest.mark.only_where(REAL_NVRTC is not None, reason="torch has brought no NVRTC along")


def of_eight_states():
    """As many as kernels take."""
    names = [f"m{k}" for k in range(8)]
    text = f"def Eight(param, grad, {', '.join(names)}, *, lr=1e-3):\n"
    text += "".join(f"    {name} = 0.{k + 1} * {name} + grad\n" for k, name in enumerate(names))
    text += f"    return param - lr * ({' + '.join(names)}), {', '.join(names)}\n"
    made = {}
    exec(text, made)
    return optim_ext.rule(names, backend="interpreted", source=text)(made["Eight"])


@by_nvrtc
@pytest.mark.parametrize("in_double", [False, True], ids=["float", "double"])
@pytest.mark.parametrize("name", ELEMENT_WISE)
def test_nvrtc_compiles_a_rule_without_spilling(name, in_double, tmp_path):
    compiled_without_spilling(ELEMENT_WISE[name], Kernels(in_double, averaging=False), tmp_path)


@by_nvrtc
@pytest.mark.parametrize("averaging", [False, True], ids=["alone", "averaging"])
@pytest.mark.parametrize("name", ["adan", "ademamix", "schedule_free_sgd", "tiger", "NAdam again", "eight states"])
def test_nvrtc_compiles_what_is_kept_otherwise_without_spilling(name, averaging, tmp_path):
    made = of_eight_states() if name == "eight states" else ELEMENT_WISE[name]
    compiled_without_spilling(made, Kernels(in_double=False, averaging=averaging, kept=True), tmp_path)


def compiled_without_spilling(made, kind, tmp_path):
    """Machine code for a GPU that is not there; what it says of registers is in its log."""
    text, image = tmp_path / "rule.cu", tmp_path / "image"
    variant = made._variant_with({})
    text.write_text(cuda_unit_of(variant.struct, variant.rule_bytes, kind))
    options = [*cuda.FLAGS, *(f"-I{path}" for path in compiler.include_paths()), "--ptxas-options=-v"]
    script = ROOT / "optim_ext/_rules/nvrtc_process.py"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(Path(REAL_NVRTC).parent)}
    environment.pop("LD_PRELOAD", None)  # the double's stand-ins
    done = subprocess.run(
        [sys.executable, "-I", "-S", script, REAL_NVRTC, text, image, "90", *options],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert image.read_bytes().startswith(b"\x7fELF")
    said = done.stdout.split(f"Function properties for {kind.name}")[1].split("Function properties")[0]
    assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", said), said
