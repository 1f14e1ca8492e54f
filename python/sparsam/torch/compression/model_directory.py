"""A Hugging Face directory: its model and tokenizer, and the files beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsam.inputs.checks import expected
from sparsam.torch.serialization.meta_device import without_values
from torch import nn

__all__ = [
    "ModelDirectory",
    "copy_companions",
    "model_folder",
    "read_directory",
    "weight_bytes",
    "without_bars",
]

_ENDINGS = ("safetensors", "bin", "h5", "msgpack", "onnx", "onnx_data", "gguf", "pt", "pth", "ckpt", "ot")


@dataclass(frozen=True)
class ModelDirectory:
    """The content of a directory.

    Attributes:
        path: The directory.
        part: The folder in it that has the model itself: ".", or one as sentence-transformers once had it.
        model: The model, on the CPU, in float32 and eval mode.
        tokenizer: Its tokenizer.
        causal: Whether it is a language model that predicts the next token.
        longest: The largest number of tokens it accepts.
    """

    path: Path
    part: str
    model: nn.Module
    tokenizer: Any
    causal: bool
    longest: int

    @property
    def nbytes(self) -> int:
        """Bytes of its weight files."""
        return weight_bytes(self.path / self.part)


def read_directory(path: Path, target: Path, *, loaded: bool = True) -> ModelDirectory:
    """Reads the model of the class that its configuration names, from local files only.

    Args:
        path: The directory.
        target: Where its folders will be copied to.
        loaded: Whether to load the weights; otherwise Parameters are on the meta device.

    Raises:
        ValueError: The directory holds no model for transformers, or one whose forward takes no plain text
            (an encoder-decoder, say), or the target is inside of it.
        ImportError: transformers is not installed.
    """
    part = model_folder(path)
    inner = path / part
    if not (inner / "config.json").is_file():
        raise ValueError(
            expected("model", str(path), "a Hugging Face directory with config.json", "check the path")
        )
    if path.resolve() in target.resolve().parents:
        raise ValueError(expected("output", str(target), "a directory outside of the model's", "move it"))
    import transformers  # noqa: PLC0415 - an extra, and slow to import
    from transformers.models.auto import modeling_auto  # noqa: PLC0415

    try:
        config: Any = transformers.AutoConfig.from_pretrained(inner, local_files_only=True)
    except (OSError, ValueError) as error:
        wanted = "a model that transformers reads"
        raise ValueError(expected("model", str(path), wanted, f"check config.json ({error})")) from error
    if getattr(config, "is_encoder_decoder", False):
        wanted = "an encoder or a decoder"
        do = "call sparsam.torch.prune with inputs of your own"
        raise ValueError(expected("model", f"an encoder-decoder ({config.model_type})", wanted, do))
    names = list(getattr(config, "architectures", None) or ())
    causal = bool(names) and names[0] in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    kind: Any = getattr(transformers, names[0], transformers.AutoModel) if names else transformers.AutoModel
    try:
        with without_bars():
            if loaded:
                model = kind.from_pretrained(inner, local_files_only=True)
            else:
                make = kind.from_config if kind is transformers.AutoModel else kind
                model = without_values(lambda: make(config))
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(inner, local_files_only=True)
    except (OSError, ValueError) as error:
        wanted = "a model and a tokenizer that transformers reads"
        raise ValueError(expected("model", str(path), wanted, f"check its files ({error})")) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    longest = min(
        int(number)
        for number in (getattr(config, "max_position_embeddings", None), tokenizer.model_max_length, 1 << 20)
        if number
    )
    return ModelDirectory(path, part, model.float().eval(), tokenizer, causal, longest)


@contextmanager
def without_bars() -> Iterator[None]:
    """Switches off the progress bars of transformers while this is open."""
    from transformers.utils import logging  # noqa: PLC0415

    bars: Any = logging  # not typed
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def copy_companions(source: Path, target: Path, part: str = ".") -> None:
    """Copies what a directory holds beside its weights: tokenizer, generation and pooling files, folders.

    Folders with weights, such as `onnx`, hold the dense model in other forms and are left out, as are hidden
    ones; those that sentence-transformers' `modules.json` names are parts of the model, and are copied.
    Existing files in `target` are kept.
    """
    parts = set(_parts(source))
    for item in sorted(source.iterdir()):
        place = target / item.name
        if item.name == part:
            copy_companions(item, place)
        elif place.exists() or _holds_weights(item):
            continue
        elif not item.is_dir():
            shutil.copyfile(item, place)
        elif item.name in parts or not (
            item.name.startswith(".") or any(map(_holds_weights, item.rglob("*")))
        ):
            shutil.copytree(item, place, symlinks=False)


def _parts(path: Path) -> list[str]:
    """The folders that sentence-transformers' modules.json names, in its order; none without that."""
    try:
        modules = json.loads((path / "modules.json").read_text(encoding="utf-8"))
        return [str(module["path"]) for module in modules]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def model_folder(path: Path) -> str:
    """Returns the model's folder: the first that modules.json names, if the directory itself has no model."""
    first = next(iter(_parts(path)), "")
    plain = first and Path(first).name == first
    return first if plain and not (path / "config.json").is_file() else "."


def _holds_weights(item: Path) -> bool:
    return item.suffix[1:] in _ENDINGS or item.name.endswith((".safetensors.index.json", ".bin.index.json"))


def weight_bytes(path: Path) -> int:
    """The bytes of a directory's safetensors files, each of an index once; of others if there are none."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = {path / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        return sum(file.stat().st_size for file in files)
    files = set(path.glob("*.safetensors")) or set(path.glob("*.bin"))
    return sum(file.stat().st_size for file in files)
