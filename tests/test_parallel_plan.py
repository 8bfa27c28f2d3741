"""Parallel plans: every weight lies where it should, the parts compute the whole, and impossible plans say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from flash_config import flash_config
from harness import FIRST_TEXT_TOKEN, NEAR_TIE, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from max.engine import Model
from reference import Float64, Reference
from sharded_model import SCALING_FACTOR, ShardedModel
from small_graphs import Ops

from step3p5.checkpoint_tensors import TensorRole, checkpoint_tensors, mtp_tensors
from step3p5.config_parser import parse_model_config
from step3p5.layer_config import ModelConfig
from step3p5.parallel_plan import NO_BLOCKS, ParallelPlan, ParallelPlanError, QuantisedBlocks, parallel_plan

FLASH = parse_model_config(flash_config())
FULL, SLIDING = "full_attention", "sliding_attention"
EXPERTS = frozenset({TensorRole.EXPERT_GATE, TensorRole.EXPERT_UP, TensorRole.EXPERT_DOWN})
SHARED = EXPERTS | {TensorRole.MLP_GATE, TensorRole.MLP_UP, TensorRole.MLP_DOWN}

SMALL: dict[str, Any] = flash_config(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_nextn_predict_layers=1,
    layer_types=[FULL, SLIDING, FULL, SLIDING, SLIDING],
    num_attention_heads=8,
    head_dim=16,
    attention_other_setting={
        "attention_type": SLIDING,
        "num_attention_heads": 24,
        "num_attention_groups": 8,
        "head_dim": 16,
    },
    sliding_window=6,
    rope_theta=[5e6, 1e4, 5e6, 1e4, 1e4],
    partial_rotary_factors=[0.5, 1.0, 0.5, 1.0, 1.0],
    moe_layers_enum="1,2",
    moe_num_experts=16,
    moe_top_k=4,
    moe_intermediate_size=32,
    share_expert_dim=48,
    moe_router_scaling_factor=SCALING_FACTOR,
    swiglu_limits=[0.0, 0.3, 0.0, 0.0, 0.0],
    swiglu_limits_shared=[0.0, 0.0, 0.2, 0.4, 0.0],
    vocab_size=128,
)
"""Eight KV groups, both attention kinds, dense and MoE layers, each kind of clamp."""

SMALL_MODEL = parse_model_config(SMALL)
MODES = {"tp": (1, False), "tp-ep": (None, False), "dp-ep": (None, True)}
"""`--ep-size` (`None`: the number of devices), and whether `--data-parallel-degree` is the number of devices."""


def plan_of(model: ModelConfig, mode: str, num_devices: int, blocks: QuantisedBlocks = NO_BLOCKS) -> ParallelPlan:
    ep_size, data_parallel = MODES[mode]
    return parallel_plan(model, num_devices, ep_size or num_devices, num_devices if data_parallel else 1, blocks)


@pytest.fixture(scope="session")
def ops(small_models: Mapping[str, Model]) -> Ops:
    return Ops(small_models, "sharded")


def random_tensors(model: ModelConfig, rng: np.random.Generator) -> dict[str, Any]:
    tensors = {}
    for name, spec in checkpoint_tensors(model).items():
        scale = 0.2 if len(spec.shape) == 1 else 1.5 * spec.shape[-1] ** -0.5
        tensors[name] = rng.normal(0.0, scale, spec.shape).astype(np.float32)
    return tensors


def clear_requests(
    rng: np.random.Generator, lengths: list[int]
) -> tuple[Reference, dict[str, Any], list[npt.NDArray[np.int64]], Float64]:
    """A random model, requests of these lengths on which no router choice is a near tie, and all their logits."""
    for _ in range(20):
        tensors = random_tensors(SMALL_MODEL, rng)
        reference = Reference(SMALL, tensors)
        requests = [rng.integers(FIRST_TEXT_TOKEN, 128, size=length) for length in lengths]
        want = np.concatenate([reference.logits(request.tolist()) for request in requests])
        if reference.router_margin > NEAR_TIE:
            return reference, tensors, requests, want
    raise AssertionError("a near tie of the router in each of 20 draws")


@pytest.mark.parametrize("num_devices", [2, 4, 8])
@pytest.mark.parametrize("mode", MODES)
def test_the_parts_compute_the_whole(ops: Ops, mode: str, num_devices: int, rng: np.random.Generator) -> None:
    reference, tensors, requests, want = clear_requests(rng, rng.permutation(range(1, 12)).tolist())
    plan = plan_of(SMALL_MODEL, mode, num_devices)
    cuts = np.sort(rng.integers(0, len(requests) + 1, size=num_devices - 1))
    bounds = [0, *cuts.tolist(), len(requests)]
    replicas = [requests[start:end] for start, end in pairwise(bounds)]
    assert_close(ShardedModel(ops, plan, reference, tensors).logits(replicas).astype(np.float32), want)


@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", [SMALL_MODEL, FLASH], ids=["small", "flash"])
def test_every_weight_lies_on_one_device_or_whole_on_all(model: ModelConfig, mode: str, num_devices: int) -> None:
    plan = plan_of(model, mode, num_devices)
    tensors = checkpoint_tensors(model) | mtp_tensors(model)
    assert plan.placements.keys() == tensors.keys()
    for name, spec in tensors.items():
        placement = plan.placements[name]
        shards = [placement.shard(spec.shape, device) for device in range(num_devices)]
        owners = [np.zeros(size, int) for size in spec.shape]
        for shard in shards:
            assert tuple(s.stop - s.start for s in shard) == placement.shard_shape(spec.shape)
            for owned, part in zip(owners, shard, strict=True):
                owned[part] += 1
        for axis, owned in enumerate(owners):
            assert (owned == (1 if placement.is_cut and axis == placement.axis else num_devices)).all(), name


@pytest.mark.parametrize(
    ("mode", "cut"),
    [
        ("tp", {"q_proj": 0, "o_proj": 1, "g_proj": 0, "mlp.down": 1, "moe.gate_proj": 1, "moe.down": 2, "lm_head": 0}),
        ("tp-ep", {"k_proj": 0, "mlp.up": 0, "share_expert.down": 1, "moe.gate_proj": 0, "moe.down": 0, "embed": 0}),
        ("dp-ep", {"moe.up_proj": 0, "moe.down": 0, "lm_head": 0, "embed": 0}),
    ],
)
def test_what_each_mode_cuts(mode: str, cut: dict[str, int]) -> None:
    placements = plan_of(FLASH, mode, 4).placements
    for part, axis in cut.items():
        of_part = [placement for name, placement in placements.items() if part in name]
        assert of_part
        assert {placement.axis for placement in of_part} == {axis}
    whole = ["norm", "moe.gate.weight", "router_bias", "eh_proj"] + (["self_attn", ".mlp."] if mode == "dp-ep" else [])
    assert not any(placement.is_cut for name, placement in placements.items() if any(part in name for part in whole))


def test_one_device_exchanges_nothing() -> None:
    plan = parallel_plan(FLASH, 1)
    assert {plan.after_embedding, plan.before_head, plan.after_head} == {None}
    for layer in plan.layers:
        assert {layer.after_attention, layer.before_mlp, layer.after_mlp} == {None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (5,),
            "num_attention_groups: found 8 KV groups, which 5 devices cannot share equally; expected one of 1, 2, 4",
        ),
        ((16,), "num_attention_groups: found 8 KV groups, which 16 devices cannot share"),
        ((5, 5), "moe_num_experts: found 288 experts, which 5 devices cannot share equally; expected one of 1, 2, 3"),
        ((16, 16, 16), "--devices: found 16 devices, expected at most 8"),
        ((4, 1, 4), "--data-parallel-degree: found 4 with --ep-size 1, expected --ep-size 4 beside it"),
        ((4, 4, 2), "--data-parallel-degree: found 2, expected 1 or 4, the number of devices"),
        ((4, 2), "--ep-size: found 2, expected 1 or 4, the number of devices"),
        ((6, 6, 6), "vocab_size: found 128896 tokens, which 6 devices cannot share"),
        ((0,), "--devices: found 0 devices"),
    ],
)
def test_an_impossible_plan_names_the_flag_or_field(arguments: tuple[int, ...], message: str) -> None:
    num_devices, ep_size, degree = (*arguments, 1, 1)[:3]
    with pytest.raises(ParallelPlanError) as raised:
        parallel_plan(FLASH, num_devices, ep_size, degree)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_expert_parallelism_needs_experts() -> None:
    dense = replace(FLASH, layers=FLASH.layers[:3])
    with pytest.raises(ParallelPlanError, match="--ep-size: found 4, but no layer has experts, expected 1"):
        parallel_plan(dense, 4, ep_size=4)


@pytest.mark.parametrize(("num_devices", "part"), [(4, 320), (8, 160)])
def test_a_cut_through_quantised_experts_is_refused(num_devices: int, part: int) -> None:
    blocks = QuantisedBlocks(128, 128, EXPERTS)
    assert parallel_plan(FLASH, 2, blocks=blocks).placements["model.layers.3.moe.up_proj.weight"].axis == 1
    with pytest.raises(ParallelPlanError, match=f"would take {part}; .* blocks of 128. Use --ep-size {num_devices},"):
        parallel_plan(FLASH, num_devices, blocks=blocks)
    assert parallel_plan(FLASH, num_devices, ep_size=num_devices, blocks=blocks).layers[3].shared_expert_is_partial


def test_a_shared_expert_whose_blocks_a_cut_would_divide_stays_whole_and_is_not_summed() -> None:
    plan = parallel_plan(FLASH, 4, ep_size=4, blocks=QuantisedBlocks(128, 128, SHARED))
    for projection in ("gate", "up", "down"):
        assert not plan.placements[f"model.layers.3.share_expert.{projection}_proj.weight"].is_cut
        assert plan.placements[f"model.layers.0.mlp.{projection}_proj.weight"].is_cut
    assert not plan.layers[3].shared_expert_is_partial


def test_the_parts_compute_the_whole_beside_a_whole_shared_expert(ops: Ops, rng: np.random.Generator) -> None:
    reference, tensors, (tokens,), want = clear_requests(rng, [9])
    blocks = QuantisedBlocks(16, 16, SHARED)
    plan = plan_of(SMALL_MODEL, "tp-ep", 2, blocks)
    assert not plan.layers[1].shared_expert_is_partial
    assert_close(ShardedModel(ops, plan, reference, tensors).logits([[tokens]]).astype(np.float32), want)


@settings(max_examples=200, deadline=None)
@given(
    groups=st.integers(1, 12),
    per_group=st.integers(1, 4),
    experts=st.integers(4, 40),
    width=st.integers(1, 64),
    num_devices=st.integers(1, 9),
    mode=st.sampled_from(list(MODES)),
)
def test_a_plan_is_either_refused_or_even(
    groups: int, per_group: int, experts: int, width: int, num_devices: int, mode: str
) -> None:
    changes = dict(num_attention_groups=groups, num_attention_heads=groups * per_group)
    changes |= dict(moe_num_experts=experts, moe_intermediate_size=width)
    model = parse_model_config({**SMALL, **changes, "attention_other_setting": None})
    try:
        plan = plan_of(model, mode, num_devices)
    except ParallelPlanError:
        return
    assert num_devices <= 8
    for name, spec in (checkpoint_tensors(model) | mtp_tensors(model)).items():
        placement = plan.placements[name]
        if placement.axis is not None:
            assert placement.shard_shape(spec.shape)[placement.axis] * num_devices == spec.shape[placement.axis]
    for layer in model.layers:
        heads = layer.attention.num_attention_heads
        q_rows = plan.placements[f"model.layers.{layer.index}.self_attn.q_proj.weight"].shard_shape((heads * 16, 64))[0]
        assert q_rows == plan.num_key_value_heads_per_device(layer) * per_group * 16
