"""Times DeepSparse, in an environment of its own; minilm.py runs this and talks to it through pipes.

    python _deepsparse.py MODEL.onnx FOLDER THREADS

reads FOLDER/inputs.npz, writes FOLDER/output.npy and an empty list, then for each line of seconds on standard
input a list of milliseconds, one per call. Needs nothing but DeepSparse and NumPy.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np


def main() -> None:
    from deepsparse import Engine  # noqa: PLC0415 - this file is read where it is not installed

    model, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    with np.load(folder / "inputs.npz") as file:
        inputs = [np.ascontiguousarray(file[name]) for name in file.files]
    engine = Engine(model, batch_size=len(inputs[0]), num_cores=threads)
    np.save(folder / "output.npy", engine.run(inputs)[0])
    print("[]", flush=True)
    for line in sys.stdin:
        engine.run(inputs)
        taken: list[float] = []
        while len(taken) < 2 or sum(taken) < 1e3 * float(line):
            start = time.perf_counter()
            engine.run(inputs)
            taken.append(1e3 * (time.perf_counter() - start))
        print(json.dumps(taken), flush=True)


if __name__ == "__main__":
    main()
