"""Weight updates do not depend on the caller's floating-point mode."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from float_modes import partly_subnormal, same_in_both, subnormal_only
from sparsam import NM, InputStatistics, admm, obs, quantize, refit, select
from sparsam.reconstruction import admm_mask, corrected_bias, reconstruction_error
from sparsam.sparse.int4 import GROUPS

WEIGHTS = {
    "normal": np.random.default_rng(0).standard_normal((24, 64)).astype(np.float32),
    "some subnormal": partly_subnormal((24, 64)),
    "all subnormal": subnormal_only((24, 64)),
}


def statistics() -> InputStatistics:
    return InputStatistics(64).update(np.random.default_rng(1).standard_normal((200, 64)))


@pytest.mark.parametrize("w", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("method", ["obs", "obs_nm", "admm", "admm_mask", "refit", "error", "bias"])
def test_new_weights(w: Any, method: str) -> None:
    h, mask = statistics(), select(w, 0.5)
    bias = np.linspace(-1, 1, 24).astype(np.float32)
    calls: dict[str, Any] = {
        "obs": lambda: obs(w, h, sparsity=0.5).weights,
        "obs_nm": lambda: obs(w, h, pattern=NM(2, 4)).weights,
        "admm": lambda: admm(w, h, sparsity=0.5).weights,
        "admm_mask": lambda: admm_mask(w, h, sparsity=0.5).to_array(),
        "refit": lambda: refit(w, h, mask),
        "error": lambda: reconstruction_error(w, mask.apply(w), h),
        "bias": lambda: corrected_bias(bias, w, mask.apply(w), h.mean),
    }
    same_in_both(calls[method])


@pytest.mark.parametrize("w", [WEIGHTS["normal"], WEIGHTS["some subnormal"]], ids=["normal", "subnormal"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [None, GROUPS[0]])
def test_integers_and_scales(w: Any, bits: Any, group: int | None) -> None:
    h, mask = statistics(), select(w, 0.5)
    for chosen in ({"mask": mask}, {"sparsity": 0.5}):

        def rounded(chosen: Any = chosen) -> tuple[Any, ...]:
            found = quantize(w, h, bits=bits, group=group, **chosen)
            return found.weights, found.scales, found.mask.to_array()

        same_in_both(rounded)
