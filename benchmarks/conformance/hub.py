"""Backbones of KerasHub, in configurations of a few thousand weights."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.conformance.makers import Maker

FAMILY = "KerasHub"
IMAGE = (32, 32, 3)
LAYERS = ["sliding_attention", "full_attention"]

# Values of arguments of any class that requires them.
SIZES: dict[str, Any] = {
    "vocabulary_size": 32, "vocab_size": 32, "num_layers": 2, "num_layers_enc": 2,
    "num_layers_dec": 2, "encoder_num_layers": 2, "decoder_num_layers": 2, "num_heads": 2,
    "num_query_heads": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "head_size": 8, "encoder_num_heads": 2, "decoder_num_heads": 2, "embedding_dim": 16,
    "hidden_dim": 16, "hidden_size": 16, "intermediate_dim": 24, "mlp_dim": 24, "filter_dim": 16,
    "num_experts": 2, "top_k": 1, "moe_intermediate_dim": 12,
    "shared_expert_intermediate_dim": 12, "shared_expert_intermediate_size": 12,
    "image_size": 32, "image_shape": IMAGE, "patch_size": 8,
    "encoder_hidden_dim": 16, "encoder_intermediate_dim": 24, "encoder_num_attention_heads": 2,
    "encoder_num_key_value_heads": 1, "encoder_head_dim": 8, "encoder_layer_types": LAYERS,
    "decoder_hidden_dim": 16, "decoder_intermediate_dim": 24, "decoder_num_attention_heads": 2,
    "decoder_num_key_value_heads": 1, "decoder_head_dim": 8, "decoder_layer_types": LAYERS,
}  # fmt: skip
RESNET = {
    "input_conv_filters": [64], "input_conv_kernel_sizes": [3],
    "stackwise_num_filters": [64, 24], "stackwise_num_blocks": [1, 1],
    "stackwise_num_strides": [1, 2], "block_type": "basic_block",
}  # fmt: skip
MIX_TRANSFORMER = {
    "num_layers": 2, "hidden_dims": [8, 16], "layerwise_depths": [1, 1],
    "layerwise_num_heads": [1, 2], "layerwise_sr_ratios": [2, 1], "layerwise_patch_sizes": [7, 3],
    "layerwise_strides": [4, 2], "max_drop_path_rate": 0.1,
}  # fmt: skip
# Further arguments of classes that need them.
FURTHER: dict[str, dict[str, Any]] = {
    "CSPNetBackbone": {
        "stem_filters": 8, "stem_kernel_size": 3, "stem_strides": 1, "stackwise_depth": [1, 2],
        "stackwise_strides": [1, 2], "stackwise_num_filters": [16, 32], "block_type": "dark_block",
        "stage_type": "dark",
    },
    "DenseNetBackbone": {"stackwise_num_repeats": [2, 2], "growth_rate": 8},
    "EfficientNetBackbone": {
        "stackwise_kernel_sizes": [3, 5], "stackwise_num_repeats": [1, 2],
        "stackwise_input_filters": [8, 16], "stackwise_output_filters": [16, 24],
        "stackwise_expansion_ratios": [1, 4], "stackwise_strides": [1, 2],
        "stackwise_squeeze_and_excite_ratios": [0, 0.25],
        "stackwise_block_types": ["fused", "unfused"], "stackwise_force_input_filters": [0, 0],
        "stackwise_nores_option": [False, False], "stackwise_width_coefficients": [1.0, 1.0],
        "stackwise_depth_coefficients": [1.0, 1.0],
    },
    "HGNetV2Backbone": {
        "depths": [1, 1], "embedding_size": 8, "hidden_sizes": [16, 24],
        "stem_channels": [3, 8, 8], "hidden_act": "relu", "use_learnable_affine_block": False,
        "stackwise_stage_filters": [(8, 8, 16, 1, 1, 3), (16, 8, 24, 1, 1, 3)],
        "apply_downsample": [False, True], "use_lightweight_conv_block": [False, False],
    },
    "MiTBackbone": MIX_TRANSFORMER,
    "MobileNetBackbone": {
        "stackwise_expansion": [[16], [24]], "stackwise_num_blocks": [1, 1],
        "stackwise_num_filters": [[8], [16]], "stackwise_kernel_size": [[3], [5]],
        "stackwise_num_strides": [[2], [1]], "stackwise_se_ratio": [[None], [0.25]],
        "stackwise_activation": [["relu"], ["hard_swish"]], "stackwise_padding": [[1], [2]],
        "output_num_filters": 32, "depthwise_filters": 8, "depthwise_stride": 1,
        "depthwise_residual": False, "last_layer_filter": 24,
    },
    "MoonshineBackbone": {},
    "PaliGemmaBackbone": {
        "vit_patch_size": 8, "vit_num_heads": 2, "vit_hidden_dim": 16, "vit_num_layers": 2,
    },
    "Qwen3_5Backbone": {
        "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "Qwen3_5MoeBackbone": {
        "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "ResNetBackbone": RESNET,
    "SmolLM3Backbone": {
        "attention_bias": False, "attention_dropout": 0.0, "rope_layer_enabled_list": [True, False],
        "layer_types": ["attention"] * 2, "mlp_bias": False, "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 32, "rope_theta": 10000.0, "partial_rotary_factor": 1.0,
    },
    "SwinTransformerBackbone": {
        "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4,
    },
    "T5GemmaBackbone": {"sliding_window": 4},
    "T5Gemma2Backbone": {"sliding_window": 4},
    "VGGBackbone": {"stackwise_num_repeats": [1, 2], "stackwise_num_filters": [8, 16]},
    "ViTDetBackbone": {
        "global_attention_layer_indices": [1], "num_output_channels": 8, "window_size": 2,
    },
    "XceptionBackbone": {
        "stackwise_conv_filters": [[8, 16], [16, 24]], "stackwise_pooling": [True, False],
    },
}  # fmt: skip
# Lengths of inputs, of classes that read more than a few steps.
LONG = {"MoonshineBackbone": 1200}


def arguments(cls: Any) -> dict[str, Any]:
    """Returns small values for the arguments that a class requires, and for the shape of images."""
    parameters = inspect.signature(cls.__init__).parameters
    needed = [
        p.name
        for p in parameters.values()
        if p.default is p.empty or p.name in ("image_shape", "top_k")
    ]
    found = {name: SIZES[name] for name in needed if name in SIZES}
    return found | FURTHER.get(cls.__name__, {})


def backbone(name: str) -> Any:
    import keras_hub

    cls = getattr(keras_hub.models, name)
    return cls(**arguments(cls))


def two_towers(name: str) -> Any:
    """Returns a model of images and texts that compares the outputs of two encoders."""
    import keras_hub

    short = name.removesuffix("Backbone")
    sizes = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "intermediate_dim": 24}
    vision = getattr(keras_hub.models, f"{short}VisionEncoder")
    text = getattr(keras_hub.models, f"{short}TextEncoder")
    further = {} if short == "SigLIP" else {"projection_dim": 8}
    return getattr(keras_hub.models, name)(
        vision(patch_size=8, image_shape=IMAGE, **sizes),
        text(vocabulary_size=32, embedding_dim=16, max_sequence_length=8, **sizes),
        **further,
    )


def around(name: str, inner: str, **options: Any) -> Any:
    """Returns a backbone around another one."""
    import keras_hub

    return getattr(keras_hub.models, name)(image_encoder=backbone(inner), **options)


SPECIAL: dict[str, Callable[[], Any]] = {
    "CLIPBackbone": lambda: two_towers("CLIPBackbone"),
    "SigLIPBackbone": lambda: two_towers("SigLIPBackbone"),
    "SegFormerBackbone": lambda: around("SegFormerBackbone", "MiTBackbone", projection_filters=8),
    "RetinaNetBackbone": lambda: around(
        "RetinaNetBackbone", "ResNetBackbone", min_level=3, max_level=4, use_p5=False
    ),
}
# Families that differ most come first.
ORDER = (
    "BertBackbone", "GPT2Backbone", "ViTBackbone", "ResNetBackbone", "T5Backbone", "GemmaBackbone",
    "MixtralBackbone", "CLIPBackbone", "WhisperBackbone", "LlamaBackbone",
    "SwinTransformerBackbone", "MiTBackbone", "DebertaV3Backbone", "RWKV7Backbone",
    "FNetBackbone", "XLNetBackbone",
    "AlbertBackbone", "BartBackbone", "BloomBackbone", "CSPNetBackbone", "DINOV2Backbone",
    "DINOV3Backbone", "DeiTBackbone", "DenseNetBackbone", "DistilBertBackbone", "ESMBackbone",
    "EdRecBackbone", "EfficientNetBackbone", "ElectraBackbone", "FalconBackbone",
    "GPTNeoXBackbone", "Gemma3Backbone", "Gemma4Backbone", "GptOssBackbone", "HGNetV2Backbone",
    "Llama3Backbone", "MistralBackbone", "MobileNetBackbone", "MoonshineBackbone", "OPTBackbone",
    "PaliGemmaBackbone", "Phi3Backbone", "Qwen2Backbone", "Qwen3Backbone", "Qwen3MoeBackbone",
    "Qwen3_5Backbone", "Qwen3_5MoeBackbone", "QwenMoeBackbone", "RetinaNetBackbone",
    "RobertaBackbone", "RoformerV2Backbone", "SegFormerBackbone", "SigLIPBackbone",
    "SmolLM3Backbone", "T5GemmaBackbone", "T5Gemma2Backbone", "VGGBackbone", "ViTDetBackbone",
    "XLMRobertaBackbone", "XceptionBackbone",
)  # fmt: skip


def makers(names: Iterable[str] = ORDER) -> list[Maker]:
    return [
        Maker(
            name,
            FAMILY,
            SPECIAL.get(name, functools.partial(backbone, name)),
            free=LONG.get(name, 8),
        )
        for name in names
    ]
