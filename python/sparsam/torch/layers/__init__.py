"""Layers whose weights are packed, and the operators that multiply with them. Imports `sparse`."""
