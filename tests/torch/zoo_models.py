"""Small random models of many classes, none of them downloaded: what `accelerate` must get right unseen.

Each `Specimen` builds a model and an example for it in any `Size`: tiny for tests, larger where times are to
mean something (benchmarks/models/zoo.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from torch.nn.utils import parametrizations
from zoo_modules import Attention, ConvNet, Curious, Scaled, Signals, Tagger, Tied
from zoo_specimen import Build, Size, Specimen, Stays

import torch
from torch import nn

__all__ = ["ZOO"]

Options = Callable[[Size], dict[str, Any]]


def _hugging_face(name: str, options: Options, inputs: Options) -> Build:
    """A model by its class, from a configuration."""
    stem = name.removesuffix("Model").removesuffix("ForCausalLM").removesuffix("LMHead")
    config_class, model_class = getattr(transformers, stem + "Config"), getattr(transformers, name)
    return lambda size: (model_class(config_class(**options(size))), inputs(size))


def _ends(size: Size) -> dict[str, Any]:
    return {"vocab_size": size.words, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _blocks(size: Size) -> dict[str, Any]:
    return {
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "intermediate_size": size.wide,
    }


def _text(name: str, more: Options = lambda _: {}) -> Build:
    """A model of tokens, an encoder or a decoder."""

    def inputs(size: Size) -> dict[str, Any]:
        ids = size.ids()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return _hugging_face(name, lambda s: _blocks(s) | _ends(s) | {"use_cache": False} | more(s), inputs)


def _grouped(name: str, more: Options = lambda _: {}) -> Build:
    """A decoder with fewer heads of keys than of queries."""
    return _text(name, lambda s: {"num_key_value_heads": 2, "head_dim": s.width // s.heads} | more(s))


def _towers(size: Size) -> dict[str, Any]:
    """An encoder and a decoder, of BART's kind."""
    each = {"layers": size.layers, "attention_heads": size.heads, "ffn_dim": size.wide}
    both = {f"{tower}_{key}": value for tower in ("encoder", "decoder") for key, value in each.items()}
    return both | _ends(size) | {"d_model": size.width, "decoder_start_token_id": 1, "use_cache": False}


def _pairs(name: str, options: Options) -> Build:
    """An encoder with a decoder of tokens."""
    return _hugging_face(name, options, lambda s: {"input_ids": s.ids(), "decoder_input_ids": s.ids()})


