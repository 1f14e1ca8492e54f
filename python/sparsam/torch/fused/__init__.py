"""Fused modules: a transformer block, an MLP or a norm of a packed model as one call of the core.

`calls` has the forms of calls that a module was seen with, `tracing` follows one through the module's own
`forward`, function by function (`functions`: what each becomes), `lowering` makes the list of steps of it,
shortened by `peephole`, and `program` is that list. `reads` finds out which attributes `forward` depends on,
`guards` whether these and the weights are as they were, `fused_forward` runs the steps where everything is
usual and else the module's own `forward`, and `installation` puts that into a model and takes it out.
Imports `sparse` and `torch.layers`.
"""
