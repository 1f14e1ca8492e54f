"""Choices: the kernels that multiply one weight, for SparseMatrix and for the packed tensors of torch."""

from __future__ import annotations

from collections.abc import Callable

from sparsam._core import active_isa, num_threads
from sparsam.sparse.cost_model import Expectation, Key, Weight, current_costs, dense_key
from sparsam.sparse.dispatch import KernelChoice, choose
from sparsam.sparse.matmul import kernels_of
from sparsam.sparse.preparation import Preparation

__all__ = ["Choices", "expect"]

MAX_BATCHES = 256  # the most batches whose kernel is cached


class Choices:
    """Which kernel multiplies which batch, among those whose forms are held.

    The first product of a batch chooses, those after it look it up. Choices depend on nothing but the
    arguments of `__init__`, the cost model, the instruction set and the number of threads: where one of
    these two has changed, they are computed again.
    There is no lock: two threads that choose at the same time choose the same.

    Attributes:
        weight: What is multiplied with.
        held: The kernels whose forms are held.
        preparation: What the user prepared.
    """

    def __init__(
        self,
        weight: Weight,
        held: tuple[str, ...],
        expected: Expectation | None = None,
        preparation: Preparation | None = None,
        dense: Callable[[], Key] = dense_key,
    ) -> None:
        """Takes the result of `expect(weight, dense)`, if known; `dense` gives the dense library's key."""
        self.weight = weight
        self.held = held
        self.preparation = preparation or Preparation()
        self._dense = dense
        self._valid: tuple[Expectation, dict[int, str]] | None = (expected, {}) if expected else None

    def kernel(self, batch: int) -> str:
        """The kernel for a batch."""
        if len(self.held) == 1:
            return self.held[0]
        valid = self._valid
        if valid is None or valid[0].settings != (active_isa(), num_threads()):
            valid = self._renewed()
        kernels = valid[1]
        kernel = kernels.get(batch)
        if kernel is None:
            if len(kernels) >= MAX_BATCHES:
                kernels.clear()
            kernel = kernels[batch] = self.choice(batch).kernel
        return kernel

    def choice(self, batch: int) -> KernelChoice:
        """The same with the reason, and what the other kernels would take."""
        if batch == 0 or self.weight.nnz == 0:
            return KernelChoice(self.held[0], "since there is nothing to multiply")
        if self.weight.rounded:
            several = len(kernels_of(self.weight)) > 1
            why = f"the {'form' if several else 'kernel'} of {self.weight.dtype} values"
            return self.preparation.choice(KernelChoice(self.held[0], why), batch, self.held)
        valid = self._valid
        if valid is None or valid[0].settings != (active_isa(), num_threads()):
            valid = self._renewed()
        expected = valid[0]
        chosen = choose(expected, batch, self.held)
        return self.preparation.under(expected.settings).choice(chosen, batch, self.held)

    def _renewed(self) -> tuple[Expectation, dict[int, str]]:
        valid: tuple[Expectation, dict[int, str]] = (expect(self.weight, self._dense), {})
        self._valid = valid
        return valid


def expect(weight: Weight, dense: Callable[[], Key] = dense_key) -> Expectation:
    """Returns the expected times of products with a weight under the current settings."""
    return current_costs(weight.dtype, dense()).expect(weight)
