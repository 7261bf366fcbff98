"""Prints the folder with the kernels' objects of the module that is imported, which a build in place leaves, for other
builds to link. Prints nothing where the sources have changed since, or where it was built elsewhere."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import optim_ext

ROOT = Path(__file__).parents[1]


def folder():
    info = optim_ext.build_info()
    name = f"torch-{info['torch']}-{'cuda' if info['cuda'] else 'cpu'}-{sys.implementation.cache_tag}"
    objects = ROOT / "build" / name / "objects"
    ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if ninja is None or not (objects / "build.ninja").exists():
        return None
    kernels, sources = objects / "csrc/kernels/cpu", ROOT / "csrc/kernels/cpu"
    if {path.stem for path in kernels.glob("*.o")} != {path.stem for path in sources.glob("*.cpp")}:
        return None  # some are of sources that are gone
    to_do = subprocess.run([ninja, "-C", objects, "-n"], capture_output=True, text=True)
    return kernels if "no work to do" in to_do.stdout else None


print(folder() or "")
