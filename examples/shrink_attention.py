"""Prunes half the heads and neurons of a transformer block, then makes its arrays smaller.

The heads of q, k, v and o, and the neurons between fc1 and fc2, are tied: one decision for all members.
"""

from __future__ import annotations

import numpy as np

from sparsam import Slices, prune
from sparsam.patterns import Tied
from sparsam.shrinking import shrink

WIDTH, HEAD, NEURONS = 256, 32, 1024


def block(w: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Attention and an MLP over x (positions, width), each added to its input."""
    q, k, v = (
        (x @ w[f"{name}.weight"].T + w[f"{name}.bias"]).reshape(len(x), -1, HEAD).swapaxes(0, 1)
        for name in ("q", "k", "v")
    )
    scores = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(HEAD))  # the scale is that of a head: it stays
    mixed = scores / scores.sum(axis=-1, keepdims=True) @ v
    x = x + mixed.swapaxes(0, 1).reshape(len(x), -1) @ w["o.weight"].T
    return x + np.maximum(x @ w["fc1.weight"].T + w["fc1.bias"], 0) @ w["fc2.weight"].T


rng = np.random.default_rng(0)
shapes = dict.fromkeys(("q", "k", "v", "o"), (WIDTH, WIDTH))
shapes |= {"fc1": (NEURONS, WIDTH), "fc2": (WIDTH, NEURONS)}
weights = {f"{name}.weight": rng.standard_normal(s) / np.sqrt(s[1]) for name, s in shapes.items()}
weights |= {f"{name}.bias": rng.standard_normal(shapes[name][0]) / 10 for name in ("q", "k", "v", "fc1")}

heads = {f"{name}.{part}": Slices(0, size=HEAD) for name in ("q", "k", "v") for part in ("weight", "bias")}
ties = (
    Tied({**heads, "o.weight": Slices(1, size=HEAD)}),
    Tied({"fc1.weight": Slices(0), "fc1.bias": Slices(0), "fc2.weight": Slices(1)}),
)
pruned = prune(weights, target_sparsity=0.5, ties=ties)
small = shrink(pruned.weights, pruned.masks, ties)

for name, array in small.items():
    print(f"{name:11} {weights[name].shape!s:12} -> {array.shape}")
x = rng.standard_normal((16, WIDTH))
difference = np.abs(block(small, x) - block(pruned.weights, x)).max()
print(f"{sum(a.size for a in weights.values()):,} weights -> {sum(a.size for a in small.values()):,}")
print(f"largest difference between the masked and the small block: {difference:.1e}")
assert difference < 1e-10
