"""Packed weights as tensors, operators that multiply with them, layers that hold them. Imports `sparse`.

`packed_weight` has the bytes of a weight, `packed_content` what they stand for, `packed_tensor` the tensor
that stands for the dense one, `tensor_views` its views and changes, `unpacked_tensor` what state dicts show,
`products` the functions of PyTorch that reach `operators` with it, `packed_parameter` puts it into modules
and takes it out, and `packing` does so with all weights of a layer.
"""
