from __future__ import annotations

import dataclasses
import json

from sparsam.report import LayerStats, Report

REPORT = Report(
    [
        LayerStats("fc1.weight", 2048, 1638, 1638 / 2048, (64, 32), "float32", "unstructured", 8192, 1896),
        LayerStats("fc1.bias", 64, 0, 0.0, (64,), "float32", "dense", 256, 256),
        LayerStats(
            "emb|pos", 4_000_000, 2_000_000, 0.5, (4000, 1000), "bfloat16", "2:4", 8_000_000, 4_500_000
        ),
    ]
)

TEXT = """\
tensor      shape      dtype     pattern          params     pruned  sparsity    dense   packed
-----------------------------------------------------------------------------------------------
fc1.weight  64x32      float32   unstructured      2,048      1,638   79.98 %  8.0 KiB  1.9 KiB
fc1.bias    64         float32   dense                64          0    0.00 %    256 B    256 B
emb|pos     4000x1000  bfloat16  2:4           4,000,000  2,000,000   50.00 %  7.6 MiB  4.3 MiB
-----------------------------------------------------------------------------------------------
total                                          4,002,112  2,001,638   50.01 %  7.6 MiB  4.3 MiB"""

MARKDOWN = """\
| tensor | shape | dtype | pattern | params | pruned | sparsity | dense | packed |
| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |
| fc1.weight | 64x32 | float32 | unstructured | 2,048 | 1,638 | 79.98 % | 8.0 KiB | 1.9 KiB |
| fc1.bias | 64 | float32 | dense | 64 | 0 | 0.00 % | 256 B | 256 B |
| emb\\|pos | 4000x1000 | bfloat16 | 2:4 | 4,000,000 | 2,000,000 | 50.00 % | 7.6 MiB | 4.3 MiB |
| total |  |  |  | 4,002,112 | 2,001,638 | 50.01 % | 7.6 MiB | 4.3 MiB |"""


def test_text() -> None:
    assert str(REPORT) == TEXT


def test_markdown() -> None:
    assert REPORT.to_markdown() == MARKDOWN


def test_json_is_the_dict_with_stable_keys() -> None:
    report = json.loads(REPORT.to_json())
    assert report == REPORT.to_dict()
    assert list(report) == ["layers", "total"]
    assert list(report["layers"][0]) == [field.name for field in dataclasses.fields(LayerStats)]
    assert report["layers"][0]["shape"] == [64, 32]
    assert report["total"] == {
        "name": "total",
        "total_params": 4_002_112,
        "pruned_params": 2_001_638,
        "sparsity": 2_001_638 / 4_002_112,
        "dense_bytes": 8_008_448,
        "packed_bytes": 4_502_152,
    }
    assert "\n" not in REPORT.to_json(indent=None)


def test_four_fields_are_enough() -> None:
    stats = LayerStats("fc", 10, 5, 0.5)
    assert (stats.name, stats.total_params, stats.pruned_params, stats.sparsity) == ("fc", 10, 5, 0.5)
    assert Report([stats]).total.sparsity == 0.5


def test_nothing_at_all() -> None:
    report = Report([])
    assert report.total.sparsity == 0.0
    assert str(report).splitlines()[-1].split() == ["total", "0", "0", "0.00", "%", "0", "B", "0", "B"]
    assert report == Report(iter(()))


def test_sizes_change_units() -> None:
    def packed(size: int) -> str:
        return str(Report([LayerStats("w", 1, 0, 0.0, packed_bytes=size)])).splitlines()[2].rsplit("  ", 1)[1]

    sizes = [packed(n).strip() for n in (0, 1023, 1024, 1024**2, 3 * 1024**3, 5 * 1024**4, 2000 * 1024**4)]
    assert sizes == ["0 B", "1023 B", "1.0 KiB", "1.0 MiB", "3.0 GiB", "5.0 TiB", "2000.0 TiB"]
