"""Checks of constructor options, in torch.optim's words, for the optimizers that torch does not have."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def check_one_element(lr: Any) -> None:
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")


def check_not_negative(**options: Any) -> None:
    """Each option is a number from zero up; keywords are their names as a message shows them."""
    for name, value in options.items():
        if not value >= 0.0:
            shown = name.replace("_", " ") if name == "learning_rate" else f"{name} value"
            raise ValueError(f"Invalid {shown}: {value}")


def check_betas(betas: tuple[float, float]) -> None:
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
