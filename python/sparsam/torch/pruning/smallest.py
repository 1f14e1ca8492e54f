"""The smallest model that is still good enough: `prune` at one sparsity after another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from sparsam.analysis.bisection import Bisection, SearchProbe
from sparsam.checkpoint.atomic import open_folder, publish
from sparsam.checkpoint.json_state import Document, read
from sparsam.config import ConfigFields, PruningConfig
from sparsam.inputs.checks import check_function, check_sparsity, expected, integer, is_number, positive
from sparsam.inputs.float_mode import standard_floats
from sparsam.patterns import NM
from sparsam.report import Readable
from sparsam.torch.pruning.calibration import read_calibration
from sparsam.torch.pruning.one_shot import prune
from sparsam.torch.pruning.prunable import check_model
from sparsam.torch.pruning.prune_plan import layer_by_layer, settings_of
from sparsam.torch.pruning.pruning_report import PruningReport
from sparsam.torch.pruning.saved_progress import identify
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SmallestModel", "find_smallest"]

_REMEDY = "delete it, or use another state_dir"


@dataclass(frozen=True)
class SmallestModel(Readable):
    """The result of `find_smallest`; `print` shows it.

    Attributes:
        sparsity: The total sparsity reached, over the weights that are pruned; 0.0 if the model is dense.
        score: Its score.
        min_score: The lowest acceptable score.
        curve: All probes, the dense model first, by rising target.
        finished: Whether the search converged; False if `max_evaluations` ran out.
        report: The report of `prune`; None if the model is dense.
    """

    sparsity: float
    score: float
    min_score: float
    curve: tuple[SearchProbe, ...]
    finished: bool
    report: PruningReport | None = field(repr=False)

    @property
    def dense_score(self) -> float:
        """The score of the dense model."""
        return self.curve[0].score

    def to_dict(self) -> dict[str, Any]:
        """Returns the result in plain types."""
        return {
            **{key: value for key, value in asdict(self).items() if key not in {"curve", "report"}},
            "dense_score": self.dense_score,
            "curve": [probe._asdict() for probe in self.curve],
            "report": None if self.report is None else self.report.to_dict(),
        }

    def __str__(self) -> str:
        scores = f"score {self.score:.6g}, dense {self.dense_score:.6g}, required {self.min_score:.6g}"
        lines = [
            f"{self.sparsity:.2%} of the weights pruned: {scores}",
            f"{len(self.curve)} evaluations"
            + ("" if self.finished else "; the limit was reached before the search converged"),
            "",
            f"{'sparsity':>9}  {'score':>10}",
        ]
        lines += [
            f"{probe.sparsity:>9.2%}  {probe.score:>10.6g}" + ("" if probe.passed else "  too low")
            for probe in self.curve
        ]
        return "\n".join(lines)


class _Saved(Document, frozen=True):
    """The saved probes of a search.

    Attributes:
        identity: The digest of the model, the calibration and the settings.
        probes: (target, sparsity, score) each.
    """

    WHAT: ClassVar[str] = "a search"
    MARK: ClassVar[str] = "sparsam_torch_search"

    identity: str
    probes: list[tuple[float, float, float]]


def find_smallest(
    model: nn.Module,
    eval_fn: Callable[[nn.Module], float],
    *,
    max_drop: float,
    config: PruningConfig | None = None,
    calibration: Iterable[Any] | None = None,
    calibration_samples: int = 1024,
    max_evaluations: int = 12,
    tolerance: float = 0.01,
    checks: int = 1,
    callback: Callable[[SearchProbe], object] | None = None,
    state_dir: str | Path | None = None,
    **changes: Unpack[ConfigFields],
) -> SmallestModel:
    """Prunes a model in place as far as possible while its score falls by at most `max_drop`.

    Bisection over the total sparsity, as `sparsam.find_smallest` does for arrays: every probe prunes the
    dense weights with `prune` and evaluates the model; the result is the best probe below the lowest sparsity
    that failed.

    Args:
        model: As for `prune`.
        eval_fn: Model -> score; the larger, the better. Called in eval mode, without gradients.
        max_drop: How far the score may fall below that of the dense model, at least 0, in units of the score.
        config: As for `prune`; the target sparsity is searched for, overrides keep theirs.
        calibration: As for `prune`; read once.
        calibration_samples: As for `prune`.
        max_evaluations: How many times `eval_fn` may be called, including for the dense model.
        tolerance: The accuracy of the total sparsity.
        checks: The number of further probes that look for failures below the result.
        callback: Called with each probe, the dense model first.
        state_dir: A folder for progress, from which an interrupted search resumes when it is repeated. The
            dense model is then evaluated again, and its score must be the same as before.
        **changes: Fields of `PruningConfig` to set on top of `config`.

    Returns:
        The result and all probes. The model is pruned to it; it is unchanged if no probe passed, or after an
        error.

    Raises:
        ValueError: `eval_fn` did not return a finite number; the configuration has an N:M pattern, which has
            one sparsity; `state_dir` belongs to another search; an argument is out of range; as for `prune`.
        TypeError: `model` is not a module, or `eval_fn` is not a function.
    """
    check_model(model)
    check_function("eval_fn", eval_fn)
    check_function("callback", callback, optional=True)
    if not is_number(max_drop) or not 0 <= max_drop < math.inf:
        raise ValueError(
            expected("max_drop", max_drop, "a number of at least 0", "pass how much may be lost")
        )
    if not check_sparsity("tolerance", tolerance) > 0:
        raise ValueError(expected("tolerance", tolerance, "a number above 0", "pass 0.01, say"))
    if integer("checks", checks) < 0:
        raise ValueError(expected("checks", checks, "an integer of at least 0", "pass 0 for none"))
    most = positive("max_evaluations", max_evaluations)
    settings = settings_of(config, changes, calibrated=calibration is not None)
    if isinstance(settings.pattern, NM):
        do = "call prune, or use another pattern"
        raise ValueError(expected("pattern", settings.pattern, "one with sparsities to search", do))
    batches = None
    if calibration is not None:
        samples = positive("calibration_samples", calibration_samples)
        batches = [batch.given for batch in read_calibration(model, calibration, samples)]
    known = _Known(state_dir, model, batches, calibration_samples, settings)
    in_parts = state_dir is not None and layer_by_layer(settings, calibrated=batches is not None)
    states = _States(model)
    bisection = Bisection(1.0, tolerance, checks)
    reports: dict[float, PruningReport] = {}

    def pruned(target: float) -> PruningReport:
        states.show_dense()
        return prune(
            model,
            settings.with_changes(target_sparsity=target),
            batches,
            calibration_samples=calibration_samples,
            state_dir=Path(str(state_dir)) / f"prune-{target!r}" if in_parts else None,
        )

    def note(target: float, sparsity: float, score: float, least: float) -> None:
        bisection.note(SearchProbe(target, sparsity, score, score >= least))
        known.add(target, sparsity, score)
        if callback is not None:
            callback(bisection.probes[target])

    with states.undone_by_errors():
        score = _score(eval_fn, model, 0.0)
        known.check_score(score)
        least = score - float(max_drop)
        note(0.0, 0.0, score, least)
        while (target := bisection.following()) is not None and len(bisection.probes) < most:
            found = known.probes.get(target)
            if found is None:
                report = pruned(target)
                reached = report.pruned_sparsity
                note(target, reached, _score(eval_fn, model, target), least)
                reports = {target: report} if bisection.bounds()[0] == target else reports
                states.keep(target, bisection.bounds()[0])
            else:
                note(target, *found, least)
        best = bisection.bounds()[0]
        if best == 0:
            states.show_dense()
        elif not states.show(best):
            reports = {best: pruned(best)}
    probe = bisection.probes[best]
    return SmallestModel(
        probe.sparsity, probe.score, least, bisection.curve(), bisection.finished, reports.get(best)
    )


class _States:
    """The tensors of a model: the dense ones, and those of the best probe."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
        self._dense = {key: t.detach().clone() for key, t in self._tensors.items()}
        self._best: tuple[float, dict[int, Tensor]] = (0.0, self._dense)

    def show_dense(self) -> None:
        self._write(self._dense)

    def show(self, target: float) -> bool:
        """Restores the tensors kept for a target; returns False if there are none."""
        if self._best[0] == target:
            self._write(self._best[1])
        return self._best[0] == target

    @standard_floats
    def keep(self, target: float, best: float) -> None:
        """Keeps the current tensors if this target is the best; else drops them."""
        if target == best:
            changed = {k: t for k, t in self._tensors.items() if not torch.equal(t, self._dense[k])}
            self._best = target, {k: t.detach().clone() for k, t in changed.items()}
        elif self._best[0] > best:
            self._best = 0.0, self._dense

    @standard_floats
    def _write(self, values: dict[int, Tensor]) -> None:
        with torch.no_grad():
            for key, tensor in self._tensors.items():
                value = values.get(key, self._dense[key])
                if not torch.equal(tensor, value):  # an expanded buffer cannot be written
                    tensor.copy_(value)

    def undone_by_errors(self) -> _Undone:
        """Restores the dense model if anything is raised inside."""
        return _Undone(self)


