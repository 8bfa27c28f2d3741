"""The float64 reference against truths made by hand: closed forms, plain sums and properties of the equations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from reference import Reference, apply_rope, attention, moe, rms_norm, rope_frequencies, route, swiglu

Array = NDArray[Any]
Tensors = dict[str, Array]

HIDDEN, VOCAB, HEAD_DIM, EXPERTS, WINDOW, LAYERS, DEPTHS = 12, 23, 8, 5, 3, 4, 2
FULL_HEADS, SLIDING_HEADS, KV_HEADS = 4, 6, 2
DENSE_WIDTH, EXPERT_WIDTH, SHARED_WIDTH = 10, 6, 7
TOKENS = [3, 17, 3, 9, 22, 0, 11, 5]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 32.0,
    "original_max_position_embeddings": 131072,
}


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A `config.json` in the released form: layers 1-3 are MoE, layer 0 is full, every list covers the MTP tail."""
    kinds = ["full_attention"] + ["sliding_attention"] * (LAYERS - 1 + DEPTHS)
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": DENSE_WIDTH,
        "num_hidden_layers": LAYERS,
        "num_nextn_predict_layers": DEPTHS,
        "layer_types": kinds,
        "num_attention_heads": FULL_HEADS,
        "num_attention_groups": KV_HEADS,
        "head_dim": HEAD_DIM,
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": SLIDING_HEADS,
            "num_attention_groups": KV_HEADS,
            "head_dim": HEAD_DIM,
        },
        "sliding_window": WINDOW,
        "rope_theta": [5e6] + [1e4] * (LAYERS - 1 + DEPTHS),
        "partial_rotary_factors": [0.5] + [1.0] * (LAYERS - 1 + DEPTHS),
        "rope_scaling": LLAMA3,
        "yarn_only_types": ["full_attention"],
        "moe_layers_enum": "1,2,3",
        "moe_num_experts": EXPERTS,
        "moe_top_k": 2,
        "moe_intermediate_size": EXPERT_WIDTH,
        "share_expert_dim": SHARED_WIDTH,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": 3.0,
        "swiglu_limits": [0, None, 0.0, 0.02, 0.0, None],
        "swiglu_limits_shared": [0.03, 0.0, None, 0.04, None, 0.0],
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
    } | changes


