"""Hugging Face transformers: `save_pretrained` and `from_pretrained` support packed weights.

import sparsam.torch  # registers the quantization method `sparsam`; needs transformers 5
from transformers import AutoModel

model = AutoModel.from_pretrained(folder)  # packed layers at once, from the folder of an accelerated model

`import sparsam.torch` imports this module where transformers' models are imported, before or after it; by
itself it does not import transformers, which takes seconds.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import transformers

if int(transformers.__version__.split(".")[0]) < 5:
    msg = f"transformers: expected version 5 or newer; got {transformers.__version__}; upgrade it"
    raise ImportError(msg)

from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import torch
from sparsam.checkpoint import safetensors_format
from sparsam.torch.acceleration.installation import restore
from sparsam.torch.layers.packed_weight import DTYPES
from sparsam.torch.layers.packing import is_packed
from sparsam.torch.serialization.contents import Contents
from sparsam.torch.serialization.encoding import Encoded
from sparsam.torch.serialization.loading import check_layers
from sparsam.torch.serialization.manifest import BITS, MARK, Manifest, dtype_name
from sparsam.torch.serialization.meta_device import materialize
from sparsam.torch.serialization.stored_weights import StoredWeights
from torch import Tensor, nn

__all__ = ["SparsamConfig", "SparsamQuantizer", "attach"]

_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that transformers computes


class _Method(str, enum.Enum):
    SPARSAM = "sparsam"


@register_quantization_config("sparsam")
class SparsamConfig(QuantizationConfigMixin):
    """The `quantization_config` in config.json of a folder with packed weights: the version of the format."""

    def __init__(self, version: str = MARK, quant_method: str = _Method.SPARSAM) -> None:
        """Takes the version; all else is in the metadata of the weight files (docs/formats.md).

        Raises:
            ValueError: Another version, or another method.
        """
        for what, got, wanted in (("version", version, MARK), ("quant_method", quant_method, "sparsam")):
            if got != wanted:
                msg = f"quantization_config: expected {what} {wanted!r}; got {got!r}; save the model again"
                raise ValueError(msg)
        self.quant_method = _Method.SPARSAM  # type: ignore[assignment]
        self.version = version

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields for config.json."""
        return {"quant_method": "sparsam", "version": self.version}


