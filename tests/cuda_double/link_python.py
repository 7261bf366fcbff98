"""Puts links to optim_ext's Python files, and a record of the build, beside a module that was built for the double."""

import os
import runpy
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)

for link in folder.iterdir():
    if link.is_symlink():
        link.unlink()
for source in (ROOT / "optim_ext").iterdir():
    if source.suffix != ".so" and source.name not in ("_build_info.py", "__pycache__"):
        (folder / source.name).symlink_to(source)

os.environ["OPTIM_EXT_CUDA"] = "0"
setup = runpy.run_path(str(ROOT / "setup.py"))
switches = setup["build_switches"]()
switches |= {"cuda": torch.version.cuda, "cuda_reason": "for a double of the CUDA runtime", "cuda_archs": "none"}
setup["write_build_info"](switches, folder)
