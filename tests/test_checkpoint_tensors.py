"""The table of hub tensor names, against names, shapes and totals written out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from step3p5.checkpoint_tensors import CheckpointDtype, TensorRole, TensorSpec, checkpoint_tensors, mtp_tensors
from step3p5.layer_config import AttentionConfig, AttentionKind, DenseMLPConfig, LayerConfig, ModelConfig, MoEConfig

FULL = AttentionConfig(AttentionKind.FULL, 4, 2, 64, None, None, head_wise_gate=True, qk_norm=True)
SLIDING = AttentionConfig(AttentionKind.SLIDING, 6, 2, 64, 128, None, head_wise_gate=True, qk_norm=True)
DENSE = DenseMLPConfig(512, None)
MOE = MoEConfig(16, 4, 128, None, DenseMLPConfig(192, None), 3.0, True, router_bias=True, fp32_gate=True)
MODEL = ModelConfig(
    hidden_size=256,
    vocab_size=1000,
    rms_norm_eps=1e-5,
    zero_centered_norm=True,
    tie_word_embeddings=False,
    max_position_embeddings=4096,
    layers=(LayerConfig(0, FULL, DENSE), LayerConfig(1, SLIDING, MOE)),
    mtp_layers=(LayerConfig(2, SLIDING, DENSE),),
)

FULL_DENSE = {
    "input_layernorm.weight": (256,),
    "self_attn.q_proj.weight": (256, 256),
    "self_attn.k_proj.weight": (128, 256),
    "self_attn.v_proj.weight": (128, 256),
    "self_attn.q_norm.weight": (64,),
    "self_attn.k_norm.weight": (64,),
    "self_attn.g_proj.weight": (4, 256),
    "self_attn.o_proj.weight": (256, 256),
    "post_attention_layernorm.weight": (256,),
    "mlp.gate_proj.weight": (512, 256),
    "mlp.up_proj.weight": (512, 256),
    "mlp.down_proj.weight": (256, 512),
}
SLIDING_ATTENTION = {
    "self_attn.q_proj.weight": (384, 256),
    "self_attn.g_proj.weight": (6, 256),
    "self_attn.o_proj.weight": (256, 384),
}
SLIDING_MOE = {
    **{name: shape for name, shape in FULL_DENSE.items() if not name.startswith("mlp.")},
    **SLIDING_ATTENTION,
    "moe.gate.weight": (16, 256),
    "moe.router_bias": (16,),
    "moe.gate_proj.weight": (16, 128, 256),
    "moe.up_proj.weight": (16, 128, 256),
    "moe.down_proj.weight": (16, 256, 128),
    "share_expert.gate_proj.weight": (192, 256),
    "share_expert.up_proj.weight": (192, 256),
    "share_expert.down_proj.weight": (256, 192),
}
MTP = {
    **FULL_DENSE,
    **SLIDING_ATTENTION,
    "enorm.weight": (256,),
    "hnorm.weight": (256,),
    "eh_proj.weight": (256, 512),
    "transformer.shared_head.norm.weight": (256,),
    "transformer.shared_head.output.weight": (1000, 256),
}


def shapes(tensors: dict[str, TensorSpec]) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape for name, spec in tensors.items()}


def under(layer: int, tensors: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"model.layers.{layer}.{name}": shape for name, shape in tensors.items()}


def test_decoder_has_exactly_the_hub_tensors() -> None:
    outside = {"model.embed_tokens.weight": (1000, 256), "model.norm.weight": (256,), "lm_head.weight": (1000, 256)}
    assert shapes(checkpoint_tensors(MODEL)) == outside | under(0, FULL_DENSE) | under(1, SLIDING_MOE)


def test_mtp_layer_has_its_own_norms_projection_and_head() -> None:
    assert shapes(mtp_tensors(MODEL)) == under(2, MTP)


def test_model_without_mtp_layers_has_no_mtp_tensors() -> None:
    assert mtp_tensors(replace(MODEL, mtp_layers=())) == {}


def test_layer_index_of_the_configuration_names_the_tensors() -> None:
    moved = replace(MODEL, layers=(LayerConfig(7, FULL, DENSE),))
    assert "model.layers.7.mlp.gate_proj.weight" in checkpoint_tensors(moved)


@pytest.mark.parametrize(
    ("model", "absent"),
    [
        (replace(MODEL, tie_word_embeddings=True), {"lm_head.weight"}),
        (
            replace(MODEL, layers=(LayerConfig(0, replace(FULL, qk_norm=False), DENSE), MODEL.layers[1])),
            {"model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.k_norm.weight"},
        ),
        (
            replace(MODEL, layers=(LayerConfig(0, replace(FULL, head_wise_gate=False), DENSE), MODEL.layers[1])),
            {"model.layers.0.self_attn.g_proj.weight"},
        ),
        (
            replace(MODEL, layers=(MODEL.layers[0], LayerConfig(1, SLIDING, replace(MOE, router_bias=False)))),
            {"model.layers.1.moe.router_bias"},
        ),
    ],
    ids=["tied head", "no QK norm", "no attention gate", "no router bias"],
)
def test_option_switched_off_removes_its_tensors_only(model: ModelConfig, absent: set[str]) -> None:
    assert set(checkpoint_tensors(MODEL)) - set(checkpoint_tensors(model)) == absent
    assert set(checkpoint_tensors(model)) < set(checkpoint_tensors(MODEL))


def test_only_the_router_bias_stays_float32_in_a_bfloat16_checkpoint() -> None:
    tensors = checkpoint_tensors(MODEL) | mtp_tensors(MODEL)
    float32 = {name for name, spec in tensors.items() if spec.dtype(CheckpointDtype.BFLOAT16) == "float32"}
    assert float32 == {"model.layers.1.moe.router_bias"}


def test_bytes_follow_shape_and_dtype() -> None:
    weight, bias = TensorSpec((16, 128, 256), TensorRole.EXPERT_UP), TensorSpec((16,), TensorRole.ROUTER_BIAS)
    assert (weight.num_bytes(CheckpointDtype.BFLOAT16), weight.num_bytes(CheckpointDtype.FLOAT32)) == (1048576, 2097152)
    assert (bias.num_bytes(CheckpointDtype.BFLOAT16), bias.num_bytes(CheckpointDtype.FLOAT32)) == (64, 64)


def test_layer_tensors_say_which_role_they_play() -> None:
    tensors = checkpoint_tensors(MODEL)
    roles = {name.removeprefix("model.layers.1."): spec.role for name, spec in tensors.items() if ".1." in name}
    assert roles["moe.gate.weight"] is TensorRole.ROUTER
    assert roles["moe.gate_proj.weight"] is TensorRole.EXPERT_GATE
    assert roles["share_expert.gate_proj.weight"] is TensorRole.MLP_GATE
    assert roles["self_attn.g_proj.weight"] is TensorRole.ATTENTION_GATE
