"""The callback for Lightning; imports lightning."""
# ruff: noqa: ARG002

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from sparsam.torch.pruning.while_training import Pruner

__all__ = ["LightningCallback"]


class LightningCallback(pl.Callback):
    """Steps a pruner after each optimizer step, and saves its state in Lightning's checkpoints."""

    def __init__(self, pruner: Pruner, *, mask_gradients: bool) -> None:
        self.pruner = pruner
        self._mask_gradients = mask_gradients
        self._optimizer_steps = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gives the pruner the optimizer, whose state it may have to reset, if it has none."""
        self.pruner._weights.check_model("LightningModule", pl_module)
        self._optimizer_steps = trainer.global_step
        if self.pruner.optimizer is None and len(trainer.optimizers) == 1:
            self.pruner.optimizer = trainer.optimizers[0]

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Masks the gradients if requested."""
        if self._mask_gradients:
            self.pruner.mask_gradients()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Steps the pruner if the optimizer stepped, which it does not for every accumulated batch."""
        if trainer.global_step > self._optimizer_steps:
            self._optimizer_steps = trainer.global_step
            self.pruner.step()

    def state_dict(self) -> dict[str, Any]:
        """The pruner's state, for the checkpoint."""
        return self.pruner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The pruner's state, from the checkpoint."""
        self.pruner.load_state_dict(state_dict)
