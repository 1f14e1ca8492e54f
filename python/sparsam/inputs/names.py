"""Which names a pattern matches: one rule for exclude, overrides, allocations, groups and the command line.

A pattern matches its own text exactly, whatever characters it contains ("layers[0].weight"), and otherwise as
`fnmatch.fnmatchcase` does.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Collection, Iterable

_WILDCARDS = re.compile(r"[*?[]")


class NamePatterns:
    """An ordered list of names and shell-style patterns, compiled once."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._patterns = tuple(patterns)
        self._exact = {pattern: i for i, pattern in enumerate(self._patterns)}
        self._wild = [
            (i, re.compile(fnmatch.translate(pattern)).match)
            for i, pattern in enumerate(self._patterns)
            if _WILDCARDS.search(pattern)
        ]
        self._wild.reverse()

    def last(self, name: str) -> str | None:
        """Returns the last pattern that matches a name, or None."""
        exact = self._exact.get(name, -1)
        for i, match in self._wild:
            if i <= exact:
                break
            if match(name):
                return self._patterns[i]
        return self._patterns[exact] if exact >= 0 else None

    def matches(self, name: str) -> bool:
        """Returns whether any pattern matches a name."""
        return self.last(name) is not None

    def among(self, names: Iterable[str]) -> dict[str, str]:
        """Returns name -> the last pattern that matches it, for those that have one, in their order."""
        if not self._patterns:
            return {}
        return {name: key for name in names if (key := self.last(name)) is not None}


def matching(pattern: str, names: Collection[str]) -> list[str]:
    """Returns the names that a pattern matches, in their order."""
    if not _WILDCARDS.search(pattern):
        return [pattern] if pattern in names else []
    match = re.compile(fnmatch.translate(pattern)).match
    return [name for name in names if name == pattern or match(name)]


def closest(name: str, names: Iterable[str]) -> str:
    """Returns the end of an error about an unknown name: the most similar names."""
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.0)
    return f"the closest names are {', '.join(map(repr, close))}" if close else "there are no tensors"
