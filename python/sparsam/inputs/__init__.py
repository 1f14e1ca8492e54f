"""What every stage reads its arguments with: checks, errors, patterns of names, torch tensors, float modes.

Imports nothing of this package.
"""
