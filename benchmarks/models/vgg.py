"""3x3 convolutions of 256 and 512 channels with pruned random weights, beside torch's, as Markdown.

    python benchmarks/models/vgg.py
    python benchmarks/models/vgg.py --values int8 [--peers]

One table of single layers (images of 32, 16, 14 and 8; batches 1 and 8): packed beside torch's
convolution in its default memory format and in channels_last; speed-ups are over both, in this order. One of
a stack of six with ReLU and pooling, through `accelerate`. Times are taken in turn, results compared. With
int8 values the first is beside packed float32 too, and with --peers beside ONNX Runtime's dense ones.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from _peers import INT8_STATIC, ORT, convolution_makers
from _shared import accelerate, describe, in_turn, named, print_disturbed, print_table, prune

import torch
from sparsam.torch import pack
from torch import Tensor, nn

TOLERANCE = 1e-5  # of the largest output
ROUNDED = 0.03  # the same of int8 values
DENSE, LAST, OURS = "torch", "torch, channels_last", "packed"
INT8, INT8_LAST = "packed int8", "packed int8, channels_last"


def assert_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Asserts that two results agree, to float32 roundings by default."""
    apart = float((found - expected).abs().max() / expected.abs().max())
    assert apart <= tolerance, apart


def layer(channels: int, image: int, batch: int, sparsity: float, seconds: float) -> dict[str, float]:
    """Median milliseconds of one layer, by what computes it."""
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    prune({"conv": conv}, sparsity)
    sparse, copied = pack(copy.deepcopy(conv)), copy.deepcopy(conv)
    last = copied.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(batch, channels, image, image)
    x_last = x.to(memory_format=torch.channels_last)
    runs: dict[str, Callable[[], Tensor]] = {
        DENSE: lambda: conv(x),
        LAST: lambda: last(x_last),
        OURS: lambda: sparse(x),
    }
    for run in runs.values():
        assert_close(run(), conv(x))
    return {name: median for name, (median, _) in in_turn(runs, seconds=seconds).items()}


def rounded_layer(
    channels: int, image: int, batch: int, sparsity: float, options: argparse.Namespace
) -> dict[str, float]:
    """The same with int8 values, in both formats, and with peers."""
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    prune({"conv": conv}, sparsity)
    last = copy.deepcopy(conv).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    sparse, int8 = pack(copy.deepcopy(conv)), pack(copy.deepcopy(conv), dtype=torch.int8)
    x = torch.randn(batch, channels, image, image)
    x_last = x.to(memory_format=torch.channels_last)
    expected = conv(x)
    runs: dict[str, Callable[[], object]] = {
        DENSE: lambda: conv(x),
        LAST: lambda: last(x_last),
        OURS: lambda: sparse(x),
        INT8: lambda: int8(x),
        INT8_LAST: lambda: int8(x_last),
    }
    assert_close(sparse(x), expected)
    assert_close(int8(x), expected, ROUNDED)
    assert torch.equal(int8(x), int8(x_last))
    with tempfile.TemporaryDirectory() as folder:
        if options.peers:
            makers = convolution_makers(conv, x, Path(folder) / "conv.onnx", options.threads)
            for name, start in makers.items():
                runs[name] = start()
                assert_close(torch.from_numpy(runs[name]()), expected, ROUNDED)
        return {name: median for name, (median, _) in in_turn(runs, seconds=options.seconds).items()}


def rounded_table(options: argparse.Namespace) -> None:
    """Prints the table of single layers with int8 values."""
    rows = []
    for channels, batch, image in itertools.product(options.channels, options.batches, options.images):
        every = {s: rounded_layer(channels, image, batch, s, options) for s in options.sparsity}
        dense = [name for name in (DENSE, LAST, ORT, INT8_STATIC) if name in every[options.sparsity[0]]]
        best = (f"{min(times[name] for times in every.values()):.3f}" for name in dense)
        ours = (
            text
            for times in every.values()
            for text in (
                f"{times[OURS]:.3f}",
                f"{times[INT8]:.3f}: {times[OURS] / times[INT8]:.1f}x",
                f"{times[INT8_LAST]:.3f}: {times[OURS] / times[INT8_LAST]:.1f}x",
            )
        )
        rows.append((channels, image, batch, *best, *ours))
    names = [f"{s:.0%}: {name} ms" for s in options.sparsity for name in (OURS, INT8, INT8_LAST)]
    print_table(("channels", "image", "batch", *(f"{name} ms" for name in dense), *names), rows)


