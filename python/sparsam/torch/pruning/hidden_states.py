"""Hidden states of a model: the outputs of its blocks, or of its layers if it has no blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sparsam.torch.pruning.calibration import Batch
from sparsam.torch.pruning.prunable import prunable_weights
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["HiddenStates", "block_names", "first_tensor", "unpadded_rows"]


class HiddenStates(AbstractContextManager["HiddenStates"]):
    """Collects the outputs of some modules while a model runs; a context manager that removes its hooks."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._modules = {name: model.get_submodule(name) for name in names}
        self._seen: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._keeper(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._seen = {}

    def taken(self) -> dict[str, Tensor]:
        """Returns the outputs since the last call: name -> the output of the module's last run."""
        seen, self._seen = self._seen, {}
        return seen

    def _keeper(self, name: str) -> Any:
        def keep(module: nn.Module, args: Any, result: Any) -> None:  # noqa: ARG001
            tensor = first_tensor(result)
            if tensor is not None:
                self._seen[name] = tensor

        return keep


def block_names(model: nn.Module) -> list[str]:
    """Returns the names of the blocks (the outermost modules of one class in a row), or of the layers."""
    found: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{block}.") for block in found):
            continue
        children = list(module.named_children())
        alike = {type(child) for _, child in children}
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(children) < 2 or len(alike) > 1:
            continue
        if all(any(True for _ in child.children()) for _, child in children):
            found += [f"{name}.{child}" if name else child for child, _ in children]
    if found:
        return found
    weights, _ = prunable_weights(model)
    return list(dict.fromkeys(weight.name.rpartition(".")[0] for weight in weights))


def first_tensor(result: Any) -> Tensor | None:
    """Returns the output of a model or a block: its logits, embedding or last states, or its first tensor."""
    if isinstance(result, Tensor):
        return result if result.is_floating_point() else None
    if isinstance(result, Mapping):
        for key in ("logits", "sentence_embedding", "last_hidden_state"):
            if isinstance(result.get(key), Tensor):
                return result[key]  # type: ignore[no-any-return]
        result = tuple(result.values())
    if isinstance(result, (tuple, list)):
        for value in result:
            tensor = first_tensor(value)
            if tensor is not None:
                return tensor
    return None


def unpadded_rows(tensor: Tensor, batch: Batch) -> Tensor:
    """Returns a tensor (..., features) as rows (n, features) in float32, without a batch's padding."""
    rows = tensor.reshape(-1, tensor.shape[-1]).float()
    mask = batch.row_mask(tensor.shape[:-1]) if tensor.ndim == 3 else None
    return rows if mask is None else rows[mask]
