"""What the native module says of the ops that step: names and order of their arguments, written once beside each rule in
csrc/rules."""

from __future__ import annotations

from typing import Any

from optim_ext._load import _C


class OpTable:
    """One op: the names of its lists of tensors and of its hyper-parameters, and where they come from."""

    def __init__(self, table: dict[str, Any]) -> None:
        params, grads, *state = table["lists"]
        self.lists: list[str] = [name for name, _, _ in (params, grads, *state)]
        self.state_keys: tuple[str, ...] = tuple(key for _, key, _ in state)
        # State that only some parameters have, and state that is one number whatever the parameter's shape.
        self.partial_state = frozenset(key for _, key, role in state if role == "partial")
        self.scalar_state = frozenset(key for _, key, role in state if role in ("scalar", "steps"))
        self.hypers: list[tuple[str, str]] = [(name, kind) for name, kind, _, _ in table["hypers"]]
        # Whether gradients may have some rows only.
        self.is_element_wise: bool = table["is_element_wise"]
        # Whether parameters and state may be kept in other ways than the rule sees them.
        self.takes_companions: bool = table["takes_companions"]
        # Which operand of the rule a state of the parameter's shape is.
        self.places: dict[str, int] = table["places"]
        # State that has numbers for the elements of a parameter, and may be kept in other ways.
        self.kept_state: tuple[str, ...] = tuple(
            key for key in self.state_keys if key in self.places or key in self.partial_state
        )
        # Options in order, each with how many hyper-parameters it holds; 0: it is one itself.
        holds: dict[str, int] = {}
        for _, _, option, index in table["hypers"]:
            holds[option] = 0 if index is None else index + 1
        self.options: list[tuple[str, int]] = list(holds.items())


TABLES = {op: OpTable(table) for op, table in _C.step_ops().items()}
