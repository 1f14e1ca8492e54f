"""Pruning of PyTorch models, which keep their classes and state_dict keys.

`prunable` decides for all modules here which weights can be pruned. Imports the pipeline, `reconstruction`,
`checkpoint`, `training`, `analysis`, `torch.layers` and `torch.acceleration`.
"""
