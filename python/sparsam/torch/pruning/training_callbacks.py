"""Callbacks that run a pruner in Hugging Face's Trainer and in Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsam.torch.pruning.while_training import Pruner

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback
    from transformers import TrainerCallback

__all__ = ["lightning_callback", "trainer_callback"]


def trainer_callback(pruner: Pruner, *, mask_gradients: bool = False) -> TrainerCallback:
    """Returns a callback for Hugging Face's Trainer: `Trainer(model, ..., callbacks=[...])`.

    Each checkpoint of the Trainer then has the pruner's state in `sparsam_pruner.pt`, and
    `train(resume_from_checkpoint=...)` resumes from it.

    Args:
        pruner: The pruner of the model that the Trainer trains.
        mask_gradients: Zero the gradients of pruned weights before each optimizer step, which is after
            gradient clipping, so that the norms there include them.

    Raises:
        ImportError: transformers is not installed.
    """
    try:
        from sparsam.torch.pruning.huggingface_callback import HuggingFaceCallback  # noqa: PLC0415
    except ModuleNotFoundError as error:
        msg = "trainer_callback: expected transformers; got no such package; pip install transformers"
        raise ImportError(msg) from error
    return HuggingFaceCallback(pruner, mask_gradients=mask_gradients)


def lightning_callback(pruner: Pruner, *, mask_gradients: bool = False) -> Callback:
    """Returns a callback for Lightning: `lightning.Trainer(callbacks=[...])`.

    Checkpoints of Lightning then have the pruner's state, and `fit(ckpt_path=...)` resumes from it.

    Args:
        pruner: The pruner of the LightningModule, or of a model inside it.
        mask_gradients: Zero the gradients of pruned weights before they are clipped.

    Raises:
        ImportError: lightning is not installed.
    """
    try:
        from sparsam.torch.pruning.lightning_callback import LightningCallback  # noqa: PLC0415
    except ModuleNotFoundError as error:
        msg = "lightning_callback: expected lightning; got no such package; pip install lightning"
        raise ImportError(msg) from error
    return LightningCallback(pruner, mask_gradients=mask_gradients)
