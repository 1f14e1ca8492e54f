"""Keeps one part of a network in memory at a time: each is read when passes reach it, until all have left."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsam.inputs.system import return_freed_memory
from sparsam.torch.pruning.activations import ActivationMeter, Activations
from sparsam.torch.pruning.forward_passes import Gate, Pass, advance, current_pass
from sparsam.torch.pruning.from_files.distilled_blocks import DistilledBlocks
from sparsam.torch.pruning.from_files.model_parts import Part
from sparsam.torch.pruning.from_files.source_tensors import SourceTensors
from sparsam.torch.pruning.saved_progress import SavedProgress
from sparsam.torch.pruning.twins import Rows, Twin, set_values
from torch import Tensor, nn

__all__ = ["PartsInTurn"]


@dataclass(frozen=True)
class _Place:
    """Where a Parameter is in one of the twins, and its placeholder while it is not in memory."""

    module: nn.Module
    attribute: str
    empty: nn.Parameter

    @property
    def parameter(self) -> nn.Parameter:
        found = self.module._parameters[self.attribute]
        assert found is not None
        return found

    def put(self, parameter: nn.Parameter) -> None:
        setattr(self.module, self.attribute, parameter)


@dataclass
class _Held:
    """A part with its name and gate, and the places of its Parameters: name -> one in each twin."""

    name: str
    gate: Gate
    places: dict[str, list[_Place]] = field(default_factory=dict)


class PartsInTurn:
    """Brings the parts of twins, which are on the meta device, into memory."""

    def __init__(
        self, parts: Sequence[Part], source: SourceTensors, twins: Sequence[Twin], heads: Collection[str]
    ) -> None:
        """Puts gates before all parts; reads tensors outside of parts, and maps the tables of embeddings.

        Args:
            parts: The parts.
            source: Where the weights are.
            twins: The pruned network, and the dense one if there are targets.
            heads: Names of parts that are output layers.
        """
        self._source, self._twins = source, twins
        self._held = {part.name: _Held(part.name, Gate(head=part.name in heads)) for part in parts}
        self._part_of: dict[str, _Held] = {}
        self._saved: SavedProgress | None = None
        self._distilled: DistilledBlocks | None = None
        self._group_of: dict[str, int] = {}
        self._rows: Mapping[str, Rows] = {}
        self._lent: dict[str, list[_Place]] = {}
        around: dict[str, list[_Place]] = {}
        for twin in twins:
            self._settle_tables(twin.model)
            for part in parts:
                self._take(twin.model, part.name)
            for name, _ in twin.model.named_parameters(remove_duplicate=False):
                if name not in self._part_of and (place := _place(twin.model, name)):
                    around.setdefault(name, []).append(place)
            for name, _ in twin.model.named_buffers(remove_duplicate=False):
                if name in source:
                    self._read_buffer(twin.model, name)
        self._fill(around)

    def follow(
        self,
        groups: Iterable[Sequence[str]],
        rows: Mapping[str, Rows],
        saved: SavedProgress,
        distilled: DistilledBlocks | None = None,
    ) -> None:
        """From now on, parts are read with the new values of the groups, and of the blocks, that are done.

        Args:
            groups: The names of weights, as they are saved together.
            rows: Name -> the weight in the pruned network.
            saved: The new values of groups.
            distilled: The new values of blocks, which replace those of groups.
        """
        self._group_of = {name: place for place, names in enumerate(groups) for name in names}
        self._rows, self._saved, self._distilled = rows, saved, distilled
        for held in self._held.values():
            self._release(held)

    def activations(self, meter: ActivationMeter) -> dict[str, Activations]:
        """Part -> what was measured there."""
        return {name: meter.found[held.gate] for name, held in self._held.items() if held.gate in meter.found}

    def behind(self, gates: Collection[Gate]) -> set[str]:
        """The names of the parts behind gates."""
        return {name for name, held in self._held.items() if held.gate in gates}

    def holds(self, name: str, *, lent: bool = False) -> bool:
        """Whether a weight is in memory with its part, or, with `lent`, by itself."""
        return self._part_of[name].gate.open or (lent and name in self._lent)

    def advance(self, passes: Iterable[Pass]) -> None:
        """As `forward_passes.advance`, opening gates for the passes, one after the other."""
        for _, waiting in self.turns(passes):
            advance(waiting)

    def turns(self, passes: Iterable[Pass]) -> Iterator[tuple[str, list[Pass]]]:
        """Yields each part that passes come to, in memory, and the passes that wait at it, to be advanced."""
        moving = [one for one in passes if not one.finished]
        advance([one for one in moving if one.gate is None])
        while gate := self._first_gate(moving):
            self._open(gate)
            yield self._behind(gate).name, [one for one in moving if one.gate is gate]

    def reach(self, name: str, passes: Sequence[Pass]) -> None:
        """Lets passes continue to the part with a weight, so that no other part is needed in memory.

        Args:
            name: The weight.
            passes: The passes, which stop only at gates.
        """
        goal = self._part_of[name].gate
        advance([one for one in passes if one.gate is None])
        while (gate := self._first_gate(passes)) and gate is not goal:
            self._open(gate)
            advance([one for one in passes if one.gate is gate])

    def lend(self, names: Sequence[str]) -> None:
        """Reads those of these weights, and their biases, that are not in memory, for the pruned network."""
        for name in names:
            if self.holds(name):
                continue
            module = self._rows[name].weight.module
            wanted = {
                one: [place for place in places if place.module is module]
                for one, places in self._part_of[name].places.items()
            }
            self._fill({one: places for one, places in wanted.items() if places})
            self._lent[name] = [place for places in wanted.values() for place in places]

    def take_back(self, names: Sequence[str], *, used: bool) -> None:
        """Releases weights that were lent; with `used`, permanently those of the dense network too."""
        for name in names:
            for place in self._lent.pop(name, ()):
                place.put(place.empty)
            if used and self.holds(name) and self._rows[name].weight.kind != "attention":  # used afterwards
                for place in self._part_of[name].places[name]:
                    if place.module is not self._rows[name].weight.module:
                        place.put(place.empty)

    def changed(self, weight: str) -> list[str]:
        """The names of a pruned weight and of the tensors that may change with it."""
        return list(self._places_of(weight))

    def pruned(self, weight: str) -> dict[str, Tensor]:
        """A weight and the tensors that changed with it, final: name in the pruned network -> tensor.

        Its part stays in memory until another one is needed; all passes must have ended.
        """
        self._open(self._part_of[weight].gate)
        found = self._places_of(weight)
        return {name: getattr(module, attribute).detach() for name, (module, attribute) in found.items()}

    def _places_of(self, weight: str) -> dict[str, tuple[nn.Module, str]]:
        names = {id(module): path for path, module in self._twins[0].model.named_modules()}
        found = self._rows[weight].places()
        return {f"{names[id(module)]}.{own}".removeprefix("."): (module, own) for module, own in found}

    def parameters(self, part: str) -> dict[str, nn.Parameter]:
        """The Parameters of a part in the pruned network, brought into memory; shared ones once."""
        self._open(self._held[part].gate)
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for name, places in self._held[part].places.items():
            found.setdefault(id(places[0].parameter), (name, places[0].parameter))
        return dict(found.values())

    def tensor(self, name: str) -> Tensor:
        """A Parameter of the pruned network, final; as for `pruned`."""
        held = self._part_of[name]
        self._open(held.gate)
        return held.places[name][0].parameter.detach()

    def leave_dense(self, part: str) -> None:
        """Releases what only the dense network has of a part, through which it has come for good."""
        for places in self._held[part].places.values():
            for place in places[1:]:
                place.put(place.empty)

    def read_again(self, part: str) -> None:
        """Reads a part that is in memory anew, which undoes changes of its Parameters."""
        self._fill(self._held[part].places)
        self._renew(self._held[part])

    def close(self) -> None:
        """Releases all parts."""
        for held in self._held.values():
            self._release(held)

    def _first_gate(self, passes: Iterable[Pass]) -> Gate | None:
        return next((one.gate for one in passes if one.gate is not None and not one.finished), None)

    def _behind(self, gate: Gate) -> _Held:
        return next(held for held in self._held.values() if held.gate is gate)

    def _open(self, gate: Gate) -> None:
        if gate.open:
            return
        for other in self._held.values():
            if other.gate.open and all(one.finished for one in other.gate.inside):
                self._release(other)
        held = self._behind(gate)
        self._fill(held.places)
        gate.open = True
        self._renew(held)

    def _fill(self, places: Mapping[str, Sequence[_Place]]) -> None:
        """Reads Parameters; twins share their memory, and shared Parameters stay shared."""
        read: dict[str, Tensor] = {}
        made: dict[int, nn.Parameter] = {}
        for name, ours in places.items():
            key = self._source.stored[name]
            if key not in read:
                read[key] = self._source.read(name).to(ours[0].empty.dtype)
            for place in ours:
                if id(place.empty) not in made:
                    made[id(place.empty)] = nn.Parameter(read[key], requires_grad=False)
                place.put(made[id(place.empty)])

    def _renew(self, held: _Held) -> None:
        """Assigns a part that was just read the new values of the groups that are done."""
        if self._saved is None:
            return
        groups: dict[int, list[str]] = {}
        for name in held.places:
            if name in self._group_of:
                groups.setdefault(self._group_of[name], []).append(name)
        pruned = self._twins[0].model
        for place in sorted(groups):
            for new in self._saved.load(place, groups[place]) or ():
                rows = self._rows[new.name]
                if rows.mean_of is not None:  # `put` subtracts a bias from this mean
                    path = next(path for path, module in pruned.named_modules() if module is rows.mean_of)
                    self._read_buffer(pruned, f"{path}.running_mean")
                new.put(rows)
        if self._distilled is not None:
            for name, values in self._distilled.values(held.name):
                set_values(held.places[name][0].parameter, values)

    def _release(self, held: _Held) -> None:
        if held.gate.open:
            held.gate.open = False
            held.gate.inside.clear()
            for places in held.places.values():
                for place in places:
                    place.put(place.empty)
            return_freed_memory()

    def _take(self, model: nn.Module, part: str) -> None:
        """Puts the gate before a part of a twin, and records the places of its Parameters."""
        held, module = self._held[part], model.get_submodule(part)
        for own, _ in module.named_parameters(remove_duplicate=False):
            name = f"{part}.{own}"
            if place := _place(model, name):
                held.places.setdefault(name, []).append(place)
                self._part_of[name] = held
        _guard(module, held.gate)

    def _settle_tables(self, model: nn.Module) -> None:
        """Maps the tables of embeddings from their files, so that only the rows in use are read."""
        for path, module in model.named_modules():
            name = f"{path}.weight".removeprefix(".")
            if type(module) is not nn.Embedding or name not in self._source:
                continue
            table, wanted = self._source.mapped(name), module.weight.dtype
            if table is None or not module.weight.is_meta:
                continue
            module.weight = nn.Parameter(table, requires_grad=False)
            if table.dtype != wanted:
                module.register_forward_hook(lambda _, __, rows, wanted=wanted: rows.to(wanted))

    def _read_buffer(self, model: nn.Module, name: str) -> None:
        model.get_buffer(name).copy_(self._source.read(name))


def _place(model: nn.Module, name: str) -> _Place | None:
    """The place of a Parameter; None if it is in memory."""
    path, _, attribute = name.rpartition(".")
    module: Any = model.get_submodule(path)
    parameter = module._parameters[attribute]
    return _Place(module, attribute, parameter) if parameter.is_meta else None


def _guard(module: nn.Module, gate: Gate) -> None:
    def before(_: nn.Module, __: Any) -> None:
        if (found := current_pass()) is not None:
            found.enter(gate)

    def after(_: nn.Module, __: Any, ___: Any) -> None:
        if (found := current_pass()) is not None:
            found.leave(gate)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)
