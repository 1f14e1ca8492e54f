"""`accelerate` and `restore`: which layers run faster packed, measured, swapped in and verified.

Imports `sparse` and `torch.layers`.
"""
