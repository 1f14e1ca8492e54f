"""The JSON that this package reads back: one decoder, checked against types, for every format.

States, reports, manifests and calibrations are edited by hand, cut short and mixed up. `decode` turns JSON
into the type that it is given or raises a ValueError that names the source and the field; a `Document` is a
JSON object that says what it is and of which version. msgspec does the checking.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from sparsam.checkpoint.locks import real_path

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "Count",
    "Document",
    "Finite",
    "Number",
    "Positive",
    "Seconds",
    "Share",
    "convert",
    "decode",
    "from_number",
    "read",
    "to_number",
]

T = TypeVar("T")

Count: TypeAlias = Annotated[int, Meta(ge=0, le=2**53 - 1)]
"""A count, limited to numbers that JSON and float64 both hold exactly."""

Finite: TypeAlias = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
Positive: TypeAlias = Annotated[int, Meta(ge=1, le=2**53 - 1)]
Seconds: TypeAlias = Annotated[float, Meta(ge=0, le=sys.float_info.max)]
Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]

Number: TypeAlias = float | Literal["inf", "-inf", "nan"]
"""Any float64. Infinities and NaN are text, since JSON has no numbers for them; see `to_number`."""

_STEP = re.compile(r"\.(\w+)|\[(\d+)\]")
_FIELD = re.compile(r"Object (contains unknown|missing required) field `(.*)`", re.DOTALL)
_OWN = re.compile(r"(\S+): expected (.*); got (.*); .*", re.DOTALL)  # an error of a type's __post_init__
_SHOWN = 60


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A JSON object with a version, and with exactly the fields of the subclass.

    Attributes:
        WHAT: What the document is, for errors.
        MARK: The field beside the others whose value is the version.
        VERSION: The only version that is read.
    """

    WHAT: ClassVar[str]
    MARK: ClassVar[str]
    VERSION: ClassVar[int] = 1

    @classmethod
    def from_json(cls, text: str | bytes, source: str, remedy: str) -> Self:
        """Reads what `to_json` wrote.

        Args:
            text: The JSON.
            source: The name of the document in error messages, such as the file.
            remedy: The last part of error messages: what the user should do.

        Raises:
            ValueError: It is another document, of another version, or damaged.
        """
        content = _parse(text, source, cls.WHAT, remedy)
        if not isinstance(content, dict) or cls.MARK not in content:
            raise _error(source, cls.WHAT, f"JSON without the field {cls.MARK!r}", remedy)
        version = content.pop(cls.MARK)
        if type(version) is not int or version != cls.VERSION:
            raise _error(source, f"version {cls.VERSION} of {cls.WHAT}", _short(version), remedy)
        return convert(content, cls, source, remedy)

    def to_json(self, *, indent: int | None = 1) -> str:
        """Returns the version and the fields as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_dict(self) -> dict[str, Any]:
        """Returns the version and the fields in plain types."""
        return {self.MARK: self.VERSION, **msgspec.to_builtins(self)}


def decode(text: str | bytes, kind: type[T], source: str, remedy: str, *, what: str = "JSON") -> T:
    """Returns JSON as a value of a type that msgspec can check: builtins, Structs, Annotated with Meta.

    Source and remedy are as for `Document.from_json`; `what` says what was expected if it is not JSON.

    Raises:
        ValueError: It is not JSON, has a key twice, or is of another type; names the field and its value.
    """
    return convert(_parse(text, source, what, remedy), kind, source, remedy)


def convert(content: Any, kind: type[T], source: str, remedy: str) -> T:
    """`decode` for JSON that is parsed already."""
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at ")
        at, value = _located(content, path)
        if match := _FIELD.fullmatch(problem):
            at = f"{at}.{match[2]}".lstrip(".")
            wanted, got = ("no such field", "one") if match[1] == "contains unknown" else ("a value", "none")
        elif match := _OWN.fullmatch(problem):
            at, wanted, got = f"{at}.{match[1]}".lstrip("."), match[2], match[3]
        else:
            wanted, got = _wanted(problem), _short(value)
        raise _error(f"{source}: field {at}" if at else source, wanted, got, remedy) from error
    except UnicodeEncodeError as error:
        raise _error(source, "Unicode text", _short(error.object), remedy) from error


def read(file: Path, remedy: str) -> bytes:
    """Returns the content of a regular file.

    Raises:
        ValueError: It is a folder, pipe or device, which may have no end, or a link to itself.
        OSError: It cannot be read.
    """
    real_path(file)
    if file.exists() and not file.is_file():
        raise _error(file, "a regular file", "a folder, pipe or device", remedy)
    return file.read_bytes()


def to_number(value: float) -> Number:
    """Returns a float as JSON can hold it: infinities and NaN as text."""
    if math.isnan(value):
        return "nan"
    return value if math.isfinite(value) else "inf" if value > 0 else "-inf"


def from_number(value: Number) -> float:
    """The float that `to_number` was given."""
    return float(value)


def _parse(text: str | bytes, source: str, what: str, remedy: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _error(source, what, f"no valid JSON ({error})", remedy) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        msg = f"an object: expected each key once; got {twice!r} twice; drop one"
        raise ValueError(msg)
    return content


def _located(content: Any, path: str) -> tuple[str, Any]:
    """The field at a path as msgspec writes it, and what is there; for a value of a mapping, the mapping."""
    value = content
    for key, index in _STEP.findall(path.partition("[...]")[0]):
        value = value[key] if key else value[int(index)]
    return path.replace("`", "").removeprefix("key in ").removeprefix("$").removeprefix("."), value


def _wanted(problem: str) -> str:
    """What msgspec expected, in the middle of a sentence."""
    if problem.startswith("Expected "):
        return problem.removeprefix("Expected ").partition(", got ")[0].replace("`", "")
    return "one of its known values" if problem.startswith("Invalid enum value") else "a number in range"


def _error(source: object, wanted: str, got: str, remedy: str) -> ValueError:
    return ValueError(f"{source}: expected {wanted}; got {got}; {remedy}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