@register_quantizer("sparsam")
class SparsamQuantizer(HfQuantizer):
    """Reads and writes packed weights for transformers, which makes one for each model."""

    requires_calibration = (
        True  # it packs nothing itself: from_pretrained(quantization_config=...) is refused
    )

    def __init__(self, quantization_config: SparsamConfig, **kwargs: Any) -> None:
        """As transformers calls it."""
        super().__init__(quantization_config, **kwargs)
        self._stored: StoredWeights | None = None
        self._names: dict[str, str] = {}
        self._failure: ValueError | None = None
        self._before: dict[str, Any] = {}

    def update_device_map(self, device_map: Any) -> Any:
        """Returns the CPU if transformers would choose the devices."""
        return {"": "cpu"} if device_map in _AUTOMATIC else device_map

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Raises ValueError for other devices than the CPU."""
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        for place in places:
            if place not in {None, *_AUTOMATIC} and torch.device(_device(place)).type != "cpu":
                msg = f"device_map: expected the CPU, where packed weights are; got {place!r}; leave it out"
                raise ValueError(msg)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        found = _read_manifest(checkpoint_files or ())
        if found is None:  # dense weights whose config.json says otherwise
            return
        modules = dict(model.named_modules(remove_duplicate=False))
        state = model.state_dict(keep_vars=True)
        prefix = f"{model.base_model_prefix}."
        self._names = _places(found.weights, state.keys(), prefix)
        manifest = _for_model(found, state.keys(), modules.keys(), prefix)
        if found.weights and not manifest.weights:
            first, kind = next(iter(found.weights)), type(model).__name__
            msg = f"packed weights: expected those of a {kind}; got {first!r}; load the class that was saved"
            raise ValueError(msg)
        check_layers(manifest, modules)
        for name, weight in manifest.weights.items():
            if tuple(state[name].shape) != weight.shape:
                came = tuple(state[name].shape)
                msg = (
                    f"tensor {name!r}: expected {weight.shape} in the model; got {came}; use its config.json"
                )
                raise ValueError(msg)
        self._stored = StoredWeights(manifest)

    def get_weight_conversions(self) -> list[Any]:
        """Returns the converter that reads values and bits."""
        if not self._names:
            return []
        names = "|".join(name.replace(".", r"\.") for name in self._names)
        sources = [f"^({names})$", f"^({names}){BITS}$"]
        return [WeightConverter(sources, r"\1", operations=[_Read(self)])]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Returns no other converters: packed folders have the names that the model has in memory."""
        if self._stored is None:
            return super().update_weight_conversions(weight_conversions, model)  # type: ignore[no-any-return, no-untyped-call]
        return self.get_weight_conversions()

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Returns None for weights that `_Read` reads, which converts them; else what transformers would."""
        for operation in getattr(converter, "operations", ()):
            if isinstance(operation, _Read):
                operation.dtype = dtype if _is_vector(param) else operation.dtype
                return None
        found: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return found

    def take(
        self, name: str, values: Tensor, bits: Tensor | None, dtype: torch.dtype | None, model: Any
    ) -> Any:
        """Stores a weight, and returns the placeholder for it in the model until all are read."""
        assert self._stored is not None
        weight = self._stored.manifest.weights[name]
        owner, _, own = name.rpartition(".")
        dense: nn.Parameter = getattr(model.get_submodule(owner), own)
        wanted = dtype or dense.dtype
        try:
            if bits is None or wanted not in DTYPES:
                kinds = ", ".join(map(dtype_name, DTYPES))
                came = "no bits" if bits is None else f"dtype={wanted}"
                parts = f"values and bits, and a dtype among {kinds}"
                msg = (
                    f"weight {name!r}: expected {parts}; got {came}; get the folder again, or leave dtype out"
                )
                raise ValueError(msg)
            narrow = (
                dtype_name(values.dtype) != weight.dtype
            )  # values are stored rounded: they stay as they are
            self._stored.add(name, Encoded(values if narrow else values.to(wanted), bits))
        except ValueError as error:
            self._failure = self._failure or error  # raised later: transformers would hide it in a table
        return nn.Parameter(torch.empty_like(dense, dtype=wanted, device="meta"), dense.requires_grad)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if self._failure is not None:
            raise self._failure
        if self._stored is not None:
            stored, self._stored = self._stored, None
            if lost := stored.missing():
                msg = f"weight {lost[0]!r}: expected values and bits; got none; the folder lacks a file"
                raise ValueError(msg)
            with torch.inference_mode(False), torch.no_grad():
                stored.pack(model)
                materialize(model)
                stored.unpack(model)
                _forget(model)
                vars(model).pop("_weight_conversions", None)  # these are `_Read`
                stored.install(model)  # from here on it is like any accelerated model
        else:
            _forget(model)
        return model

    def get_state_dict_and_metadata(self, model: Any, *_: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns the tensors and the metadata that save_pretrained writes."""
        model.config.quantization_config = self.quantization_config
        contents = Contents.of(
            model,
            ignored=model._keys_to_ignore_on_save or (),
            ties=model.all_tied_weights_keys,
            buffers=False,
        )
        return contents.tensors, contents.manifest.to_metadata()

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        restore(model)
        return model if dtype is None else model.to(dtype)

    def is_serializable(self, *_: Any) -> bool:
        """True."""
        return True

    @property
    def is_trainable(self) -> bool:
        """False: packed weights have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """True."""
        return True

    def put_on(self, model: Any) -> None:
        """Makes save_pretrained of a model use this quantizer."""
        self._before = {key: vars(model)[key] for key in ("_weight_conversions",) if key in vars(model)}
        model.hf_quantizer = self
        model._weight_conversions = []  # the names in the folder are those in memory
        model.config.quantization_config = self.quantization_config

    def take_off(self, model: Any) -> None:
        """Undoes `put_on`."""
        del model.hf_quantizer, model._weight_conversions
        vars(model).update(self._before)
        if isinstance(getattr(model.config, "quantization_config", None), SparsamConfig):
            del model.config.quantization_config


class _Read(ConversionOps):
    """Hands values and bits of a weight to the quantizer; one for each weight.

    Attributes:
        dtype: The dtype that from_pretrained was asked for.
    """

    def __init__(self, hf_quantizer: SparsamQuantizer, dtype: torch.dtype | None = None) -> None:
        self.hf_quantizer = hf_quantizer
        self.dtype = dtype

    def __deepcopy__(self, _: Any) -> _Read:
        return _Read(self.hf_quantizer)

    def convert(  # type: ignore[override]
        self, input_dict: Mapping[str, Any], *_: Any, full_layer_name: str, model: Any, **__: Any
    ) -> dict[str, Any]:
        """Called by transformers with all tensors of one weight, by the patterns that their names match."""
        found = {pattern.endswith(f"{BITS}$"): tensors for pattern, tensors in input_dict.items()}
        values, bits = ((one[0] if isinstance(one, list) else one) for one in map(found.get, (False, True)))
        if values is None:
            values = torch.empty(0)
        return {full_layer_name: self.hf_quantizer.take(full_layer_name, values, bits, self.dtype, model)}


def attach(model: nn.Module) -> None:
    """Lets `save_pretrained` of this model, and of models inside it, write their packed weights.

    `accelerate` does this. Call it if layers were packed by hand; `restore` undoes it.
    """
    for module in model.modules():
        free = isinstance(module, PreTrainedModel) and getattr(module, "hf_quantizer", None) is None
        if free and any(is_packed(layer) for layer in module.modules()):
            SparsamQuantizer(SparsamConfig(), pre_quantized=True).put_on(module)


def _forget(model: nn.Module) -> None:
    """Removes the attributes that transformers sets on quantized models."""
    for key in ("is_quantized", "quantization_method", "hf_quantizer"):
        vars(model).pop(key, None)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module.config).pop("quantization_config", None)
            vars(module.config).pop("_is_quantized", None)


def _device(place: Any) -> Any:
    return f"cuda:{place}" if isinstance(place, int) else "meta" if place == "disk" else place


def _is_vector(param: Any) -> bool:
    return len(param.get_shape() if hasattr(param, "get_shape") else param.shape) == 1


def _read_manifest(files: Sequence[str]) -> Manifest | None:
    """The metadata of a folder's files, which all have the same; None without packed weights."""
    found: dict[str, str] = {}
    for file in files:
        if not file.endswith(".safetensors"):
            return None
        with safetensors_format.open_file(Path(file), "pt") as handle:
            metadata = handle.metadata() or {}
        if found and metadata != found:
            msg = f"{file}: expected the metadata of {Path(files[0]).name}; got others; get the folder again"
            raise ValueError(msg)
        found = metadata
    if "sparsam" not in found:
        return None
    try:
        return Manifest.from_metadata(found)
    except ValueError as error:
        msg = f"{files[0]}: expected what save_pretrained writes; got another: {error}; save it again"
        raise ValueError(msg) from error


