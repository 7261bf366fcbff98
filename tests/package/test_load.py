"""What happens at import: one OpenMP runtime, a build that fits, and a clear sentence where it does not."""

import shutil
from pathlib import Path

import pytest
import torch
from specs import SPECS

import optim_ext

# Runs in a process of its own: replaces modules before optim_ext is imported, then says how that went.
IMPORT_WITH = """
import sys, types
record = types.ModuleType("optim_ext._build_info")
record.BUILD_INFO = {info!r}
sys.modules["optim_ext._build_info"] = record
sys.modules.update({modules!r})
try:
    import optim_ext
except ImportError as error:
    print(error)
else:
    print("imported")
"""
REBUILD = "pip install --no-build-isolation"


def test_build_info_describes_this_build():
    info = optim_ext.build_info()
    assert info["version"] == optim_ext.__version__
    assert info["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert "-ffp-contract=off" in info["cxx_flags"] and "fast-math" not in info["cxx_flags"]
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key("optim_ext::adamw_", "CUDA")
    assert has_cuda == (info["cuda"] is not None)
    assert (info["cuda_archs"] is not None) == has_cuda


def test_build_info_is_a_copy():
    optim_ext.build_info()["torch"] = "changed"
    assert optim_ext.build_info()["torch"] != "changed"


def test_import_costs_little_beyond_torch(python):
    """The compiler alone is seconds and 160 MB; torch brings it in when somebody compiles or makes an optimizer."""
    seconds, megabytes, *brought_in = python(
        """
import resource, sys, time, torch
def now():
    return time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, start = set(sys.modules), now()
import optim_ext
seconds, megabytes = (after - before for before, after in zip(start, now()))
print(seconds, megabytes, *sorted(name for name in set(sys.modules) - before if not name.startswith("optim_ext")))
"""
    ).stdout.split()
    assert "torch._dynamo" not in brought_in and "sympy" not in brought_in
    assert float(seconds) < 0.3
    assert float(megabytes) < 30


@pytest.mark.parametrize("torch_version", ["1.99.0", "2.1.0+cpu", "99.0.1"])
def test_another_torch_minor(python_with_torch, torch_version):
    info = {**optim_ext.build_info(), "torch": torch_version}
    said = python_with_torch(IMPORT_WITH.format(info=info, modules={})).stdout
    assert f"built for torch {torch_version} " in said and f"found torch {torch.__version__} " in said
    assert REBUILD in said and "undefined symbol" not in said


def test_another_patch_release_is_fine(python_with_torch):
    major, minor = torch.__version__.split(".")[:2]
    info = {**optim_ext.build_info(), "torch": f"{major}.{minor}.99+other"}
    assert python_with_torch(IMPORT_WITH.format(info=info, modules={})).stdout == "imported\n"


def test_another_cuda(python_with_torch):
    info = {**optim_ext.build_info(), "cuda": "1.0"}
    said = python_with_torch(IMPORT_WITH.format(info=info, modules={})).stdout
    assert "CUDA: 1.0" in said and f"CUDA: {torch.version.cuda or 'none'}" in said and REBUILD in said


def test_not_built(python_with_torch):
    """Neither the record of a build nor the module: a source folder that was only unpacked."""
    said = python_with_torch(IMPORT_WITH.format(info={}, modules={"optim_ext._build_info": None})).stdout
    assert "no native module" in said and REBUILD in said


def test_in_the_source_folder(tmp_path, python_with_torch):
    """It hides an installed package, and has no native module unless it was built in place."""
    package = Path(optim_ext.__file__).parent
    shutil.copytree(package, tmp_path / "optim_ext", ignore=shutil.ignore_patterns("*.so", "_build_info.py"))
    (tmp_path / "setup.py").touch()
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
import optim_ext._load
"""
    assert "run Python in another folder" in python_with_torch(code, check=False).stderr


def test_module_cannot_be_loaded(python_with_torch):
    """A record of a build, but no module for this Python."""
    info = optim_ext.build_info()
    said = python_with_torch(IMPORT_WITH.format(info=info, modules={"optim_ext._C": None})).stdout
    assert f"built for torch {info['torch']} and Python {info['python']}" in said and REBUILD in said


def test_one_openmp_runtime_and_it_has_threads(python):
    """parallel_for is silently serial when the module is compiled without OpenMP, and slow with two runtimes."""
    runtimes, before, after = python(
        """
import os, numpy, torch, optim_ext
torch.set_num_threads(2)
params = [torch.from_numpy(numpy.ones(1 << 20, numpy.float32)).requires_grad_()]
params[0].grad = torch.from_numpy(numpy.ones(1 << 20, numpy.float32))
optimizer = optim_ext.SGD(params, lr=0.1)
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
optimizer.step()
runtimes = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libomp" in line}
print(len(runtimes), before, threads())
""",
        OMP_NUM_THREADS="2",
    ).stdout.split()
    assert runtimes == "1"
    assert int(after) == int(before) + 1


def test_report(python):
    code = "import runpy; runpy.run_module('optim_ext', run_name='__main__')"
    done = python(code, check=False, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"torch {torch.__version__}" in done.stdout
    assert "kernels   optim_ext::adamw_: CPU" in done.stdout
    for spec in SPECS:  # L-BFGS is not among them: it has tests against closures only
        assert f"self-test ok   {spec.name}(defaults) float32 on cpu, native" in done.stdout
    assert "self-test passed" in done.stdout


def test_report_finds_wrong_optimizers(python):
    """The self-test is worth something only if it can fail."""
    wrong = {"RMSprop": "alpha", "LAMB": "eps", "LARS": "trust_coefficient", "Lion": "lr"}
    done = python(
        f"""
import runpy, optim_ext
def spoil(cls, option):
    hypers = cls._hypers
    cls._hypers = lambda self, group: hypers(self, {{**group, option: 0.5}})
for name, option in {wrong!r}.items():
    spoil(getattr(optim_ext, name), option)
runpy.run_module("optim_ext", run_name="__main__")
""",
        check=False,
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 1
    for name in wrong:
        assert f"self-test FAIL {name}" in done.stdout
    assert "self-test ok   AdamW" in done.stdout
