"""Tests that run other people's frameworks, in the environment that `make frameworks` makes. No other call of pytest comes
here unless this folder is named (norecursedirs in pyproject.toml); where a framework is missing, its test fails."""

import os
import sys
from pathlib import Path

# Read where the frameworks are imported: nothing is looked up on the network, reported anywhere or run on a GPU.
os.environ.update(
    CUDA_VISIBLE_DEVICES="",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="disabled",
)

import torch

sys.path.insert(0, str(Path(__file__).parent))

import torchvision_here  # noqa: F401

torch.set_num_threads(1)
