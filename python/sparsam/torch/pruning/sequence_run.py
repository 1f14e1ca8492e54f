"""Pruning layer by layer along a `LayerSequence`: fit each group, keep what is done, and warn."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Protocol

from sparsam.torch.pruning.calibration import Batch, distinct_tokens
from sparsam.torch.pruning.layer_fits import NewLayer, fit_group
from sparsam.torch.pruning.prune_plan import PrunePlan
from sparsam.torch.pruning.saved_progress import SavedProgress
from sparsam.torch.pruning.sequence import LayerSequence
from torch import nn

__all__ = ["Step", "alike", "prune_in_sequence"]

_ROWS_PER_INPUT = 2  # with fewer rows of calibration per input of a layer, its own targets are safer
_DISTINCT, _VOCABULARY = 0.08, 0.25  # the least share of distinct tokens in all tokens, and in the vocabulary


class Step(Protocol):
    """A function that is called after each group; `skipped`: an earlier call did it."""

    def __call__(self, what: str, count: int, *, skipped: bool = False) -> None:
        """`count` weights are done, the last of them `what`."""


def prune_in_sequence(
    sequence: LayerSequence,
    plan: PrunePlan,
    executor: Executor | None,
    saved: SavedProgress | None,
    step: Step,
    said: list[str],
) -> dict[str, NewLayer]:
    """Prunes layer by layer.

    Args:
        sequence: The network.
        plan: What to do.
        executor: Solves the problems of a group; None: this thread.
        saved: The results of earlier calls, to which this one adds; None: nothing is kept.
        step: Called after each group.
        said: The texts of warnings are appended to it.

    Returns:
        Name -> the new layer without its values, for the report.
    """
    known: dict[str, NewLayer] = {}
    short: list[tuple[str, int, int]] = []
    for place, group in enumerate(sequence.groups):
        layers = {name: sequence.layers[name] for name in group.names}
        found = None if saved is None else saved.load(place, group.names)
        skipped = found is not None
        if found is None:
            statistics = sequence.gather(group)
            fitted = statistics.parts[0][0]
            if statistics.targets and fitted.count < _ROWS_PER_INPUT * fitted.in_features:
                statistics.targets.clear()
                short.append((group.names[0], fitted.count, fitted.in_features))
            found = fit_group(
                statistics, layers, plan.pool_of, plan.method, executor, sequence.rectified(group)
            )
            del statistics, fitted
            if saved is not None:
                saved.save(place, found)
        for new in found:
            sequence.put(new)
            known[new.name] = new.without_values()
        del found
        sequence.finish_group(group)
        step(group.names[-1], len(group.names), skipped=skipped)
    if short:
        said.append(_short(*short[0], others=len(short) - 1))
    return known


def alike(model: nn.Module, batches: Sequence[Batch]) -> str:
    """The warning if the texts of the calibration are too similar."""
    tokens = distinct_tokens(batches)
    if tokens is None:
        return ""
    distinct, total = tokens
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    if distinct < min(_DISTINCT * total, _VOCABULARY * max(tables, default=0)) and distinct < 500:
        return (
            f"calibration: expected text of many kinds; got {distinct} distinct tokens of {total}; layers "
            "are fitted to their own outputs, which is better there; calibrate with more varied text"
        )
    return ""


def _short(name: str, rows: int, inputs: int, others: int) -> str:
    more = f" (and as many in proportion for {others} others)" if others else ""
    return (
        f"calibration: expected at least {_ROWS_PER_INPUT * inputs} rows for the {inputs} inputs of "
        f"{name!r}{more}; got {rows}; they are fitted to their own outputs, which is better there; give more "
        "samples"
    )
