"""Parses the strings of a command line into patterns, methods and overrides."""

from __future__ import annotations

import importlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

from sparsam import checkpoint
from sparsam.checkpoint import foreign, torch_files
from sparsam.config import MethodLike, OverrideLike
from sparsam.inputs.checks import expected
from sparsam.patterns import NM, Block, Pattern, Slices, Unstructured
from sparsam.scores import Magnitude, Random

_FORMS: tuple[tuple[str, Callable[..., Pattern]], ...] = (
    ("unstructured", Unstructured),
    (r"(\d+):(\d+)(?::(channels))?", NM),
    (r"block:(\d+)x(\d+)", Block),
    (r"slices:(-?\d+)(?::(\d+))?", Slices),
)
# Not N:M:channels, which Typer prints as an emoji.
PATTERNS = (
    "unstructured, N:M (keep N of every M; along channels: 2:4:channels), block:ROWSxCOLS or "
    "slices:AXIS[:SIZE]"
)


def parse_pattern(text: str) -> Pattern:
    """Returns the pattern that `PATTERNS` describes; ValueError for any other text."""
    for form, make in _FORMS:
        if found := re.fullmatch(form, text):
            groups = (group for group in found.groups() if group is not None)
            return make(*(group if group.isalpha() else int(group) for group in groups))
    raise ValueError(expected("pattern", text, PATTERNS, "choose one of them"))


def parse_method(method: str, norm: int | None, seed: int | None) -> MethodLike:
    """Returns the method, as an object if an option belongs to it; ValueError for another method's option."""
    for option, value, owner in (("--norm", norm, "magnitude"), ("--seed", seed, "random")):
        if value is not None and method != owner:
            msg = f"{option}: expected --method {owner}; got {method}; leave one of them out"
            raise ValueError(msg)
    if norm is not None:
        return Magnitude(norm)
    return cast(MethodLike, method) if seed is None else Random(seed)


def parse_override(text: str) -> tuple[str, OverrideLike]:
    """Returns the names and the value of `PAT=0.5`, `PAT=2:4` or `PAT=0.5,block:4x1`; else ValueError."""
    names, _, value = text.rpartition("=")
    sparsity, *rest = value.split(",")
    if not names or len(rest) > 1:
        raise ValueError(
            expected(
                "override", text, "PAT=SPARSITY, PAT=PATTERN or PAT=SPARSITY,PATTERN", "write 'fc*=0.5', say"
            )
        )
    if not rest and re.fullmatch(r"[a-z]+(:.*)?|\d+:\d+(:channels)?", value):
        return names, parse_pattern(value)
    try:
        number = float(sparsity)
    except ValueError:
        wanted = f"a number from 0 to 1 or a pattern ({PATTERNS})"
        raise ValueError(expected("override", value, wanted, "write 'fc*=0.5', say")) from None
    return names, (number, parse_pattern(rest[0])) if rest else number


def parse_shapes(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Returns the shapes of `3072x768` or `3072x768,768x3072`, several times; else ValueError."""
    shapes = []
    for text in (part for whole in texts for part in whole.split(",")):
        found = re.fullmatch(r"(\d+)x(\d+)", text)
        if not found or "0" in found.groups():
            raise ValueError(expected("shape", text, "OUTxIN", "write 3072x768, say"))
        shapes.append((int(found[1]), int(found[2])))
    return shapes


def parse_batches(texts: Sequence[str]) -> list[int]:
    """Returns the numbers of `1,8,128`, several times; ValueError for anything but positive integers."""
    parts = [part for whole in texts for part in whole.split(",")]
    if bad := [part for part in parts if not re.fullmatch(r"[0-9]*[1-9][0-9]*", part)]:
        raise ValueError(expected("batch", bad[0], "positive integers", "write 1,8,128, say"))
    return [int(part) for part in parts]


def parse_sparsities(texts: Sequence[str]) -> list[float]:
    """Returns the numbers of `0.5,0.8`, several times; ValueError for anything but numbers."""
    sparsities = []
    for text in (part for whole in texts for part in whole.split(",")):
        try:
            sparsities.append(float(text))
        except ValueError:
            raise ValueError(
                expected("sparsity", text, "numbers from 0 to 1", "write 0.5,0.8, say")
            ) from None
    return sparsities


def parse_groups(texts: Sequence[str]) -> dict[str, list[str]]:
    """Returns name -> tensor patterns of `NAME=PAT,PAT`, several times; ValueError for any other text."""
    groups: dict[str, list[str]] = {}
    for text in texts:
        name, _, patterns = text.partition("=")
        if not name or not all(patterns.split(",")) or name in groups:
            raise ValueError(
                expected("group", text, "NAME=PATTERN,..., each name once", "write 'block0=layers.0.*', say")
            )
        groups[name] = patterns.split(",")
    return groups


def check_sparsity_option(value: float | None) -> None:
    """Raises ValueError for a number outside [0, 1]; for a percentage the error names the fraction."""
    if value is not None and not 0 <= value <= 1:
        percent = value if 1 < value <= 100 else 80
        meant = f"write {percent / 100:g} for {percent:g} %"
        msg = f"--sparsity: expected a fraction from 0 to 1; got {value:g}; {meant}"
        raise ValueError(msg)


@dataclass(frozen=True)
class EvalFunction:
    """A user's function; its errors become one-line ValueErrors with their location."""

    text: str
    function: Callable[[Any], float]

    def __call__(self, weights: Any) -> float:
        """The score of the weights."""
        try:
            return self.function(weights)
        except Exception as error:
            msg = f"eval {self.text}: expected a score; got {_located(error)}; correct that function"
            raise ValueError(msg) from error


def check_output(output: Path, source: Path, *, force: bool) -> None:
    """Raises ValueError if `output` cannot be written, or replaces `source` and `force` is not given."""
    torch_files.check_name(output)
    same = output.exists() and source.exists() and output.samefile(source)
    if foreign.kind_of(source) == foreign.kind_of(output) == "safetensors":
        same = same or checkpoint.overwrites(output, source)
    if not force and same:
        msg = f"{output}: expected an output other than the input; got the same; rename it, or pass --force"
        raise ValueError(msg)


def parse_eval(text: str) -> EvalFunction:
    """Imports the function of `package.module:function`, the working directory being on the path.

    Raises:
        ValueError: The text has another form, the import fails, or there is no such function.
    """
    module_name, _, name = text.partition(":")
    if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", text):
        raise ValueError(
            expected("eval", text, "package.module:function", "write mine.evaluation:accuracy, say")
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            msg = (
                f"eval: expected an importable module; got {error}; correct the name (the working directory "
                f"{here} is on the path)"
            )
            raise ValueError(msg) from error
        msg = (
            f"eval: expected an importable module; got an error from importing {module_name}: "
            f"{_located(error)}; correct that module"
        )
        raise ValueError(msg) from error
    try:
        function = attrgetter(name)(module)
    except AttributeError as error:
        msg = (
            f"eval: expected a function of {module.__file__ or module_name}; got {error}; name one that "
            "exists"
        )
        raise ValueError(msg) from error
    if not callable(function):
        raise ValueError(expected(f"eval {text}", function, "a function from weights to a score", "name one"))
    return EvalFunction(text, function)


def _located(error: BaseException) -> str:
    """The error in one line, with the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