def _t5(size: Size) -> dict[str, Any]:
    heads = {"num_heads": size.heads, "d_kv": size.width // size.heads, "num_layers": size.layers}
    wide = {"d_model": size.width, "d_ff": size.wide, "decoder_start_token_id": 0}
    return _ends(size) | heads | wide | {"use_cache": False}


def _vision(name: str, options: Options) -> Build:
    """A model of images."""
    return _hugging_face(name, options, lambda s: {"pixel_values": s.images()})


def _vit(size: Size) -> dict[str, Any]:
    return _blocks(size) | {"image_size": size.image, "patch_size": 8}


def _swin(size: Size) -> dict[str, Any]:
    shape = {"image_size": size.image, "patch_size": 4, "window_size": 4}
    return shape | {"embed_dim": size.width // 2, "depths": [1, 2], "num_heads": [2, 4]}


def _stages(size: Size) -> dict[str, Any]:
    widths = [size.width // 2, size.width, size.width, 2 * size.width]
    return {"hidden_sizes": widths, "depths": [1, 1, 2, 1]}


def _clip(size: Size) -> tuple[nn.Module, Any]:
    text, image = _blocks(size) | _ends(size), _vit(size)
    config = transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=size.width)
    return transformers.CLIPModel(config), {"input_ids": size.ids(), "pixel_values": size.images()}


def _whisper(size: Size) -> dict[str, Any]:
    return _towers(size) | {"num_mel_bins": 16, "max_source_positions": size.tokens}


def _wav2vec2(size: Size) -> dict[str, Any]:
    convolutions = {
        "conv_dim": (size.width // 2, size.width, size.width),
        "conv_stride": (5, 4, 2),
        "conv_kernel": (10, 4, 3),
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
    }
    return _blocks(size) | convolutions


def _plain(make: Callable[[Size], nn.Module], draw: Callable[[Size], Any]) -> Build:
    return lambda size: (make(size), draw(size))


def _encoder(size: Size) -> nn.Module:
    layer = nn.TransformerEncoderLayer(size.width, size.heads, size.wide, batch_first=True)
    return nn.TransformerEncoder(layer, size.layers)


def _transformer(size: Size) -> nn.Module:
    depth = (size.layers, size.layers)
    return nn.Transformer(size.width, size.heads, *depth, size.wide, batch_first=True)


def _computed(size: Size) -> nn.Module:
    """Layers whose weights are computed, and one with a forward of its own."""
    width = size.width
    return nn.Sequential(
        nn.Linear(width, size.wide),
        nn.GELU(),
        Scaled(size.wide, width),
        parametrizations.weight_norm(nn.Linear(width, width)),
        nn.SiLU(),
        parametrizations.spectral_norm(nn.Linear(width, width)),
    )


def _tagger(kind: Callable[..., nn.RNNBase]) -> Build:
    return _plain(lambda s: Tagger(kind, s.width, s.layers, s.words), Size.ids)


def _narrow_embedding(size: Size) -> dict[str, Any]:
    return {"embedding_size": size.width // 2}


def _relative(_: Size) -> dict[str, Any]:
    return {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}


def _experts(size: Size) -> dict[str, Any]:
    each = {"moe_intermediate_size": size.width, "shared_expert_intermediate_size": 2 * size.width}
    return each | {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}


_SEVERAL = "no kernel for 4 matrices in one Parameter"
_MAMBA: Stays = {(kind, "not called with the example inputs"): 2 for kind in ("Conv1d", "Linear")}

ZOO: tuple[Specimen, ...] = (
    Specimen("BertModel", "encoder", _text("BertModel")),
    Specimen("RobertaModel", "encoder", _text("RobertaModel")),
    Specimen("DistilBertModel", "encoder", _text("DistilBertModel", lambda s: {"hidden_dim": s.wide})),
    Specimen("AlbertModel", "encoder", _text("AlbertModel", _narrow_embedding)),
    Specimen("DebertaV2Model", "encoder", _text("DebertaV2Model", _relative)),
    Specimen("ElectraModel", "encoder", _text("ElectraModel", _narrow_embedding)),
    Specimen("MPNetModel", "encoder", _text("MPNetModel")),
    Specimen(
        "ModernBertModel",
        "encoder",
        _text("ModernBertModel", lambda _: {"cls_token_id": 1, "sep_token_id": 2}),
    ),
    Specimen(
        "LlamaForCausalLM", "decoder", _grouped("LlamaForCausalLM", lambda _: {"tie_word_embeddings": True})
    ),
    Specimen("MistralModel", "decoder", _grouped("MistralModel")),
    Specimen("Qwen2ForCausalLM", "decoder", _grouped("Qwen2ForCausalLM")),
    Specimen("GemmaModel", "decoder", _grouped("GemmaModel")),
    Specimen("PhiModel", "decoder", _text("PhiModel")),
    Specimen(
        "OPTModel",
        "decoder",
        _text("OPTModel", lambda s: {"ffn_dim": s.wide, "word_embed_proj_dim": s.width}),
    ),
    Specimen("GPT2LMHeadModel", "decoder", _text("GPT2LMHeadModel", lambda s: {"n_inner": s.wide})),
    Specimen("GPTNeoXModel", "decoder", _text("GPTNeoXModel")),
    Specimen("T5Model", "encoder-decoder", _pairs("T5Model", _t5)),
    Specimen("BartModel", "encoder-decoder", _pairs("BartModel", _towers)),
    Specimen("MarianModel", "encoder-decoder", _pairs("MarianModel", _towers)),
    Specimen("ViTModel", "vision", _vision("ViTModel", _vit)),
    Specimen("SwinModel", "vision", _vision("SwinModel", _swin)),
    Specimen("ConvNextModel", "vision", _vision("ConvNextModel", _stages)),
    Specimen(
        "ResNetModel",
        "vision",
        _vision("ResNetModel", lambda s: _stages(s) | {"embedding_size": 16, "layer_type": "basic"}),
    ),
    Specimen(
        "SegformerModel",
        "vision",
        _vision("SegformerModel", lambda s: _stages(s) | {"num_attention_heads": [1, 2, 2, 4]}),
    ),
    Specimen("CLIPModel", "vision", _clip),
    Specimen("SiglipVisionModel", "vision", _vision("SiglipVisionModel", _vit)),
    Specimen(
        "MixtralModel",
        "experts",
        _grouped("MixtralModel", lambda s: {"num_local_experts": 4, "intermediate_size": 2 * s.width}),
        {("MixtralExperts", _SEVERAL): 4},
    ),
    Specimen(
        "Qwen2MoeModel", "experts", _text("Qwen2MoeModel", _experts), {("Qwen2MoeExperts", _SEVERAL): 4}
    ),
    Specimen("MambaModel", "state space", _text("MambaModel", lambda _: {"state_size": 8}), _MAMBA),
    Specimen("ConvNet", "plain", _plain(lambda s: ConvNet(s.width), Size.images)),
    Specimen("nn.TransformerEncoder", "plain", _plain(_encoder, Size.rows)),
    Specimen("nn.Transformer", "plain", _plain(_transformer, lambda s: (s.rows(), s.rows()))),
    Specimen(
        "nn.MultiheadAttention",
        "plain",
        _plain(lambda s: Attention(s.width, s.heads), lambda s: (s.rows(), s.rows().repeat(1, 1, 2))),
    ),
    Specimen("LSTM tagger", "plain", _tagger(nn.LSTM)),
    Specimen("GRU tagger", "plain", _tagger(nn.GRU)),
    Specimen("tied weights", "plain", _plain(lambda s: Tied(s.width, s.words), Size.ids)),
    Specimen("FalconModel", "decoder", _text("FalconModel", lambda s: {"ffn_hidden_size": s.wide})),
    Specimen(
        "MobileNetV2Model",
        "vision",
        _vision("MobileNetV2Model", lambda s: {"depth_multiplier": s.width / 512}),
    ),
    Specimen(
        "WhisperModel",
        "speech",
        _hugging_face(
            "WhisperModel",
            _whisper,
            lambda s: {
                "input_features": torch.randn(s.batch, 16, 2 * s.tokens),
                "decoder_input_ids": s.ids(),
            },
        ),
    ),
    Specimen(
        "Wav2Vec2Model",
        "speech",
        _hugging_face(
            "Wav2Vec2Model", _wav2vec2, lambda s: {"input_values": torch.randn(s.batch, 80 * s.tokens)}
        ),
        computed=1,
    ),
    Specimen("Signals", "plain", _plain(lambda s: Signals(s.width, s.layers), lambda s: s.signals(4))),
    Specimen("layers read in forward", "plain", _plain(lambda s: Curious(s.width), lambda s: s.signals(4))),
    Specimen(
        "computed weights",
        "plain",
        _plain(_computed, Size.rows),
        computed=2,
    ),
)
