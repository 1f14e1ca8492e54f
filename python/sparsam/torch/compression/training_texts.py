"""Texts to distil from, in new variants each time that they are gone through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import torch
from sparsam.torch.compression.texts import (
    Batch,
    joined_tokens,
    sentence_batches,
    sentence_length,
    window_length,
    windows_of,
)

__all__ = ["TrainingTexts"]

_SPLICED = 0.5


class TrainingTexts:
    """Batches for distillation, different in each pass: few texts, seen again and again, are learnt by heart.

    The teacher says what any input should give, so inputs need not be texts that somebody wrote. Sentences:
    half of them, drawn anew in each pass, break off at a random word and go on with the end of another
    sentence, from a random word on. Running text: the windows begin at another token in each pass.

    Passes differ, also those of one object: each takes its first random number from PyTorch's generator, as a
    DataLoader does, so that `distill` can resume in any of them.
    """

    def __init__(
        self,
        texts: Sequence[str],
        tokenizer: Any,
        *,
        running: bool,
        longest: int,
        rows: int = 16,
        seed: int = 0,
    ) -> None:
        """Keeps the texts.

        Args:
            texts: Without those that quality is measured on.
            tokenizer: Of the model.
            running: Whether texts are joined and cut into windows, as `batches_of` does.
            longest: The largest number of tokens that the model accepts.
            rows: Sentences in a batch; a batch of windows has one.
            seed: Of the order, the splices and the first tokens of windows.

        Raises:
            ValueError: There is not enough text for a window.
        """
        self._texts, self._tokenizer, self._rows = list(texts), tokenizer, rows
        self._length = window_length(longest) if running else sentence_length(longest)
        self._ids = joined_tokens(self._texts, tokenizer) if running else None
        if self._ids is not None:
            windows_of(self._ids, self._length)
        self._seed = seed

    def __iter__(self) -> Iterator[Batch]:
        random = np.random.default_rng((self._seed, int(torch.randint(1 << 62, ()))))
        if self._ids is not None:
            spare = min(len(self._ids) - self._length, self._length - 1)
            windows = windows_of(self._ids[random.integers(spare + 1) :], self._length)
            for i in random.permutation(len(windows)):
                yield windows[i]
        else:
            texts = [self._variant(self._texts[i], random) for i in random.permutation(len(self._texts))]
            yield from sentence_batches(texts, self._tokenizer, self._length, self._rows)

    def _variant(self, text: str, random: np.random.Generator) -> str:
        """A sentence as it is, or with the end of another."""
        if random.random() >= _SPLICED:
            return text
        first, second = text.split(), self._texts[random.integers(len(self._texts))].split()
        begin, end = (int(random.integers(len(words) + 1)) for words in (first, second))
        return " ".join(first[:begin] + second[end:]) or text
