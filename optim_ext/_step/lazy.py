"""Sparse gradients where torch takes none: the rows they hold are stepped, all others are left as they are."""

from __future__ import annotations

from typing import Any, Final

from optim_ext._step.base import Group
from optim_ext._step.precision import KeptStep
from optim_ext._tables import TABLES

LAZY_ROWS: Final = "lazy_rows"


class LazyStep(KeptStep):
    def __init__(self, *args: Any, lazy_rows: bool = False, **kwargs: Any) -> None:
        """Whether sparse gradients may step the rows they hold, and no others, where torch refuses them
        (docs/sparse.md); also a key of a parameter group."""
        self._lazy_in_all = {LAZY_ROWS: lazy_rows} if lazy_rows is not False else {}
        super().__init__(*args, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.defaults.update(self.__dict__.pop("_lazy_in_all", {}))
        given = param_group.get(LAZY_ROWS, self.defaults.get(LAZY_ROWS, False))
        if not isinstance(given, bool):
            raise ValueError(f"group {len(self.param_groups)}: {LAZY_ROWS} is {given!r}, expected True or False")
        super().add_param_group(param_group)
        if given and not self._takes_rows(self.param_groups[-1]):
            self._take_back_group()
            why = "takes dense gradients only" if self._takes_dense else "steps the rows of sparse gradients as it is"
            raise ValueError(f"{type(self).__name__} {why}: it does not take {LAZY_ROWS}")

    add_param_group.__doc__ = KeptStep.add_param_group.__doc__

    def _takes_rows(self, group: Group) -> bool:
        """Whether each element is stepped on its own, so that some rows can be."""
        return TABLES[self._op].is_element_wise and self._takes_dense

    def load_state_dict(self, state_dict: dict[str, Any], *, copy: bool = False) -> None:
        lazy = [self._is_lazy(group) for group in self.param_groups]
        super().load_state_dict(state_dict, copy=copy)
        for group, was_lazy in zip(self.param_groups, lazy, strict=True):  # no part of what was learned
            group.pop(LAZY_ROWS, None)
            if was_lazy:
                group[LAZY_ROWS] = True

    load_state_dict.__doc__ = KeptStep.load_state_dict.__doc__

    def _is_lazy(self, group: Group) -> bool:
        return bool(group.get(LAZY_ROWS, False))

    def _steps_rows(self, group: Group) -> bool:
        """Whether the op steps by sparse gradients."""
        return self._is_lazy(group) or (self._takes_sparse(group) and not group.get("fused"))  # where torch refuses

    def _kept_how(self, group: Group) -> list[str]:
        return [
            *super()._kept_how(group),
            *([f"{LAZY_ROWS}: sparse gradients step their rows"] if self._is_lazy(group) else []),
        ]

    def _refuse_precision(self, group: Group, reason: str | None) -> None:
        super()._refuse_precision(group, reason)
        for index, p in enumerate(group["params"]) if self._is_lazy(group) else ():
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError(
                    f"gradient of {self._described(group, index)}: it is sparse, and {LAZY_ROWS} needs a native step, but "
                    f"torch's own code would run ({reason})"
                )

    def _make_missing_state(self, group: Group) -> None:
        if not self._is_lazy(group):
            return super()._make_missing_state(group)
        if self._make_kept_state(group) is not None:
            return None
        others = []
        for p in group["params"]:
            if p.grad is None or not p.grad.is_sparse:
                others.append(p)
            elif not self.state.get(p):
                self._make_state(group, p)
        return super()._make_missing_state({**group, "params": others})
