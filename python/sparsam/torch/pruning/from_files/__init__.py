"""Models that memory does not hold, pruned with calibration from file to file.

`workflow` is `prune_files`, `job` what it is to do; `model_parts` cuts a model into parts, `source_tensors`
finds their weights in files, `parts_in_turn` holds one part in memory at a time, `needed_memory` says what
that takes, and `shard_writing` writes the result. Imports the rest of `torch.pruning`, and `checkpoint`.
"""
