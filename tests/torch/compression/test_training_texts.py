"""Texts to distil from: every pass has other ones, made of the words that were given and of no others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from compression_models import encoder, texts, tokenizer

import torch
from sparsam.torch import distill
from sparsam.torch.compression.texts import joined_tokens
from sparsam.torch.compression.training_texts import TrainingTexts
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")


def sentences(passes: TrainingTexts) -> list[tuple[int, ...]]:
    """The rows of one pass without padding."""
    return [
        tuple(row[mask == 1].tolist())
        for batch in passes
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def test_each_pass_over_sentences_is_another_and_repeatable() -> None:
    given, known = texts(), tokenizer()
    passes = TrainingTexts(given, known, running=False, longest=32, rows=8)
    torch.manual_seed(0)
    first, second = sentences(passes), sentences(passes)
    assert len(first) == len(second) == len(given)
    assert first != second
    again = TrainingTexts(given, known, running=False, longest=32, rows=8)
    torch.manual_seed(0)
    assert [sentences(again), sentences(again)] == [first, second]
    torch.manual_seed(0)
    assert sentences(TrainingTexts(given, known, running=False, longest=32, rows=8, seed=1)) != first
    assert all(len(batch["input_ids"]) <= 8 for batch in passes)


def test_sentences_are_whole_or_a_beginning_with_the_end_of_another() -> None:
    given, known = texts(), tokenizer()
    whole = {tuple(known(text)["input_ids"]) for text in given}
    words = [tuple(known(text, add_special_tokens=False)["input_ids"]) for text in given]
    begins = {one[:n] for one in words for n in range(len(one) + 1)}
    ends = {one[n:] for one in words for n in range(len(one) + 1)}
    seen = sentences(TrainingTexts(given, known, running=False, longest=32))
    spliced = [row for row in seen if row not in whole]
    assert 0.2 < len(spliced) / len(seen) < 0.6
    for row in spliced:
        inner = row[1:-1]  # between [CLS] and [SEP]
        assert any(inner[:n] in begins and inner[n:] in ends for n in range(len(inner) + 1)), row


def test_windows_begin_elsewhere_in_each_pass() -> None:
    given, known = texts(), tokenizer()
    ids = joined_tokens(given, known)
    passes = TrainingTexts(given, known, running=True, longest=16)
    starts = []
    for _ in range(4):
        rows = [batch["input_ids"][0] for batch in passes]
        assert all(len(row) == 16 for row in rows)
        offsets = [
            start
            for start in range(16)
            if torch.equal(torch.stack(sorted(rows, key=lambda row: row.tolist())), in_order(ids[start:]))
        ]
        assert offsets
        starts.append(offsets[0])
    assert len(set(starts)) > 1


def in_order(ids: torch.Tensor) -> torch.Tensor:
    """All windows of 16 tokens, sorted."""
    windows = ids[: len(ids) // 16 * 16].reshape(-1, 16)
    return torch.stack(sorted(windows, key=lambda row: row.tolist()))


def test_a_text_of_one_window_stays_at_its_place() -> None:
    given, known = texts()[:20], tokenizer()
    length = len(joined_tokens(given, known))
    passes = TrainingTexts(given, known, running=True, longest=length)
    for _ in range(3):
        (batch,) = passes
        assert torch.equal(batch["input_ids"][0], joined_tokens(given, known))
    with pytest.raises(ValueError, match="calibration: expected windows of 512 tokens"):
        TrainingTexts(given, known, running=True, longest=512)


class Interrupted(TrainingTexts):
    """Texts of which the n-th batch in all is followed by Ctrl-C."""

    left = 5  # of 3 in a pass

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in super().__iter__():
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            yield batch


def test_distillation_resumes_in_a_later_pass(tmp_path: Path) -> None:
    """What a pass has is decided by the state of PyTorch's generator, which a run saves."""
    given, known, teacher = texts()[:24], tokenizer(), encoder().eval()
    options: dict[str, Any] = {"running": False, "longest": 32, "rows": 8}

    def trained(folder: Path, *kinds: type[TrainingTexts]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        for kind in kinds:
            student = encoder().eval()
            with torch.no_grad():
                student.get_parameter("encoder.layer.0.output.dense.weight")[:, ::2] = 0
            with contextlib.suppress(KeyboardInterrupt):
                texts_in_turn = kind(given, known, **options)
                distill(student, teacher, texts_in_turn, steps=7, state_dir=folder, checkpoint_every=1)
        states: dict[str, Tensor] = student.state_dict()
        return states

    whole = trained(tmp_path / "whole", TrainingTexts)
    parts = trained(tmp_path / "parts", Interrupted, TrainingTexts)
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
