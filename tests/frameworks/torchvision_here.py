"""torchvision, which timm and others import where it is there, made to be importable.

PyPI's wheels of it are made for a torch with CUDA. Beside one without, their ops do not load, and all that the import still
wants is that two of them are declared. What is imported here takes transforms of pictures from it, and no op."""

import torch

try:
    import torchvision
except RuntimeError:
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401
