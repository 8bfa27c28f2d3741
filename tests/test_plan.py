"""`python -m step3p5.plan` against checkpoints on disk, MAX's own constants, enumeration and published sizes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from flash_config import flash_config
from max.dtype import DType
from max.graph import DeviceRef
from max.nn.comm.allreduce import Signals
from max.nn.kv_cache import MHAKVCacheParams
from max.pipelines.kv_cache import KVCacheConfig
from max.pipelines.lib.pipeline_runtime_config import PipelineRuntimeConfig

from step3p5.byte_account import Forward, forward_bytes, forward_flops
from step3p5.checkpoint_files import CheckpointError, StoredTensor
from step3p5.checkpoint_tensors import CheckpointDtype, checkpoint_tensors, mtp_tensors
from step3p5.config_parser import parse_model_config
from step3p5.layer_config import MoEConfig
from step3p5.parallel_plan import ParallelPlan, parallel_plan
from step3p5.plan import memory
from step3p5.plan.__main__ import main
from step3p5.plan.case import MODES, Case, Load
from step3p5.plan.gpus import GPUS
from step3p5.plan.links import expert_exchange
from step3p5.plan.memory import device_memory
from step3p5.plan.report import summary
from step3p5.plan.routing import busiest_device_experts
from step3p5.plan.source import ModelSource, read_model
from step3p5.plan.speculation import draft_bytes, expected_speedup, expected_tokens, verify_bytes
from step3p5.plan.step_time import Part, decode_step, draft_step
from step3p5.plan.weight_formats import FORMATS, stored_format
from step3p5.speculation.draft_vocabulary import SIZE_VARIABLE

FLASH = parse_model_config(flash_config())
FLASH_6 = replace(FLASH, layers=FLASH.layers[:6])
RESULTS = Path(__file__).resolve().parent.parent / "benchmarks/results"
BF16, FP8, INT4 = FORMATS["bf16"], FORMATS["fp8"], FORMATS["int4"]
H100 = GPUS["h100"]


def plan_of(mode: str, count: int) -> ParallelPlan:
    return Case(ModelSource("flash", FLASH, BF16), H100, count, mode, Load(1, 1)).plan


def stored_bytes(folder: Path, prefixes: tuple[str, ...]) -> int:
    """Bytes of the tensors on disk whose names do not start with `prefixes`."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__" and not name.startswith(prefixes):
                total += entry["data_offsets"][1] - entry["data_offsets"][0]
    return total


@pytest.mark.parametrize("mtp_depth", [0, 1, 3])
def test_weights_are_the_bytes_of_the_checkpoint(tiny: Path, mtp_depth: int) -> None:
    source = read_model(str(tiny), None)
    assert source.weights.name == "float32"
    left_out = tuple(f"model.layers.{index}." for index in range(6 + mtp_depth, 9)) or ("-",)
    counted = device_memory(parallel_plan(source.model, 1), source.weights, 1, 1, mtp_depth).weights
    assert counted == pytest.approx(stored_bytes(tiny, left_out), rel=5e-3)


@pytest.mark.parametrize(("dtype", "gigabytes"), [("bf16", 398.8), ("fp8", 195 * 1.0737), ("int4", 111.5)])
def test_weights_are_those_of_the_released_forms(dtype: str, gigabytes: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SIZE_VARIABLE, str(FLASH.vocab_size))  # a checkpoint has the whole heads
    # The Int4 file has no MTP layers, the other two have.
    depth = 0 if dtype == "int4" else 3
    counted = device_memory(parallel_plan(FLASH, 1), FORMATS[dtype], 1, 1, depth).weights
    assert counted / 1e9 == pytest.approx(gigabytes, rel=6e-3)


@pytest.mark.parametrize("mode", MODES)
def test_shares_of_the_weights_add_up(mode: str) -> None:
    plan = plan_of(mode, 8)
    whole = sum(
        BF16.num_bytes(spec.shape, spec.role)
        for name, spec in checkpoint_tensors(FLASH).items()
        if not plan.placements[name].is_cut
    )
    each, one = (device_memory(p, BF16, 1, 1).weights for p in (plan, parallel_plan(FLASH, 1)))
    assert 8 * each == pytest.approx(one + 7 * whole)


