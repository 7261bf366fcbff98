"""Rules about whole tensors (Muon, Adafactor) on DTensors of which no process has the whole.

Each such parameter has an owner among the processes that have its parts. For a step these send it their parts of parameter,
gradient and state; the owner steps as one process would, with the same bits; and everybody gets back what is his. These are
two collectives for each process group and step, which move less than one all-gather of the parameters: each process sends
and receives its own share only. Between steps nobody has more than that share.

Where several dimensions of a mesh cut a tensor, it is gathered and stepped on every process that has a part.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optim_ext import _sharding
from optim_ext._precision import codecs, options, parts, values
from optim_ext._precision.options import ROUNDING_KEY, SCALE
from optim_ext._step.base import Group

if TYPE_CHECKING:
    from optim_ext._step.local_view import LocalView
    from optim_ext._step.sharded import ShardedStep


class Whole:
    """One DTensor parameter: what this process has of it, and the whole of it while this process steps it."""

    def __init__(self, name: str, dtensor: Any, local: Tensor, copies: set[str]):
        self.name, self.local, self.copies = name, local, copies
        self.shape = dtensor.shape
        self.groups = _sharding.sharding_groups(dtensor._spec)
        self.owner = 0  # rank in the group, where there is one
        self.steps_here = True
        self.is_exchanged = False  # with an owner, or gathered
        # Of this process's gradient; it is said when the others have what they wait for.
        self.problem: str | None = None
        # In the order of memory that the whole has, by which words of chance go.
        self.tensor = torch.empty_like(parts.whole_of(dtensor), dtype=local.dtype, device=local.device)
        self._kept: dict[str, Tensor] = {}  # the whole of gradient and state, by key
        self._copied: dict[str, Tensor] = {}

    def cut(self, state: dict[str, Any]) -> list[str]:
        """The keys of the state that is cut as the parameter is; of the rest everyone has a copy."""
        tensors = (key for key, value in state.items() if isinstance(value, Tensor))
        return [key for key in tensors if key != ROUNDING_KEY and key not in self.copies]

    def grad(self) -> Tensor:
        """This process's part, zeros where it has none. What is sent must not depend on which gradients there are."""
        grad, self.problem = self.local.grad, None
        if grad is not None and grad.dtype != self.local.dtype:
            self.problem = f"it is of {grad.dtype}, expected {self.local.dtype} as its parameter"
        elif grad is not None and grad.shape != self.local.shape:
            self.problem = f"this part of it has shape {list(grad.shape)}, expected {list(self.local.shape)}"
        return torch.zeros_like(self.local) if grad is None or self.problem is not None else grad

    def refuse(self) -> None:
        """Raises RuntimeError where the gradient that has just been asked for is none for this parameter."""
        if self.problem is not None:
            raise RuntimeError(
                f"gradient of {self.name}: {self.problem}, where a rule is about whole tensors that are cut"
            )

    def keep(self, key: str, like: Tensor) -> Tensor:
        """Memory for the whole of what a process has a part of."""
        if key not in self._kept or self._kept[key].dtype != like.dtype:
            if key.endswith(SCALE):
                self._kept[key] = like.new_empty(self.shape[0], codecs.blocks_of_row(self.shape))
            else:
                self._kept[key] = torch.empty_like(self.tensor, dtype=like.dtype)
        return self._kept[key]

    def forget(self, keys: Iterable[str]) -> None:
        """Let go of the memory for what the state does not have any more."""
        for key in keys:
            self._kept.pop(key, None)
            self._copied.pop(key, None)

    def copy(self, key: str, value: Tensor) -> Tensor:
        """A tensor in the place of state of which every process has a copy, until the step is known to hold."""
        if (
            key not in self._copied
            or self._copied[key].dtype != value.dtype
            or self._copied[key].device != value.device
        ):
            self._copied[key] = value.clone()
        return self._copied[key]

    def take_memory(self) -> None:
        for tensor in (self.tensor, *self._kept.values()):
            tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size())

    def free_memory(self) -> None:
        self.tensor.grad = None
        for tensor in (self.tensor, *self._kept.values()):
            tensor.untyped_storage().resize_(0)