def tiny_tensors(rng: np.random.Generator) -> Tensors:
    """Random float32 tensors under hub names for `tiny_config`."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for index in range(LAYERS + DEPTHS):
        heads = FULL_HEADS if index == 0 else SLIDING_HEADS
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (HIDDEN,),
            "post_attention_layernorm.weight": (HIDDEN,),
            "self_attn.q_proj.weight": (heads * HEAD_DIM, HIDDEN),
            "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj.weight": (HIDDEN, heads * HEAD_DIM),
            "self_attn.g_proj.weight": (heads, HIDDEN),
            "self_attn.q_norm.weight": (HEAD_DIM,),
            "self_attn.k_norm.weight": (HEAD_DIM,),
        }
        if index not in (1, 2, 3):
            layer |= gated_mlp_shapes("mlp.", DENSE_WIDTH)
        else:
            layer |= {"moe.gate.weight": (EXPERTS, HIDDEN), "moe.router_bias": (EXPERTS,)}
            layer |= {name: (EXPERTS, *shape) for name, shape in gated_mlp_shapes("moe.", EXPERT_WIDTH).items()}
            layer |= gated_mlp_shapes("share_expert.", SHARED_WIDTH)
        if index >= LAYERS:
            layer |= {
                "enorm.weight": (HIDDEN,),
                "hnorm.weight": (HIDDEN,),
                "eh_proj.weight": (HIDDEN, 2 * HIDDEN),
                "transformer.shared_head.norm.weight": (HIDDEN,),
                "transformer.shared_head.output.weight": (VOCAB, HIDDEN),
            }
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return {name: rng.normal(0.0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def gated_mlp_shapes(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate_proj.weight": (width, HIDDEN),
        f"{prefix}up_proj.weight": (width, HIDDEN),
        f"{prefix}down_proj.weight": (HIDDEN, width),
    }


def silence(tensors: Tensors, *suffixes: str) -> Tensors:
    """The tensors with every one that ends in a suffix set to zero."""
    return {name: array * 0 if name.endswith(suffixes) else array for name, array in tensors.items()}


def normed(x: Array, weight: Array) -> Array:
    """The zero-centred RMSNorm in plain Python, a row at a time."""
    rows = []
    for row in x:
        scale = 1.0 / math.sqrt(sum(float(value) ** 2 for value in row) / len(row) + 1e-5)
        rows.append([float(value) * scale * (1.0 + float(w)) for value, w in zip(row, weight, strict=True)])
    return np.array(rows)


def changed_rows(before: Array, after: Array) -> list[bool]:
    """Which rows differ by more than the summation order of a matrix product can explain."""
    changed: list[bool] = (np.abs(after - before).max(axis=-1) > 1e-9).tolist()
    return changed


@pytest.fixture(params=[1, 20260])
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(request.param)


def test_rms_norm_is_zero_centred_unless_told_otherwise() -> None:
    x = np.array([[3.0, 4.0]])
    unit = math.sqrt(12.5 + 1e-5)
    np.testing.assert_allclose(rms_norm(x, np.array([0.0, 1.0]), 1e-5), [[3 / unit, 8 / unit]], rtol=1e-14)
    np.testing.assert_allclose(rms_norm(x, np.array([0.0, 1.0]), 1e-5, 0.0), [[0.0, 4 / unit]], rtol=1e-14)


def test_rope_pairs_a_dim_with_the_one_half_a_rotation_width_on_and_passes_the_tail() -> None:
    quarter_turn = np.array([math.pi / 2, 0.0])
    x = np.arange(1.0, 7.0).reshape(1, 1, 6)
    rotated = apply_rope(x, np.array([1]), quarter_turn)
    np.testing.assert_allclose(rotated[0, 0], [-3.0, 2.0, 1.0, 4.0, 5.0, 6.0], atol=1e-15)


def test_rope_keeps_norms_and_makes_scores_depend_on_distance_only(rng: np.random.Generator) -> None:
    frequencies = rope_frequencies(1e4, HEAD_DIM)
    q, k = rng.normal(size=(2, 1, 1, HEAD_DIM))

    def score(q_position: int, k_position: int) -> float:
        rotated_q = apply_rope(q, np.array([q_position]), frequencies)
        assert np.linalg.norm(rotated_q) == pytest.approx(np.linalg.norm(q), rel=1e-13)
        return float(np.vdot(rotated_q, apply_rope(k, np.array([k_position]), frequencies)))

    assert score(1007, 1002) == pytest.approx(score(5, 0), rel=1e-10)
    assert score(5, 0) != pytest.approx(score(0, 5), rel=1e-3)


def test_rope_frequencies_fall_geometrically_over_the_rotated_dims() -> None:
    np.testing.assert_allclose(rope_frequencies(1e4, 8), [1.0, 1e-1, 1e-2, 1e-3], rtol=1e-14)


def test_llama3_scaling_keeps_high_frequencies_divides_low_ones_and_blends_between() -> None:
    plain, scaled = rope_frequencies(5e6, 64), rope_frequencies(5e6, 64, LLAMA3)
    wavelength = 2 * math.pi / plain
    high, low = wavelength <= 131072 / 32, wavelength >= 131072 / 1
    between = ~high & ~low
    assert all(part.any() for part in (high, between, low))
    np.testing.assert_array_equal(scaled[high], plain[high])
    np.testing.assert_allclose(scaled[low], plain[low] / 2, rtol=1e-14)
    for frequency, got in zip(plain[between], scaled[between], strict=True):
        smooth = (131072 * frequency / (2 * math.pi) - 1) / 31
        assert got == pytest.approx((1 - smooth) * frequency / 2 + smooth * frequency, rel=1e-12)


def test_attention_agrees_with_sums_written_out(rng: np.random.Generator) -> None:
    heads, kv_heads, dim, window = 4, 2, 3, 3
    q = rng.normal(size=(2, heads, dim))
    k, v = rng.normal(size=(2, 5, kv_heads, dim))
    got = attention(q, k, v, window)
    for row, position in enumerate((3, 4)):
        for head in range(heads):
            keys = [j for j in range(5) if j <= position and position - j < window]
            exps = [math.exp(sum(q[row, head] * k[j, head // 2]) / math.sqrt(dim)) for j in keys]
            expected = sum(e * v[j, head // 2] for e, j in zip(exps, keys, strict=True)) / sum(exps)
            np.testing.assert_allclose(got[row, head], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("window", "seen"), [(None, [1, 2, 3, 4, 5]), (2, [1, 2, 2, 2, 2]), (1, [1] * 5)])
def test_equal_keys_average_the_visible_values(window: int | None, seen: list[int]) -> None:
    v = np.arange(5.0).reshape(5, 1, 1)
    got = attention(np.ones((5, 1, 1)), np.ones((5, 1, 1)), v, window)
    np.testing.assert_allclose(got[:, 0, 0], [t - (count - 1) / 2 for t, count in enumerate(seen)], rtol=1e-14)


def test_swiglu_clamps_the_gate_after_silu_from_above_and_the_up_half_on_both_sides() -> None:
    silu_of_2, silu_of_minus_9 = 2 / (1 + math.exp(-2)), -9 / (1 + math.exp(9))
    gate, up = np.array([50.0, 2.0, 2.0, -9.0]), np.array([1.5, 80.0, -80.0, 1.0])
    np.testing.assert_allclose(swiglu(gate, up)[1:3], [80 * silu_of_2, -80 * silu_of_2], rtol=1e-14)
    np.testing.assert_allclose(
        swiglu(gate, up, 7.0), [10.5, 7 * silu_of_2, -7 * silu_of_2, silu_of_minus_9], rtol=1e-14
    )
    # silu(2) = 1.76 lies under a limit of 1.9 although the gate itself does not; silu(-1) lies under -0.1 and stays.
    np.testing.assert_allclose(swiglu(np.array([2.0]), np.array([1.0]), 1.9), [silu_of_2], rtol=1e-14)
    np.testing.assert_allclose(swiglu(np.array([-1.0]), np.array([0.1]), 0.1), [-0.1 / (1 + math.e)], rtol=1e-14)


def test_router_chooses_by_biased_score_and_weighs_by_the_score() -> None:
    scores = np.array([0.9, 0.8, 0.2, 0.1])
    logits, bias = np.log(scores / (1 - scores))[None], np.array([-1.0, 0.0, 0.0, 0.75])
    ids, weights = route(logits, bias, top_k=2, normalize=False, scale=1.0)
    assert ids.tolist() == [[3, 1]]
    np.testing.assert_allclose(weights, [[0.1, 0.8]], rtol=1e-13)
    ids, weights = route(logits, None, top_k=2, normalize=True, scale=3.0)
    assert ids.tolist() == [[0, 1]]
    np.testing.assert_allclose(weights, [[2.7 / 1.7, 2.4 / 1.7]], rtol=1e-13)


def test_normalised_router_weights_sum_to_the_scaling_factor_even_for_tiny_scores() -> None:
    _, weights = route(np.array([[-30.0, -31.0, -32.0], [5.0, 0.0, 1.0]]), np.zeros(3), 2, normalize=True, scale=3.0)
    np.testing.assert_allclose(weights.sum(axis=-1), 3.0, rtol=1e-6)


def test_moe_adds_each_chosen_expert_by_its_weight(rng: np.random.Generator) -> None:
    x = rng.normal(size=(3, HIDDEN))
    gate, up = rng.normal(size=(2, EXPERTS, EXPERT_WIDTH, HIDDEN))
    down = rng.normal(size=(EXPERTS, HIDDEN, EXPERT_WIDTH))
    ids, weights = np.array([[4, 0], [0, 1], [4, 1]]), rng.uniform(0.1, 1.0, size=(3, 2))
    got = moe(x, ids, weights, gate, up, down, 0.5)
    for t in range(3):
        expected = sum(
            w * (down[e] @ [min(g / (1 + math.exp(-g)), 0.5) * max(-0.5, min(0.5, u)) for g, u in pairs])
            for e, w in zip(ids[t], weights[t], strict=True)
            for pairs in [list(zip(gate[e] @ x[t], up[e] @ x[t], strict=True))]
        )
        np.testing.assert_allclose(got[t], expected, rtol=1e-11, atol=1e-13)


def test_without_branches_the_model_is_embedding_norm_and_head(rng: np.random.Generator) -> None:
    tensors = silence(tiny_tensors(rng), "o_proj.weight", "down_proj.weight")
    model = Reference(tiny_config(), tensors)
    embedded = tensors["model.embed_tokens.weight"][TOKENS]
    np.testing.assert_array_equal(model.hidden_states(TOKENS), embedded)
    x = normed(embedded, tensors["model.norm.weight"])
    np.testing.assert_allclose(model.logits(TOKENS), x @ tensors["lm_head.weight"].T, rtol=1e-10, atol=1e-12)


def test_tied_embeddings_are_the_head(rng: np.random.Generator) -> None:
    tensors = tiny_tensors(rng)
    untied = Reference(tiny_config(), tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    del tensors["lm_head.weight"]
    tied = Reference(tiny_config(tie_word_embeddings=True), tensors)
    np.testing.assert_array_equal(tied.logits(TOKENS), untied.logits(TOKENS))


def test_no_token_sees_a_later_one(rng: np.random.Generator) -> None:
    model = Reference(tiny_config(), tiny_tensors(rng))
    changed = changed_rows(model.logits(TOKENS), model.logits([*TOKENS[:5], 1, *TOKENS[6:]]))
    assert changed == [False] * 5 + [True] * 3


def test_a_sliding_layer_forgets_tokens_beyond_its_window(rng: np.random.Generator) -> None:
    model = Reference(tiny_config(), tiny_tensors(rng))
    h = rng.normal(size=(8, HIDDEN))
    moved = h.copy()
    moved[2] += 1.0
    full, sliding = (changed_rows(model.decoder_layer(h, i), model.decoder_layer(moved, i)) for i in (0, 1))
    assert sliding == [False, False, True, True, True, False, False, False]
    assert full == [False, False] + [True] * 6


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("index", [0, 1], ids=["full", "sliding"])
def test_an_attention_layer_agrees_with_sums_and_complex_rotations(
    rng: np.random.Generator, index: int, gated: bool
) -> None:
    """Every wavelength exceeds the original length of 1, so llama3 scaling halves the full layer's frequencies."""
    tensors = silence(tiny_tensors(rng), "down_proj.weight")
    scaling = LLAMA3 | {"original_max_position_embeddings": 1}
    config = tiny_config(rope_scaling=scaling, use_head_wise_attn_gate=gated)
    frequencies = [0.5, 0.5 * 5e6**-0.5] if index == 0 else [1.0, 1e-1, 1e-2, 1e-3]
    heads, window, half = (4, 99, 2) if index == 0 else (6, WINDOW, 4)
    layer = {name.split("self_attn.")[-1]: w for name, w in tensors.items() if f"layers.{index}.self_attn" in name}
    h = rng.normal(size=(6, HIDDEN))
    x = normed(h, tensors[f"model.layers.{index}.input_layernorm.weight"])

    def rotated(name: str, t: int, head: int) -> Array:
        vector = layer[f"{name}_proj.weight"].reshape(-1, HEAD_DIM, HIDDEN)[head] @ x[t]
        vector = normed(vector[None], layer[f"{name}_norm.weight"])[0]
        pairs = (vector[:half] + 1j * vector[half : 2 * half]) * np.exp(1j * t * np.array(frequencies))
        return np.concatenate([pairs.real, pairs.imag, vector[2 * half :]])

    expected = h.copy()
    for t in range(6):
        out = []
        for head in range(heads):
            kv_head, keys = head * KV_HEADS // heads, range(max(0, t - window + 1), t + 1)
            exps = [math.exp(rotated("q", t, head) @ rotated("k", j, kv_head) / math.sqrt(HEAD_DIM)) for j in keys]
            values = [layer["v_proj.weight"].reshape(-1, HEAD_DIM, HIDDEN)[kv_head] @ x[j] for j in keys]
            gate = 1 / (1 + math.exp(-(layer["g_proj.weight"][head] @ x[t]))) if gated else 1.0
            out.append(gate * sum(e * value for e, value in zip(exps, values, strict=True)) / sum(exps))
        expected[t] += layer["o_proj.weight"] @ np.concatenate(out)
    np.testing.assert_allclose(Reference(config, tensors).decoder_layer(h, index), expected, rtol=1e-9, atol=1e-11)