def test_the_format_is_read_from_the_headers() -> None:
    tensors = checkpoint_tensors(FLASH) | mtp_tensors(FLASH)
    headers = {name: StoredTensor(spec.shape, "bfloat16") for name, spec in tensors.items()}
    assert stored_format(tensors, headers) == BF16
    for name in tensors:
        if ".moe." in name and "_proj" in name:
            headers[name] = StoredTensor(tensors[name].shape, "F8_E4M3")
    assert stored_format(tensors, headers) == FP8
    headers["model.layers.0.mlp.up_proj.weight"] = StoredTensor((11264, 4096), "F8_E4M3")
    assert stored_format(tensors, headers).blocks.roles > FP8.blocks.roles


def test_scales_of_partial_blocks_are_counted() -> None:
    role = next(iter(FP8.blocks.roles))
    assert FP8.num_bytes((3, 130, 256), role) == 3 * (130 * 256 + 2 * 2 * 4)
    assert INT4.num_bytes((10, 512), role) == 10 * 2 * 144


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("context", [1, 128, 129, 600, 8192])
def test_caches_are_the_pages_that_max_takes(mode: str, context: int) -> None:
    counted = device_memory(plan_of(mode, 4), BF16, 10, context).cache
    requests, heads = (3, 8) if mode == "dp-ep" else (10, 2)
    for kind, window, layers in (("full_attention", None, 12), ("sliding_attention", 512, 33)):
        params = MHAKVCacheParams(
            dtype=DType.bfloat16,
            n_kv_heads=heads,
            head_dim=128,
            num_layers=layers,
            devices=[DeviceRef.GPU()],
            page_size=memory.PAGE_SIZE,
            window_size=window,
        )
        (region,) = params.leaves().values()
        blocks = region.blocks_to_reserve(math.ceil(context / 128), enable_prefix_caching=False)
        assert counted[kind] == requests * blocks * params.bytes_per_block


def test_a_gpu_held_the_weights_and_no_more_than_is_planned() -> None:
    run = json.loads((RESULTS / "forward-flash6-h100.json").read_text())
    in_use = run["device_memory"]
    held = in_use["after_rounds"] - in_use["before_loading"] - in_use["caches"]
    requests, context = (max(of[name] for of in run["results"]) for name in ("batch_size", "context"))
    planned = device_memory(parallel_plan(FLASH_6, 1), BF16, requests, context)
    assert planned.weights < held < planned.fixed < 1.05 * held


def test_constants_are_those_of_max() -> None:
    assert memory.SIGNAL_BYTES == Signals.NUM_BYTES
    fields = KVCacheConfig.model_fields
    assert fields["kv_cache_page_size"].default == memory.PAGE_SIZE
    assert fields["device_memory_utilization"].default == memory.UTILIZATION
    assert PipelineRuntimeConfig.model_fields["max_batch_input_tokens"].default == memory.STEP_TOKENS


@pytest.mark.parametrize(("batch", "context", "new_tokens"), [(1, 1, 1), (3, 1000, 1), (64, 9000, 4)])
def test_a_step_on_one_device_is_a_forward_pass(batch: int, context: int, new_tokens: int) -> None:
    step = decode_step(parallel_plan(FLASH, 1), BF16, H100, batch, context, new_tokens)
    forward = Forward(batch, new_tokens, context)
    bf16 = CheckpointDtype.BFLOAT16
    assert step.memory_bytes == pytest.approx(forward_bytes(FLASH, forward, bf16, bf16))
    heads = 2 * FLASH.vocab_size * FLASH.hidden_size * batch * (new_tokens - 1)
    assert step.flops == pytest.approx(forward_flops(FLASH, forward) + heads)
    assert step.link_bytes == 0
    assert step.seconds >= max(step.memory_bytes / H100.bandwidth, step.flops / H100.bf16_flops)


def test_a_token_of_flash_reads_23_gigabytes() -> None:
    step = decode_step(parallel_plan(FLASH, 1), BF16, H100, 1, 1)
    assert step.memory_bytes / 1e9 == pytest.approx(22.9, rel=5e-3)
    assert step.seconds == pytest.approx(step.memory_bytes / 3.35e12)
    assert step.work[Part.EXPERTS].num_bytes == pytest.approx(42 * 8 * 3 * 4096 * 1280 * 2)


