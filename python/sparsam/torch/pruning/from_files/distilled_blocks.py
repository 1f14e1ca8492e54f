"""What is kept of the distillation of each block: its new values, and its error before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from sparsam import checkpoint
from sparsam.checkpoint.atomic import open_folder, publish
from sparsam.checkpoint.json_state import Document, read
from sparsam.checkpoint.layout import read_layout
from sparsam.torch.layers.packed_weight import from_array, to_array
from sparsam.torch.pruning.pruning_report import DistilledBlock
from torch import Tensor

__all__ = ["DistilledBlocks"]


class _Outcome(Document, frozen=True):
    """What became of a block."""

    WHAT: ClassVar[str] = "the distillation of a block"
    MARK: ClassVar[str] = "sparsam_distilled_block"

    steps: int
    before: float
    after: float


class DistilledBlocks:
    """The blocks of a run that are distilled, in a folder of that run.

    Attributes:
        names: The blocks to distil.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        """Opens or makes the folder."""
        self._folder, self.names = open_folder("state_dir", folder), list(names)

    def outcome(self, block: str) -> DistilledBlock | None:
        """What became of a block; None if it was not distilled yet."""
        if block not in self.names or not self._file(block, ".json").exists():
            return None
        file = self._file(block, ".json")
        found = _Outcome.from_json(read(file, "delete it"), str(file), "delete it")
        return DistilledBlock(block, found.steps, found.before, found.after)

    def save(self, found: DistilledBlock, values: Mapping[str, Tensor]) -> None:
        """Saves what became of a block, its new values first; there are none if it stays as it was."""
        if found.improved:
            arrays: dict[str, Any] = {name: to_array(one.detach()) for name, one in values.items()}
            checkpoint.save(self._file(found.name, ".safetensors"), arrays)
        text = _Outcome(steps=found.steps, before=found.before, after=found.after).to_json()
        publish({self._file(found.name, ".json"): lambda path: path.write_text(text, encoding="utf-8")})

    def values(self, block: str) -> Iterator[tuple[str, Tensor]]:
        """The new values of a block; none if it was not distilled, or stays as it was."""
        if self._changed(block):
            for name, array in checkpoint.stream(self._file(block, ".safetensors")):
                yield name, from_array(array)

    def changed(self) -> Iterator[str]:
        """The names of all Parameters that have new values."""
        for block in filter(self._changed, self.names):
            for entry in read_layout(self._file(block, ".safetensors")).entries:
                yield entry.name

    def _changed(self, block: str) -> bool:
        found = self.outcome(block)
        return found is not None and found.improved

    def _file(self, block: str, suffix: str) -> Path:
        return self._folder / f"block-{self.names.index(block):05d}{suffix}"