def test_a_moe_layer_adds_routed_and_shared_experts_each_with_its_own_clamp(rng: np.random.Generator) -> None:
    tensors = silence(tiny_tensors(rng), "self_attn.o_proj.weight")
    tensors = {name: array * 3 for name, array in tensors.items()}
    h, layer = rng.normal(size=(1, HIDDEN)), "model.layers.3."
    x = normed(h, tensors[layer + "post_attention_layernorm.weight"])[0]

    def gated(projections: list[Array], limit: float) -> Array:
        gate, up, down = projections
        pairs = zip(gate @ x, up @ x, strict=True)
        result: Array = down @ [min(g / (1 + math.exp(-g)), limit) * max(-limit, min(limit, u)) for g, u in pairs]
        return result

    scores = 1 / (1 + np.exp(-(tensors[layer + "moe.gate.weight"] @ x)))
    chosen = sorted(range(EXPERTS), key=lambda e: -(scores[e] + tensors[layer + "moe.router_bias"][e]))[:2]
    projections = [f"{name}_proj.weight" for name in ("gate", "up", "down")]
    expected = h[0] + gated([tensors[f"{layer}share_expert.{name}"] for name in projections], 0.04)
    for expert in chosen:
        weight = 3.0 * scores[expert] / sum(scores[chosen])
        expected = expected + weight * gated([tensors[f"{layer}moe.{name}"][expert] for name in projections], 0.02)
    np.testing.assert_allclose(Reference(tiny_config(), tensors).decoder_layer(h, 3)[0], expected, rtol=1e-10)


