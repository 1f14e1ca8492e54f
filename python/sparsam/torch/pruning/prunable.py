"""Which weights of a model can be pruned, and which stay dense by default, and why."""

from __future__ import annotations

import contextlib
import fnmatch
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch.nn.utils import parametrize

import torch
from sparsam.config import PruningConfig
from sparsam.torch.layers.packed_parameter import is_packed
from sparsam.torch.layers.packed_tensor import PackedTensor
from sparsam.torch.layers.packed_weight import DTYPES
from sparsam.torch.layers.packing import is_transposed
from torch import Tensor, nn

__all__ = ["Kind", "PrunableWeight", "check_model", "heads_of", "named_weights", "prunable_weights"]

Kind: TypeAlias = Literal["linear", "convolution", "attention", "recurrent", "unseen"]

_TABLES = (nn.Embedding, nn.EmbeddingBag)
_ENDS = ("_orig", "_g", "_v")  # of Parameters that hooks of torch.nn.utils compute a weight from


@dataclass(frozen=True)
class PrunableWeight:
    """A weight of a model that can be pruned.

    Attributes:
        name: Its key in the model's state_dict; the first one if it has several.
        module: The module that holds it.
        attribute: The name of the Parameter in that module.
        kind: "linear": of nn.Linear or Hugging Face's Conv1D; "convolution": of nn.Conv1d, Conv2d or Conv3d;
            "attention": of the input and output projections of nn.MultiheadAttention; "recurrent": of
            nn.LSTM, nn.GRU, nn.RNN and their cells; "unseen": any other, which is dense unless the
            configuration names it, and whose inputs no method knows.
        transposed: Whether it is stored as (in, out), as in Hugging Face's Conv1D.
        groups: The number of groups of a convolution; else 1.
    """

    name: str
    module: nn.Module
    attribute: str
    kind: Kind
    transposed: bool = False
    groups: int = 1

    @property
    def parameter(self) -> nn.Parameter:
        """The weight itself."""
        found: nn.Parameter = self.module._parameters[self.attribute]  # type: ignore[assignment]
        return found


def named_weights(config: PruningConfig) -> set[str]:
    """The names that a configuration itself gives to be pruned: in `overrides`, as they are, and in `ties`.

    These are pruned even where the model's own rule would leave them dense. A shell-style pattern only
    chooses among the weights that are pruned anyway.
    """
    return {*config.overrides, *(name for tie in config.ties for name in tie.members)}


def prunable_weights(
    model: nn.Module, *, exclude: Sequence[str] = (), named: Collection[str] = (), loaded: bool = True
) -> tuple[list[PrunableWeight], dict[str, str]]:
    """Finds the weights that can be pruned, in the order of the model's state_dict.

    These stay dense by default: embeddings; weights shared with an embedding; the output layer of a
    language model, which is what `get_output_embeddings` returns, or a linear layer outside of lists of
    modules that has the shape of the largest embedding; parameters of fewer than two axes (biases, norms);
    kinds of layers for which the methods have no inputs (transposed convolutions, matrices of experts in
    one Parameter).

    Args:
        model: The model.
        exclude: Names of weights or of modules that contain them, or shell-style patterns, to leave out.
        named: Names of parameters to prune even if they would stay dense; `exclude` takes precedence.
        loaded: Whether weights must have values; else they may be on the meta device.

    Returns:
        The weights, and for each parameter of two or more axes that stays dense, name -> reason.

    Raises:
        ValueError: A weight that could be pruned and is not excluded is packed, parametrized, sparse, on the
            meta device or not initialised; its dtype is not float16, bfloat16, float32 or float64.
        TypeError: `model` is not a module.

    Warns:
        UserWarning: A pattern of `exclude` matches no weight.
    """
    check_model(model)
    heads = heads_of(model)
    tables = {
        _memory(table.weight): name for name, table in model.named_modules() if isinstance(table, _TABLES)
    }
    found: list[PrunableWeight] = []
    dense: dict[str, str] = {}
    seen: dict[int, str] = {}
    matched: set[str] = set()
    for weight, reason in _every_weight(model, named):
        parts = weight.name.split(".")
        names = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        hits = [pattern for pattern in exclude for name in names if _matches(name, pattern)]
        matched.update(hits)
        chosen = weight.name in named
        if hits or (reason and not chosen):
            dense[weight.name] = "excluded" if hits else reason
            continue
        _check(weight, loaded=loaded)
        tensor = weight.parameter
        if tensor.numel() == 0:
            dense[weight.name] = "no weights"
        elif id(tensor) in seen:
            dense[weight.name] = f"the same as {seen[id(tensor)]}"
        elif _memory(tensor) in tables and not chosen:
            dense[weight.name] = f"shared with the embedding {tables[_memory(tensor)]}"
        elif id(weight.module) in heads and not chosen:
            dense[weight.name] = "head of a language model"
        else:
            seen[id(tensor)] = weight.name
            found.append(weight)
    for pattern in exclude:
        if pattern not in matched:
            message = f"exclude: expected names or patterns of weights; got {pattern!r}, which matches none"
            warnings.warn(message, UserWarning, stacklevel=3)
    return found, dense


