"""Messages of `verbose=True`: to the logger `sparsam` if a program has set it up, else to stdout."""

from __future__ import annotations

import logging
import sys

__all__ = ["LOGGER", "say"]

LOGGER = logging.getLogger("sparsam")
LOGGER.addHandler(logging.NullHandler())


def say(text: str) -> None:
    """Logs a text as INFO; writes it to stdout if logging is not set up for INFO, as in a notebook."""
    heard = LOGGER.isEnabledFor(logging.INFO) and (len(LOGGER.handlers) > 1 or logging.root.handlers)
    if heard:
        LOGGER.info("%s", text)
    else:
        sys.stdout.write(f"{text}\n")
