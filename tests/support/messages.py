"""The one form of an error's message."""

from __future__ import annotations

import re

FORM = re.compile(r"\S.*: expected \S.*; got \S.*; \S.*", re.DOTALL)
"""`WHAT: expected X; got Y; do Z`."""