def check_model(model: object) -> None:
    """Raises TypeError for anything but a module, such as a state dict."""
    if not isinstance(model, nn.Module):
        got = type(model).__name__
        msg = f"model: expected a torch.nn.Module; got {got}; pass the model, or tensors to sparsam.prune"
        raise TypeError(msg)


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def _every_weight(model: nn.Module, named: Collection[str]) -> Iterator[tuple[PrunableWeight, str]]:
    """Yields the weights of every module once, each with the reason if it stays dense; and those `named`."""
    projections = {
        id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)
    }
    for path, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        prefix = f"{path}." if path else ""
        own = _weights_of(module, projection=id(module) in projections)
        yield from (
            (PrunableWeight(prefix + attribute, module, attribute, kind, transposed, groups), "")
            for attribute, kind, transposed, groups in own
        )
        taken = {f"{attribute}{end}" for attribute, *_ in own for end in ("", *_ENDS)}
        for attribute, parameter in module._parameters.items():
            if attribute in taken or parameter is None or isinstance(parameter, nn.UninitializedParameter):
                continue
            slight = parameter.ndim < 2 or attribute.startswith("bias")
            if slight and prefix + attribute not in named:
                continue
            weight = PrunableWeight(prefix + attribute, module, attribute, "unseen")
            yield weight, _why_dense(module, attribute, parameter)


def _weights_of(module: nn.Module, *, projection: bool) -> list[tuple[str, Kind, bool, int]]:
    """(attribute, kind, transposed, groups) of the weights of a module whose inputs can be observed."""
    if isinstance(module, nn.Linear):
        return [("weight", "attention" if projection else "linear", False, 1)]
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return [("weight", "convolution", False, module.groups)]
    if is_transposed(module):
        return [("weight", "linear", True, 1)]
    if isinstance(module, nn.MultiheadAttention):
        projections = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return [(name, "attention", False, 1) for name in projections if _has(module, name)]
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        computed: Any = module.parametrizations if parametrize.is_parametrized(module) else ()
        names = dict.fromkeys(_without_end(name) for name in (*module._parameters, *computed))
        return [
            (name, "recurrent", False, 1) for name in names if name.startswith(("weight_ih", "weight_hh"))
        ]
    return []


def _has(module: nn.Module, attribute: str) -> bool:
    kept = module._parameters.get(attribute) is not None or attribute in vars(module)  # one that hooks set
    return kept or parametrize.is_parametrized(module, attribute)


def _without_end(name: str) -> str:
    """The name of the weight that is computed from a Parameter of this name."""
    return next((name.removesuffix(end) for end in _ENDS if name.endswith(end)), name)


