"""What the benchmarks of models share: times taken in turn, tables, pruning, and where the time goes."""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

import sparsam
import sparsam.torch
from sparsam import bench

__all__ = [
    "accelerate",
    "describe",
    "in_turn",
    "layer_ms",
    "named",
    "operators",
    "print_table",
    "prune",
]

Runs = Mapping[str, Callable[[], object]]


def in_turn(runs: Runs, *, seconds: float = 3.0, block: float = 0.1) -> dict[str, tuple[float, float]]:
    """Milliseconds that each call takes: (median, least).

    Blocks of calls of each in turn, the first call of a block untimed: threads of what ran before may still
    spin, and its data is in the cache.

    Args:
        runs: Name -> what to time. A callable with an attribute `block_ms` is asked for a block: it takes the
            seconds and returns the times, for what runs in another process.
        seconds: For all together; every one has at least three blocks.
        block: Seconds of a block; it has at least two calls.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 3 or time.perf_counter() < end:
        rounds += 1
        for name, run in runs.items():
            elsewhere: Callable[[float], list[float]] | None = getattr(run, "block_ms", None)
            times[name] += elsewhere(block) if elsewhere else _block(run, block)
    return {name: (statistics.median(taken), min(taken)) for name, taken in times.items()}


def _block(run: Callable[[], object], seconds: float) -> list[float]:
    run()
    taken: list[float] = []
    while len(taken) < 2 or sum(taken) < 1e3 * seconds:
        start = time.perf_counter()
        run()
        taken.append(1e3 * (time.perf_counter() - start))
    return taken


def named(model: nn.Module, *kinds: type[nn.Module]) -> dict[str, nn.Module]:
    """The layers of some kinds, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def prune(layers: Mapping[str, nn.Module], sparsity: float) -> None:
    """Zeroes the smallest float32 weights of each layer, in place."""
    if sparsity:
        weights = {name: layer.get_parameter("weight").detach().numpy() for name, layer in layers.items()}
        sparsam.prune(weights, target_sparsity=sparsity, inplace=True)


def accelerate(model: nn.Module, examples: Any, *, show: bool = False) -> sparsam.torch.AccelerationReport:
    """`sparsam.torch.accelerate`, its report printed only on request."""
    with contextlib.nullcontext() if show else contextlib.redirect_stdout(io.StringIO()):
        return sparsam.torch.accelerate(model, examples)


def layer_ms(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> float:
    """Milliseconds spent in those layers during one run, summed."""
    total, started = 0.0, 0.0

    def before(*_: object) -> None:
        nonlocal started
        started = time.perf_counter()

    def after(*_: object) -> None:
        nonlocal total
        total += time.perf_counter() - started

    with contextlib.ExitStack() as stack:
        for layer in layers.values():
            for handle in (layer.register_forward_pre_hook(before), layer.register_forward_hook(after)):
                stack.callback(handle.remove)
        run()
    return 1e3 * total


def operators(model: nn.Module, run: Callable[[], object], *, runs: int = 5) -> dict[str, float]:
    """Milliseconds of a run by operator, most first; what layers of ours take is under their class' name.

    Args:
        model: What runs.
        run: A run of it.
        runs: How many to average over.
    """
    ours = named(model, sparsam.torch.SparseLinear, sparsam.torch.SparseConv2d)
    with contextlib.ExitStack() as stack:
        for layer in ours.values():
            original, name = layer.forward, type(layer).__name__

            def forward(*inputs: Tensor, _run: Any = original, _name: str = name) -> Tensor:
                with torch.profiler.record_function(_name):
                    found: Tensor = _run(*inputs)
                    return found

            layer.forward = forward
            stack.callback(delattr, layer, "forward")
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(runs):
                run()
    found: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        found[event.key.removeprefix("aten::")] += event.self_cpu_time_total / 1e3 / runs
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def print_operators(title: str, times: Mapping[str, float], *, shown: int = 8) -> None:
    """A table of the operators that take the most."""
    total = sum(times.values())
    first = list(times.items())[:shown]
    rest = total - sum(ms for _, ms in first)
    rows = [(name, f"{ms:.2f}", f"{ms / total:.0%}") for name, ms in [*first, ("everything else", rest)]]
    print_table((title, "ms", "share"), rows)


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a Markdown table."""
    print(f"\n| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def describe(*packages: str) -> str:
    """The machine, the versions and the command that was given."""
    versions = [f"{name} {found}" for name in packages if (found := _version(name))]
    command = " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    python = sys.version.split()[0]
    return f"`{command}`: {bench.machine()}; {', '.join([f'Python {python}', *versions])}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def examples(sizes: Iterable[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], dict[str, Tensor]]]:
    """Random token ids for each (sentences, tokens)."""
    for size in sizes:
        ids = torch.randint(1000, 30_000, size, generator=torch.Generator().manual_seed(0))
        yield size, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
