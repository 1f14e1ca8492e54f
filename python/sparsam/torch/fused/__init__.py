"""Fused modules: a transformer block, an MLP or a norm of a packed model as one call of the core.

`calls` has the forms of calls that a module was seen with, `tracing` follows one through the module's own
`forward`, function by function (`functions`: what each becomes), `lowering` makes the list of steps of it,
shortened by `peephole`, and `program` is that list. `reads` finds out which attributes `forward` depends on,
`guards` whether these and the weights are as they were, `fused_forward` runs the steps where everything is
usual and else the module's own `forward`, and `installation` puts that into a model and takes it out.
Decoder layers that compute one position are cut where they update the cache of keys and values: `caching`
is what is between the steps, `decoding` follows rotary embedding and attention over the cache, and
`decoding_forward` runs the steps before and after.
Imports `sparse` and `torch.layers`.
"""
