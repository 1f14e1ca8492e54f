"""Models that do not fit into memory, pruned with calibration from file to file.

`workflow` is `prune_files`, `job` its checked arguments; `model_parts` divides a model into parts,
`source_tensors` finds their weights in files, `parts_in_turn` holds one part in memory at a time,
`needed_memory` estimates the memory of that, `block_distillation` trains blocks and `distilled_blocks`
keeps what that gave, and `shard_writing` writes the result. Imports the rest of
`torch.pruning`, and `checkpoint`.
"""
