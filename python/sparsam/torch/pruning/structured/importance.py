"""The importance of attention heads for a task: the score without each head."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsam.inputs.checks import check_function, is_number
from sparsam.inputs.display import printable
from sparsam.report import Readable
from sparsam.torch.acceleration.model_runner import ModelRunner, as_examples
from sparsam.torch.pruning.structured.search import check_model, find_structures
from sparsam.torch.pruning.structured.structures import cuts_of
from sparsam.torch.pruning.structured.surgery import Surgery
from torch import nn

__all__ = ["HeadImportance", "head_importance"]


@dataclass(frozen=True)
class HeadImportance(Readable):
    """The scores of a model without each single head. `print` it, or pass it to `shrink`.

    Attributes:
        dense_score: The score with all heads.
        scores: Name of an attention -> for each of its heads the score without it.
    """

    dense_score: float
    scores: dict[str, tuple[float, ...]]

    @property
    def drops(self) -> dict[str, tuple[float, ...]]:
        """Name of an attention -> how much the score falls without each head; negative where it rises."""
        return {name: tuple(self.dense_score - s for s in scores) for name, scores in self.scores.items()}

    def ranking(self) -> list[tuple[str, int]]:
        """(attention, head), the least important first; equal ones in the order of the model."""
        heads = [(name, i) for name, scores in self.scores.items() for i in range(len(scores))]
        return sorted(heads, key=lambda head: -self.scores[head[0]][head[1]])

    def __str__(self) -> str:
        width = max(map(len, self.scores), default=0)
        lines = [f"score {self.dense_score:.6g} with all heads; its drop without each of them"]
        lines += [
            f"{printable(name).ljust(width)}  " + "  ".join(f"{drop:+.4g}" for drop in drops)
            for name, drops in self.drops.items()
        ]
        return "\n".join(lines)


def head_importance(
    model: nn.Module,
    eval_fn: Callable[[nn.Module], float],
    example_inputs: Any,
    *,
    callback: Callable[[str, int, float], object] | None = None,
) -> HeadImportance:
    """Measures the importance of attention heads for a task: evaluates the model without each one.

    One evaluation for each head (with grouped queries: a key-value head with its query heads), and one more.
    The model is in eval mode during the call, and unchanged afterwards (Michel, Levy and Neubig, "Are sixteen
    heads really better than one?", 2019, do this with BERT).

    Args:
        model: The model; not compiled or accelerated.
        eval_fn: Model -> score; the larger, the better.
        example_inputs: As for `shrink`; the attention is found by running them.
        callback: Called after each head with the attention's name, the head and the score.

    Returns:
        The scores, for `shrink(..., importance=...)`.

    Raises:
        ValueError: The model has no attention whose heads can be removed; `eval_fn` did not return a finite
            number.
        TypeError: `model` is not a module, or is compiled.
    """
    check_model(model)
    check_function("eval_fn", eval_fn)
    check_function("callback", callback, optional=True)
    examples = as_examples(example_inputs)
    with ModelRunner(model, examples) as runner:
        runner.first_outputs()
        structures, left = find_structures(model, examples[0], ("heads",))
        if not structures:
            reasons = "; ".join(f"{name}: {why}" for name, why in left.items()) or "no attention ran"
            msg = f"model: expected attention heads to cut; got none ({reasons}); pass another model"
            raise ValueError(msg)
        dense = _score(eval_fn, model, "all heads")
        scores: dict[str, tuple[float, ...]] = {}
        for structure in structures:
            found = []
            for head in range(structure.units):
                surgery = Surgery(model, cuts_of([structure], {structure.name: np.array([head], np.int64)}))
                with surgery.undone_by_errors():
                    surgery.show("zeroed")
                    found.append(_score(eval_fn, model, f"head {head} of {structure.name} dropped"))
                surgery.show("whole")
                if callback is not None:
                    callback(structure.name, head, found[-1])
            scores[structure.name] = tuple(found)
    return HeadImportance(dense, scores)


def _score(eval_fn: Callable[[nn.Module], float], model: nn.Module, where: str) -> float:
    score = eval_fn(model)
    if not is_number(score) or not math.isfinite(score):
        msg = f"eval_fn: expected a finite number as score; got {score!r} with {where}; return one"
        raise ValueError(msg)
    return float(score)
