"""Parameters and state that are kept in other ways than torch keeps them: the options, the state, loading."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils.weak import WeakTensorKeyDictionary

from optim_ext import _grad_control, _sharding
from optim_ext._precision import codecs, options, parts, values
from optim_ext._precision.options import CODES, PLACE, ROUNDING_KEY, SCALE, TWINS, Keeping
from optim_ext._step.base import Group, OpStep
from optim_ext._tables import TABLES

# The operands that rounding keys on a GPU serve, by these tensors: what has been looked at once is not waited for again.
_ROUNDED_BY: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()

# The state keys of one parameter in place of those of its group, and the keys of its companions; None: there are none.
Way = tuple[tuple[str | None, ...], tuple[str, ...]] | None


class KeptStep(OpStep):
    """The layer that knows how parameters and state are kept. What the ops are given of it: `csrc/kernels/operand.h`."""

    def __init__(
        self,
        *args: Any,
        param_precision: str = "native",
        state_precision: str | Mapping[str, str] = "native",
        rounding_seed: int = 0,
        min_q8_size: int = 4096,
        **kwargs: Any,
    ) -> None:
        """In what parameters and state are kept (docs/precision.md); also keys of a parameter group."""
        asked = {
            "param_precision": param_precision,
            "state_precision": state_precision,
            "rounding_seed": rounding_seed,
            "min_q8_size": min_q8_size,
        }
        options.check(asked, type(self).__name__)
        self._asked_of_all = options.given(asked)
        super().__init__(*args, **kwargs)
        self._keep_made_state()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        # Torch's constructor has made the defaults by now, and adds the first groups by this method.
        self.defaults.update(self.__dict__.pop("_asked_of_all", {}))
        super().add_param_group(param_group)
        try:
            self._check_precision(self.param_groups[-1])
        except BaseException:
            self._take_back_group()
            raise

    add_param_group.__doc__ = torch.optim.Optimizer.add_param_group.__doc__

    def _take_back_group(self) -> None:
        """Of a group that was added, and turns out to be one that cannot be stepped."""
        self.param_groups.pop()
        self._ask()

    def load_state_dict(self, state_dict: dict[str, Any], *, copy: bool = False) -> None:
        self._options_kept = [options.given(group) for group in self.param_groups]
        try:
            super().load_state_dict(state_dict, copy=copy)
        finally:
            del self._options_kept

    load_state_dict.__doc__ = OpStep.load_state_dict.__doc__

    @classmethod
    def _keeps_otherwise(cls) -> bool:
        """Whether the class takes any of these options."""
        return TABLES[cls._op].takes_companions

    def _keeps(self, group: Group) -> bool:
        return bool(options.given(group))

    def _check_precision(self, group: Group) -> None:
        """Refuse options that nothing is meant by, or that this class cannot do, before anything is written."""
        if not self._keeps(group):
            return
        number = self._number_of(group)
        options.check(group, f"group {number}")
        asked = group.get("state_precision", "native")
        unknown = set(asked) - set(TABLES[self._op].kept_state) if isinstance(asked, Mapping) else set()
        if unknown:
            raise ValueError(
                f"group {number}: state_precision names {min(unknown)!r}, which is no state of {type(self).__name__}; it "
                f"has {', '.join(map(repr, TABLES[self._op].kept_state))}"
            )
        if not self._keeps_otherwise():
            name = next(iter(options.given(group)))
            raise ValueError(
                f"{type(self).__name__} keeps parameters and state as they are: it does not take {name} yet"
            )
        for index in range(len(group["params"])):
            self._keeping(group, index)

    def _keeping(self, group: Group, index: int) -> Keeping | None:
        p, described = group["params"][index], self._described(group, index)
        keys = [key for key in self._state_keys_of(group, p) if key in TABLES[self._op].kept_state]
        places = TABLES[self._op].places
        ordered = {key: places.get(key) for key in sorted(keys, key=lambda key: places.get(key, 0))}
        dtensor = self._dtensor_of(p)
        whole = p if dtensor is None else parts.whole_of(dtensor)
        keeping = options.keeping_of(whole, group, ordered, described)
        if keeping is not None and p.device.type not in ("cpu", "meta", "cuda"):
            raise ValueError(
                f"{described}: {type(self).__name__} takes param_precision and state_precision for parameters on the CPU "
                f"and CUDA tensors, and it is on {p.device}; use 'native' for both"
            )
        if keeping is None or dtensor is None:
            takes_chance = options.asks_for(group, "q8") or (keeping is not None and keeping.by_chance)
            if takes_chance and _grad_control.is_flat_shard(p):
                raise ValueError(
                    f"{described}: it is a shard of FullyShardedDataParallel, which does not say where its elements are "
                    f"in the whole; {parts.USE_NO_CHANCE}"
                )
            return keeping
        steps_wholes = self._needs_whole_tensors(group)
        problem = parts.why_not(keeping, dtensor, steps_wholes)
        if problem is not None:
            raise ValueError(f"{described}: {problem}")
        return dataclasses.replace(keeping, is_part=not steps_wholes and _sharding.is_cut(dtensor._spec))

    def _state_keys_of(self, group: Group, p: Tensor) -> list[str]:
        """The keys of the state that a parameter has."""
        return [key for key in self._state_keys(group) if key is not None]

    def _seen_dtype(self, group: Group, index: int) -> torch.dtype:
        """The dtype of a parameter as the rule sees it, which a default may depend on."""
        dtype: torch.dtype = group["params"][index].dtype
        is_kept = dtype in options.HALVES and group.get("param_precision", "native") != "native"
        return torch.float32 if is_kept else dtype

    def _dtensor_of(self, p: Tensor) -> Any:
        """The DTensor that a parameter is, or that it stands in for; or None."""
        return p if _sharding.is_dtensor(p) else None

    def _way(self, group: Group, index: int) -> Way:
        keeping = self._keeping(group, index) if self._keeps(group) else None
        if keeping is None:
            return None
        return tuple(keeping.key_of(key) for key in self._state_keys(group)), tuple(keeping.companions)

    def _ways(self, group: Group, members: list[int]) -> tuple[Way, ...]:
        return tuple(self._way(group, index) for index in members) if self._keeps(group) else ()

    def _refuse_precision(self, group: Group, reason: str | None) -> None:
        """Raise where torch's code is to run for a group, for the reason given: it would not know what is kept beside."""
        if self._keeps(group):
            name = next(iter(options.given(group)))
            raise RuntimeError(
                f"{name}={group[name]!r} of group {self._number_of(group)} needs a native step, but torch's own code would "
                f"run ({reason}); it may with 'native' for param_precision and state_precision"
            )

    def _kept_how(self, group: Group) -> list[str]:
        if not self._keeps(group):
            return []
        counts: dict[tuple[str, str], int] = {}
        for index, p in enumerate(group["params"]):
            keeping = self._keeping(group, index)
            kind = str(p.dtype).removeprefix("torch."), "as torch keeps them" if keeping is None else str(keeping)
            counts[kind] = counts.get(kind, 0) + 1
        return [f"{count} {dtype} parameters: {how}" for (dtype, how), count in counts.items()]

    # --- Masters ---

    def master_params(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter with its value as steps see it: in float32 where it has fewer bits, what is kept beside it
        included.

        Yields:
            The name that the optimizer was given (else "group.index") and a new tensor, of the parameter's shape.
        """
        for group in self.param_groups:
            for index, p in enumerate(group["params"]):
                yield self._name_in_group(group, index), self._master(p)

    def load_master_params(self, masters: Mapping[str, Tensor]) -> None:
        """Set parameters, and what is kept beside them, to values that :meth:`master_params` gave.

        Args:
            masters: by name; parameters that are not named stay as they are.

        Raises:
            ValueError: a name is none of this optimizer's, or a value has another shape; nothing has been written.
        """
        places = {
            self._name_in_group(group, index): (group, index)
            for group in self.param_groups
            for index in range(len(group["params"]))
        }
        for name, value in masters.items():
            if name not in places:
                raise ValueError(f"{name!r} is no parameter of this {type(self).__name__}")
            group, index = places[name]
            p = group["params"][index]
            if value.shape != p.shape:
                raise ValueError(
                    f"{self._described(group, index)}: its master has shape {list(value.shape)}, expected {list(p.shape)}"
                )
            if not _sharding.are_alike(value, p):
                kind = f"DTensor with {_sharding.described(p._spec)}" if _sharding.is_dtensor(p) else "plain tensor"
                raise ValueError(f"{self._described(group, index)}: it is a {kind}, and its master has to be one")
        with torch.no_grad():
            for name, value in masters.items():
                group, index = places[name]
                self._set_master(group, index, value)

    def _master(self, p: Tensor) -> Tensor:
        if p.dtype not in options.HALVES:
            return p.detach().clone()
        value = values.param_value(p, self.state.get(p, {})).clone()
        return _sharding.wrapped(value, p) if _sharding.is_dtensor(p) else value

    def _set_master(self, group: Group, index: int, value: Tensor) -> None:
        p, keeping = group["params"][index], self._keeping(group, index) if self._keeps(group) else None
        value = value.detach().to(p.device)
        if keeping is None or keeping.param not in TWINS:
            p.copy_(value)
            return
        part, value = _sharding.local(p), _sharding.local(value).float()
        part.copy_(codecs.half_of_master(value) if keeping.param == "remainder" else value)
        twin = values.twin_of(part, keeping.param, value)
        self.state[p][TWINS[keeping.param][0]] = _sharding.wrapped(twin, p) if _sharding.is_dtensor(p) else twin

    def _name_in_group(self, group: Group, index: int) -> str:
        names = group.get("param_names")
        return names[index] if names else f"{self._number_of(group)}.{index}"

    # --- State ---

    def _make_missing_state(self, group: Group) -> None:
        if self._make_kept_state(group) is None:
            super()._make_missing_state(group)

    @_disable_dynamo(recursive=True)
    def _make_kept_state(self, group: Group) -> set[int] | None:
        """Make what state there is none of, and convert what is kept in another way.

        Returns:
            Indices of the parameters whose state was made; None where everything is kept as torch keeps it.
        """
        if not self._keeps(group) and not any(self._is_strange(p) for p in group["params"]):
            return None
        self._check_precision(group)
        made = set()
        for index, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            if values.TWIN_KEYS.issuperset(self.state.get(p, ())):
                self._make_state(group, p)
                made.add(index)
            self._convert(group, index)
        return made

    def _make_state(self, group: Group, p: Tensor) -> None:
        """What torch would make for a float32 parameter of this value, as conversions of float32 lose nothing of what it begins
        with, and for a dense gradient where the class takes one."""
        dtype = self._dtype_of_state(group, p)
        by_itself = dtype is p.dtype and not (p.grad is not None and p.grad.is_sparse)
        like = p if by_itself else self._value_in(dtype, p).requires_grad_()
        if not by_itself and self._takes_dense:
            like.grad = torch.zeros((), dtype=dtype, device=p.device).expand(p.shape)
        elif not by_itself:
            like.grad = torch.zeros(p.shape, dtype=dtype, device=p.device, layout=torch.sparse_coo)
        keys = self._state_keys(group)
        self._init_group({**group, "params": [like]}, *([] for _ in range(2 + len(keys))))
        companions = {} if by_itself else self.state.get(p, {})
        entry = self.state[p] if by_itself else self.state.pop(like, {}) | companions
        for key in keys:
            if key in TABLES[self._op].places and entry.get(key) is None:
                entry[key] = torch.zeros_like(like, requires_grad=False)
        if entry:
            self.state[p] = entry

    def _dtype_of_state(self, group: Group, p: Tensor) -> torch.dtype:
        """Of a parameter for which torch makes state, before that is kept as asked."""
        kept = self._keeps(group) or self._is_strange(p)
        return torch.float32 if kept and p.dtype in options.HALVES else p.dtype

    def _value_in(self, dtype: torch.dtype, p: Tensor) -> Tensor:
        """A copy of a parameter with what it is kept in besides itself: a state may begin as the parameter is."""
        if not self._begins_as_the_parameter():
            return torch.empty_like(p, dtype=dtype, requires_grad=False)
        entry = self.state.get(p, {})
        if dtype is p.dtype or not values.has_twin(p, entry):
            return p.detach().to(dtype, copy=True)
        value = values.param_value(p, entry)
        return _sharding.wrapped(value, p) if _sharding.is_dtensor(p) else value.clone()

    def _begins_as_the_parameter(self) -> bool:
        """Whether some state is made from the values of its parameter; memory is enough for the others."""
        return False

    def _keep_made_state(self) -> None:
        """State that a constructor makes (Adagrad's) is kept as asked from the beginning: what loads into the keys that are
        there (torch.distributed.checkpoint) would lose masters and bits otherwise."""
        for group in self.param_groups:
            for index, p in enumerate(group["params"]) if self._keeps(group) else ():
                if self.state.get(p):
                    self._convert(group, index)

    def _is_strange(self, p: Tensor) -> bool:
        """Whether the state has what only these options make."""
        return any(values.is_ours(key) for key in self.state.get(p, ()))

    def _first_value(self, group: Group, key: str) -> float | None:
        """What a state that a constructor has made starts from, in full precision; None: it says so itself."""
        return None

    def _convert(self, group: Group, index: int) -> None:
        """Bring the state of a parameter into the form its options ask for, from any other."""
        p = group["params"][index]
        entry = self.state[p]
        if not _sharding.is_dtensor(p):
            converted = self._converted(group, index, p, entry)
        else:
            seen = parts.local_entry(p, entry, TABLES[self._op].scalar_state | TABLES[self._op].partial_state)
            if seen is None:  # of another layout, which the next step refuses
                return
            made = self._converted(group, index, _sharding.local(p), seen)
            converted = {
                key: entry[key] if seen.get(key) is value else parts.wrapped(key, value, p, entry.get(key))
                for key, value in made.items()
                if key != PLACE
            }
        for key in entry.keys() - converted.keys():
            if values.is_ours(key) or key + CODES in converted:
                del entry[key]
        entry.update(converted)

    def _converted(self, group: Group, index: int, p: Tensor, entry: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the options make of the state of a parameter, or of what a process has of it, but for what they leave alone."""
        keeping = self._keeping(group, index)
        own = Keeping("native", tuple((key, "native") for key in TABLES[self._op].kept_state), 0)
        wanted = keeping or own
        converted: dict[str, Tensor] = {}
        for key, precision in wanted.state:
            if precision == "q8" and values.is_in_blocks(p, entry, key):
                converted |= {name: entry[name] for name in (key + CODES, key + SCALE)}
            elif (value := self._state_value(group, p, entry, key)) is not None:
                converted |= values.as_kept(p, key, value, precision)
        # What the group has no use for now (amsgrad=False) waits as it is, as it does where torch keeps it.
        waiting = {name for key in TABLES[self._op].kept_state for name in (key + CODES, key + SCALE)}
        waiting -= {name for key, _ in wanted.state for name in (key + CODES, key + SCALE)}
        converted |= {name: entry[name] for name in waiting if name in entry}
        return converted | self._companions(group, index, p, entry, wanted)

    def _state_value(self, group: Group, p: Tensor, entry: Mapping[str, Any], key: str) -> Tensor | None:
        """A state as it is, whatever it is kept in."""
        value = values.state_value(p, entry, key)
        if value is None:
            return None
        first, step = self._first_value(group, key), entry.get("step")
        if first is not None and step is not None and float(step) == 0.0 and value.dtype is not torch.float32:
            return torch.full_like(value, first, dtype=torch.float32)
        return value

    def _companions(
        self, group: Group, index: int, p: Tensor, entry: Mapping[str, Any], keeping: Keeping
    ) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        if keeping.param in TWINS:
            key = TWINS[keeping.param][0]
            found = entry.get(key)
            if isinstance(found, Tensor) and values.is_twin(p, keeping.param, found):
                made[key] = codecs.like(p, found)
            else:
                made[key] = values.twin_of(p, keeping.param, values.param_value(p, entry))
        if keeping.by_chance:
            found = entry.get(ROUNDING_KEY)
            made[ROUNDING_KEY] = self._key_beside(group, index, p, found, keeping.by_chance)
            place = parts.place_of(self._dtensor_of(group["params"][index])) if keeping.is_part else None
            if place is not None:
                made[PLACE] = place
        return made

    def _key_beside(self, group: Group, index: int, p: Tensor, found: Any, by_chance: int) -> Tensor:
        """What the random words of a parameter come from, where its state has ``found`` for it."""
        is_key = isinstance(found, Tensor) and found.dtype is torch.int64 and found.shape == (3,)
        if is_key and _ROUNDED_BY.get(found) == by_chance:
            return found  # type: ignore[no-any-return]
        numbers = found.tolist() if is_key else [self._new_rounding_key(group, index), 0, 0]
        key: Tensor = found
        if not is_key or numbers[2] != by_chance:
            device = "cpu" if p.is_meta else p.device  # it has a value where parameters have none
            key = torch.tensor([*numbers[:2], by_chance], dtype=torch.int64, device=device)
        if key.device.type not in ("cpu", "meta"):
            _ROUNDED_BY[key] = by_chance
        return key

    def _new_rounding_key(self, group: Group, index: int) -> int:
        names = group.get("param_names")
        before = sum(len(other["params"]) for other in self.param_groups[: self._number_of(group)])
        return options.rounding_key(group.get("rounding_seed", 0), names[index] if names else before + index)

    def _undo_casts(self, saved: dict[str, Any]) -> None:
        """What torch has cast to the parameter's dtype is put back, and brought into the form the options ask for: those
        of this optimizer, as they are no part of what was learned."""
        super()._undo_casts(saved)
        for group, own, its in zip(self.param_groups, self._options_kept, saved["param_groups"], strict=True):
            for name in options.DEFAULTS:
                group.pop(name, None)
            group.update(own)
            for index, (p, number) in enumerate(zip(group["params"], its["params"], strict=True)):
                raw = saved["state"].get(number)
                if not raw or not (self._keeps(group) or any(values.is_ours(key) for key in raw)):
                    continue
                entry = self.state[p]
                for key, value in raw.items():
                    kept = key in TABLES[self._op].kept_state or values.is_ours(key)
                    if kept and isinstance(value, Tensor):
                        entry[key] = value.detach().to(p.device, copy=True)
                self._convert(group, index)
