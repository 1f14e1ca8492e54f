"""Plain text as batches: for calibration, and held out from it for measuring quality."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sparsam.inputs.checks import expected
from torch import Tensor

__all__ = [
    "Batch",
    "TextBatches",
    "batches_of",
    "distinct_texts",
    "joined_tokens",
    "read_texts",
    "sentence_batches",
    "sentence_length",
    "window_length",
    "windows_of",
]

Batch = dict[str, Tensor]

HELD_OUT = 10  # one text in this many is held out
_HELD_OUT_MOST = 256
_SENTENCES = 16  # in a batch
_TOKENS = 256  # of a sentence at most
_WINDOW = 512  # tokens of a window of running text


@dataclass(frozen=True)
class TextBatches:
    """Texts as keyword inputs of a model.

    Attributes:
        calibration: The batches to prune with.
        held_out: Other texts, for measuring quality.
        unit: What a row of a batch is, "sentences" or "windows".
        texts: The texts of `calibration`.
    """

    calibration: list[Batch]
    held_out: list[Batch]
    unit: str
    texts: list[str]

    def rows(self, batches: Sequence[Batch]) -> int:
        """How many sentences or windows."""
        return sum(len(batch["input_ids"]) for batch in batches)


def read_texts(file: Path) -> list[str]:
    """Returns the lines of a UTF-8 file that are not blank, each once, in their order.

    Raises:
        ValueError: It is not text, or has fewer than 20 different lines.
        OSError: It cannot be read.
    """
    if not file.is_file():
        raise ValueError(
            expected("calibration", str(file), "a file with a text on each line", "check the path")
        )
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(expected("calibration", str(file), "UTF-8 text", f"convert it ({error})")) from error
    return distinct_texts(lines, f" in {file}")


def distinct_texts(lines: Iterable[str], where: str = "") -> list[str]:
    """Returns the texts that are not blank, each once, in their order; ValueError if there are too few."""
    given = list(lines)
    for line in given:
        if not isinstance(line, str):
            raise TypeError(expected("calibration", line, "texts", "pass a list of str, or a file"))
    texts = list(dict.fromkeys(line.strip() for line in given if line.strip()))
    if len(texts) < 2 * HELD_OUT:
        wanted = f"at least {2 * HELD_OUT} different lines of text"
        raise ValueError(expected("calibration", f"{len(texts)}{where}", wanted, "give more text"))
    return texts


def batches_of(texts: Sequence[str], tokenizer: Any, *, running: bool, longest: int) -> TextBatches:
    """Tokenizes texts; every tenth is held out.

    Args:
        texts: At least 20.
        tokenizer: Of the model.
        running: Whether texts are joined and cut into windows of equal length, as language models read them;
            else each is one row, and batches are made of texts of about the same length.
        longest: The largest number of tokens that the model accepts.

    Raises:
        ValueError: There is not enough text for a window.
    """
    apart = list(texts[HELD_OUT - 1 :: HELD_OUT])[:_HELD_OUT_MOST]
    taken = set(apart)
    kept = [text for text in texts if text not in taken]
    if running:
        kept_windows, apart_windows = (
            windows_of(joined_tokens(part, tokenizer), window_length(longest)) for part in (kept, apart)
        )
        return TextBatches(kept_windows, apart_windows, "windows", kept)
    length = sentence_length(longest)
    return TextBatches(
        sentence_batches(kept, tokenizer, length),
        sentence_batches(apart, tokenizer, length),
        "sentences",
        kept,
    )


def sentence_length(longest: int) -> int:
    """Returns the largest number of tokens of a sentence; longer ones are cut off."""
    return min(_TOKENS, longest)


def window_length(longest: int) -> int:
    """Returns the number of tokens of a window."""
    return min(_WINDOW, longest)


def sentence_batches(
    texts: Sequence[str], tokenizer: Any, length: int, rows: int = _SENTENCES
) -> list[Batch]:
    """Returns batches of texts of about the same length, in an order that mixes short and long ones."""
    ordered = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
    groups = [ordered[start : start + rows] for start in range(0, len(ordered), rows)]
    groups.sort(key=min)
    options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
    return [dict(tokenizer([texts[i] for i in sorted(group)], **options)) for group in groups]


def joined_tokens(texts: Sequence[str], tokenizer: Any) -> Tensor:
    """Returns the tokens of all texts, a line each."""
    ids: Tensor = tokenizer("\n".join(texts), return_tensors="pt", verbose=False)["input_ids"][0]
    return ids


def windows_of(ids: Tensor, length: int) -> list[Batch]:
    """Returns tokens cut into windows, a batch each, without padding; ValueError if there is not one."""
    count = len(ids) // length
    if not count:
        wanted = f"windows of {length} tokens, in each part of the text"
        raise ValueError(expected("calibration", f"a part of {len(ids)} tokens", wanted, "give more text"))
    windows = ids[: count * length].reshape(count, length)
    return [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in windows]
