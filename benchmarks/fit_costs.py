"""Fits the default costs that ship with the package, on this machine, and merges them into a file.

    python benchmarks/fit_costs.py --threads 2 --isa avx512
    OPENBLAS_NUM_THREADS=2 python benchmarks/fit_costs.py --threads 2 --dense

write python/sparsam/sparse/default_costs.json: the kernels of one instruction set for each dtype of the
values, or the dense products of NumPy (with the threads that its BLAS was started with) and of PyTorch.
Entries of other libraries and numbers of threads stay as they are. Run it with nothing else on the machine,
for 1 and 2 threads, once for every instruction set and once for dense products;
`benchmarks/grid_matmul.py` then tells how good the choices are.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import sparsam
from sparsam.sparse import calibration, cost_model
from sparsam.sparse.cost_model import Costs, Defaults

FILE = Path(__file__).parents[1] / "python/sparsam/sparse/default_costs.json"


def kernels(isa: str, threads: int) -> list[calibration.Measured]:
    sparsam.set_num_threads(threads)
    with sparsam.use_isa(isa):
        return [calibration.measure_kernels(cost_model.kernel_key(dtype)) for dtype in cost_model.DTYPES]


def dense(threads: int) -> list[calibration.Measured]:
    numpy = calibration.measure_dense(cost_model.dense_key(), calibration.numpy_product)
    import torch  # noqa: PLC0415 - only after NumPy was timed
    from sparsam.torch.layers import dense_costs  # noqa: PLC0415

    torch.set_num_threads(threads)
    return [numpy, *map(dense_costs.measure, dense_costs.DTYPES)]


def merge(found: list[Costs], file: Path) -> None:
    costs = {}
    if file.exists():
        known = Defaults.from_json(file.read_bytes(), str(file), "delete it").costs
        costs = {(one.library, one.dtype, one.threads): one for one in known}
    costs |= {(one.library, one.dtype, one.threads): one for one in found}
    document = Defaults([costs[key] for key in sorted(costs)]).to_dict()
    lines = [json.dumps(one) for one in document["costs"]]
    head = json.dumps({key: value for key, value in document.items() if key != "costs"})[:-1]
    file.write_text(f'{head}, "costs": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--isa", default=sparsam.isa())
    parser.add_argument("--threads", type=int, default=sparsam.num_threads())
    parser.add_argument("--dense", action="store_true", help="dense products instead of our kernels")
    parser.add_argument("--output", type=Path, default=FILE)
    arguments = parser.parse_args()
    start = time.perf_counter()
    found = dense(arguments.threads) if arguments.dense else kernels(arguments.isa, arguments.threads)
    for measured in found:
        print(f"{measured.costs.key}: the fit is off by {measured.error:.1%} in the median")  # noqa: T201
    merge([measured.costs for measured in found], arguments.output)
    print(f"{time.perf_counter() - start:.0f} s")  # noqa: T201


if __name__ == "__main__":
    main()
