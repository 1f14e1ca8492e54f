"""The command line. Nothing imports this folder; it imports all others."""

from __future__ import annotations

from sparsam.cli.app import main

__all__ = ["main"]
