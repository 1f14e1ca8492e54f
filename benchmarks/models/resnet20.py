"""A ResNet-20 on CIFAR-10, pruned: `accelerate` beside torch, and which layers stay dense, as Markdown.

    python benchmarks/models/resnet20.py --data DIR

DIR holds resnet20-12fca82f.th of github.com/akamaster/pytorch_resnet_cifar10 and cifar10_test_first1000.npz:
X, uint8 images (n, 32, 32, 3), and Y, their classes, from CIFAR-10. Convolutions are pruned by magnitude,
each to the sparsity; nothing is trained afterwards, the accuracy shows that both compute the same.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from pathlib import Path

import numpy as np
from _shared import (
    accelerate,
    describe,
    in_turn,
    named,
    operators,
    print_disturbed,
    print_operators,
    print_table,
    prune,
)
from torch.nn import functional

import torch
from torch import Tensor, nn

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TOLERANCE = 1e-4  # of the largest logit


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without weights."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.padding = stride, (width - channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        around = (0, 0, 0, 0, self.padding, self.padding)
        return functional.relu(y + functional.pad(x[:, :, :: self.stride, :: self.stride], around))


class ResNet20(nn.Module):
    """He et al. 2015, section 4.2, shortcut option A; names as in the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        y: Tensor = self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))
        return y


def read(folder: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """(model, normalised images, classes)."""
    state = torch.load(folder / "resnet20-12fca82f.th", map_location="cpu", weights_only=True)["state_dict"]
    model = ResNet20().eval()
    model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    with np.load(folder / "cifar10_test_first1000.npz") as file:
        images, classes = torch.from_numpy(file["X"]).float() / 255, torch.from_numpy(file["Y"])
    images = ((images - torch.tensor(MEAN)) / torch.tensor(DEVIATION)).permute(0, 3, 1, 2).contiguous()
    return model, images, classes


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.8, 0.9])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--profile", action="store_true", help="where the time goes, by operator")
    parser.add_argument("--report", action="store_true", help="print what accelerate prints")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    print(describe())
    original, images, classes = read(options.data)
    rows, layers, profiles = [], [], []
    with torch.inference_mode():
        for sparsity in options.sparsity:
            dense = copy.deepcopy(original)
            prune(named(dense, nn.Conv2d), sparsity)
            for batch in options.batches:
                model, x = copy.deepcopy(dense), images[:batch]
                report = accelerate(model, x, show=options.report)
                expected, found = dense(images), model(images)
                apart = float((found - expected).abs().max() / expected.abs().max())
                assert apart <= TOLERANCE, apart
                right = [int((logits.argmax(1) == classes).sum()) for logits in (expected, found)]
                runs = {"dense": partial(dense, x), "ours": partial(model, x)}
                times = in_turn(runs, seconds=options.seconds)
                before, after = times["dense"][0], times["ours"][0]
                rows.append(
                    (
                        f"{sparsity:.0%}",
                        batch,
                        f"{report.swapped} of {len(report.layers)}",
                        f"{before:.2f}",
                        f"{after:.2f}",
                        f"{before / after:.2f}x",
                        f"{right[0] / len(images):.1%} / {right[1] / len(images):.1%}",
                    )
                )
                layers += [
                    (
                        f"{sparsity:.0%}",
                        batch,
                        row.name,
                        "x".join(map(str, row.shape)),
                        "" if row.dense_ms is None else f"{row.dense_ms:.3f} / {row.sparse_ms:.3f}",
                        row.reason,
                    )
                    for row in report.layers
                    if not row.swapped
                ]
                if options.profile:
                    for what, one in (("torch", dense), ("accelerated", model)):
                        title = f"{what}, {sparsity:.0%} zeros, batch {batch}"
                        profiles.append((title, operators(one, lambda: one(x))))  # noqa: B023
    header = (
        "zeros",
        "batch",
        "swapped",
        "torch ms",
        "accelerated ms",
        "speed-up",
        "accuracy torch / accelerated",
    )
    print_table(header, rows)
    print_table(("zeros", "batch", "left dense", "shape", "dense / sparse ms", "why"), layers)
    for title, times_of in profiles:
        print_operators(title, times_of)
    print_disturbed()


if __name__ == "__main__":
    main()
