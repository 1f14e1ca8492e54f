"""Transposed convolutions as convolutions whose outputs are interleaved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Phases"]


@dataclass(frozen=True)
class Phases:
    """The geometry of a transposed convolution, with which its weight becomes that of a convolution.

    Along an axis W[k] carries x[p] to y[stride * p + dilation * k - padding]. With y in phases of the stride,
    y[stride * m + r], each phase is a convolution of x, of stride 1, with the k that lead to it; m - p is
    (dilation * k - padding) // stride. All phases together are one convolution with an output for each, whose
    weight is 0 where no k leads: a packed weight skips that.

    Attributes:
        stride: The distance of the pixels of x in y, along each axis.
        padding: How many pixels of y are cut off on both sides.
        dilation: The distance of taps.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of phases."""
        return math.prod(self.stride)

    def reach(self, kernel: Sequence[int]) -> list[tuple[int, int]]:
        """The least and the largest m - p, along each axis."""
        every = zip(kernel, self.stride, self.padding, self.dilation, strict=True)
        return [(-p // s, (d * (k - 1) - p) // s) for k, s, p, d in every]

    def taps(self, kernel: Sequence[int]) -> tuple[int, ...]:
        """The kernel of the convolution, for that of the transposed one."""
        return tuple(last - first + 1 for first, last in self.reach(kernel))

    def output_size(
        self, sizes: Sequence[int], kernel: Sequence[int], output_padding: Sequence[int]
    ) -> list[int]:
        """The size of y, for that of x."""
        every = zip(sizes, kernel, output_padding, self.stride, self.padding, self.dilation, strict=True)
        return [(n - 1) * s - 2 * p + d * (k - 1) + more + 1 for n, k, more, s, p, d in every]

    def matrix_shape(self, shape: Sequence[int], groups: int) -> tuple[int, int]:
        """The shape of the result of `matrix` for a weight of a shape."""
        ins, outs, *kernel = shape
        return groups * outs * self.count, ins // groups * math.prod(self.taps(kernel))

    def matrix(self, weight: Tensor, groups: int) -> Tensor:
        """The weight of the convolution, as a matrix.

        Args:
            weight: That of the transposed convolution, (in, out / groups, ...).
            groups: Its groups.

        Returns:
            (groups * out / groups * phases, in / groups * taps): phases of an output follow each other.
        """
        ins, outs, *kernel = weight.shape
        rank, each = len(kernel), (groups, outs, ins // groups)
        spread = weight.new_zeros(*self.stride, *self.taps(kernel), *each)
        by_tap = weight.reshape(groups, ins // groups, outs, *kernel).permute(*range(3, 3 + rank), 0, 2, 1)
        spread[self._places(kernel)] = by_tap
        strides, taps, (group, out, channel) = (
            range(rank),
            range(rank, 2 * rank),
            range(2 * rank, 2 * rank + 3),
        )
        return spread.permute(group, out, *strides, channel, *taps).reshape(
            self.matrix_shape(weight.shape, groups)
        )

    def weight(self, matrix: Tensor, shape: Sequence[int], groups: int) -> Tensor:
        """The weight of that shape of which `matrix` gives this."""
        ins, outs, *kernel = shape
        rank, taps = len(kernel), self.taps(kernel)
        spread = matrix.reshape(groups, outs, *self.stride, ins // groups, *taps)
        axes = (*range(2, 2 + rank), *range(3 + rank, 3 + 2 * rank), 0, 1, 2 + rank)
        by_tap = spread.permute(axes)[self._places(kernel)]
        return by_tap.permute(rank, rank + 2, rank + 1, *range(rank)).reshape(tuple(shape))

    def _places(self, kernel: Sequence[int]) -> tuple[Tensor, ...]:
        """For each tap its phase along each axis, then its place in the kernel of the convolution."""
        rank, phases, places = len(kernel), [], []
        for axis, size in enumerate(kernel):
            step, phase = self._steps(axis, size)
            shape = [-1 if other == axis else 1 for other in range(rank)]
            phases.append(phase.reshape(shape))
            places.append((step[-1] - step).reshape(shape))
        return (*phases, *places)

    def _steps(self, axis: int, size: int) -> tuple[Tensor, Tensor]:
        """The m - p and the phase of each tap along an axis."""
        apart = self.dilation[axis] * torch.arange(size, device="cpu") - self.padding[axis]
        step = torch.div(apart, self.stride[axis], rounding_mode="floor")
        return step, apart - step * self.stride[axis]
