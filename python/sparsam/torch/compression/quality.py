"""The quality of a model relative to its dense original, on unlabelled held-out texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.nn import functional

import torch
from sparsam.torch.pruning.calibration import Batch
from torch import Tensor, nn

__all__ = ["Quality", "QualityMeasure", "check_outputs", "mean_state"]

_PAIRS = 20_000


@dataclass(frozen=True)
class Quality:
    """A quality measure and its value for a model.

    Attributes:
        measure: "similarity": Spearman's rank correlation between the cosine similarities of pairs of texts
            (all, or 20,000) by this model and by the dense one; embeddings are the mean over the tokens of
            the last hidden state. "agreement": the share of predictions (the arg max of the logits)
            that are the dense model's. "perplexity": of the text itself.
        value: 1 is as good as dense; of the perplexity, less is better.
    """

    measure: str
    value: float

    def __str__(self) -> str:
        return f"{self.value:.2f}" if self.measure == "perplexity" else f"{self.value:.4f}"


class QualityMeasure:
    """Measures models on the same held-out text, against the outputs of the dense model.

    The dense model runs over the text once, when this is made.
    """

    def __init__(self, dense: nn.Module, batches: Sequence[dict[str, Tensor]], *, causal: bool) -> None:
        """Chooses the measure by the dense model's outputs, which `check_outputs` has passed.

        Args:
            dense: The original.
            batches: Held-out text.
            causal: Whether it is a language model.
        """
        self._batches = batches
        self._predictions: list[Tensor] = []
        self._embeddings = np.empty((0, 0))
        self.measure = "perplexity"
        if causal:
            return
        with torch.no_grad():
            if hasattr(dense(**batches[0]), "logits"):
                self.measure, self._predictions = "agreement", _predictions(dense, batches)
            else:
                self.measure, self._embeddings = "similarity", _embeddings(dense, batches)

    def of(self, model: nn.Module) -> Quality:
        """Returns the quality of a model."""
        with torch.no_grad():
            if self.measure == "perplexity":
                value = _perplexity(model, self._batches)
            elif self.measure == "agreement":
                value = _agreement(self._predictions, _predictions(model, self._batches), self._batches)
            else:
                value = _similarity(self._embeddings, _embeddings(model, self._batches))
        return Quality(self.measure, value)


def check_outputs(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Raises ValueError, with the reason, if a model cannot be measured; `batch` is held-out text."""
    wanted = "one that takes plain text and returns logits or last_hidden_state"
    do = "load its base model and save that, or call sparsam.torch.prune with inputs of your own"
    kind = type(model).__name__
    try:
        with torch.no_grad():
            result: Any = model(**batch)
    except Exception as error:
        got = f"a {kind} that raises {type(error).__name__} ({str(error)[:120]})"
        msg = f"model: expected {wanted}; got {got}; {do}"
        raise ValueError(msg) from error
    if not any(isinstance(getattr(result, name, None), Tensor) for name in ("logits", "last_hidden_state")):
        names = ", ".join(getattr(result, "keys", list)())
        msg = f"model: expected {wanted}; got a {kind} that returns {names}; {do}"
        raise ValueError(msg)


def _perplexity(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> float:
    total, count = 0.0, 0
    for batch in batches:
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
        wanted = batch["input_ids"][:, 1:].flatten()
        total += float(functional.cross_entropy(logits.double(), wanted, reduction="sum"))
        count += len(wanted)
    return math.exp(min(total / count, 700.0))


def _predictions(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    return [model(**batch).logits.argmax(-1) for batch in batches]


def _agreement(
    dense: Sequence[Tensor], other: Sequence[Tensor], batches: Sequence[dict[str, Tensor]]
) -> float:
    same, count = 0, 0
    for theirs, ours, batch in zip(dense, other, batches, strict=True):
        seen = batch["attention_mask"].bool() if ours.ndim == 2 else torch.ones_like(ours, dtype=torch.bool)
        same += int((ours == theirs)[seen].sum())
        count += int(seen.sum())
    return same / count


def _embeddings(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> NDArray[np.float64]:
    found = []
    for batch in batches:
        found.append(functional.normalize(_mean(model(**batch), batch["attention_mask"]).double(), dim=1))
    result: NDArray[np.float64] = torch.cat(found).numpy()
    return result


def mean_state(output: Any, batch: Batch) -> Tensor:
    """The embeddings of sentences, as `distill` asks for them: the mean over the tokens of the last state."""
    return _mean(output, batch.named["attention_mask"])


def _mean(output: Any, attention_mask: Tensor) -> Tensor:
    mask = attention_mask[..., None].to(output.last_hidden_state.dtype)
    result: Tensor = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
    return result


def _similarity(dense: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Spearman's correlation; pairs of texts at equal distances in the list of all pairs."""
    i, j = np.triu_indices(len(dense), k=1)
    chosen = np.unique(np.linspace(0, len(i) - 1, min(_PAIRS, len(i))).astype(np.int64))
    ranks = [_ranks(np.einsum("nd,nd->n", e[i[chosen]], e[j[chosen]])) for e in (dense, other)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    result: NDArray[np.float64] = ((ends - counts + ends - 1) / 2)[inverse]
    return result
