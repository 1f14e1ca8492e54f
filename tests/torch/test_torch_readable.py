"""Every report of the package: plain data, JSON, text and HTML, in which names are harmless."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest

import sparsam
import sparsam.torch
from sparsam.analysis.bisection import SearchProbe
from sparsam.analysis.density_choice import Step
from sparsam.analysis.lottery import TicketResult, TicketRound
from sparsam.analysis.search import SearchResult
from sparsam.analysis.sensitivity_curve import SensitivityCurve, SensitivityPoint
from sparsam.analysis.sensitivity_report import SensitivityReport
from sparsam.report import LayerStats, Readable, Report
from sparsam.runtime import BuildInfo
from sparsam.sparse.dispatch import Candidate, Explanation
from sparsam.torch import (
    AccelerationReport,
    CompressionReport,
    DistillationReport,
    HeadImportance,
    LatencyPlan,
    LayerRow,
    PruningReport,
    ShrinkReport,
    SmallestModel,
)
from sparsam.torch.compression.compression_report import Stage
from sparsam.torch.compression.quality import Quality
from sparsam.torch.compression.timing import Timing
from sparsam.torch.pruning.pruning_report import PrunedWeight
from sparsam.torch.pruning.structured.report import StructureRow

NAME = "<script>alert('x')</script>&\x1b[2J"

_REPORT = Report([LayerStats(NAME, 4, 2, 0.5, (2, 2), "float32", "unstructured", 16, 9)])
_PRUNING = PruningReport(
    [PrunedWeight(NAME, 4, 2, 0.5, (2, 2), "float32", "unstructured", 16, 9, 0.1, NAME)], NAME, 1.0, [NAME]
)
_ACCELERATION = AccelerationReport(
    (LayerRow(NAME, "Linear", (2, 2), 0.5, "unstructured", (((3, 2), 1),), reason=NAME),),
    2.0, 1.0, 16, 9, 1e-7, disturbed=True, summary=NAME,
)  # fmt: skip
_PROBES = (SearchProbe(0.0, 0.0, 1.0, passed=True), SearchProbe(0.5, 0.5, 0.4, passed=False))
_ROUNDS = (TicketRound(0, 0.0, 1.0), TicketRound(1, 0.5, 0.9))
_POINTS = (SensitivityPoint(NAME, 0.5, 2, 0.7),)
_STEP = {NAME: Step(0.5, 1e-3, 0.1)}

REPORTS: tuple[Readable, ...] = (
    _REPORT,
    _PRUNING,
    _ACCELERATION,
    TicketResult(_ROUNDS, {}, {}, {}, _REPORT, (0,), (0.9,), {"random": (0.8,)}),
    SearchResult(0.5, 0.4, {NAME: np.ones(1)}, {}, _REPORT, _PROBES, 0.3, 1.0, finished=False),
    SensitivityReport(1.0, (SensitivityCurve(NAME, ((NAME, 4),), _POINTS),), "magnitude", "unstructured"),
    Explanation("W <8x4>", 3, "panels", "it is < all", (Candidate("panels", 1.0),)),
    BuildInfo("1", "GCC <12>", ("avx2",), ("avx2",), "avx2", 1, "OpenMP"),
    CompressionReport(
        NAME,
        NAME,
        (Stage("dense", 0.0, Quality("similarity", 1.0), None, 1.0),),
        ((0.5, 0.9),),
        ((0.5, 0.95),),
        (Timing(1, 2, 2.0, 1.0),),
        _PRUNING,
        _ACCELERATION,
        1.0,
    ),
    DistillationReport(2, 1.0, "steps", (1.0, 0.5), (0.5, 0.5)),
    HeadImportance(1.0, {NAME: (0.9, 0.8)}),
    LatencyPlan(_STEP, _STEP, {NAME: 4}, {NAME: (Step(0.5, 1e-3, 0.1),)}),
    ShrinkReport(
        (StructureRow(NAME, "heads", 4, (0, 1)),), 9, 5, 2.0, 1.0, {NAME: NAME}, {"heads": 2},
        ((NAME, 0, (2, 3)),), ((NAME, "heads", 2),),
    ),
    SmallestModel(0.5, 0.9, 0.8, _PROBES, finished=True, report=_PRUNING),
)  # fmt: skip


def readable_classes() -> set[type[Any]]:
    """All classes of the package that are readable, wherever they are."""
    for module in pkgutil.walk_packages(sparsam.__path__, "sparsam."):
        if not module.name.startswith(("sparsam.cli", "sparsam.demo", "sparsam.bench", "sparsam.__main__")):
            importlib.import_module(module.name)

    def below(kind: type[Any]) -> set[type[Any]]:
        return {kind, *(one for child in kind.__subclasses__() for one in below(child))}

    return below(Readable) - {Readable}


def test_each_kind_of_report_is_here() -> None:
    assert readable_classes() == {type(report) for report in REPORTS}


def test_whatever_prints_as_a_report_is_one() -> None:
    public = [getattr(package, name) for package in (sparsam, sparsam.torch) for name in package.__all__]
    kinds = {kind for kind in public if inspect.isclass(kind) and kind.__name__.endswith(("Report", "Plan"))}
    assert kinds
    assert all(issubclass(kind, Readable) for kind in kinds)
    returned = {
        found.rsplit(".", 1)[-1]
        for one in public
        if inspect.isfunction(one)
        and isinstance(found := one.__annotations__.get("return"), str)
        and found.endswith(("Report", "Plan", "Model", "Importance", "TicketResult", "SearchResult"))
    }
    assert {"AccelerationReport", "LatencyPlan", "SearchResult", "TicketResult", "SmallestModel"} <= returned
    assert returned <= {kind.__name__ for kind in readable_classes()}


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: type(report).__name__)
def test_report(report: Readable) -> None:
    content = report.to_dict()
    assert json.loads(report.to_json()) == json.loads(json.dumps(content, allow_nan=False)) == content
    page = report._repr_html_()
    ET.fromstring(f"<div>{page}</div>")
    assert "<script" not in page
    assert "\x1b" not in page
    assert "\x1b" not in str(report)
    assert NAME not in page
