"""What the benchmarks of models share: times taken in turn, tables, pruning, and where the time goes."""

from __future__ import annotations

import contextlib
import os
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import sparsam
import sparsam.torch
import torch
from sparsam import bench
from sparsam.torch.layers.packing import is_packed
from torch import Tensor, nn

__all__ = [
    "Stopwatch",
    "accelerate",
    "describe",
    "examples",
    "in_turn",
    "named",
    "operators",
    "print_disturbed",
    "print_operators",
    "print_table",
    "prune",
]

Runs = Mapping[str, Callable[[], object]]

ENOUGH, PATIENCE = 6, 3
UNNOTICED_MS = 20.0  # a switch to other work in that time, of the system itself say, is no disturbance
_disturbed: list[Stopwatch] = []


class Stopwatch:
    """Takes times, and knows those during which the system took a CPU away from this process."""

    def __init__(self) -> None:
        self.clean: list[float] = []
        self.every: list[float] = []

    def take(self, run: Callable[[], object]) -> None:
        """Times a call."""
        switches, start = _switches(), time.perf_counter()
        run()
        self._add(1e3 * (time.perf_counter() - start), _switches() - switches)

    def take_layers(self, layers: Mapping[str, nn.Module], run: Callable[[], object]) -> None:
        """Times what those layers take during a call, summed."""
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
            switches = _switches()
            run()
            self._add(1e3 * total, _switches() - switches)

    def _add(self, ms: float, switches: int) -> None:
        self.every.append(ms)
        if switches <= ms / UNNOTICED_MS:
            self.clean.append(ms)

    def trust(self, times: Iterable[float]) -> None:
        """Notes times that another process took."""
        self.every += times
        self.clean = self.every

    @property
    def enough(self) -> bool:
        """Whether there are undisturbed times to go by."""
        return len(self.clean) >= ENOUGH

    @property
    def times(self) -> list[float]:
        """The undisturbed times; all of them where those are too few."""
        if not self.enough:
            _disturbed.append(self)
        return self.clean if self.enough else self.every


def _switches() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def in_turn(runs: Runs, *, seconds: float = 3.0, block: float = 0.1) -> dict[str, tuple[float, float]]:
    """Milliseconds that each call takes: (median, least).

    Blocks of calls of each in turn, the first call of a block untimed: threads of what ran before may still
    spin, and its data is in the cache. Where other work disturbs, up to PATIENCE times as long.

    Args:
        runs: Name -> what to time. A callable with an attribute `block_ms` is asked for a block: it takes the
            seconds and returns the times, for what runs in another process.
        seconds: For all together; every one has at least three blocks.
        block: Seconds of a block; it has at least two calls.
    """
    watches = {name: Stopwatch() for name in runs}
    begin, rounds = time.perf_counter(), 0
    while (
        rounds < 3
        or (left := begin + seconds - time.perf_counter()) > 0
        or (left > -(PATIENCE - 1) * seconds and not all(watch.enough for watch in watches.values()))
    ):
        rounds += 1
        for name, run in runs.items():
            elsewhere: Callable[[float], list[float]] | None = getattr(run, "block_ms", None)
            if elsewhere is not None:
                watches[name].trust(elsewhere(block))
                continue
            run()
            end, calls = time.perf_counter() + block, 0
            while calls < 2 or time.perf_counter() < end:
                calls += 1
                watches[name].take(run)
    taken = {name: watch.times for name, watch in watches.items()}
    return {name: (statistics.median(times), min(times)) for name, times in taken.items()}


def print_disturbed() -> None:
    """Says whether other work on the machine disturbed."""
    if _disturbed:
        print(f"\n{len(_disturbed)} of the times may mislead: other work kept the CPUs busy throughout")


def named(model: nn.Module, *kinds: type[nn.Module]) -> dict[str, nn.Module]:
    """The layers of some kinds, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def prune(layers: Mapping[str, nn.Module], sparsity: float) -> None:
    """Zeroes the smallest float32 weights of each layer, in place."""
    if sparsity:
        weights = {name: layer.get_parameter("weight").detach().numpy() for name, layer in layers.items()}
        sparsam.prune(weights, target_sparsity=sparsity, inplace=True)


def accelerate(
    model: nn.Module,
    examples: Any,
    *,
    show: bool = False,
    values: Any = None,
    seconds: float = 20.0,
    tolerance: float | None = None,
    keep_dense: bool = True,
) -> sparsam.torch.AccelerationReport:
    """`sparsam.torch.accelerate`, its report printed only on request."""
    return sparsam.torch.accelerate(
        model,
        examples,
        values=values,
        seconds=seconds,
        tolerance=tolerance,
        keep_dense=keep_dense,
        verbose=show,
    )


def operators(model: nn.Module, run: Callable[[], object], *, runs: int = 5) -> dict[str, float]:
    """Milliseconds of a run by operator, most first; what layers of ours take is under their class' name.

    Args:
        model: What runs.
        run: A run of it.
        runs: How many to average over.
    """
    ours = {name: module for name, module in model.named_modules() if is_packed(module)}
    with contextlib.ExitStack() as stack:
        for layer in ours.values():
            fused = vars(layer).get("forward")
            original, name = layer.forward, f"packed {type(layer).__name__}"

            def forward(*inputs: Tensor, _run: Any = original, _name: str = name) -> Tensor:
                with torch.profiler.record_function(_name):
                    found: Tensor = _run(*inputs)
                    return found

            layer.forward = forward
            if fused is None:
                stack.callback(delattr, layer, "forward")
            else:  # with the activation that follows
                stack.callback(setattr, layer, "forward", fused)
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
