"""setup.py: what it decides, what it refuses and how, and what a source distribution holds."""

import os
import runpy
import select
import shutil
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import pytest

# Runs setup.py as a build tool would, in a process where torch cannot be imported.
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = ["setup.py", *sys.argv[1:]]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.fixture
def setup(root, monkeypatch):
    """setup.py's functions, with no switch set and no toolkit in sight."""
    for name in ("OPTIM_EXT_CUDA", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    names = runpy.run_path(str(root / "setup.py"))
    monkeypatch.setitem(names["find_toolkit"].__globals__, "USUAL_TOOLKIT", root / "no such folder")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return SimpleNamespace(**names)


def make_toolkit(folder, release):
    (folder / "bin").mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / "include/cuda_runtime.h").touch()
    nvcc = folder / "bin/nvcc"
    nvcc.write_text(
        f"""#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release {release}, V{release}.1" ;;
  *--dryrun*) echo '#$ TOP={folder}/bin/..' >&2 ;;
  *--list-gpu-arch*) printf 'compute_75\\ncompute_80\\ncompute_90\\n' ;;
esac
"""
    )
    nvcc.chmod(0o755)
    return folder


def torch_with(cuda, archs="sm_70 sm_75 sm_80 sm_90 sm_120", gpus=()):
    return SimpleNamespace(
        __version__="2.14.1",
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(device_count=lambda: len(gpus), get_device_capability=lambda index: gpus[index]),
        _C=SimpleNamespace(_cuda_getArchFlags=lambda: archs),
    )


def test_cpu_torch_needs_no_toolkit(setup, monkeypatch):
    assert setup.choose_cuda(torch_with(None)) == (None, "torch is built without CUDA")
    monkeypatch.setenv("OPTIM_EXT_CUDA", "1")
    with pytest.raises(SystemExit, match=r"OPTIM_EXT_CUDA=1, but torch 2\.14\.1 is built without CUDA"):
        setup.choose_cuda(torch_with(None))


def test_no_toolkit(setup, monkeypatch):
    toolkit, why = setup.choose_cuda(torch_with("13.0"))
    assert toolkit is None and "no CUDA toolkit fits torch's CUDA 13.0" in why
    monkeypatch.setenv("OPTIM_EXT_CUDA", "1")
    with pytest.raises(SystemExit, match="no such folder"):
        setup.choose_cuda(torch_with("13.0"))


def test_toolkit_of_another_major_version(setup, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "old", "12.8")))
    monkeypatch.setenv("OPTIM_EXT_CUDA", "1")
    with pytest.raises(SystemExit, match=r"CUDA_HOME: .*/old \(CUDA 12\.8\)"):
        setup.choose_cuda(torch_with("13.0"))


def test_cuda_home_comes_first(setup, monkeypatch, tmp_path):
    home, other = (make_toolkit(tmp_path / name, "13.1") for name in ("home", "other"))
    monkeypatch.setenv("PATH", f"{other}/bin:/usr/bin:/bin")
    assert setup.choose_cuda(torch_with("13.0"))[0] == other
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert setup.choose_cuda(torch_with("13.0"))[0] == home
    monkeypatch.setenv("OPTIM_EXT_CUDA", "0")
    assert setup.choose_cuda(torch_with("13.0"))[0] is None