@pytest.mark.parametrize(
    ("mode", "hidden_states"),
    [
        # Two for an all-reduce, one for a gather; the first two are the embedding's, the last one is the head's gather.
        # A token is sent, and its sum comes back, where one of its 8 experts is among the 72 of 288 of a device.
        ("tp", 2 + 45 * 4),
        ("tp-ep", 2 + 45 * 4),
        ("dp-ep", 2 + 42 * 2 * (1 - math.comb(216, 8) / math.comb(288, 8)) + 1),
    ],
)
def test_what_goes_over_the_links(mode: str, hidden_states: float) -> None:
    step = decode_step(plan_of(mode, 4), BF16, H100, 8, 100)
    assert step.link_bytes == pytest.approx(0.75 * 8 * 2 * (hidden_states * 4096 + 128896))
    assert step.work[Part.LINKS].seconds == pytest.approx(step.link_bytes / 450e9)


@pytest.mark.parametrize(("experts", "top_k", "devices"), [(8, 2, 4), (6, 3, 2), (9, 4, 3)])
def test_a_dispatch_is_that_of_all_choices(experts: int, top_k: int, devices: int) -> None:
    (moe,) = {layer.mlp for layer in FLASH.layers[4:5]}
    assert isinstance(moe, MoEConfig)
    choices = [np.array(chosen) // (experts // devices) for chosen in combinations(range(experts), top_k)]
    ways = expert_exchange(replace(moe, num_experts=experts, top_k=top_k), devices, 12 * devices, 10)
    # Twelve tokens of the first device, ten bytes each, there and back.
    to_devices = np.mean([np.unique(chosen[chosen != 0]).size for chosen in choices])
    to_experts = np.mean([np.sum(chosen != 0) for chosen in choices])
    assert ways.dispatch_to_devices == pytest.approx(2 * 12 * 10 * to_devices)
    assert ways.dispatch_to_experts == pytest.approx(2 * 12 * 10 * to_experts)


@pytest.mark.parametrize("batch", [8, 512, 8192])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_the_exchange_of_the_plan_is_counted_beside_the_others(batch: int, count: int) -> None:
    case = Case(ModelSource("flash", FLASH, BF16), H100, count, "dp-ep", Load(batch, 8192))
    step = summary(case)["step"]
    ways = step["expert_exchange"]
    assert ways["dispatch_to_devices"] == pytest.approx(step["link_bytes_per_layer"]["moe"])
    assert ways["dispatch_to_devices"] == min(ways.values())


def test_a_mesh_of_links_is_as_fast_as_it_has_peers() -> None:
    assert GPUS["mi300x"].link_bandwidth(2) == pytest.approx(64e9)
    assert GPUS["mi300x"].link_bandwidth(8) == GPUS["mi300x"].link
    assert H100.link_bandwidth(2) == H100.link_bandwidth(8) == 450e9


@pytest.mark.parametrize(("experts", "devices", "hit"), [(8, 2, 3), (8, 4, 5), (9, 3, 4), (8, 8, 1), (6, 2, 6)])
def test_the_busiest_device_is_that_of_all_choices(experts: int, devices: int, hit: int) -> None:
    each = experts // devices
    busiest = [max(np.bincount(np.array(chosen) // each)) for chosen in combinations(range(experts), hit)]
    assert busiest_device_experts(experts, devices, hit) == pytest.approx(np.mean(busiest))


def test_the_busiest_device_grows_from_none_to_all_of_its_experts() -> None:
    counts = [busiest_device_experts(288, 8, hit) for hit in np.linspace(0, 288, 100).tolist()]
    assert counts[0] == 0
    assert counts[-1] == 36
    assert all(before <= after for before, after in pairwise(counts))


@pytest.mark.parametrize("mode", MODES)
def test_the_largest_load_fits_and_one_more_does_not(mode: str) -> None:
    case = Case(ModelSource("flash", FLASH, BF16), H100, 8, mode, Load(160, 4096))
    more = 8 if mode == "dp-ep" else 1
    assert replace(case, load=Load(case.largest_batch, 4096)).fits
    assert not replace(case, load=Load(case.largest_batch + more, 4096)).fits
    assert replace(case, load=Load(160, case.largest_context)).fits
    assert not replace(case, load=Load(160, case.largest_context + 1)).fits


def test_nothing_fits_beside_weights_that_do_not() -> None:
    case = Case(ModelSource("flash", FLASH, BF16), H100, 4, "tp", Load(1, 1))
    assert (case.fits, case.largest_batch, case.largest_context) == (False, 0, 0)


@pytest.mark.parametrize(("batch", "speedup"), [(1, 1.06), (8, 1.04), (64, 2.2)])
def test_speculation_pays_as_its_bytes_say(batch: int, speedup: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SIZE_VARIABLE, str(FLASH.vocab_size))
    # Counted by hand for the first six layers and three drafts that are each accepted with 0.8, from drawn routings.
    forward_cost, draft_cost = (partial(of, FLASH_6, context=1) for of in (verify_bytes, draft_bytes))
    assert expected_speedup(batch, 3, 0.8, forward_cost, draft_cost) == pytest.approx(speedup, rel=0.03)


@pytest.mark.parametrize(("size", "gigabytes"), [(FLASH.vocab_size, 1.62), (16384, 0.70)])
def test_what_a_draft_reads(size: int, gigabytes: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SIZE_VARIABLE, str(size))
    assert draft_bytes(FLASH, 1, 1) / 1e9 == pytest.approx(gigabytes, rel=5e-3)
    step = draft_step(parallel_plan(FLASH, 1), BF16, H100, 4, 1001)
    assert step.memory_bytes == pytest.approx(draft_bytes(FLASH, 4, 1000))


@pytest.mark.parametrize(("depth", "acceptance", "tokens"), [(0, 0.8, 1), (3, 0, 1), (3, 1, 4), (3, 0.8, 2.952)])
def test_tokens_of_a_cycle(depth: int, acceptance: float, tokens: float) -> None:
    assert expected_tokens(depth, acceptance) == pytest.approx(tokens)


def test_drafting_nothing_changes_nothing() -> None:
    assert expected_speedup(4, 0, 0.7, lambda batch, new: 5.0 * batch * new, lambda batch: 1.0) == 1


def test_an_impossible_acceptance_is_refused() -> None:
    with pytest.raises(ValueError, match="acceptance 0 to 1"):
        expected_tokens(1, 1.5)


def test_json_has_what_the_text_has(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--gpu", "h200", "--count", "4", "--mode", "tp-ep", "--batch", "4", "--dtype", "fp8"]
    main([*arguments, "--json"])
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["flags"] == "--devices gpu:0,1,2,3 --ep-size 4"
    assert numbers["memory_per_device"]["fits"]
    main(arguments)
    text = capsys.readouterr().out
    assert f"{numbers['memory_per_device']['weights'] / 1e9:.2f}" in text
    assert f"{numbers['tokens_per_second']:.0f} tokens/s for the node" in text
    assert f"largest batch at context 8192: {numbers['largest_batch_at_context']}\n" in text


def test_a_checkpoint_is_planned_from_its_folder(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model", str(tiny), "--gpu", "b200", "--count", "2", "--context", "512", "--mtp", "--json"])
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["dtype"] == "float32"
    assert {row["depth"] for row in numbers["speculation"]} == {1, 2, 3}


def test_the_released_model_may_lie_somewhere(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEP3P5_MODEL", raising=False)
    assert len(read_model("step3p5", None).model.layers) == 45
    monkeypatch.setenv("STEP3P5_MODEL", str(tiny))
    assert read_model("step3p5", None).model == read_model(str(tiny), None).model


def test_the_comparison_marks_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--gpu", "h100", "--compare", "--dtype", "fp8", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert {row["count"] for row in rows} == {1, 2, 4, 8}
    fitting = [row for row in rows if "refused" not in row and row["memory_per_device"]["fits"]]
    winner = max(fitting, key=lambda row: row["tokens_per_second"])
    main(["--gpu", "h100", "--compare", "--dtype", "fp8"])
    (marked,) = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" **")]
    assert marked.split()[:2] == [str(winner["count"]), winner["mode"]]
    assert sum("quantised blocks" in row.get("refused", "") for row in rows) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "5"], "num_attention_groups: found 8 KV groups"),
        (["--count", "5", "--mode", "dp-ep"], "moe_num_experts: found 288 experts"),
        (["--context", "999999"], "--context: found 999999, expected 1 to 262144"),
        (["--batch", "0"], "--batch: found 0"),
        (["--model", "nowhere"], "--model: found no readable nowhere/config.json"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STEP3P5_MODEL", raising=False)
    with pytest.raises(SystemExit) as raised:
        main(["--gpu", "h100", *arguments])
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(flash_config()))
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(CheckpointError, match="a safetensors file"):
        read_model(str(tmp_path), None)
