"""Against torch.nn.utils.prune: the same weights where nothing is tied, the same count at random."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsam.pruner import prune


def untied(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    """Values whose magnitudes all differ, with random signs."""
    rng = np.random.default_rng(seed)
    n = int(np.prod(shape))
    values = rng.permutation(np.arange(1, n + 1)) * rng.choice([-1, 1], n) / n
    return np.asarray(values.reshape(shape), np.float32)


SPARSITIES = [0.0, 0.1, 0.25, 0.5, 0.731, 0.8, 0.95, 1.0]
LAYERS = [(64, 48), (10, 64), (33, 7)]


@pytest.fixture(name="torch", scope="module")
def real_torch() -> Any:
    pytest.importorskip("torch.nn.utils.prune")
    return pytest.importorskip("torch")


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_global_magnitude_equals_torch(torch: Any, sparsity: float) -> None:
    flat = untied(sum(a * b for a, b in LAYERS), seed=5)
    parts = np.split(flat, np.cumsum([a * b for a, b in LAYERS])[:-1])
    weights = {f"{i}": part.reshape(shape) for i, (part, shape) in enumerate(zip(parts, LAYERS, strict=True))}
    modules = [torch.nn.Linear(cols, rows, bias=False) for rows, cols in LAYERS]
    for module, array in zip(modules, weights.values(), strict=True):
        module.weight.data = torch.from_numpy(array.copy())
    peer = torch.nn.utils.prune
    peer.global_unstructured([(m, "weight") for m in modules], peer.L1Unstructured, amount=sparsity)

    ours = prune(weights, scope="global", target_sparsity=sparsity)
    for module, array, mask in zip(modules, ours.weights.values(), ours.masks.values(), strict=True):
        assert (module.weight_mask.numpy().astype(bool) == mask.to_array()).all()
        assert (module.weight.detach().numpy() == array).all()


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("shape", LAYERS)
def test_layer_magnitude_equals_torch(torch: Any, sparsity: float, shape: tuple[int, int]) -> None:
    weights = untied(*shape, seed=6)
    module = torch.nn.Linear(shape[1], shape[0], bias=False)
    module.weight.data = torch.from_numpy(weights.copy())
    torch.nn.utils.prune.l1_unstructured(module, "weight", amount=sparsity)
    assert (prune(weights, target_sparsity=sparsity).weights == module.weight.detach().numpy()).all()


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_random_prunes_as_many_as_torch(torch: Any, sparsity: float) -> None:
    module = torch.nn.Linear(48, 64, bias=False)
    module.weight.data = torch.from_numpy(untied(64, 48))
    torch.nn.utils.prune.random_unstructured(module, "weight", amount=sparsity)
    ours = prune(untied(64, 48), method="random", target_sparsity=sparsity)
    assert ours.masks.count == int(module.weight_mask.sum())


def test_torch_tensors_are_arrays_enough(torch: Any) -> None:
    state = torch.nn.Linear(8, 4).state_dict()
    result = prune(state, target_sparsity=0.75)
    assert (result.weights["weight"] == 0).sum() == 24
    assert result.weights["bias"] is state["bias"]