def test_a_dense_layer_takes_its_clamp_from_the_shared_limits(rng: np.random.Generator) -> None:
    model = Reference(tiny_config(), tiny_tensors(rng))
    assert (model.plan(0).is_moe, model.plan(0).shared_limit) == (False, 0.03)
    h = rng.normal(size=(4, HIDDEN))
    free = Reference(tiny_config(swiglu_limits_shared=None), model._tensors)
    wide = Reference(tiny_config(swiglu_limits_shared=[1e9] * 6), model._tensors)
    np.testing.assert_array_equal(free.decoder_layer(h, 0), wide.decoder_layer(h, 0))
    assert not np.allclose(free.decoder_layer(h, 0), model.decoder_layer(h, 0), rtol=1e-3)


@pytest.mark.parametrize(
    "spelling",
    [
        {"moe_layers_enum": [1, 2, 3]},
        {"moe_layers_enum": " 1, 2,3,4"},
        {"moe_layers_enum": None},
        {"use_rope_layers": []},
        {"use_rope_layers": [1] * 6},
        {"rope_theta": [5e6, *[1e4] * 9]},
        {"swiglu_limits": [None, 0, 0, 0.02, 0, 0, 9.0], "swiglu_limits_shared": [0.03, 0, 0, 0.04]},
        {"need_fp32_gate": False},
        {"use_qk_norm": True, "use_moe_router_bias": True, "norm_expert_weight": True, "zero_centered": True},
        {"layer_types": ["full_attention", *["sliding_attention"] * 3]},
    ],
    ids=str,
)
def test_another_spelling_of_the_same_model_gives_the_same_logits(spelling: dict[str, Any]) -> None:
    tensors = tiny_tensors(np.random.default_rng(5))
    expected = Reference(tiny_config(), tensors).logits(TOKENS)
    np.testing.assert_array_equal(Reference(tiny_config(**spelling), tensors).logits(TOKENS), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"use_rope_layers": [1, None, 1, 1]},
        {"rope_theta": 1e4},
        {"partial_rotary_factors": [1.0] * 4},
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8}},
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8}, "yarn_only_types": ["sliding_attention"]},
        {"use_qk_norm": False},
        {"use_moe_router_bias": False},
        {"norm_expert_weight": False},
        {"zero_centered": False},
        {"moe_router_scaling_factor": 1.0},
        {"sliding_window": 4},
        {"swiglu_limits": [0] * 6},
    ],
    ids=str,
)
def test_every_switch_of_the_configuration_reaches_the_logits(change: dict[str, Any]) -> None:
    tensors = tiny_tensors(np.random.default_rng(6))
    expected = Reference(tiny_config(), tensors).logits(TOKENS)
    assert np.abs(Reference(tiny_config(**change), tensors).logits(TOKENS) - expected).max() > 1e-6


