"""The C++ core. Arrays are float16, bfloat16, float32 or float64 of any strides unless said otherwise."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

_Weights: TypeAlias = NDArray[Any]
_Words: TypeAlias = NDArray[np.uint64]  # C order, 64 mask bits each
_Real = TypeVar("_Real", np.float32, np.float64)

__version__: str
compiler: str

def active_isa() -> str: ...
def compiled_isas() -> list[str]: ...
def available_isas() -> list[str]: ...
def use_isa(name: str) -> None: ...
def int8_isas() -> list[str]: ...
def use_int8_isa(name: str) -> None: ...
def use_quads(wanted: bool | None) -> None: ...
def num_threads() -> int: ...
def default_num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def adopt_runtime(library: str) -> bool: ...
def threading_runtime() -> str: ...
def standard_floats() -> int: ...
def set_float_mode(mode: int) -> None: ...
def threshold(arrays: list[_Weights], k: int) -> tuple[float, int, int]: ...
def threshold_mask(
    arrays: list[_Weights], value: float, ties_kept: int, outs: list[_Weights]
) -> tuple[list[_Words], list[int], list[int]]: ...
def threshold_masks(
    arrays: list[_Weights], counts: list[int], outs: list[_Weights]
) -> tuple[list[_Words], list[int], list[int]] | None: ...
def bracket(
    array: _Weights, low: float, high: float, room: int
) -> tuple[int, int, int, _Weights | None] | None: ...
def nm_mask(array: _Weights, keep: int, m: int) -> _Words | None: ...
def row_topk_mask(array: _Weights, cols: int, pruned: int) -> _Words | None: ...
def find_nan(arrays: list[_Weights]) -> tuple[int, int] | None: ...
def count_nonzero(array: _Weights) -> int: ...
def tile_scores(
    array: _Weights, rows: int, cols: int, tile_rows: int, tile_cols: int, norm: int
) -> NDArray[np.float64]: ...
def byte_ranges(arrays: list[_Weights]) -> NDArray[np.uint64]: ...
def count_bits(words: _Words) -> int: ...
def apply_mask(array: _Weights, words: _Words, out: _Weights) -> int: ...
def expand_tiles(tile_words: _Words, rows: int, cols: int, tile_rows: int, tile_cols: int) -> _Words: ...
def add_products(
    tiles: NDArray[np.float64],
    a: NDArray[_Real],
    a_scale: NDArray[np.float64],
    b: NDArray[_Real],
    b_scale: NDArray[np.float64],
    edges: tuple[int, int],
    upper: bool,
) -> None: ...
def propagate_errors(
    w: NDArray[_Real],
    u: NDArray[_Real],
    keep: NDArray[np.bool_],
    errors: NDArray[_Real],
    first: int,
    cols: int,
) -> None: ...
def sweep(
    w: NDArray[_Real],
    u: NDArray[_Real],
    keep: NDArray[np.bool_],
    errors: NDArray[_Real],
    first: int,
    cols: int,
    n: int,
    m: int,
) -> None: ...
def rounding_sweep(
    w: NDArray[_Real],
    u: NDArray[_Real],
    keep: NDArray[np.bool_],
    errors: NDArray[_Real],
    first: int,
    cols: int,
    scales: NDArray[_Real],
    group: int,
    most: int,
) -> None: ...
def masked_least_squares(
    h: NDArray[np.float64],
    keep: NDArray[np.bool_],
    sides: NDArray[np.float64],
    order: NDArray[np.int64],
    starts: NDArray[np.int64],
    tolerance: float,
) -> None: ...

class Packed:
    """A matrix (rows, cols) of which the nonzero values are stored, in one or two forms (docs/formats.md)."""

    @staticmethod
    def pack(w: _Weights) -> Packed: ...
    @staticmethod
    def from_mask(w: _Weights, mask: _Words) -> Packed: ...
    @staticmethod
    def from_parts(rows: int, cols: int, bits: NDArray[np.uint8], values: _Weights) -> Packed: ...
    # int8 values from -64 to 64, of which 0 is pruned, and a scale for each row.
    @staticmethod
    def pack_int8(
        w: NDArray[np.int8], scales: NDArray[np.float32], taps: tuple[int, int] = (0, 0)
    ) -> Packed: ...
    @staticmethod
    def from_int8_parts(
        rows: int,
        cols: int,
        bits: NDArray[np.uint8],
        values: NDArray[np.int8],
        scales: NDArray[np.float32],
        taps: tuple[int, int] = (0, 0),
    ) -> Packed: ...
    # Levels of int4 values, of which 0 is pruned; `width` columns share the scales (rows, groups).
    @staticmethod
    def pack_int4(
        w: NDArray[np.int8], width: int, scales: NDArray[np.float32], levels: NDArray[np.int8]
    ) -> Packed: ...
    @staticmethod
    def from_int4_parts(
        rows: int,
        cols: int,
        width: int,
        bits: NDArray[np.uint8],
        values: NDArray[np.uint8],
        scales: NDArray[np.float32],
        levels: NDArray[np.int8],
    ) -> Packed: ...
    @staticmethod
    def from_buffers(buffers: Sequence[NDArray[np.uint8]], *, trusted: bool = False) -> Packed: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def nnz(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def width(self) -> int: ...  # columns that share a scale of int4 values; else 0
    @property
    def taps(self) -> tuple[int, int]: ...  # of int8 values of a convolution, its kernel; else (0, 0)
    @property
    def blocked(self) -> int: ...
    @property
    def forms(self) -> tuple[str, ...]: ...
    @property
    def nbytes(self) -> int: ...
    def add(self, form: str) -> None: ...
    def keep(self, forms: Sequence[str]) -> None: ...
    def buffer(self, form: str) -> NDArray[np.uint8]: ...
    def bits(self) -> NDArray[np.uint8]: ...
    def values(self) -> _Weights: ...
    def scales(self) -> NDArray[np.float32]: ...  # of int8 (rows,) and int4 (rows, groups); else empty
    def levels(self) -> NDArray[np.int8]: ...  # of int4 values, 16; else empty
    def quad_rows(self, batch: int) -> int: ...  # of int8 values in slots: rows of x for which quads are used
    def unpack(self) -> _Weights: ...
    def linear(
        self,
        kernel: str,
        x: NDArray[np.float32],
        bias: NDArray[np.float32] | None,
        activation: str,
        out: NDArray[np.float32],
    ) -> None: ...
    def product(self, kernel: str, x: object) -> NDArray[np.float32] | None: ...
    # Addresses of contiguous memory that the caller vouches for; 0 is no bias.
    def linear_at(
        self, kernel: str, x: int, bfloat16: bool, batch: int, bias: int, activation: str, out: int
    ) -> None: ...
    def look_up_at(self, indices: int, n: int, out: int) -> None: ...
    def conv2d_at(
        self,
        x: int,
        x_stride: int,
        images: int,
        image: tuple[int, int],
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        bias: int,
        activation: str,
        out: int,
        out_stride: int,
        x_pixel: int = 1,
        out_pixel: int = 1,
    ) -> None: ...
    def conv3d_at(
        self,
        x: int,
        x_stride: int,
        volumes: int,
        volume: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        bias: int,
        activation: str,
        out: int,
        out_stride: int,
    ) -> None: ...

# Tensors of PyTorch, read without Python: whether its table (`__dlpack_c_exchange_api__`) is understood; a
# product, None unless all are plain float32 (x: or bfloat16) of fitting shapes.
def use_tensors(table: object) -> bool: ...
def linear_of_tensors(
    weight: Packed, kernel_for: Callable[[int], str], x: object, bias: object, activation: str
) -> Any | None: ...

# Phases of transposed convolutions as one result, see cpp/include/sparsam/interleave.hpp; addresses as above.
def interleave_at(
    x: int,
    planes: int,
    stride: Sequence[int],
    inner: Sequence[int],
    offset: Sequence[int],
    outer: Sequence[int],
    y: int,
) -> None: ...

# One direction of one recurrent layer, see cpp/include/sparsam/recurrent.hpp; addresses as above.
def recur_at(
    weight: Packed,
    kernel: str,
    projection: Packed | None,
    projection_kernel: str,
    cell: str,
    batches: Sequence[int],
    reversed: bool,
    inputs: int,
    bias: int,
    h: int,
    c: int,
    y: int,
    y_stride: int,
) -> None: ...

# softmax(scale q k^T + mask) v of every head, see cpp/include/sparsam/attention.hpp; addresses as above. The
# shape: sequences, heads, queries, keys, depth; strides of sequences, heads, positions. A mask at 0 is none.
def attention_at(
    shape: tuple[int, int, int, int, int],
    q: int,
    of_q: tuple[int, int, int],
    k: int,
    of_k: tuple[int, int, int],
    v: int,
    of_v: tuple[int, int, int],
    mask: int,
    bytes: bool,
    of_mask: tuple[int, int, int],
    scale: float,
    out: int,
) -> None: ...

# A module as steps over buffers of float32 (sequences * positions, widths[i]), see
# cpp/include/sparsam/steps.hpp. Operands are numbers of buffers; `t` is an index into the addresses of
# vectors that run() is given, -1 for none. y may be an operand except in linear and attention:
#   ("linear", packed, kernel, x, y, bias_t, activation)
#   ("attention", q, k, v, y, heads, scale, mask)      mask: 1 where the mask of run() applies, else 0
#   ("add", a, b, y)
#   ("layer_norm", x, y, weight_t, bias_t, eps), ("rms_norm", x, y, weight_t, eps)
#   ("add_layer_norm", a, b, sum, y, weight_t, bias_t, eps), ("add_rms_norm", a, b, sum, y, weight_t, eps)
#                                                      sum = a + b: a buffer, or -1 where nobody reads it
#   ("activate", x, y, activation), ("gate", g, u, y, activation)     y = activation(g) * u
#   ("rotary", x, cos, sin, y, heads)                  y = x * cos + rotate_half(x) * sin of each head
class Steps:
    def __init__(self, widths: Sequence[int], steps: Sequence[tuple[Any, ...]]) -> None: ...
    def scratch(self, sequences: int, positions: int) -> int: ...
    # Addresses of buffers, of vectors, of a mask with its strides of sequences, heads, queries, and of so
    # many floats of scratch. What is written overlaps nothing else.
    def run(
        self,
        sequences: int,
        positions: int,
        given: Sequence[tuple[int, int]],
        tensors: Sequence[int],
        mask: tuple[int, bool, tuple[int, int, int]] | None,
        scratch: int,
        floats: int,
    ) -> None: ...

# Whether dictionaries have these values (by identity) under these names, others are empty, and objects are of
# these classes; nothing is kept.
def unchanged(
    tables: tuple[dict[str, Any], ...],
    names: tuple[str, ...],
    values: tuple[Any, ...],
    absent: object,
    empty: tuple[Any, ...],
    objects: tuple[Any, ...],
    kinds: tuple[type, ...],
) -> bool: ...

# Of PyTorch's tensors, once it is known how to read them; None unless all are plain vectors of these sizes.
def vector_addresses(
    tensors: tuple[Any, ...], sizes: tuple[int, ...], starts: tuple[int, ...]
) -> list[int] | None: ...