def _places(names: Collection[str], known: Collection[str], prefix: str) -> dict[str, str]:
    """Saved name -> name in the model: a base model lacks the prefix, or the file does."""
    found = {}
    for name in names:
        for one in (name, name.removeprefix(prefix), prefix + name):
            if one in known:
                found[name] = one
                break
    return found


def _for_model(
    manifest: Manifest, tensors: Collection[str], modules: Collection[str], prefix: str
) -> Manifest:
    """The manifest with the names of a model, which may be a part of the one that was saved."""
    weights = _places(manifest.weights, tensors, prefix)
    tied = _places({*manifest.tied, *manifest.tied.values()}, tensors, prefix)
    places = _places(manifest.layers, {*modules, *tensors}, prefix)  # projections have a tensor's name
    layers = {places[name]: layer for name, layer in manifest.layers.items() if name in places}
    activations = _places(manifest.fused, modules, prefix)
    fused = {}
    for name, into in manifest.fused.items():
        found = tuple(places[one] for one in into if one in places)
        if name in activations and len(found) == len(into):
            fused[activations[name]] = found
        else:  # the activation, or a layer that computes it, is not in this part of the model
            layers |= {one: msgspec.structs.replace(layers[one], activation=None) for one in found}
    return Manifest(
        {weights[name]: weight for name, weight in manifest.weights.items() if name in weights},
        layers,
        fused,
        {
            tied[name]: tied[source]
            for name, source in manifest.tied.items()
            if name in tied and source in tied
        },
        attention=tuple(_places(manifest.attention, modules, prefix).values()),
        modules={
            name: manifest.modules[saved]
            for saved, name in _places(manifest.modules, modules, prefix).items()
        },
    )
