"""What `sparsam.reconstruction` refuses, and how it says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import sparsam
from messages import FORM
from sparsam import NM, Block, InputStatistics, Mask
from sparsam.reconstruction import admm, admm_mask, corrected_bias, obs, reconstruction_error, refit

X = np.random.default_rng(0).standard_normal((20, 4))
W, H = X[:3], X.T @ X
NAN = np.where(np.arange(4) == 2, np.nan, W)
INDEFINITE = np.ones((4, 4)) * 9 - np.eye(4) * 8
INDEFINITE[0, 1:] = INDEFINITE[1:, 0] = -9
BAD_H = np.where(np.eye(4, k=1) == 1, np.inf, H)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, r"'weights': .* got nan at index \(0, 2\)", lambda: refit(NAN, H, Mask.ones((3, 4)))),
        (ValueError, r"'fc': .* got nan at index \(0, 2\)", lambda: obs(NAN, H, sparsity=0.5, name="fc")),
        (ValueError, r"h for tensor .* got inf at index \(0, 1\)", lambda: obs(W, BAD_H, sparsity=0.5)),
        (
            ValueError,
            "h for tensor 'x': expected statistics of some inputs; got none",
            lambda: obs(W, InputStatistics(4), sparsity=0.5, name="x"),
        ),
        (ValueError, "a symmetric matrix", lambda: obs(W, np.triu(H), sparsity=0.5)),
        (ValueError, "at least 0", lambda: obs(W, np.diag([1.0, -1, 1, 1]), sparsity=0.5)),
        (ValueError, r"expected shape \(4, 4\)", lambda: admm(W, np.eye(3), sparsity=0.5)),
        (TypeError, "float32 or float64", lambda: refit(W, np.eye(4, dtype=int), Mask.ones((3, 4)))),
        (TypeError, "got int64", lambda: obs(np.ones((3, 4), np.int64), H, sparsity=0.5)),
        (ValueError, r"\(out, in\)", lambda: obs(np.ones(4), H, sparsity=0.5)),
        (ValueError, "mask for tensor .* expected shape", lambda: refit(W, H, Mask.ones((4, 3)))),
        (TypeError, "expected a Mask", lambda: refit(W, H, np.ones((3, 4), bool))),  # type: ignore[arg-type]
        (ValueError, "it says what is kept", lambda: obs(W, H, sparsity=0.5, mask=Mask.ones((3, 4)))),
        (ValueError, "it says what is kept", lambda: admm(W, H, Mask.ones((3, 4)), sparsity=0.5)),
        (ValueError, "got neither", lambda: obs(W, H)),
        (ValueError, "got neither", lambda: admm(W, H)),
        (ValueError, "keeps 2 of every 4", lambda: obs(W, H, sparsity=0.6, pattern=NM(2, 4))),
        (ValueError, "a multiple of 3 weights", lambda: obs(W, H, pattern=NM(1, 3))),
        (TypeError, r"expected Unstructured\(\) or NM", lambda: obs(W, H, sparsity=0.5, pattern=Block(1, 2))),
        (ValueError, "'layer' or 'row'", lambda: obs(W, H, sparsity=0.5, scope="global")),
        (ValueError, "1 to 256", lambda: obs(W, H, sparsity=0.5, block=257)),
        (ValueError, "block", lambda: obs(W, H, sparsity=0.5, block=0)),
        (ValueError, "damping", lambda: refit(W, H, Mask.ones((3, 4)), damping=-1)),
        (ValueError, "rho", lambda: admm(W, H, sparsity=0.5, rho=0)),
        (ValueError, "iterations", lambda: admm(W, H, sparsity=0.5, iterations=0)),
        (ValueError, "expected the mean of the inputs", lambda: obs(W, H, sparsity=0.5, bias=np.zeros(3))),
        (
            ValueError,
            r"expected shape \(4,\)",
            lambda: obs(W, H, sparsity=0.5, bias=W[:, 0], mean=W[:, 0]),
        ),
        (ValueError, "mean: .* got nan at index 1", lambda: corrected_bias(*with_bad_mean())),
        (ValueError, "output 2", lambda: corrected_bias(np.array([0, 0, np.inf]), W, W, np.zeros(4))),
        (TypeError, "bias: .* got int64", lambda: corrected_bias(np.zeros(3, int), W, W, np.zeros(4))),
        (TypeError, "mean: .* got complex", lambda: corrected_bias(np.zeros(3), W, W, np.zeros(4) * 1j)),
        (ValueError, "h for tensor .* an array of; got list", lambda: obs(W, [[1], [1, 2]], sparsity=0.5)),
        (
            TypeError,
            "cross for .* got int64",
            lambda: refit(W, H, Mask.ones((3, 4)), cross=W.astype(int)),
        ),
        (ValueError, "cross for .* got .4, 3.", lambda: refit(W, H, Mask.ones((3, 4)), cross=W.T)),
        (ValueError, "cross for .* got nan", lambda: refit(W, H, Mask.ones((3, 4)), cross=NAN)),
        (ValueError, "semidefinite", lambda: obs(W, INDEFINITE, sparsity=0.5)),
        (ValueError, "got neither", lambda: admm_mask(W, H)),
        (ValueError, "rho", lambda: admm_mask(W, H, sparsity=0.5, rho=np.nan)),
        (ValueError, "'fc': .* got nan", lambda: admm_mask(NAN, H, sparsity=0.5, name="fc")),
        (ValueError, r"got \(2,\)", lambda: corrected_bias(np.zeros(2), W, W, np.zeros(4))),
        (ValueError, "within the range of float16; got 6e.06", lambda: refit(*overflowing())),
        (ValueError, "the shape of w", lambda: reconstruction_error(W, W.reshape(3, 4, 1), H)),
    ],
)
def test_errors_say_what_to_do(error: type[Exception], match: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=match) as caught:
        call()
    assert FORM.fullmatch(str(caught.value)), caught.value


def with_bad_mean() -> tuple[Any, Any, Any, Any]:
    return np.zeros(3), W, W, np.array([0, np.nan, 0, 0])


def overflowing() -> tuple[Any, Any, Mask]:
    """A weight that must take over one of 6e4 on an input of a hundred times its strength."""
    h = np.array([[1.0, 99.0], [99.0, 10000.0]])
    return np.full((1, 2), 6e4, np.float16), h, Mask.from_array(np.array([[True, False]]))


def test_obs_has_the_name_of_its_paper() -> None:
    assert sparsam.sparsegpt is sparsam.obs


def test_centred_statistics_of_inputs_with_large_means() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((300, 12)) + 1e4).astype(np.float32)
    centred = InputStatistics(12).update(x).centred
    w, bias = rng.standard_normal((5, 12)), np.zeros(5)
    for new in (
        obs(w, centred, sparsity=0.5, bias=bias),
        admm(w, centred, sparsity=0.5, bias=bias),
    ):
        assert new.bias is not None
        outputs = x.astype(np.float64) @ new.weights.T + new.bias
        wanted = x.astype(np.float64) @ w.T
        # The bias mends the mean; what is left is less than the spread of the outputs.
        assert np.abs((outputs - wanted).mean(axis=0)).max() < 1e-2
        assert ((outputs - wanted).std(axis=0) < wanted.std(axis=0)).all()
        assert np.isfinite(refit(w, centred, new.mask)).all()
