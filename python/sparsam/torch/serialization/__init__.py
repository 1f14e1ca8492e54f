"""`save` and `load` for models with packed layers.

Imports `sparse`, `checkpoint`, `torch.layers` and `torch.acceleration`.
"""
