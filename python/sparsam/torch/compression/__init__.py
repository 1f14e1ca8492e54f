"""The whole pipeline for a Hugging Face directory: prune, recover, accelerate, save, and measure each stage.

`workflow` is `compress`; `model_directory` reads and writes models, `texts` makes batches of text, `quality`
compares a model with its dense original on held-out texts, `timing` measures both alternately, and
`compression_report` holds the result. `block_by_block` only prunes, for models that do not fit into memory.
Needs transformers. Imports `checkpoint`, `torch.acceleration`, `torch.pruning` and `torch.serialization`.
"""
