"""ResNet-20 for CIFAR-10: loading, in functions with the inputs of its layers, and as a model of PyTorch.

The network is He et al., "Deep residual learning for image recognition", 2015, section 4.2, with shortcuts of
option A: every second pixel, and channels of zeros. Batch normalisation is a scale and a shift.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray

import torch
from sparsam.statistics import InputStatistics
from torch import nn

Array = NDArray[Any]
Tensor = torch.Tensor

BLOCKS = {f"layer{s}.{b}": 2 if s > 1 and b == 0 else 1 for s in (1, 2, 3) for b in (0, 1, 2)}
"""Residual blocks and their strides; each has two convolutions, conv1 and conv2."""

PRUNED = tuple(f"{block}.conv{i}" for block in BLOCKS for i in (1, 2))
"""All convolutions but the first: 267,264 weights."""

_WEIGHTS = "resnet20-12fca82f.th"
_CALIBRATION = "cifar10_train_first512.npz"
_TEST = "cifar10_test_first1000.npz"
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)
_EPSILON = 1e-5
_BATCH = 32

SOURCE = f"""the folder needs
  {_WEIGHTS}: weights of github.com/akamaster/pytorch_resnet_cifar10 (pretrained_models)
  {_CALIBRATION}: X uint8 (512, 32, 32, 3) and Y, the first images of data_batch_1 and their labels
  {_TEST}: X uint8 (1000, 32, 32, 3) and Y, the first of test_batch
The batches are CIFAR-10 for Python, www.cs.toronto.edu/~kriz/cifar.html."""


@dataclass(frozen=True)
class Network:
    """Convolutions without bias, then times `scale` plus `bias`, by name.

    Attributes:
        weights: (out, in, 3, 3).
        scale: (out,).
        bias: (out,).
        classifier: Weights (10, 64) and bias.
    """

    weights: Mapping[str, Tensor]
    scale: Mapping[str, Tensor]
    bias: Mapping[str, Tensor]
    classifier: tuple[Tensor, Tensor]

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        """A convolution with its normalisation, before the ReLU; x (n, in, h, w)."""
        weights = self.weights[name] * self.scale[name].reshape(-1, 1, 1, 1)
        return torch.cat([F.conv2d(part, weights, self.bias[name], stride, 1) for part in batches(x)])

    def start(self, x: Tensor) -> Tensor:
        """What the first block is given."""
        return F.relu(self.conv("conv1", x))

    def block(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the second convolution of a block is given, and what the next block is given."""
        middle = F.relu(self.conv(f"{name}.conv1", x, BLOCKS[name]))
        return middle, F.relu(self.conv(f"{name}.conv2", middle) + shortcut(x, middle.shape[1]))

    def logits(self, x: Tensor) -> Tensor:
        """(n, 10) for images (n, 3, 32, 32)."""
        x = self.start(x)
        for name in BLOCKS:
            x = self.block(name, x)[1]
        weights, bias = self.classifier
        return x.mean((2, 3)) @ weights.T + bias

    def folded(self, name: str) -> Array:
        """The weights of a convolution times its scale."""
        return (self.weights[name] * self.scale[name].reshape(-1, 1, 1, 1)).numpy()

    def arrays(self) -> dict[str, Array]:
        """The weights to prune."""
        return {name: self.weights[name].numpy() for name in PRUNED}

    def having(self, weights: Mapping[str, Array], bias: Mapping[str, Array] | None = None) -> Network:
        """The network with some of its weights, and biases, replaced."""
        new = {name: torch.from_numpy(array) for name, array in weights.items()}
        shift = {name: torch.from_numpy(array) for name, array in (bias or {}).items()}
        return replace(self, weights={**self.weights, **new}, bias={**self.bias, **shift})


