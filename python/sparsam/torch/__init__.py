"""PyTorch: pruned models that run faster on CPUs. Needs the extra `torch`.

import sparsam.torch

report = sparsam.torch.accelerate(model, example_inputs)  # swaps in packed layers where they win, and says so
sparsam.torch.restore(model)

From the import on, kernels run on the OpenMP threads that PyTorch uses, as many as `torch.set_num_threads`
says. Imports the pipeline, `sparse`, `checkpoint`, `reconstruction`, `training` and `analysis`.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

try:
    import torch
except ImportError as error:
    msg = "sparsam.torch: expected PyTorch; got none; install it with: pip install 'sparsam[torch]'"
    raise ImportError(msg) from error

from sparsam import _core
from sparsam.inputs.late_imports import on_demand
from sparsam.torch.acceleration.attention import AttentionRow
from sparsam.torch.acceleration.fused_modules import FusedRow
from sparsam.torch.acceleration.installation import restore
from sparsam.torch.acceleration.layer_row import LayerRow
from sparsam.torch.acceleration.report import AccelerationReport
from sparsam.torch.acceleration.workflow import accelerate
from sparsam.torch.layers.packed_tensor import PackedTensor
from sparsam.torch.layers.packing import pack
from sparsam.torch.serialization.files import load, save
from sparsam.torch.sparse_tensors import from_sparse_tensor, to_sparse_tensor
from sparsam.torch.transformers_import import register_when_imported

if TYPE_CHECKING:
    from sparsam.torch.compression.compression_report import CompressionReport
    from sparsam.torch.compression.workflow import compress
    from sparsam.torch.pruning.distillation import distill
    from sparsam.torch.pruning.distillation_report import DistillationReport
    from sparsam.torch.pruning.from_files.workflow import prune_files
    from sparsam.torch.pruning.latency import LatencyPlan, latency_plan
    from sparsam.torch.pruning.one_shot import prune
    from sparsam.torch.pruning.pruning_report import PruningReport
    from sparsam.torch.pruning.smallest import SmallestModel, find_smallest
    from sparsam.torch.pruning.structured.importance import HeadImportance, head_importance
    from sparsam.torch.pruning.structured.report import ShrinkReport
    from sparsam.torch.pruning.structured.workflow import shrink
    from sparsam.torch.pruning.tickets import find_ticket
    from sparsam.torch.pruning.training_callbacks import lightning_callback, trainer_callback
    from sparsam.torch.pruning.while_training import Pruner
else:
    __getattr__ = on_demand(
        __name__,
        {
            "CompressionReport": "sparsam.torch.compression.compression_report",
            "DistillationReport": "sparsam.torch.pruning.distillation_report",
            "HeadImportance": "sparsam.torch.pruning.structured.importance",
            "LatencyPlan": "sparsam.torch.pruning.latency",
            "Pruner": "sparsam.torch.pruning.while_training",
            "PruningReport": "sparsam.torch.pruning.pruning_report",
            "ShrinkReport": "sparsam.torch.pruning.structured.report",
            "SmallestModel": "sparsam.torch.pruning.smallest",
            "compress": "sparsam.torch.compression.workflow",
            "distill": "sparsam.torch.pruning.distillation",
            "find_smallest": "sparsam.torch.pruning.smallest",
            "find_ticket": "sparsam.torch.pruning.tickets",
            "head_importance": "sparsam.torch.pruning.structured.importance",
            "latency_plan": "sparsam.torch.pruning.latency",
            "lightning_callback": "sparsam.torch.pruning.training_callbacks",
            "prune": "sparsam.torch.pruning.one_shot",
            "prune_files": "sparsam.torch.pruning.from_files.workflow",
            "pruning": "sparsam.torch.pruning",
            "compression": "sparsam.torch.compression",
            "shrink": "sparsam.torch.pruning.structured.workflow",
            "trainer_callback": "sparsam.torch.pruning.training_callbacks",
        },
    )

__all__ = [
    "AccelerationReport",
    "AttentionRow",
    "CompressionReport",
    "DistillationReport",
    "FusedRow",
    "HeadImportance",
    "LatencyPlan",
    "LayerRow",
    "PackedTensor",
    "Pruner",
    "PruningReport",
    "ShrinkReport",
    "SmallestModel",
    "accelerate",
    "compress",
    "distill",
    "find_smallest",
    "find_ticket",
    "from_sparse_tensor",
    "head_importance",
    "latency_plan",
    "lightning_callback",
    "load",
    "pack",
    "prune",
    "prune_files",
    "restore",
    "save",
    "shrink",
    "to_sparse_tensor",
    "trainer_callback",
]

register_when_imported()

if not any(
    _core.adopt_runtime(str(library))
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))
):
    warnings.warn(
        "sparsam.torch: expected OpenMP threads that can be shared with PyTorch; got none, so sparsam has "
        "threads of its own: results are the same, but two pools that wait for work on the same cores may "
        "double the time of small layers; set OMP_WAIT_POLICY=passive, or use sparsam.set_num_threads(1)",
        RuntimeWarning,
        stacklevel=2,
    )
