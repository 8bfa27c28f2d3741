"""Bytes and operations of a forward pass, against published sizes and counts made by hand and by enumeration."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from flash_config import flash_config

from step3p5.byte_account import Forward, cache_bytes, experts_hit, forward_bytes, forward_flops, weight_bytes
from step3p5.checkpoint_tensors import CheckpointDtype
from step3p5.config_parser import parse_model_config
from step3p5.layer_config import AttentionConfig, AttentionKind, DenseMLPConfig, LayerConfig, ModelConfig, MoEConfig

BF16, F32 = CheckpointDtype.BFLOAT16, CheckpointDtype.FLOAT32
FLASH = parse_model_config(flash_config())

FULL = AttentionConfig(AttentionKind.FULL, 4, 2, 64, None, None, head_wise_gate=True, qk_norm=True)
SLIDING = AttentionConfig(AttentionKind.SLIDING, 6, 2, 64, 5, None, head_wise_gate=True, qk_norm=True)
MOE = MoEConfig(16, 4, 128, None, DenseMLPConfig(192, None), 3.0, True, router_bias=True, fp32_gate=True)
SMALL = ModelConfig(
    hidden_size=256,
    vocab_size=1000,
    rms_norm_eps=1e-5,
    zero_centered_norm=True,
    tie_word_embeddings=False,
    max_position_embeddings=4096,
    layers=(LayerConfig(0, FULL, DenseMLPConfig(512, None)), LayerConfig(1, SLIDING, MOE)),
    mtp_layers=(LayerConfig(2, SLIDING, DenseMLPConfig(512, None)),),
)


@pytest.mark.parametrize(
    ("part", "megabytes"),
    [
        ("model.layers.4.self_attn.", 151),
        ("model.layers.3.self_attn.", 218),
        ("model.layers.0.mlp.", 277),
        ("model.layers.3.moe.gate.", 2.36),
        ("model.layers.3.moe.", 251.7 + 2.36),
        ("model.layers.3.share_expert.", 31.5),
        ("lm_head.", 1056),
        ("model.embed_tokens.", 4096 * 2 / 1e6),
        ("", 22_900),
    ],
)
def test_a_token_reads_the_published_bytes_of_flash(part: str, megabytes: float) -> None:
    read = weight_bytes(FLASH, BF16, num_tokens=1)
    total = sum(num_bytes for name, num_bytes in read.items() if name.startswith(part))
    assert total / 1e6 == pytest.approx(megabytes, rel=5e-3)


@pytest.mark.parametrize(("tokens", "experts"), [(1, 8), (2, 16), (4, 32), (8, 57), (16, 107), (64, 246), (256, 287)])
def test_experts_hit_are_those_of_drawn_routings(tokens: int, experts: int) -> None:
    moe = FLASH.layers[3].mlp
    assert isinstance(moe, MoEConfig)
    # The counts are of one draw each, and four tokens happened to share no expert.
    assert experts_hit(moe, tokens) == pytest.approx(experts, rel=0.05)


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(4, 2, 1), (4, 2, 3), (5, 1, 4), (6, 3, 2), (3, 3, 2)])
def test_experts_hit_is_the_mean_over_all_routings(experts: int, top_k: int, tokens: int) -> None:
    routings = product(combinations(range(experts), top_k), repeat=tokens)
    mean = np.mean([len(set().union(*routing)) for routing in routings])
    assert experts_hit(replace(MOE, num_experts=experts, top_k=top_k), tokens) == pytest.approx(mean)


def test_every_tensor_but_the_embedding_and_the_experts_is_read_once() -> None:
    few, many = weight_bytes(SMALL, F32, 1), weight_bytes(SMALL, F32, 10_000)
    grow = {name for name in few if few[name] != many[name]}
    assert grow == {
        "model.embed_tokens.weight",
        *(f"model.layers.1.moe.{p}_proj.weight" for p in ("gate", "up", "down")),
    }
    assert many["model.layers.1.moe.up_proj.weight"] == 16 * 128 * 256 * 4
    assert many["model.embed_tokens.weight"] == 10_000 * 256 * 4
    assert few["model.layers.0.self_attn.q_norm.weight"] == 64 * 4


def test_a_tied_head_reads_the_whole_embedding_and_the_rows_of_the_tokens() -> None:
    read = weight_bytes(replace(SMALL, tie_word_embeddings=True), BF16, num_tokens=3)
    assert "lm_head.weight" not in read
    assert read["model.embed_tokens.weight"] == pytest.approx((1000 + 3) * 256 * 2)


def test_router_bias_is_float32_in_bfloat16_weights() -> None:
    assert weight_bytes(SMALL, BF16, 1)["model.layers.1.moe.router_bias"] == 16 * 4
    assert weight_bytes(SMALL, BF16, 1)["model.layers.1.moe.gate.weight"] == 16 * 256 * 2


@pytest.mark.parametrize(("context", "in_window"), [(1, 1), (511, 511), (512, 512), (513, 512), (1000, 512)])
def test_decoding_reads_the_context_on_full_layers_and_the_window_on_sliding_ones(context: int, in_window: int) -> None:
    per_token_and_layer = 4096
    wanted = 3 * per_token_and_layer * (12 * context + 33 * in_window)
    assert cache_bytes(FLASH, BF16, Forward(3, 1, context)) == wanted
    assert cache_bytes(FLASH, F32, Forward(3, 1, context)) == 2 * wanted


@pytest.mark.parametrize(("new_tokens", "context"), [(1, 1), (1, 9), (3, 4), (3, 20), (20, 20), (4, 4), (2, 6)])
def test_cache_and_attention_are_those_of_every_visible_key(new_tokens: int, context: int) -> None:
    pairs = {kind: visible(new_tokens, context, window) for kind, window in (("full", context), ("sliding", 5))}
    keys = {kind: {key for _, key in seen} for kind, seen in pairs.items()}
    forward = Forward(2, new_tokens, context)
    assert cache_bytes(SMALL, F32, forward) == 2 * (len(keys["full"]) + len(keys["sliding"])) * 2 * 2 * 64 * 4

    full = 256 * 256 * 2 + 2 * 128 * 256 + 4 * 256 + 3 * 512 * 256
    sliding = 384 * 256 * 2 + 2 * 128 * 256 + 6 * 256 + 16 * 256 + 4 * 3 * 128 * 256 + 3 * 192 * 256
    attention = 2 * 64 * (4 * len(pairs["full"]) + 6 * len(pairs["sliding"]))
    multiply_adds = 2 * new_tokens * (full + sliding) + 2 * attention + 2 * 1000 * 256
    assert forward_flops(SMALL, forward) == 2 * multiply_adds


def test_decoding_a_short_context_multiplies_every_weight_it_reads() -> None:
    forward = Forward(1, 1, 1)
    weights_read = sum(weight_bytes(FLASH, BF16, 1).values()) / 2
    assert forward_flops(FLASH, forward) / 2 == pytest.approx(weights_read, rel=1e-3)


def test_a_pass_reads_weights_and_cache_each_in_its_own_dtype() -> None:
    forward = Forward(2, 1, 10)
    wanted = sum(weight_bytes(SMALL, BF16, 2).values()) + 2 * (10 + 5) * 2 * 2 * 64 * 4
    assert forward_bytes(SMALL, forward, weight_dtype=BF16, cache_dtype=F32) == pytest.approx(wanted)


@pytest.mark.parametrize("numbers", [(0, 1, 1), (1, 0, 1), (1, 2, 1)])
def test_an_impossible_pass_is_refused(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="new_tokens <= context"):
        Forward(*numbers)


def visible(new_tokens: int, context: int, window: int) -> set[tuple[int, int]]:
    """All (query, key) positions of the last `new_tokens` queries, by trying each."""
    queries = range(context - new_tokens, context)
    return {(query, key) for query in queries for key in range(context) if key <= query and query - key < window}