class Block(nn.Module):
    """A residual block of the network as a model of PyTorch."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + shortcut(x, y.shape[1]))


class ResNet20(nn.Module):
    """The network as a model of PyTorch, with the keys of its published weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks = {name: Block(*_channels(name), BLOCKS[name]) for name in BLOCKS}
        for stage in ("layer1", "layer2", "layer3"):
            own = [block for name, block in blocks.items() if name.startswith(stage)]
            self.add_module(stage, nn.Sequential(*own))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in ("layer1", "layer2", "layer3"):
            x = self.get_submodule(stage)(x)
        result: Tensor = self.linear(x.mean((2, 3)))
        return result

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """(n, 10) for images (n, 3, 32, 32)."""
        return torch.cat([self(part) for part in batches(x)])

    def arrays(self) -> dict[str, Array]:
        """The weights to prune."""
        return {name: self.get_parameter(f"{name}.weight").detach().numpy() for name in PRUNED}


def _channels(block: str) -> tuple[int, int]:
    """Those that a block takes and gives."""
    outputs = {"layer1": 16, "layer2": 32, "layer3": 64}[block.partition(".")[0]]
    return (outputs // BLOCKS[block], outputs)


@dataclass(frozen=True)
class Images:
    """Normalised images (n, 3, 32, 32) and labels (n,)."""

    x: Tensor
    labels: Tensor


def load(data: Path) -> tuple[Network, ResNet20, Images, Images]:
    """The dense network in both forms, calibration and test images; SystemExit that says what is missing."""
    if not all((data / name).is_file() for name in (_WEIGHTS, _CALIBRATION, _TEST)):
        raise SystemExit(f"{data}: {SOURCE}")  # noqa: EM102
    state = torch.load(data / _WEIGHTS, map_location="cpu", weights_only=True)["state_dict"]
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    weights, scale, bias = {}, {}, {}
    for name in ("conv1", *PRUNED):
        norm = name.replace("conv", "bn")
        scale[name] = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"] + _EPSILON)
        bias[name] = state[f"{norm}.bias"] - scale[name] * state[f"{norm}.running_mean"]
        weights[name] = state[f"{name}.weight"]
    network = Network(weights, scale, bias, (state["linear.weight"], state["linear.bias"]))
    model = ResNet20().eval()
    model.load_state_dict(state)
    return network, model, _images(data / _CALIBRATION), _images(data / _TEST)


def _images(file: Path) -> Images:
    with np.load(file) as content:
        x, y = content["X"].astype(np.float32) / 255, content["Y"].astype(np.int64).reshape(-1)
    x = (x - _MEAN) / _STD
    return Images(torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))), torch.from_numpy(y))


def batches(x: Tensor) -> Iterator[Tensor]:
    return iter(torch.split(x, _BATCH))


def shortcut(x: Tensor, channels: int) -> Tensor:
    """A block's input as it is added to its output."""
    more = (channels - x.shape[1]) // 2
    return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, more, more)) if more else x


def statistics(x: Tensor, stride: int = 1) -> InputStatistics:
    """Of the im2col patches of a convolution's input: in * 9 numbers at every position."""
    found = InputStatistics(x.shape[1] * 9)
    for part in batches(x):
        patches = F.unfold(part, 3, padding=1, stride=stride)
        found.update(patches.transpose(1, 2).numpy())
    return found


def dense_inputs(network: Network, x: Tensor) -> dict[str, InputStatistics]:
    """The inputs of each layer to prune."""
    found = {}
    x = network.start(x)
    for name, stride in BLOCKS.items():
        found[f"{name}.conv1"] = statistics(x, stride)
        middle, x = network.block(name, x)
        found[f"{name}.conv2"] = statistics(middle)
    return found


def accuracy(network: Network | ResNet20, images: Images) -> float:
    """In percent."""
    return 100 * float((network.logits(images.x).argmax(1) == images.labels).float().mean())


def divergence(logits: Tensor, dense: Tensor) -> float:
    """The mean KL divergence of the classes' probabilities from those of the dense network."""
    log_p, log_q = F.log_softmax(dense, 1), F.log_softmax(logits, 1)
    return float((log_p.exp() * (log_p - log_q)).sum(1).mean())
