"""The convolutions of U-Nets and generators that are not 2-d: 3-d and transposed ones, beside torch's.

    python benchmarks/models/unet.py
    python benchmarks/models/unet.py --values int8 --only volumes

Tables of single layers with pruned random weights, as Markdown: packed beside torch's in its default memory
format and in channels_last, speed-ups over both, in this order. One of a small 3-d U-Net, with `accelerate`.
Times are taken in turn, results compared.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

from _shared import accelerate, describe, in_turn, named, print_disturbed, print_table, prune

import torch
from sparsam.torch import pack
from torch import Tensor, nn

TOLERANCE = 1e-5  # of the largest output
ROUNDED = 0.03  # the same of int8 values
DENSE, LAST, OURS, INT8 = "torch", "channels_last", "packed", "packed int8"
KINDS = (nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)

VOLUMES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "64 channels, 3x3x3, 16x32x32": (lambda: nn.Conv3d(64, 64, 3, padding=1), (1, 64, 16, 32, 32)),
    "128, 3x3x3, 8x16x16": (lambda: nn.Conv3d(128, 128, 3, padding=1), (1, 128, 8, 16, 16)),
    "128, 3x3x3, 8x16x16, batch 4": (lambda: nn.Conv3d(128, 128, 3, padding=1), (4, 128, 8, 16, 16)),
    "256, 3x3x3, 4x8x8": (lambda: nn.Conv3d(256, 256, 3, padding=1), (1, 256, 4, 8, 8)),
    "128 to 256, 3x3x3, stride 2, 8x16x16": (lambda: nn.Conv3d(128, 256, 3, 2, 1), (1, 128, 8, 16, 16)),
    "256, 1x3x3, 8x14x14": (lambda: nn.Conv3d(256, 256, (1, 3, 3), padding=(0, 1, 1)), (1, 256, 8, 14, 14)),
    "256, 3x1x1, 8x14x14": (lambda: nn.Conv3d(256, 256, (3, 1, 1), padding=(1, 0, 0)), (1, 256, 8, 14, 14)),
}
UPWARDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "512 to 256, 4x4, stride 2, 16x16": (lambda: nn.ConvTranspose2d(512, 256, 4, 2, 1), (1, 512, 16, 16)),
    "512 to 256, 4x4, stride 2, 32x32": (lambda: nn.ConvTranspose2d(512, 256, 4, 2, 1), (1, 512, 32, 32)),
    "512 to 256, 4x4, stride 2, 16x16, batch 8": (
        lambda: nn.ConvTranspose2d(512, 256, 4, 2, 1),
        (8, 512, 16, 16),
    ),
    "256 to 128, 2x2, stride 2, 16x16": (lambda: nn.ConvTranspose2d(256, 128, 2, 2), (1, 256, 16, 16)),
    "256 to 128, 2x2, stride 2, 32x32": (lambda: nn.ConvTranspose2d(256, 128, 2, 2), (1, 256, 32, 32)),
    "512 to 256, 2x2, stride 2, 32x32": (lambda: nn.ConvTranspose2d(512, 256, 2, 2), (1, 512, 32, 32)),
    "128 to 64, 3x3, stride 2, 32x32": (lambda: nn.ConvTranspose2d(128, 64, 3, 2, 1, 1), (1, 128, 32, 32)),
    "512 to 256, 16, stride 8, 1-d of 64": (lambda: nn.ConvTranspose1d(512, 256, 16, 8, 4), (1, 512, 64)),
    "128 to 64, 2x2x2, stride 2, 8x16x16": (lambda: nn.ConvTranspose3d(128, 64, 2, 2), (1, 128, 8, 16, 16)),
}


def assert_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Asserts that two results agree, to float32 roundings by default."""
    apart = float((found - expected).abs().max() / expected.abs().max())
    assert apart <= tolerance, apart


def layer(
    make: Callable[[], nn.Module], shape: tuple[int, ...], sparsity: float, options: argparse.Namespace
) -> dict[str, float]:
    """Median milliseconds of one layer, by what computes it."""
    conv, x = make(), torch.randn(shape)
    prune({"conv": conv}, sparsity)
    sparse = pack(copy.deepcopy(conv))
    expected = conv(x)
    runs: dict[str, Callable[[], Tensor]] = {DENSE: lambda: conv(x), OURS: lambda: sparse(x)}
    assert_close(sparse(x), expected)
    if x.ndim > 3:
        order: Any = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        last: nn.Module = copy.deepcopy(conv).to(memory_format=order)  # type: ignore[call-overload]
        x_last = x.to(memory_format=order)
        assert_close(last(x_last), expected)
        runs[LAST] = lambda: last(x_last)
    if options.values is not None and isinstance(conv, nn.Conv3d):
        rounded = pack(copy.deepcopy(conv), dtype=torch.int8)
        assert_close(rounded(x), expected, ROUNDED)
        runs[INT8] = lambda: rounded(x)
    return {name: median for name, (median, _) in in_turn(runs, seconds=options.seconds).items()}