def test_plain_norm_weights_are_one_more_than_zero_centred_ones(rng: np.random.Generator) -> None:
    tensors = {name: array.astype(np.float64) for name, array in tiny_tensors(rng).items()}
    plain = {name: array + 1 if "norm" in name else array for name, array in tensors.items()}
    got = Reference(tiny_config(zero_centered=False), plain).logits(TOKENS)
    np.testing.assert_allclose(got, Reference(tiny_config(), tensors).logits(TOKENS), rtol=1e-9, atol=1e-12)


def test_absent_fields_mean_every_layer_but_0_is_moe_and_sliding_layers_have_the_same_heads() -> None:
    config = tiny_config()
    del config["moe_layers_enum"], config["attention_other_setting"]
    plans = [Reference(config, {}).plan(index) for index in range(LAYERS + DEPTHS)]
    assert [plan.is_moe for plan in plans] == [False, True, True, True, False, False]
    assert {plan.heads for plan in plans} == {FULL_HEADS}
    assert [plan.window for plan in plans] == [None] + [WINDOW] * 5
    assert [plan.heads for plan in map(Reference(tiny_config(), {}).plan, (0, 1))] == [FULL_HEADS, SLIDING_HEADS]


def test_layers_of_the_mtp_tail_are_dense_whatever_moe_layers_enum_says() -> None:
    model = Reference(tiny_config(moe_layers_enum="0,3,4,5"), {})
    assert [model.plan(index).is_moe for index in range(6)] == [True, False, False, True, False, False]


