"""Packed weights as tensors, operators that multiply with them, layers that hold them. Imports `sparse`.

`packed_weight` has the bytes of a weight, `packed_tensor` the tensor that stands for the dense one,
`products` the functions of PyTorch that reach `operators` with it, `packed_parameter` puts it into modules
and takes it out, and `packing` does so with all weights of a layer.
"""