class OwnedBy:
    """Parameters that are cut over one process group along one of their dimensions, one owner each."""

    def __init__(self, group: Any):
        self.group = group
        self.size, self.rank = group.size(), group.rank()
        self.members: list[tuple[Whole, int]] = []  # and the dimension that is cut
        self._load = [0] * self.size

    def add(self, whole: Whole, dim: int) -> None:
        """The owner is who has the least to do, so that the work is spread; found alike by all processes."""
        whole.owner = min(range(self.size), key=lambda rank: (self._load[rank], rank))
        whole.steps_here, whole.is_exchanged = whole.owner == self.rank, True
        self._load[whole.owner] += math.prod(whole.shape) * (1 + min(whole.shape, default=1))
        self.members.append((whole, dim))

    def fetch(self, states: dict[Tensor, dict[str, Any]]) -> None:
        outgoing: list[list[Tensor]] = [[] for _ in range(self.size)]
        places: list[list[Tensor]] = [[] for _ in range(self.size)]
        for whole, dim in self.members:
            state = states.get(whole.local, {})
            keys = whole.cut(state)
            mine = [whole.local, whole.grad(), *(state[key] for key in keys)]
            outgoing[whole.owner] += mine
            if whole.steps_here:
                wholes = [whole.tensor, whole.keep("grad", mine[1]), *(whole.keep(key, state[key]) for key in keys)]
                whole.take_memory()
                for rank in range(self.size):
                    places[rank] += self._parts(wholes, dim, rank)
        _fill(places, _exchange(outgoing, places, self.group))

    def give_back(self, states: dict[Tensor, dict[str, Any]], refused: bool) -> None:
        """Nobody takes anything where the step was refused, here or by another owner: the others are told, as they wait."""
        device = self.members[0][0].local.device
        outgoing = [[torch.tensor([refused], device=device)] for _ in range(self.size)]
        told = torch.zeros(self.size, dtype=torch.bool, device=device)
        places = [[told[rank : rank + 1]] for rank in range(self.size)]
        for whole, dim in self.members:
            state = states.get(whole.local, {})
            keys = whole.cut(state)
            copies = [key for key, value in state.items() if isinstance(value, Tensor) and key not in keys]
            places[whole.owner] += [whole.local, *(state[key] for key in (*keys, *copies))]
            if whole.steps_here:
                wholes = [whole.tensor, *(whole.keep(key, state[key]) for key in keys)]
                for rank in range(self.size):
                    outgoing[rank] += self._parts(wholes, dim, rank) + [whole.copy(key, state[key]) for key in copies]
        received = _exchange(outgoing, places, self.group)
        _fill([some[:1] for some in places], received)
        if device.type == "cpu" and bool(told.any()):  # a GPU is not waited for
            if refused:
                return
            raise RuntimeError(f"process {told.tolist().index(True)} of a group refuses this step; see the error there")
        _fill(places, received)

    def _parts(self, wholes: Sequence[Tensor], dim: int, rank: int) -> list[Tensor]:
        """What a process has of whole tensors: cut as torch.chunk cuts, exponents where their blocks are."""
        cut = []
        for whole in wholes:
            along = min(dim, whole.dim() - 1)
            size = whole.shape[along]
            step = -(-size // self.size)
            begin = min(rank * step, size)
            cut.append(whole.narrow(along, begin, min(begin + step, size) - begin))
        return cut


class Gathered:
    """A parameter that several dimensions of a mesh cut: every process steps the whole of it."""

    def __init__(self, whole: Whole, dtensor: Any):
        self.whole = whole
        self._like_param = Layout(type(dtensor), dtensor._spec, whole.local)
        self._exponents = type(dtensor), parts.scale_spec(dtensor)
        self._like_exponents: Layout | None = None

    def _layout(self, key: str, part: Tensor) -> Layout:
        if not key.endswith(SCALE):
            return self._like_param
        if self._like_exponents is None:
            self._like_exponents = Layout(*self._exponents, part)
        return self._like_exponents

    def fetch(self, states: dict[Tensor, dict[str, Any]]) -> None:
        whole, state = self.whole, states.get(self.whole.local, {})
        pieces = {"grad": whole.grad()}
        pieces |= {key: state[key] for key in whole.cut(state)}
        wholes = {key: whole.keep(key, part) for key, part in pieces.items()}
        whole.take_memory()
        whole.tensor.copy_(self._like_param.whole_of(whole.local.detach()))
        for key, part in pieces.items():
            wholes[key].copy_(self._layout(key, part).whole_of(part.detach()))

    def give_back(self, states: dict[Tensor, dict[str, Any]], refused: bool) -> None:
        whole, state = self.whole, states.get(self.whole.local, {})
        self._like_param.take_part(whole.local, whole.tensor)
        for key in whole.cut(state):
            self._layout(key, state[key]).take_part(state[key], whole.keep(key, state[key]))


class Layout:
    """How processes have parts of tensors of one shape, whatever their dtype."""

    def __init__(self, kind: Any, spec: Any, local: Tensor):
        self._spec, self._type = spec, kind
        mesh = spec.mesh
        # Where in the whole this process's elements are: each is labelled with its process and its place there. Of copies
        # the first process's are gathered.
        of_first = [
            0 if place.is_replicate() else c for place, c in zip(spec.placements, mesh.get_coordinate(), strict=True)
        ]
        rank = sum(c * math.prod(mesh.shape[dim + 1 :]) for dim, c in enumerate(of_first))
        places = torch.arange(local.numel(), device=local.device).view(local.shape)
        labels = self.whole_of(places + rank * _LABELS).reshape(-1)
        mine = (labels // _LABELS == rank).nonzero().view(-1)
        self._index = mine[(labels[mine] % _LABELS).argsort()]

    def whole_of(self, part: Tensor) -> Tensor:
        if part.dtype is torch.int16:  # which neither gloo nor NCCL gather
            return self.whole_of(part.view(torch.bfloat16)).view(torch.int16)
        meta = self._spec.tensor_meta._replace(dtype=part.dtype)
        spec = type(self._spec)(self._spec.mesh, self._spec.placements, tensor_meta=meta)
        found: Tensor = self._type(part, spec, requires_grad=False).full_tensor()
        return found

    def take_part(self, part: Tensor, whole: Tensor) -> None:
        part.copy_(whole.reshape(-1)[self._index].view(part.shape))


_LABELS = 2**40


class Owners:
    """The groups and the state of a view with whole tensors in the place of parts, for the rules that need these."""

    def __init__(self, optimizer: ShardedStep, view: LocalView):
        self.plan: Any = None
        self.groups: list[Group] = []
        self.state: defaultdict[Any, Any] = defaultdict(dict)
        self._wholes: dict[Tensor, Whole] = {}  # by the stand-in of this process's part
        self._kept_as: dict[int, dict[str, Any]] = {}  # by number of the group, what its state was brought into
        by_group: dict[str, OwnedBy] = {}
        self._rounds: list[OwnedBy | Gathered] = []
        for group in view.groups:
            params = []
            for p in group["params"]:
                dtensor = view.whole_of(p)
                if (
                    dtensor is None
                    or not optimizer._needs_whole_tensors(group)
                    or not _sharding.sharding_groups(dtensor._spec)
                ):
                    params.append(p)
                    continue
                if p not in self._wholes:
                    copies = view.copies.setdefault(p, set(view.scalars))
                    self._wholes[p] = whole = Whole(view.name_of(p), dtensor, p, copies)
                    dim = _only_cut(dtensor._spec)
                    if dim is None:
                        self._rounds.append(Gathered(whole, dtensor))
                    else:
                        key = whole.groups[0].group_name
                        if key not in by_group:
                            by_group[key] = OwnedBy(whole.groups[0])
                            self._rounds.append(by_group[key])
                        by_group[key].add(whole, dim)
                    whole.free_memory()
                params.append(self._wholes[p].tensor)
            self.groups.append({**group, "params": params})

    def __bool__(self) -> bool:
        return bool(self._wholes)

    def owns(self, p: Tensor) -> bool:
        return p in self._wholes

    def make_state(self, optimizer: ShardedStep, view: LocalView) -> None:
        """State that is missing, or is to be kept in another way, of all parameters: what is sent must not depend on which
        gradients there are here."""
        for number, group in enumerate(view.groups):
            asked = options.given(group)
            is_new_way = self._kept_as.get(number) != asked
            for index, p in enumerate(group["params"]):
                if p not in self._wholes:
                    continue
                is_missing = values.TWIN_KEYS.issuperset(view.state.get(p, ()))
                if is_missing:
                    view.state[p].update(self._made_state(optimizer, group, p))
                if (is_new_way or is_missing) and (asked or optimizer._is_strange(p)):
                    optimizer._convert(group, index)
            self._kept_as[number] = asked

    def _made_state(self, optimizer: ShardedStep, group: Group, p: Tensor) -> dict[str, Any]:
        """As torch makes it, which in all these classes starts at zero: seen on a tensor without memory."""
        shape = self._wholes[p].shape
        ghost = torch.empty(shape, dtype=optimizer._dtype_of_state(group, p), device="meta")
        ghost.grad = torch.empty_like(ghost)
        state, optimizer.state = optimizer.state, defaultdict(dict)
        try:
            lists: list[list[Any]] = [[] for _ in range(2 + len(optimizer._state_keys(group)))]
            optimizer._init_group({**group, "params": [ghost]}, *lists)
            made = dict(optimizer.state[ghost])
        finally:
            optimizer.state = state
        for key, value in made.items():
            if isinstance(value, Tensor) and value.is_meta:
                is_cut = value.shape == shape
                made[key] = torch.zeros(p.shape if is_cut else value.shape, dtype=value.dtype, device=p.device)
                if not is_cut:
                    self._wholes[p].copies.add(key)
        return made

    @contextmanager
    def whole(self, optimizer: ShardedStep, view: LocalView) -> Iterator[None]:
        """Within the block the optimizer has whole tensors where this process is to step them; then all get their parts."""
        for mine, seen in zip(self.groups, view.groups, strict=True):
            params = mine["params"]
            mine.clear()
            mine.update(seen)
            mine["params"] = params
        try:
            for each in self._rounds:
                each.fetch(view.state)
            self._enter(view)
            optimizer.param_groups, optimizer.state, optimizer._plan = self.groups, self.state, self.plan
            refused = False
            try:
                for whole in self._wholes.values():
                    whole.refuse()
                yield
            except Exception:
                refused = True
                raise
            finally:
                self.plan = optimizer._plan
                optimizer.param_groups, optimizer.state, optimizer._plan = view.groups, view.state, None
                for each in self._rounds:  # the others wait for it
                    each.give_back(view.state, refused)
            for p, entry in self.state.items():  # of those that are stepped by their parts
                if p not in self._tensors() and view.state.get(p) is not entry:
                    view.state[p] = entry
        finally:
            for whole in self._wholes.values():
                whole.free_memory()

    def _tensors(self) -> set[Tensor]:
        return {whole.tensor for whole in self._wholes.values()}

    def _enter(self, view: LocalView) -> None:
        entries: dict[Any, Any] = {}
        for p, seen in view.state.items():
            whole = self._wholes.get(p)
            if whole is None:
                entries[p] = seen
            elif whole.steps_here:
                cut = whole.cut(seen)
                entry = self.state.get(whole.tensor, {})
                gone = entry.keys() - seen.keys()
                whole.forget(gone)
                for key in gone:
                    del entry[key]
                for key, value in seen.items():
                    if key in cut:
                        value = whole.keep(key, value)
                    elif isinstance(value, Tensor) and whole.is_exchanged:
                        value = whole.copy(key, value).copy_(value)
                    entry[key] = value
                entries[whole.tensor] = entry
        self.state.clear()
        self.state.update(entries)
        for p, whole in self._wholes.items():
            has_grad = whole.steps_here and p.grad is not None
            whole.tensor.grad = whole.keep("grad", p) if has_grad else None


def _only_cut(spec: Any) -> int | None:
    """The dimension that is cut, if it is one, in chunks of one size up to the last ones; else None."""
    from torch.distributed.tensor import Shard

    cut = [place for dim, place in enumerate(spec.placements) if not place.is_replicate() and spec.mesh.size(dim) > 1]
    return cut[0].dim if len(cut) == 1 and type(cut[0]) is Shard else None


def _exchange(outgoing: Sequence[Sequence[Tensor]], places: Sequence[Sequence[Tensor]], group: Any) -> list[Tensor]:
    """Send tensors to each process of a group, by bytes and in one collective; gives the bytes that each of them has sent,
    as many as there are in the places they are for."""
    device = next((t.device for some in (*outgoing, *places) for t in some), torch.device("cpu"))
    nothing = torch.empty(0, dtype=torch.uint8, device=device)
    sent = torch.cat([nothing, *(_bytes(t) for some in outgoing for t in some)])
    sizes, expected = (
        [sum(t.numel() * t.element_size() for t in some) for some in side] for side in (outgoing, places)
    )
    received = torch.empty(sum(expected), dtype=torch.uint8, device=device)
    torch.distributed.all_to_all_single(received, sent, expected, sizes, group=group)
    return list(torch.split(received, expected))


def _fill(places: Sequence[Sequence[Tensor]], received: Sequence[Tensor]) -> None:
    """Put what each process has sent where it belongs."""
    for some, found in zip(places, received, strict=True):
        begin = 0
        for place in some:
            size = place.numel() * place.element_size()
            part = found[begin : begin + size].clone()  # by itself, where every dtype may begin
            place.copy_(part.view(place.dtype).view(place.shape))
            begin += size


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
