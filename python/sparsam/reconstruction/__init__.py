"""Weight updates that compensate for pruned weights, from the second moments of a layer's inputs.

With H the sum (or mean) of x x^T over the inputs x of a layer, replacing its weights W by W' changes its
outputs by the squared error tr((W - W') H (W - W')^T). `refit` minimises it over the weights that a mask
keeps, `obs` and `admm` choose the mask as well, `admm_mask` only that, `quantize` rounds the weights to
integers times scales too, `reconstruction_error` measures the error. Imports the pipeline.
"""

from __future__ import annotations

from sparsam.reconstruction.alternating import admm, admm_mask
from sparsam.reconstruction.column_sweep import obs, sparsegpt
from sparsam.reconstruction.layer_problem import Reconstruction, corrected_bias, reconstruction_error
from sparsam.reconstruction.least_squares import refit
from sparsam.reconstruction.quantized_sweep import Quantization, quantize

__all__ = [
    "Quantization",
    "Reconstruction",
    "admm",
    "admm_mask",
    "corrected_bias",
    "obs",
    "quantize",
    "reconstruction_error",
    "refit",
    "sparsegpt",
]
