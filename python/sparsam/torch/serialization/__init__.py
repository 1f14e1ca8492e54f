"""`save` and `load` for models with packed layers.

Imports `checkpoint`, `torch.layers` and `torch.acceleration`.
"""