def test_nvcc_on_path_may_be_a_wrapper(setup, monkeypatch, tmp_path):
    toolkit = make_toolkit(tmp_path / "real", "13.0")
    wrapper = tmp_path / "wrapped/bin/nvcc"
    wrapper.parent.mkdir(parents=True)
    wrapper.write_text(f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:/usr/bin:/bin")
    assert setup.choose_cuda(torch_with("13.0"))[0] == toolkit


def test_unknown_switch(setup, monkeypatch):
    monkeypatch.setenv("OPTIM_EXT_CUDA", "yes")
    with pytest.raises(SystemExit, match="OPTIM_EXT_CUDA=yes is not understood"):
        setup.choose_cuda(torch_with(None))


def test_archs(setup, monkeypatch, tmp_path):
    toolkit = make_toolkit(tmp_path, "13.0")
    assert setup.cuda_archs(torch_with("13.0"), toolkit) == "7.5;8.0;9.0+PTX"
    assert setup.cuda_archs(torch_with("13.0", gpus=[(8, 0), (8, 0)]), toolkit) == "8.0+PTX"
    assert setup.cuda_archs(torch_with("13.0", gpus=[(8, 0), (12, 0)]), toolkit) == "8.0;9.0+PTX"
    assert setup.cuda_archs(torch_with("13.0", archs=""), toolkit) == "9.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    assert setup.cuda_archs(torch_with("13.0"), toolkit) == "9.0a"


@pytest.mark.parametrize("command", ["bdist_wheel", "dist_info", "editable_wheel"])
def test_without_torch_it_stops_with_one_sentence(python, root, command):
    """As in pip's isolated build, or before torch is installed."""
    done = python(WITHOUT_TORCH, command, cwd=root, check=False)
    assert done.returncode == 1
    assert "pip install --no-build-isolation ." in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


def test_without_ninja_it_stops_with_one_sentence(setup, monkeypatch, tmp_path):
    monkeypatch.setitem(
        setup.native_build.__globals__, "sysconfig", SimpleNamespace(get_path=lambda name: str(tmp_path))
    )
    monkeypatch.setattr(
        setup.native_build.__globals__["shutil"], "which", lambda name: None if name == "ninja" else name
    )
    (tmp_path / "Python.h").touch()
    with pytest.raises(SystemExit, match="ninja is missing.*pip install ninja"):
        setup.native_build()


def test_with_old_setuptools_it_stops_with_one_sentence(setup, monkeypatch):
    monkeypatch.setitem(setup.native_build.__globals__, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["setup.py", "dist_info"])
    with pytest.raises(SystemExit, match="setuptools is too old.*pip install 'setuptools>=70.1'"):
        setup.native_build()


def test_the_ninja_of_an_environment_that_is_not_activated_is_found(setup, monkeypatch, tmp_path):
    """pip does not put its environment's programs on PATH."""
    (tmp_path / "ninja").write_text("#!/bin/sh\n")
    (tmp_path / "ninja").chmod(0o755)
    monkeypatch.setitem(
        setup.native_build.__globals__, "sysconfig", SimpleNamespace(get_path=lambda name: str(tmp_path))
    )

    def stop():
        raise StopIteration(shutil.which("ninja"))

    monkeypatch.setitem(setup.native_build.__globals__, "build_switches", stop)
    with pytest.raises(StopIteration, match=f"{tmp_path}/ninja"):
        setup.native_build()


BUILD = """
import pathlib, runpy, sys
wait = runpy.run_path("setup.py")["wait_for_other_builds"]
wait(pathlib.Path(sys.argv[1]))
wait(pathlib.Path(sys.argv[1]))  # build tools may run setup.py twice in one process
print("builds", flush=True)
input()
"""


def test_two_builds_of_one_tree_take_turns(root, tmp_path):
    def start():
        pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
        return subprocess.Popen([sys.executable, "-c", BUILD, str(tmp_path)], cwd=root, text=True, **pipes)

    first = start()
    assert first.stdout.readline() == "builds\n"
    second = start()
    assert "Another build" in second.stderr.readline()
    assert not select.select([second.stdout], [], [], 0.5)[0]
    first.communicate("\n")
    assert second.stdout.readline() == "builds\n"
    second.communicate("\n")


def test_source_distribution_needs_no_torch(python, root, tmp_path):
    python(WITHOUT_TORCH, "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path, cwd=root)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        files = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    for folder in ("csrc", "optim_ext", "tests", "examples", ".ci"):
        for path in (root / folder).rglob("*"):
            name = str(path.relative_to(root))
            generated = path.suffix in (".so", ".pyc") or path.name in ("_build_info.py", "__pycache__")
            if not generated and path.is_file():
                assert name in files, f"{name} is missing"
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "Makefile", "CMakeLists.txt", "mkdocs.yml"} <= files
    assert not [name for name in files if name.endswith((".so", ".pyc", "_build_info.py"))]


def quietly(root, log, code):
    command = [sys.executable, root / ".ci/quietly.py", log, sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_build_shows_how_far_it_is(root, tmp_path):
    log = tmp_path / "build/test.log"
    code = "for i in range(1, 4): print(f'  [{i}/3] c++ -c file.cpp'); print('file.cpp: warning')"
    done = quietly(root, log, code)
    assert done.returncode == 0 and "compiled 3 of 3 files" in done.stdout and "built in" in done.stdout
    assert "warning" not in done.stdout and log.read_text().count("warning") == 3


def test_a_build_that_fails_shows_the_end_of_its_log(root, tmp_path):
    log = tmp_path / "test.log"
    done = quietly(root, log, "for i in range(100): print('line', i, '.')\nraise SystemExit('no compiler')")
    assert done.returncode == 1 and f"all of its output is in {log}" in done.stdout
    assert "line 99 ." in done.stdout and "no compiler" in done.stdout and "line 9 ." not in done.stdout
    assert "line 9 ." in log.read_text()


@pytest.mark.parametrize("switch, says", [("", True), ("0", False), ("1", False)])
def test_make_builds_for_the_cpu_where_no_gpu_is_visible(root, tmp_path, switch, says):
    """The recipe runs with stand-ins for the environment's Python and pip."""
    for name in ("Makefile", "setup.py", "pyproject.toml"):
        shutil.copy(root / name, tmp_path)
    shutil.copytree(root / ".ci", tmp_path / ".ci")
    (tmp_path / "csrc").mkdir()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/torch.stamp").touch()
    for name, code in (("python", f'exec {sys.executable} "$@"'), ("pip", 'echo "switch=$OPTIM_EXT_CUDA"')):
        (tmp_path / ".venv/bin" / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / ".venv/bin" / name).chmod(0o755)
    environment = {**os.environ, "OPTIM_EXT_CUDA": switch, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["make", ".venv/demo.stamp"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert ("no GPU is visible: building for the CPU only" in done.stdout) == says
    assert (tmp_path / "build/demo.log").read_text() == f"switch={switch or '0'}\n"


@pytest.mark.parametrize(
    ("target", "packages"),
    [("arm-check", "g++-aarch64-linux-gnu qemu-user"), ("old-cpu-check", "qemu-user")],
)
def test_make_names_the_packages_of_an_emulator_that_is_missing(root, tmp_path, target, packages):
    make = shutil.which("make")
    shutil.copy(root / "Makefile", tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/find").symlink_to(shutil.which("find"))
    done = subprocess.run(
        [make, target], cwd=tmp_path, env={"PATH": str(tmp_path / "bin")}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert done.stdout.endswith(f"sudo apt-get install {packages}\n")
    assert {path.name for path in tmp_path.iterdir()} == {"Makefile", "csrc", "bin"}  # nothing was built


def test_the_headers_that_are_packaged_compile_a_rule_on_their_own(setup, monkeypatch, root, tmp_path):
    """Without the rest of the source folder, as in an installed wheel."""
    monkeypatch.chdir(root)
    setup.copy_headers(tmp_path / "csrc")
    unit = tmp_path / "unit.cpp"
    unit.write_text(
        """#define OPTIM_EXT_ONLY_BASELINE
#include "kernels/cpu/one_rule.h"
struct Rule {
  static constexpr int kOperands = 2;
  static constexpr unsigned kUsed = 3u, kUpdates = 1u;
  const void* code;
  double ascent;
  OPTIM_EXT_RULE Rule at_step(double) const { return *this; }
  template <class V>
  OPTIM_EXT_RULE void operator()(V& param, V grad) const { param = param - grad * V(ascent); }
};
OPTIM_EXT_EXPORT_RULE(Rule)
"""
    )
    flags = [flag for flag in (tmp_path / "csrc/compile_flags.txt").read_text().split() if flag != "-fopenmp"]
    command = ["c++", *flags, "-O0", "-shared", "-fPIC", f"-I{tmp_path}/csrc", unit, "-o", tmp_path / "rule.so"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