def table(
    layers: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]], options: argparse.Namespace
) -> None:
    """Prints the table of some layers."""
    rows = []
    for name, (make, shape) in layers.items():
        every = [layer(make, shape, sparsity, options) for sparsity in options.sparsity]
        dense = {kind: min(times[kind] for times in every) for kind in (DENSE, LAST) if kind in every[0]}
        texts = [
            f"{times[kind]:.3f}: " + " / ".join(f"{ms / times[kind]:.1f}x" for ms in dense.values())
            for times in every
            for kind in (OURS, INT8)
            if kind in times
        ]
        rows.append((name, f"{dense[DENSE]:.3f}", f"{dense[LAST]:.3f}" if LAST in dense else "", *texts))
    kinds = [OURS, *([INT8] if options.values is not None else [])]
    names = [f"{sparsity:.0%} zeros: {kind}" for sparsity in options.sparsity for kind in kinds]
    print_table(("layer", f"{DENSE} ms", f"{LAST} ms", *names), rows)


class UNet(nn.Module):
    """Two levels of a 3-d U-Net, 64 to 256 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.top = block(1, 64)
        self.down = nn.Conv3d(64, 128, 2, 2)
        self.middle = block(128, 128)
        self.deeper = nn.Conv3d(128, 256, 2, 2)
        self.bottom = block(256, 256)
        self.back = nn.ConvTranspose3d(256, 128, 2, 2)
        self.joined = block(256, 128)
        self.up = nn.ConvTranspose3d(128, 64, 2, 2)
        self.last = block(128, 64)
        self.head = nn.Conv3d(64, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits for each pixel of a volume."""
        top = self.top(x)
        middle = self.middle(self.down(top))
        bottom = self.bottom(self.deeper(middle))
        middle = self.joined(torch.cat([middle, self.back(bottom)], 1))
        return self.head(self.last(torch.cat([top, self.up(middle)], 1)))  # type: ignore[no-any-return]


def block(ins: int, outs: int) -> nn.Sequential:
    """Two convolutions, each with a ReLU."""
    first, second = nn.Conv3d(ins, outs, 3, padding=1), nn.Conv3d(outs, outs, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())


def whole(sparsity: float, options: argparse.Namespace) -> tuple[object, ...]:
    """A row about the U-Net."""
    model = UNet().eval()
    prune(
        {name: one for kind in KINDS for name, one in named(model, kind).items() if name != "head"}, sparsity
    )
    dense, x = copy.deepcopy(model), torch.randn(1, 1, 16, 32, 32)
    report = accelerate(model, x, show=options.report, values=options.values, keep_dense=False)
    assert_close(model(x), dense(x), TOLERANCE if options.values is None else 0.1)
    times = in_turn({DENSE: lambda: dense(x), OURS: lambda: model(x)}, seconds=4 * options.seconds)
    before, after = times[DENSE][0], times[OURS][0]
    sizes = f"{report.weights_before / 2**20:.1f} / {report.weights_after / 2**20:.1f}"
    swapped = f"{report.swapped} of {len(report.layers)}"
    return f"{sparsity:.0%}", swapped, f"{before:.1f}", f"{after:.1f}", f"{before / after:.2f}x", sizes


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9])
    parser.add_argument("--values", choices=["int8"], help="rounded weights and inputs, of 3-d convolutions")
    parser.add_argument("--only", choices=["volumes", "transposed", "unet"], help="one of the tables")
    parser.add_argument("--report", action="store_true", help="print what accelerate prints")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.6, help="for each row")
    options = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    print(describe())
    with torch.inference_mode():
        if options.only in {None, "volumes"}:
            table(VOLUMES, options)
        if options.only in {None, "transposed"}:
            table(UPWARDS, options)
        if options.only in {None, "unet"}:
            header = ("zeros", "swapped", "torch ms", "accelerated ms", "speed-up", "MiB before / after")
            print_table(header, [whole(sparsity, options) for sparsity in options.sparsity])
    print_disturbed()


if __name__ == "__main__":
    main()