class _Undone:
    def __init__(self, states: _States) -> None:
        self._states = states

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._states.show_dense()


class _Known:
    """The probes of an earlier, interrupted search, and those of this one."""

    def __init__(
        self,
        state_dir: str | Path | None,
        model: nn.Module,
        batches: Any,
        samples: int,
        settings: PruningConfig,
    ) -> None:
        self.probes: dict[float, tuple[float, float]] = {}
        self._file: Path | None = None
        if state_dir is None:
            return
        self._file = open_folder("state_dir", state_dir) / "search.json"
        read_again = [] if batches is None else read_calibration(model, batches, samples)
        self._identity = identify(model, read_again, settings)
        if self._file.exists():
            saved = _Saved.from_json(read(self._file, _REMEDY), str(self._file), _REMEDY)
            if saved.identity != self._identity:
                msg = (
                    f"state_dir: {self._file}: expected the search of this model, calibration and "
                    f"configuration; got another's; {_REMEDY}"
                )
                raise ValueError(msg)
            self.probes = {target: (sparsity, score) for target, sparsity, score in saved.probes}

    def check_score(self, dense: float) -> None:
        """Raises ValueError if the dense model had another score, for example from another `eval_fn`."""
        if 0.0 in self.probes and not math.isclose(self.probes[0.0][1], dense, rel_tol=1e-6):
            before = self.probes[0.0][1]
            msg = (
                f"eval_fn: expected that of the search in {self._file}, by which the dense model scores "
                f"{before:.6g}; got {dense:.6g}; pass the same function and data, or {_REMEDY}"
            )
            raise ValueError(msg)

    def add(self, target: float, sparsity: float, score: float) -> None:
        self.probes[target] = sparsity, score
        if self._file is not None:
            saved = _Saved(self._identity, [(at, *found) for at, found in self.probes.items()])
            text = saved.to_json()
            publish({self._file: lambda path: path.write_text(text, encoding="utf-8")})


def _score(eval_fn: Callable[[nn.Module], float], model: nn.Module, target: float) -> float:
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            score = eval_fn(model)
    finally:
        for module, flag in training:
            module.training = flag
    if not is_number(score) or not math.isfinite(score):
        msg = f"eval_fn: expected a finite number as score; got {score!r} at sparsity {target:g}; return one"
        raise ValueError(msg)
    return float(score)
