"""What `parallel.py` makes of logits, times and kernels of several GPUs; no GPU is needed."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from flash_config import flash_config

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import parallel
import plot
from bounds import bound_seconds, known_gpu
from busy import Kernel
from collectives import PassOfDevices, collective_times, kind_of, shared, union
from device import device_numbers, equal_replicas
from forward_cases import Precision, evaluate, make_cases
from report import Environment, write_json
from same_logits import Agreement, FreeRun, Reference

from step3p5.checkpoint_tensors import CheckpointDtype
from step3p5.config_parser import parse_model_config
from step3p5.parallel_plan import parallel_plan
from step3p5.plan.gpus import GPUS
from step3p5.plan.step_time import Part, decode_step, prefill_step
from step3p5.plan.weight_formats import FORMATS

FLASH = parse_model_config(flash_config())
H100, BF16 = GPUS["h100"], FORMATS["bf16"]


def test_gpus_are_known_by_their_names() -> None:
    assert known_gpu("NVIDIA H100 80GB HBM3") is H100
    assert known_gpu("NVIDIA H200") is GPUS["h200"]
    assert known_gpu("NVIDIA A100-SXM4-80GB") is None


def test_a_case_has_the_bound_of_its_plan() -> None:
    plan = parallel_plan(FLASH, 2, 2, 2)
    prefill, decode = make_cases([2048], [128], contexts=[64], decode_steps=3, replicas=2)
    assert (prefill.batch_size, prefill.name) == (2, "prefill, 2048 tokens x 2")
    assert bound_seconds(decode, plan, H100) == decode_step(plan, BF16, H100, 128, 66).seconds
    assert bound_seconds(prefill, plan, H100) == prefill_step(plan, BF16, H100, 2, 2048).seconds


def test_a_prefill_multiplies_the_head_with_the_last_tokens_only() -> None:
    plan = parallel_plan(FLASH, 2)
    prefill, verify = (step(plan, BF16, H100, 3, 100) for step in (prefill_step, decode_step))
    every = decode_step(plan, BF16, H100, 3, 100, 100)
    assert prefill.work[Part.HEAD].flops == verify.work[Part.HEAD].flops == every.work[Part.HEAD].flops / 100
    assert prefill.work[Part.EXPERTS] == every.work[Part.EXPERTS]
    assert verify.link_bytes < prefill.link_bytes < every.link_bytes


def test_devices_are_read_as_max_reads_them() -> None:
    numbers = [device_numbers(devices) for devices in ("cpu", "gpu", "gpu:1", "gpu:0,1")]
    assert numbers == [[], [0], [1], [0, 1]]


def test_captured_graphs_are_let_through_for_equal_replicas_only_meanwhile() -> None:
    generate = importlib.import_module("max.pipelines.lib.generate")
    check = generate._check_graph_capture
    with equal_replicas():
        assert generate._check_graph_capture is not check
    assert generate._check_graph_capture is check


def test_logits_are_compared_position_by_position() -> None:
    reference = np.array([[1.0, 4.0, 0.0], [2.0, 0.0, -4.0]], np.float32)
    here = reference + np.array([[0.0, -0.5, 0.0], [0.0, 2.25, 0.0]], np.float32)
    agreement = Agreement.of("here", [reference], [here])
    assert agreement.positions == 2
    assert agreement.largest_difference == 2.25 / 4
    assert agreement.other_best == 1
    assert agreement.largest_gap == 2.0 / 2**-5  # numbers at 4 lie 2 ** -5 apart
    assert agreement.beyond_rounding == 1
    assert agreement.bfloat16_step == 2**-5 / 4
    assert Agreement.of("itself", [reference], [reference]).row()[2:] == ("0.00000", "0.00000", "0", "0.00", "0")


def test_free_tokens_are_the_same_up_to_a_step() -> None:
    reference = np.array([[1, 2, 3], [4, 5, 6]])
    assert FreeRun.of(reference, np.array([[1, 2, 3], [4, 9, 6]])) == FreeRun(2, 6, 1, [3, 1])


def test_a_reference_is_read_as_it_was_written(tmp_path: Path) -> None:
    logits = [np.full((2, 3), row, np.float32) for row in range(4)]
    Reference.write(tmp_path / "one", np.arange(8).reshape(4, 2), logits)
    read = Reference.read(tmp_path / "one")
    assert read.tokens.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert np.array_equal(np.stack(read.logits), np.stack(logits))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("comm_allreduce_2stage_kernel", "all-reduce"),
        ("void all_gather<bf16>", "all-gather"),
        ("dispatch_gpu_send_tokens_A6A", "dispatch, send"),
        ("combine_gpu_receive_sums_A6A", "combine, receive"),
        ("Memcpy PtoP (Device -> Device)", "copy between devices"),
        ("Memcpy DtoD (Device -> Device)", None),
        ("mo_broadcast_to_elementwise", None),
    ],
)
def test_collectives_are_known_by_their_names(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind


def test_times_are_joined_and_intersected() -> None:
    left = union([Kernel(0, 2, "a"), Kernel(1, 3, "b"), Kernel(6, 1, "c")])
    assert left == [(0, 4), (6, 7)]
    assert shared(left, [(3, 6.5), (6.75, 9)]) == 1.75
    assert shared(left, []) == 0


def test_every_device_has_its_collectives() -> None:
    kernels = [
        Kernel(0, 1000, "gemm", 0),
        Kernel(500, 1000, "allreduce", 0),
        Kernel(2000, 3000, "allreduce", 0),
        Kernel(0, 4000, "gemm", 1),
    ]
    (time,) = collective_times(0, kernels[:3], passes=2)
    assert (time.runs, time.milliseconds, time.median_run, time.shortest_run) == (1, 2, 2, 1)
    assert time.hidden == 0.125
    plan = parallel_plan(FLASH, 2)
    of = PassOfDevices.of("decode", 5.0, kernels, 2, plan)
    assert [(device.device, device.busy, device.gaps) for device in of.devices] == [(0, 2.25, 0.25), (1, 2, 0)]
    assert [device.layer for device in of.devices] == [2 * 2, 0]  # two all-reduces a layer


def test_a_report_is_shown_and_written(tmp_path: Path) -> None:
    kernels = [Kernel(0, 1000, "gemm", 0), Kernel(500, 1000, "allreduce", 0)]
    plan = parallel_plan(FLASH, 2)
    (case,) = make_cases([], [8], contexts=[64], decode_steps=3)
    case.keep([0.1, 0.02, 0.03])
    precision = Precision(CheckpointDtype.BFLOAT16, CheckpointDtype.BFLOAT16)
    report = parallel.Report(
        benchmark="parallel",
        environment=Environment.of_this_process(2),
        model="flash6",
        devices="gpu:0,1",
        ep_size=1,
        data_parallel_degree=1,
        captured_graphs=True,
        overlap=False,
        gpu=H100.name,
        results=[evaluate(case, FLASH, precision, None, 0.005)],
        passes=[PassOfDevices.of(case.name, 5.0, kernels, 1, plan)],
        failures={"look": "ValueError: none"},
    )
    assert "FAILED look: ValueError: none" in report.text()
    assert report.results[0].row()[-2:] == ("5.00", "5.00")
    write_json(tmp_path / "parallel.json", report)
    plot.draw(tmp_path / "parallel.json", tmp_path / "parallel.png")
    assert (tmp_path / "parallel.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "parallel.json").read_text())["passes"][0]["collectives"][0]["hidden"] == 0.5


def test_uneven_batches_are_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arguments.accelerator_count", lambda: 2)
    flags = ["--precompiled-mefs", "mefs", "--devices", "gpu:0,1", "--ep-size", "2", "--data-parallel-degree", "2"]
    with pytest.raises(SystemExit):
        parallel.parse_arguments(["flash6", "one", *flags])
    expected = "parallel.py: error: --batches: found 1, expected a multiple of --data-parallel-degree, 2\n"
    assert capsys.readouterr().err == expected
