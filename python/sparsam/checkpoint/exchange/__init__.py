"""Formats of other libraries for pruned weights, to and from plain arrays.

`bitmask` and `two_of_four` are those of compressed-tensors, `cutlass` is PyTorch's semi-structured one; they
turn one tensor into several of a checkpoint. `compressed_rows` holds one matrix: a file of scipy.sparse or of
the Deep Learning Matrix Collection. docs/formats.md specifies their bytes.
"""

from __future__ import annotations
