"""The command line `sparsam`. It imports every other folder; nothing imports it.

`entry` is what the script runs; it needs no extra. `app` puts the commands together, one module for each
group: `pruning`, `analysis`, `benchmarks`, `demos`, `machine`. `options` has the options that several
commands share, `arguments` turns strings into objects, `console` prints.
"""

from __future__ import annotations

from sparsam.cli.entry import main

__all__ = ["main"]