def stack() -> nn.Sequential:
    """Six layers as in the middle of VGG: images of 32, 16 and 8."""
    return nn.Sequential(
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
        nn.MaxPool2d(2),
        *(nn.Conv2d(256, 512, 3, padding=1), nn.ReLU(), nn.Conv2d(512, 512, 3, padding=1), nn.ReLU()),
        nn.MaxPool2d(2),
        *(nn.Conv2d(512, 512, 3, padding=1), nn.ReLU(), nn.Conv2d(512, 512, 3, padding=1), nn.ReLU()),
    ).eval()


def whole(sparsity: float, batch: int, options: argparse.Namespace) -> tuple[object, ...]:
    """A row about the stack."""
    model = stack()
    prune(named(model, nn.Conv2d), sparsity)
    dense, x = copy.deepcopy(model), torch.randn(batch, 256, 32, 32)
    report = accelerate(model, x, show=options.report, values=options.values, keep_dense=False)
    assert_close(model(x), dense(x), TOLERANCE if options.values is None else 0.1)
    times = in_turn({DENSE: lambda: dense(x), OURS: lambda: model(x)}, seconds=2 * options.seconds)
    before, after = times[DENSE][0], times[OURS][0]
    fused = sum(row.activation is not None for row in report.layers)
    swapped = f"{report.swapped} of {len(report.layers)}, {fused} with ReLU"
    sizes = f"{report.weights_before / 2**20:.1f} / {report.weights_after / 2**20:.1f}"
    return f"{sparsity:.0%}", batch, swapped, f"{before:.2f}", f"{after:.2f}", f"{before / after:.2f}x", sizes


def float_table(options: argparse.Namespace) -> None:
    """Prints the table of single layers with float32 values."""
    rows = []
    for channels, batch in itertools.product(options.channels, options.batches):
        sums: dict[tuple[float, str], float] = {}
        for image in options.images:
            every = {s: layer(channels, image, batch, s, options.seconds) for s in options.sparsity}
            for sparsity, times in every.items():
                for name, ms in times.items():
                    sums[sparsity, name] = sums.get((sparsity, name), 0.0) + ms
            rows.append(row(channels, image, batch, every))
        every = {s: {name: sums[s, name] for name in (DENSE, LAST, OURS)} for s in options.sparsity}
        rows.append(row(channels, "all", batch, every))
    zeros = [f"{s:.0%} zeros" for s in options.sparsity]
    print_table(("channels", "image", "batch", f"{DENSE} ms", f"{LAST} ms", *zeros), rows)


def row(channels: int, image: object, batch: int, every: dict[float, dict[str, float]]) -> tuple[object, ...]:
    """Times of torch, and for each sparsity ours with the speed-up over torch's default and best format."""
    dense, last = (min(times[name] for times in every.values()) for name in (DENSE, LAST))
    gains = (
        f"{times[OURS]:.3f}: {times[DENSE] / times[OURS]:.2f}x / {times[LAST] / times[OURS]:.2f}x"
        for times in every.values()
    )
    return channels, image, batch, f"{dense:.3f}", f"{last:.3f}", *gains


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9])
    parser.add_argument("--channels", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--images", type=int, nargs="+", default=[32, 16, 14, 8])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--values", choices=["int8"], help="rounded weights and inputs")
    parser.add_argument("--peers", action="store_true", help="with --values: ONNX Runtime's convolutions too")
    parser.add_argument("--stack", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--report", action="store_true", help="print what accelerate prints")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.6, help="for each row")
    options = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)  # of what ONNX Runtime thinks of small models
    print(describe("torch", "onnxruntime") if options.peers else describe())
    with torch.inference_mode():
        if options.values is None:
            float_table(options)
        else:
            rounded_table(options)
        if options.stack:
            header = (
                "zeros",
                "batch",
                "swapped",
                "torch ms",
                "accelerated ms",
                "speed-up",
                "MiB before / after",
            )
            print_table(header, (whole(s, n, options) for s in options.sparsity for n in options.batches))
    print_disturbed()


if __name__ == "__main__":
    main()
