"""Pruning of PyTorch models, which stay the ordinary models they are: the same classes and state_dict keys.

Which weights can be pruned (`prunable`) is the same for all that lives here. Imports the pipeline,
`reconstruction`, `checkpoint`, `training`, `analysis` and, of `sparsam.torch`, the layers.
"""