def _why_dense(module: nn.Module, attribute: str, parameter: Tensor) -> str:
    """Why a parameter of two or more axes of such a module stays dense."""
    kind = type(module).__name__
    if isinstance(module, _TABLES):
        return "embedding"
    if isinstance(module, nn.RNNBase):
        return f"{attribute} of {kind}: the inputs of a projection of hidden states are not seen"
    if isinstance(module, nn.modules.conv._ConvNd):
        return f"no method for {kind}"
    if parameter.ndim == 3:
        return f"{parameter.shape[0]} matrices in one Parameter"
    return f"parameter of {kind}, which is no linear layer or convolution"


def heads_of(model: nn.Module) -> set[int]:
    """The output layers of language models, by id."""
    heads: set[int] = set()
    getter = getattr(model, "get_output_embeddings", None)
    if callable(getter):
        with contextlib.suppress(NotImplementedError):
            heads.add(id(getter()))
    tables = [module.weight for module in model.modules() if isinstance(module, _TABLES)]
    if not tables:
        return heads
    largest = max(tables, key=lambda table: table.shape[0]).shape
    listed = {
        id(inner)
        for module in model.modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        for inner in module.modules()
    }
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module) not in listed and not is_packed(module):
            weight = module._parameters.get("weight")
            if weight is not None and weight.shape == largest:
                heads.add(id(module))
    return heads


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """A key that is equal for tensors with the same memory."""
    if (
        tensor.device.type == "meta"
        or tensor.layout is not torch.strided
        or isinstance(tensor, (PackedTensor, nn.UninitializedParameter))
    ):
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.shape)


def _norm_by_hook(module: nn.Module, attribute: str) -> str:
    """Which function of torch.nn.utils computes a weight before each call, as these did before 2.0; or ""."""
    if f"{attribute}_g" in module._parameters:
        return "weight_norm"
    return "spectral_norm" if f"{attribute}_orig" in module._parameters else ""


def _check(weight: PrunableWeight, *, loaded: bool) -> None:
    """Raises ValueError if a weight cannot be pruned as it is, with the reason."""
    module, attribute = weight.module, weight.attribute
    parameter = module._parameters.get(attribute)
    got, do = "", ""
    if is_packed(module):
        got, do = "a packed one", "call sparsam.torch.restore(model) first"
    elif parametrize.is_parametrized(module, attribute):
        got = "one computed by a parametrization"
        do = f"call torch.nn.utils.parametrize.remove_parametrizations(module, {attribute!r}) first"
    elif f"{attribute}_mask" in module._buffers:
        got = "one that torch.nn.utils.prune computes"
        do = f"call torch.nn.utils.prune.remove(module, {attribute!r}) first"
    elif norm := _norm_by_hook(module, attribute):
        got = f"one that torch.nn.utils.{norm} computes"
        do = f"call torch.nn.utils.remove_{norm}(module, {attribute!r}) first"
    elif parameter is None:
        got, do = f"a {type(getattr(module, attribute, None)).__name__}", "exclude it"
    elif isinstance(parameter, nn.UninitializedParameter):
        got, do = "one without a shape", "run the model once, so that its lazy layers know their shapes"
    elif parameter.layout is not torch.strided:
        layout = str(parameter.layout).removeprefix("torch.")
        got, do = f"one of the layout {layout}", "make it dense with .to_dense()"
    elif type(parameter) is not nn.Parameter and type(parameter.data) is not Tensor:
        got, do = f"a {type(parameter).__name__}", "exclude it, or make it a plain Parameter"
    elif parameter.device.type == "meta" and loaded:
        got, do = "one on the meta device, which has no values", "load the weights first"
    elif parameter.dtype not in {*DTYPES, torch.float64}:
        got, do = f"one of {str(parameter.dtype).removeprefix('torch.')}", "convert it, or exclude it"
    if got:
        wanted = "a dense floating-point Parameter"
        msg = f"weight {weight.name!r}: expected {wanted}; got {got}; {do}"
        raise ValueError(msg)
