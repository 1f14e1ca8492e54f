from __future__ import annotations

import dataclasses
import html
import json

import ml_dtypes
import numpy as np
import pytest

from sparsam.report import LayerStats, Report, measure

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


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("encoder.layer_0.q_proj.weight", "encoder.layer_0.q_proj.weight"),
        ("[click](javascript:alert(1))", "\\[click\\](javascript:alert(1))"),
        ("<img src=x onerror=alert(1)>", "&lt;img src=x onerror=alert(1)&gt;"),
        ("![x](http://a/b)", "!\\[x\\](http:\\//a/b)"),
        ("a`b`*c*_d_ ~~e~~", "a\\`b\\`\\*c\\*\\_d\\_ \\~\\~e\\~\\~"),
        ("\x9b31m\x1b[2J", "\\\\x9b31m\\\\x1b\\[2J"),
    ],
)
def test_markdown_shows_names_as_they_are(name: str, shown: str) -> None:
    (row,) = Report([LayerStats(name, 0, 0, 0.0)]).to_markdown().splitlines()[2:3]
    assert row.startswith(f"| {shown} | ")


@pytest.mark.parametrize("name", ["<img src=x>", '" onload="f()', "[a](b)", "\x9b31m\x1b[2J", "a\nb"])
def test_notebooks_show_names_as_they_are(name: str) -> None:
    page = Report([LayerStats(name, 0, 0, 0.0)])._repr_html_()
    shown = html.escape("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name))
    assert f'<td style="text-align: left">{shown}</td>' in page
    assert page.count("<tr>") == page.count("</tr>") == 3


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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int8", "bool", ">f2"])
def test_a_tensor_is_packed_where_that_is_smaller(dtype: str) -> None:
    values = np.array([[0, 1, 0, 0], [-0.0, 0, 0, 1e-7]], np.float64)
    array = values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    nonzero = int((array != 0).sum())
    stats = measure("w", array, pruned=3, pattern="2:4")
    assert (stats.pruned_params, stats.sparsity, stats.pattern) == (3, 3 / 8, "2:4")
    assert (stats.dense_bytes, stats.packed_bytes) == (array.nbytes, 1 + nonzero * array.itemsize)
    assert measure("w", array).pruned_params == 8 - nonzero
    full = measure("w", np.ones((2, 4)).astype(array.dtype))
    assert full.packed_bytes == full.dense_bytes == array.nbytes


def test_names_cannot_command_a_terminal() -> None:
    text = str(Report([LayerStats("a\x1b[2J\nb\u202e\u00e9", 1, 0, 0.0)]))
    assert "a\\x1b[2J\\nb\\u202e\u00e9 " in text
    assert len(text.splitlines()) == 5
