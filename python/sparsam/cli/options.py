"""The arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from sparsam.cli.arguments import PATTERNS

Source: TypeAlias = Annotated[
    Path,
    typer.Argument(
        metavar="IN",
        help="A safetensors file, an index of shards, or the directory of either; .pt, .bin, .npz, .onnx.",
    ),
]
Scope: TypeAlias = Annotated[
    str,
    typer.Option(
        help="Where weights are compared: layer (in each tensor), row (in each row) or global (in all)."
    ),
]
_shared_out = typer.Option(help="How the total is divided among the tensors: uniform, erk, lamp or global.")
Allocation: TypeAlias = Annotated[str, _shared_out]
AllocationOrNone: TypeAlias = Annotated[str | None, _shared_out]
PatternText: TypeAlias = Annotated[str, typer.Option("--pattern", help=f"One of {PATTERNS}.")]
Method: TypeAlias = Annotated[str, typer.Option(help="magnitude, random or lamp.")]
Exclude: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(metavar="PAT", help="Leave tensors whose names match PAT dense; repeatable."),
]
Overrides: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--override",
        metavar="PAT=VALUE",
        help="A sparsity, a pattern or both, as 0.5,2:4, for tensors whose names match PAT; repeatable.",
    ),
]
Force: TypeAlias = Annotated[bool, typer.Option("--force", help="Allow the output to replace the input.")]
Picture: TypeAlias = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw the result: .png, .svg or .pdf.")
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]
