"""The command line `sparsam`. It imports every other folder; nothing imports it.

`entry` is the script's entry point and needs no extra. `app` collects the commands, one module for each
group: `pruning`, `analysis`, `benchmarks`, `demos`, `machine`. `options` has the options that several
commands share, `arguments` turns strings into objects, `console` prints.
"""

from __future__ import annotations

from sparsam.cli.entry import main

__all__ = ["main"]
