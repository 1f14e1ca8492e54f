"""How every stage reads its arguments: checks and errors, name patterns, torch tensors, floating-point mode.

Imports nothing of this package.
"""
