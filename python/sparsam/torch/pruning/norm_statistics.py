"""Running statistics of batch norms, measured again after the layers before them have changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sparsam.torch.pruning.calibration import Batch
from torch import Tensor, nn

__all__ = ["estimate_norms"]


def estimate_norms(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Sets running means and variances to their averages over batches; counters stay as they were.

    Args:
        model: A twin, in evaluation mode.
        batches: The calibration.

    Raises:
        ValueError: A batch has only one value per channel, which has no variance.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    before = [(norm.momentum, _copy(norm.num_batches_tracked)) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
        norm.train()
    with torch.no_grad():
        for index, batch in enumerate(batches):
            try:
                model(*batch.args, **batch.kwargs)
            except ValueError as error:
                wanted = f"several values for each channel in batch {index}"
                msg = f"estimate_batch_norm: expected {wanted}; got {error}; use larger batches"
                raise ValueError(msg) from error
    for norm, (momentum, tracked) in zip(norms, before, strict=True):
        norm.momentum = momentum
        if norm.num_batches_tracked is not None and tracked is not None:
            norm.num_batches_tracked.copy_(tracked)
        norm.eval()


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()
