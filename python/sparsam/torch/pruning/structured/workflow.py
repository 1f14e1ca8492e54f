"""`shrink`: find, choose, cut, verify, measure, report."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

import torch
from sparsam.config import PruningConfig
from sparsam.inputs.checks import expected, is_number
from sparsam.inputs.messages import say
from sparsam.inputs.names import NamePatterns
from sparsam.torch.acceleration.model_runner import ModelRunner, as_examples, difference
from sparsam.torch.pruning.structured.importance import HeadImportance
from sparsam.torch.pruning.structured.report import ShrinkReport, StructureRow, change_config
from sparsam.torch.pruning.structured.search import check_model, find_structures, without_cache
from sparsam.torch.pruning.structured.structures import KINDS, Cuts, Structure, cuts_of
from sparsam.torch.pruning.structured.surgery import Surgery
from sparsam.torch.pruning.structured.unit_selection import check_config, select_units
from torch import nn

__all__ = ["shrink"]

_ROUNDS = (5, 50)


def shrink(
    model: nn.Module,
    config: PruningConfig | float | None,
    example_inputs: Any,
    *,
    kinds: Collection[str] = KINDS,
    importance: HeadImportance | Mapping[str, ArrayLike] | None = None,
    seconds: float = 1.0,
    verbose: bool = False,
) -> ShrinkReport:
    """Makes a dense model smaller in place, by removing attention heads, neurons and channels.

    - *Heads*: of every attention that calls PyTorch's `scaled_dot_product_attention` (or can be made to,
      as Hugging Face's). With grouped queries a unit is a key-value head with its query heads.
    - *Neurons* of linear layers and *channels* of convolutions, with all that depends on them (biases, batch
      norms, residual branches, the layers that read them), by Torch-Pruning's dependency graph.

    Outputs of the model, axes that are normalised across, and weights shared with an embedding are kept.
    Exactly `round(sparsity * units)` units are removed, those with the lowest scores (`unit_selection`).
    Biases and batch norms are removed with their units and do not count in the score.

    The small model is compared with the large one in which the same units are zeroed: their outputs for the
    example inputs must agree to the accuracy of the dtype, else the model is left unchanged and an error
    names the structure. Parameters that were cut are new objects: create the optimizer afterwards. Hugging
    Face's `config` (a copy) is updated where all layers agree, so that `from_pretrained` reads the model back
    if its class computes its shapes from those (Llama's heads and neurons, BERT's neurons; not BERT's heads);
    `ShrinkReport.apply` works for every model.

    Args:
        model: The model, not compiled or accelerated; on the CPU.
        config: The sparsity of units, or a `PruningConfig`: `target_sparsity`, `method`, `scope`, and
            `exclude` and `overrides` by name of a structure.
        example_inputs: A tensor, a tuple of arguments, a mapping of keyword arguments, or a list of these.
        kinds: Which of "heads", "neurons", "channels".
        importance: The result of `head_importance`; or name of a structure -> a number for each unit, larger
            for units more worth keeping. Other structures are scored by the method.
        seconds: How long to measure latency; 0: not at all.
        verbose: Whether to print the report.

    Returns:
        What was removed, and the number of parameters and the latency before and after.

    Raises:
        ImportError: Torch-Pruning is not installed and neurons or channels are requested.
        ValueError: Nothing can be cut; a sparsity would leave a structure without units; a field of the
            configuration has no meaning here; the outputs of the small model are wrong.
        TypeError: `model` is not a module, or is compiled; `example_inputs` have another type.
    """
    check_model(model)
    if (
        isinstance(kinds, str)
        or not isinstance(kinds, Sequence)
        or not kinds
        or any(kind not in KINDS for kind in kinds)
    ):
        wanted = f"some of {', '.join(map(repr, KINDS))}"
        raise ValueError(expected("kinds", kinds, wanted, "pass a tuple of them"))
    settings = config if isinstance(config, PruningConfig) else PruningConfig(config)
    check_config(settings)
    if not is_number(seconds):
        raise ValueError(expected("seconds", seconds, "a number", "pass 0 to measure no latency"))
    measured = _measured(importance)
    examples = as_examples(example_inputs)
    with ModelRunner(model, examples) as runner, without_cache(model):
        runner.first_outputs()  # errors in the inputs are found here, before anything else
        structures, left = find_structures(model, examples[0], kinds)
        excluded = NamePatterns(settings.exclude)
        left |= {s.name: "excluded" for s in structures if excluded.matches(s.name)}
        structures = [s for s in structures if s.name not in left]
        if not structures:
            reasons = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:5]) or "no layers"
            msg = (
                f"model: expected {' or '.join(kinds)} to cut; got none ({reasons}); change kinds or exclude"
            )
            raise ValueError(msg)
        tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        gone = select_units(structures, tensors, settings, measured)
        cuts = cuts_of(structures, gone)
        before = sum(parameter.numel() for parameter in model.parameters())
        surgery = Surgery(model, cuts)
        with surgery.undone_by_errors():
            _verify(model, runner, surgery, structures, gone)
            times = _times(runner, surgery, seconds)
            surgery.show("cut")
            report = ShrinkReport(
                tuple(_row(structure, gone[structure.name]) for structure in structures),
                before,
                sum(parameter.numel() for parameter in model.parameters()),
                *times,
                left,
                _config_numbers(getattr(model, "config", None), structures, gone),
                *_plain(cuts),
            )
    change_config(model, report.config)
    if verbose:
        say(str(report))
    return report


def _measured(importance: object) -> dict[str, NDArray[np.float64]]:
    """The importance as arrays."""
    given = importance.drops if isinstance(importance, HeadImportance) else importance
    if given is None:
        return {}
    wanted, do = "what head_importance returned, or numbers for each unit by name", "pass that"
    if not isinstance(given, Mapping):
        raise TypeError(expected("importance", given, wanted, do))
    try:
        return {name: np.asarray(value, np.float64) for name, value in given.items()}
    except (TypeError, ValueError) as error:
        raise TypeError(expected("importance", str(error), wanted, do)) from error


def _row(structure: Structure, gone: NDArray[np.int64]) -> StructureRow:
    kept = np.setdiff1d(np.arange(structure.units), gone)
    return StructureRow(structure.name, structure.kind, structure.units, tuple(map(int, kept)))


def _plain(cuts: Cuts) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    removed = tuple((name, axis, tuple(map(int, gone))) for (name, axis), gone in cuts.removed.items())
    return removed, tuple((module, name, less) for (module, name), less in cuts.lowered.items())


def _verify(
    model: nn.Module,
    runner: ModelRunner,
    surgery: Surgery,
    structures: Sequence[Structure],
    gone: Mapping[str, NDArray[np.int64]],
) -> None:
    """Raises ValueError, with the structure at fault, if the cut model's outputs are not the zeroed one's."""
    wrong = _wrong(model, runner, surgery)
    if not wrong:
        return
    surgery.show("whole")
    for structure in structures:
        alone = Surgery(model, cuts_of([structure], gone))
        why = _wrong(model, runner, alone)
        alone.show("whole")
        if why:
            msg = (
                f"{structure.name}: expected outputs that are those of the model with the same "
                f"{structure.kind} zeroed; got {why}; exclude {structure.name!r}"
            )
            raise ValueError(msg)
    msg = (
        "model: expected outputs that are those of the model with the same units zeroed; got "
        f"{wrong}; pass fewer kinds"
    )
    raise ValueError(msg)


def _wrong(model: nn.Module, runner: ModelRunner, surgery: Surgery) -> str:
    """A description of what is wrong with the outputs of the cut model; "" if nothing is."""
    surgery.show("zeroed")
    wanted = runner.outputs()
    surgery.show("cut")
    try:
        off = difference(runner.outputs(), wanted)
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__} from its forward ({error!s:.120})"
    eps = max((torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()), default=0.0)
    allowed = 4 * eps**0.5
    return f"a difference of {off:.3g}, more than {allowed:.3g}" if off is None or off > allowed else ""


def _times(runner: ModelRunner, surgery: Surgery, seconds: float) -> tuple[float | None, float | None]:
    """Median seconds for the examples before and after, measured alternately."""
    if not seconds > 0:
        return None, None
    end = time.perf_counter() + seconds
    taken: dict[str, list[float]] = {"whole": [], "cut": []}
    for number in range(_ROUNDS[1]):
        if number >= _ROUNDS[0] and time.perf_counter() > end:
            break
        for state, found in taken.items():
            surgery.show(state)  # type: ignore[arg-type]
            found.append(runner.seconds().wall)
    return statistics.median(taken["whole"]), statistics.median(taken["cut"])


def _config_numbers(
    config: Any, structures: Sequence[Structure], gone: Mapping[str, NDArray[np.int64]]
) -> dict[str, int]:
    """The fields of Hugging Face's config that count units, where all layers agree."""
    heads = [s for s in structures if s.heads is not None]
    neurons = [s for s in structures if s.kind == "neurons"]
    numbers: dict[str, int] = {}
    for fields, found, each in (
        (("num_attention_heads",), heads, [s.heads.queries for s in heads if s.heads]),
        (("num_key_value_heads",), heads, [s.heads.keys for s in heads if s.heads]),
        (("intermediate_size", "n_inner"), neurons, [1] * len(neurons)),
    ):
        before = _agreed(s.units * n for s, n in zip(found, each, strict=True))
        after = _agreed((s.units - len(gone[s.name])) * n for s, n in zip(found, each, strict=True))
        for name in fields:
            if before and after and before != after and getattr(config, name, 0) in {before, None}:
                numbers[name] = after
    size = _agreed(s.heads.size for s in heads if s.heads)
    if "num_attention_heads" in numbers and size and getattr(config, "head_dim", 0) is None:
        numbers["head_dim"] = size
    return numbers


def _agreed(values: Iterable[int]) -> int | None:
    """The one value that all have; None if they differ, or there are none."""
    found = set(values)
    return found.pop() if len(found) == 1 else None