def test_mtp_drafts_from_the_next_token_and_the_hidden_state_before_the_final_norm(rng: np.random.Generator) -> None:
    """With silent decoder layers each depth is its `eh_proj` and its own head, here written out."""
    tensors = silence(tiny_tensors(rng), "o_proj.weight", "down_proj.weight")
    tensors["model.norm.weight"][:] = np.nan
    tensors["lm_head.weight"][:] = np.nan
    embedded = tensors["model.embed_tokens.weight"][TOKENS]
    hidden: Array = embedded
    got = Reference(tiny_config(), tensors).mtp_logits(TOKENS, 2)
    assert [array.shape for array in got] == [(len(TOKENS) - 1, VOCAB), (len(TOKENS) - 2, VOCAB)]
    for depth, logits in enumerate(got):
        layer = f"model.layers.{LAYERS + depth}."
        e = normed(embedded[depth + 1 :], tensors[layer + "enorm.weight"])
        h = normed(hidden[:-1], tensors[layer + "hnorm.weight"])
        eh_proj = tensors[layer + "eh_proj.weight"]
        hidden = e @ eh_proj[:, :HIDDEN].T + h @ eh_proj[:, HIDDEN:].T
        head_input = normed(hidden, tensors[layer + "transformer.shared_head.norm.weight"])
        expected = head_input @ tensors[layer + "transformer.shared_head.output.weight"].T
        np.testing.assert_allclose(logits, expected, rtol=1e-9, atol=1e-11)


