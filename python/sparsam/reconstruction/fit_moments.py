"""The moments that one layer is fitted to, and the errors computed from them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsam.reconstruction.layer_problem import quadratic
from sparsam.statistics import InputStatistics

__all__ = ["FitMoments"]


class FitMoments:
    """Moments as the fit uses them: centred or not, with the targets of one layer only.

    It has the attributes of statistics that `obs` and the others use: `gram`, `mean`, `count`, `precision`.
    """

    def __init__(self, statistics: InputStatistics, rows: slice | None, *, centred: bool) -> None:
        self.centred = centred
        self.moments = statistics.centred
        self.gram = self.moments.gram if centred else statistics.gram
        self.mean, self.count = self.moments.mean, self.moments.count
        self.precision = self.moments.precision
        self.rows = rows
        self.cross: NDArray[np.float64] | None = None
        self.target_mean: NDArray[np.float64] | None = None
        if rows is not None:
            cross = self.moments.cross if centred else statistics.cross
            assert cross is not None
            assert self.moments.target_mean is not None
            self.cross, self.target_mean = cross[rows], self.moments.target_mean[rows]

    def bias(
        self,
        dense: NDArray[Any],
        weights: NDArray[Any],
        bias: NDArray[Any],
        subset: NDArray[np.int64] | None = None,
    ) -> NDArray[Any]:
        """The bias with which the mean output equals the mean target; for a subset of outputs if given."""
        new = weights.reshape(len(weights), -1).astype(np.float64)
        if self.target_mean is not None:
            wanted = self.target_mean if subset is None else self.target_mean[subset]
        else:
            wanted = dense.reshape(len(dense), -1).astype(np.float64) @ self.mean + bias
        result: NDArray[Any] = (wanted - new @ self.mean).astype(bias.dtype)
        return result

    def error(
        self,
        dense: NDArray[Any],
        weights: NDArray[Any],
        bias: NDArray[Any] | None,
        dense_bias: NDArray[Any] | None,
        subset: NDArray[np.int64] | None = None,
    ) -> float:
        """The squared error of new weights, relative to the squared norm of the target outputs."""
        new = weights.reshape(len(weights), -1).astype(np.float64)
        if self.rows is None:
            return self._own_error(dense.reshape(new.shape).astype(np.float64), new, bias, dense_bias)
        targets, means = self.moments.target_squares, self.moments.target_mean
        assert targets is not None
        assert means is not None
        at = np.arange(len(targets))[self.rows]
        at = at if subset is None else at[subset]
        energy = float(targets[at].sum())
        if bias is None:
            energy += self.moments.weight * float(means[at] @ means[at])
        offset = np.zeros(len(new)) if bias is None else bias.astype(np.float64)
        error = self.moments.squared_error(new, offset, rows=at)
        return _share(error, energy)

    def _own_error(
        self,
        dense: NDArray[np.float64],
        new: NDArray[np.float64],
        bias: NDArray[Any] | None,
        dense_bias: NDArray[Any] | None,
    ) -> float:
        error, energy = quadratic(dense - new, self.gram), quadratic(dense, self.gram)
        if bias is not None and dense_bias is not None:
            rest = (dense - new) @ self.mean + (dense_bias.astype(np.float64) - bias.astype(np.float64))
            error += self.moments.weight * float(rest @ rest)
        return _share(error, energy)


def _share(error: float, energy: float) -> float:
    if energy > 0:
        return error / energy
    return 0.0 if error <= 0 else float("inf")
