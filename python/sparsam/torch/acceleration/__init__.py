"""`accelerate` and `restore`: which layers run faster packed, measured, swapped in and verified.

Imports `sparse`, `torch.layers` and `torch.fused`.
"""