def test_mtp_row_t_of_depth_k_sees_tokens_up_to_t_plus_k_plus_1_through_its_decoder_layer() -> None:
    model = Reference(tiny_config(), tiny_tensors(np.random.default_rng(8)))
    before, after = model.mtp_logits(TOKENS, 2), model.mtp_logits([*TOKENS[:5], 1, *TOKENS[6:]], 2)
    for depth, (old, new) in enumerate(zip(before, after, strict=True)):
        assert changed_rows(old, new) == [t + depth + 1 >= 5 for t in range(len(old))]


def test_every_mtp_depth_runs_its_own_decoder_layer() -> None:
    tensors = tiny_tensors(np.random.default_rng(11))
    before = Reference(tiny_config(), tensors).mtp_logits(TOKENS, 2)
    for depth, reached in ((0, [True, True]), (1, [False, True])):
        silenced = silence(tensors, f"layers.{LAYERS + depth}.self_attn.o_proj.weight")
        after = Reference(tiny_config(), silenced).mtp_logits(TOKENS, 2)
        assert [any(changed_rows(old, new)) for old, new in zip(before, after, strict=True)] == reached


def test_a_sharded_checkpoint_of_mixed_dtypes_reads_as_its_values(tmp_path: Path) -> None:
    tensors = tiny_tensors(np.random.default_rng(9))
    upper_half = {name: array.view(np.uint32) >> 16 for name, array in tensors.items()}
    rounded = {name: (bits << 16).astype(np.uint32).view(np.float32) for name, bits in upper_half.items()}
    names = sorted(tensors)
    for shard, part in enumerate((names[::2], names[1::2])):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        blob = b""
        for position, name in enumerate(part):
            as_bf16 = position % 3 > 0
            data = upper_half[name].astype("<u2").tobytes() if as_bf16 else rounded[name].tobytes()
            offsets = [len(blob), len(blob) + len(data)]
            dtype = "BF16" if as_bf16 else "F32"
            header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": offsets}
            blob += data
        text = json.dumps(header).encode()
        path = tmp_path / f"model-{shard + 1:05d}-of-00002.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + blob)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    got = Reference.from_checkpoint(tmp_path).logits(TOKENS)
    np.testing.assert_array_equal(got, Reference(tiny_config(), rounded).logits(TOKENS))


def test_errors_name_what_is_wrong() -> None:
    tensors = tiny_tensors(np.random.default_rng(10))
    with pytest.raises(ValueError, match=r"found ids -1 to 3, expected 0 to 22"):
        Reference(tiny_config(), tensors).logits([3, -1])
    with pytest.raises(ValueError, match=r"rope_theta: found 2 entries, expected at least 3 for layer 2"):
        Reference(tiny_config(rope_theta=[1e4, 1e4]), tensors).logits(TOKENS)
    with pytest.raises(ValueError, match=r"tensor model.layers.1.self_attn.q_proj.weight: found float32 \(48, 12\)"):
        Reference(tiny_config(attention_other_setting=None), tensors).logits(TOKENS)
    with pytest.raises(ValueError, match=r"depth_count: found 3, expected at most num_nextn_predict_layers = 2"):
        Reference(tiny_config(), tensors).mtp_logits(TOKENS, 3)
