"""`save` and `load` for models with packed layers.

Imports `sparse`, `checkpoint`, `torch.layers`, `torch.fused` and `torch.acceleration`.
"""
