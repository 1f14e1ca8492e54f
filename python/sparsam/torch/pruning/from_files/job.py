"""The plan of a run from files to files, checked before anything is read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparsam.allocation import OWL, Global, resolve
from sparsam.checkpoint.layout import Layout
from sparsam.config import PruningConfig
from sparsam.inputs.checks import expected
from sparsam.torch.pruning.calibration import Batch
from sparsam.torch.pruning.from_files.model_parts import Part, find_parts
from sparsam.torch.pruning.from_files.needed_memory import Demand, Seen, check_memory, part_size
from sparsam.torch.pruning.from_files.source_tensors import SourceTensors
from sparsam.torch.pruning.prunable import heads_of, named_weights, prunable_weights
from sparsam.torch.pruning.prune_plan import PrunePlan
from sparsam.torch.pruning.saved_progress import identify
from torch import nn

__all__ = ["Job"]


@dataclass(frozen=True)
class Job:
    """What is pruned, and where its parts and its weights are."""

    model: nn.Module
    layouts: Sequence[Layout]
    plan: PrunePlan
    dense: Mapping[str, str]
    parts: Sequence[Part]
    source: SourceTensors

    @classmethod
    def of(
        cls,
        model: nn.Module,
        layouts: Sequence[Layout],
        given: PruningConfig,
        *,
        values: str | None,
        group: int | None,
    ) -> Job:
        """Checks what can be checked before anything is read."""
        weights, dense = prunable_weights(
            model, exclude=given.exclude, named=named_weights(given), loaded=False
        )
        if not weights:
            kind = type(model).__name__
            msg = f"model: expected weights to prune; got none in {kind}; check exclude, and the model"
            raise ValueError(msg)
        for weight in weights:
            if not weight.parameter.is_meta:
                wanted = "weights on the meta device, which are read from the files"
                got = f"{weight.name!r} in memory"
                raise ValueError(expected("model", got, wanted, "make it in torch.device('meta')"))
        if given.allocation != "uniform" and isinstance(resolve(given.allocation), (Global, OWL)):
            do = "take the sparsities of sparsam.allocation.allocate"
            raise ValueError(expected("allocation", given.allocation, "one that needs no weights", do))
        plan = PrunePlan.of(weights, given, calibrated=True, values=values, group=group)
        if not plan.by_layer:
            got = f"scope {given.scope!r}, method {given.method!r} and {len(given.ties)} ties"
            msg = (
                f"config: expected pruning layer by layer, in scope 'layer' or 'row', without ties or "
                f"gradients; got {got}; call sparsam.checkpoint.prune_files without calibration, or load the "
                "model and call prune"
            )
            raise ValueError(msg)
        for name, buffer in model.named_buffers():
            if buffer.device.type != "cpu":
                wanted = "buffers on the CPU, since files need not have them"
                got = f"{name!r} on {buffer.device}"
                raise ValueError(expected("model", got, wanted, "make them outside of torch.device('meta')"))
        parts = find_parts(model)
        _check_shared(model, parts, plan)
        return cls(model, layouts, plan, dense, parts, SourceTensors(model, layouts))

    @property
    def heads(self) -> set[str]:
        """The parts that are output layers of language models, without a weight that is pruned."""
        found = heads_of(self.model)
        return {
            part.name
            for part in self.parts
            if any(id(one) in found for one in self.model.get_submodule(part.name).modules())
            and not any(name.startswith(f"{part.name}.") for name in self.plan.weights)
        }

    def check_memory(self, limit: int, demand: Demand, seen: Seen | None = None) -> None:
        """Raises ValueError if `limit` bytes are not enough; as the function of that name."""
        check_memory(limit, self.model, self.parts, self.plan.weights, demand, skip=self.heads, seen=seen)

    @property
    def largest_part(self) -> int:
        """The bytes of the largest part in memory."""
        return max(part_size(self.model, part) for part in self.parts if part.name not in self.heads)

    def identity(self, batches: Sequence[Batch], config: PruningConfig, settings: str) -> str:
        """The identity of the run: model, files, calibration and configuration."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(identify(self.model, batches, config, f"from files {settings}").encode())
        for layout in self.layouts:
            text = f"{layout.file.resolve()} {layout.size} {layout.mtime_ns}"
            digest.update(text.encode(errors="surrogateescape"))
            digest.update(layout.head)
        return digest.hexdigest()


def _check_shared(model: nn.Module, parts: Sequence[Part], plan: PrunePlan) -> None:
    """Raises ValueError for a weight to prune that several parts have."""
    places: dict[int, tuple[str, str]] = {}
    for part in parts:
        for own, parameter in model.get_submodule(part.name).named_parameters(remove_duplicate=False):
            name = f"{part.name}.{own}"
            first, other = places.setdefault(id(parameter), (name, part.name))
            if other != part.name and first in plan.weights:
                msg = (
                    f"weight {first!r}: expected one that a single block has; got one that is also {name!r}; "
                    "exclude it, or load the model and call prune"
                )
                raise ValueError(msg)
