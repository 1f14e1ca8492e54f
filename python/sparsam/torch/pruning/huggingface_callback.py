"""The callback for Hugging Face's Trainer; imports transformers."""
# ruff: noqa: ARG002

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import torch
from sparsam.checkpoint.atomic import publish
from sparsam.torch.pruning.while_training import Pruner

__all__ = ["HuggingFaceCallback"]

FILE = "sparsam_pruner.pt"


class HuggingFaceCallback(TrainerCallback):
    """Steps a pruner after each optimizer step, and saves its state in the Trainer's checkpoints."""

    def __init__(self, pruner: Pruner, *, mask_gradients: bool) -> None:
        self.pruner = pruner
        self._mask_gradients = mask_gradients

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gives the pruner the optimizer if it has none, and the state of a checkpoint to resume from.

        Raises:
            ValueError: The pruner is another model's, as with `model_init`; a checkpoint lacks its state.
        """
        if (model := kwargs.get("model")) is not None:
            self.pruner._weights.check_model("Trainer's model", model)
        if self.pruner.optimizer is None:
            self.pruner.optimizer = kwargs.get("optimizer")
        if state.global_step in (0, self.pruner.steps):
            return
        path = _checkpoint(args, state) / FILE
        if not path.is_file():
            msg = (
                f"trainer_callback: expected the pruner's state in {path}, since training resumes at step "
                f"{state.global_step}; got no such file; load it with pruner.load_state_dict before train()"
            )
            raise ValueError(msg)
        self.pruner.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Masks the gradients if requested."""
        if self._mask_gradients:
            self.pruner.mask_gradients()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Steps the pruner before the gradients are cleared."""
        self.pruner.step()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes the pruner's state into the checkpoint."""
        folder = _checkpoint(args, state)
        if state.is_world_process_zero and folder.is_dir():
            publish({folder / FILE: lambda path: torch.save(self.pruner.state_dict(), path)})


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
