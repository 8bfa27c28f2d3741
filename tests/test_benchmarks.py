"""What the benchmarks share and what `forward.py` makes of its times; no model is compiled."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flash_config import flash_config

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bandwidth
import contention
import device
import forward
import gpu_clock
import plot
import report
from forward_cases import Case, Precision, evaluate, make_cases

from step3p5.byte_account import Forward
from step3p5.checkpoint_tensors import CheckpointDtype
from step3p5.config_parser import parse_model_config

F32 = CheckpointDtype.FLOAT32
FLASH = parse_model_config(flash_config())


def test_a_spread_has_median_quartiles_and_extremes() -> None:
    spread = report.Spread.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert spread == report.Spread(3.0, 2.0, 4.0, 1.0, 5.0, 5)
    assert spread.text(10, 1) == "30.0 (20.0 - 40.0)"


def test_a_single_measurement_is_its_own_spread() -> None:
    assert report.Spread.of([7.0]) == report.Spread(7.0, 7.0, 7.0, 7.0, 7.0, 1)


def test_no_measurement_has_no_spread() -> None:
    with pytest.raises(ValueError, match="at least one measurement"):
        report.Spread.of([])


def test_a_table_aligns_names_left_and_numbers_right() -> None:
    assert report.format_table(("pass", "ms"), [("a", "1.0"), ("longer", "10.0")]).splitlines() == [
        "pass      ms",
        "------  ----",
        "a        1.0",
        "longer  10.0",
    ]


def test_cpu_model_names_family_and_model(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nstepping\t: 1\n")
    assert report.cpu_model(cpuinfo) == "AMD EPYC (family 25, model 17)"


def test_peak_memory_is_the_high_water_mark(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmPeak:\t 4000000 kB\nVmHWM:\t 1638416 kB\nVmRSS:\t 1492296 kB\n")
    assert report.peak_memory_bytes(status) == 1638416 * 1024


def test_peak_memory_holds_what_was_allocated() -> None:
    block = np.ones(64 << 20, np.uint8)
    assert report.peak_memory_bytes() > block.nbytes


def test_caches_that_cores_share_count_once(tmp_path: Path) -> None:
    for core, shared in enumerate(("0-1", "0-1", "2-3", "2-3")):
        index = tmp_path / f"cpu{core}" / "cache" / "index3"
        index.mkdir(parents=True)
        (index / "size").write_text("32768K\n")
        (index / "shared_cpu_list").write_text(shared + "\n")
    assert bandwidth.last_level_cache_bytes(tmp_path) == 2 * 32 << 20
    assert bandwidth.last_level_cache_bytes(tmp_path / "absent") == 0


def test_a_copy_counts_bytes_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_seconds", lambda call: call() or 0.5)
    measured = bandwidth.measure_bandwidth(rounds=3, array_bytes=1 << 20)
    assert measured.array_bytes == pytest.approx(1 << 20, rel=1e-3)
    assert (measured.copy.median, measured.copy.count) == (4 * measured.array_bytes, 3)
    assert (measured.read.median, measured.read.count) == (2 * measured.array_bytes, 3)


def test_cores_taken_are_all_work_but_our_own(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    ticks = os.sysconf("SC_CLK_TCK")
    user, nice, system, idle, iowait, irq, softirq, steal = (n * ticks for n in (10, 1, 5, 1000, 500, 2, 3, 4))
    stat.write_text(f"cpu  {user} {nice} {system} {idle} {iowait} {irq} {softirq} {steal} 7 7\ncpu0 1 2 3\n")
    times = contention.CpuTimes.now(stat)
    assert times is not None
    assert times.all_work == 25

    before = contention.CpuTimes(clock=100.0, all_work=50.0, own_work=4.0)
    assert contention.cores_taken(before, contention.CpuTimes(clock=110.0, all_work=70.0, own_work=19.0)) == 0.5
    assert contention.cores_taken(before, contention.CpuTimes(clock=110.0, all_work=60.0, own_work=15.0)) == 0
    assert contention.cores_taken(None, before) is None
    assert contention.CpuTimes.now(tmp_path / "absent") is None


def test_a_prefill_case_keeps_the_prompt_and_a_decode_case_the_steps_after_it() -> None:
    prefill, decode = make_cases(prefill=[64], batches=[4], contexts=[32], decode_steps=3)
    prefill.keep([0.5])
    decode.keep([0.5, 0.1, 0.2, 0.3])
    assert (prefill.seconds, prefill.forward, prefill.longest) == ([0.5], Forward(1, 64, 64), 65)
    assert (decode.seconds, decode.forward, decode.longest) == ([0.1, 0.2, 0.3], Forward(4, 1, 34), 36)
    assert decode.name == "decode, batch 4, context 33-35"


def test_a_result_sets_the_median_time_against_bytes_copy_and_operations() -> None:
    case = Case("decode", batch_size=1, prompt_length=64, decode_steps=1, seconds=[0.1, 2.0, 0.1])
    result = evaluate(case, FLASH, Precision(CheckpointDtype.BFLOAT16, F32), copy_rate=458e9)
    assert result.seconds.median == 0.1
    assert result.tokens_per_second == pytest.approx(10)
    assert result.bytes_to_read == pytest.approx(22.9e9, rel=5e-3)
    assert result.of_copy == pytest.approx(0.5, rel=5e-3)
    assert result.flops_per_second == pytest.approx(229e9, rel=1e-2)
    assert result.row()[0] == "decode"
    assert result.row()[6] == "50 %"


def test_without_a_copy_rate_there_is_no_share_of_it() -> None:
    case = Case("prefill", batch_size=1, prompt_length=64, decode_steps=0, seconds=[1.0])
    result = evaluate(case, FLASH, Precision(F32, F32), copy_rate=None)
    assert (result.of_copy, result.row()[6]) == (None, "-")
    assert result.tokens_per_second == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: MODEL"),
        (["{folder}", "--batches", "1,0"], "argument --batches: found '1,0', expected whole numbers of at least 1"),
        (["{folder}", "--prefill", "long"], "argument --prefill: found 'long', expected whole numbers of at least 1"),
        (["{folder}", "--rounds", "0"], "argument --rounds: found '0', expected a whole number of at least 1"),
        (["{folder}", "--devices", "tpu"], "argument --devices: found 'tpu', expected cpu, gpu"),
        (["{folder}", "--devices", "gpu:999"], "argument --devices: found 'gpu:999', but MAX sees"),
        (["{folder}", "--prefill", "64,999999"], "prefill, 999999 tokens: 1000000 tokens, expected at most"),
        (["{folder}/absent"], "MODEL: found no folder {folder}/absent, expected"),
        (["{folder}/llama"], "MODEL {folder}/llama: model_type: found 'llama', expected 'step3p5'"),
    ],
)
def test_an_unusable_argument_is_one_line_and_status_2(
    arguments: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        forward.main([argument.format(folder=checkpoint) for argument in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert exit_info.value.code == 2
    assert len(lines) == 1
    assert lines[0].startswith("forward.py: error: " + message.format(folder=checkpoint))


def test_a_run_prints_a_table_and_writes_the_same_as_json(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device, "AutoModel", FakeModel)
    monkeypatch.setattr(bandwidth, "MINIMUM_ARRAY_BYTES", 1 << 20)
    monkeypatch.setattr(bandwidth, "CACHE_MULTIPLE", 0)
    file = tmp_path / "results" / "run.json"
    options = ["--batches", "2,3", "--prefill", "16", "--context", "4", "--steps", "5", "--rounds", "2"]
    forward.main([str(checkpoint), *options, "--json", str(file)])

    assert FakeModel.settings["max_batch_size"] == 3
    assert FakeModel.settings["max_length"] == 17
    content = json.loads(file.read_text())
    assert content["num_parameters"] == pytest.approx(196.8e9, rel=1e-3)
    assert [(r["batch_size"], r["new_tokens"], r["context"]) for r in content["results"]] == [
        (1, 16, 16),
        (2, 1, 7),
        (3, 1, 7),
    ]
    assert [r["seconds"]["count"] for r in content["results"]] == [2, 10, 10]
    assert content["precision"] == {"weights": "bfloat16", "cache": "float32"}
    assert content["bandwidth"]["copy"]["median"] > 0
    assert {"date", "command", "cpu", "cores", "versions"} <= content["environment"].keys()

    table = capsys.readouterr().out.splitlines()[-3:]
    for line, result in zip(table, content["results"], strict=True):
        assert line.startswith(result["name"])
        assert f"{1e3 * result['seconds']['median']:.2f} (" in line


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with Flash's configuration alone, and in it one of another model."""
    (tmp_path / "config.json").write_text(json.dumps(flash_config()))
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return tmp_path


class FakeModel:
    """Stands for `AutoModel`: takes its settings and steps batches that do nothing."""

    settings: dict[str, Any]

    def __init__(self, path: str, **settings: Any) -> None:
        type(self).settings = settings
        self.pipeline = SimpleNamespace(tokenizer=SimpleNamespace(tokenizer_vocab_size=100))
        cache = SimpleNamespace(kv_cache_format=None)
        self.pipeline_config = SimpleNamespace(model=SimpleNamespace(quantization_encoding="bfloat16", kv_cache=cache))

    def __enter__(self) -> FakeModel:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def generate_iter(
        self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float, ignore_eos: bool
    ) -> FakeBatch:
        assert temperature == 0
        assert ignore_eos
        assert all(0 <= token < 100 for prompt in prompts for token in prompt)
        assert len({tuple(prompt) for prompt in prompts}) == len(prompts)
        return FakeBatch(max_new_tokens)


@dataclass
class FakeBatch:
    """A batch that is done after `steps` steps."""

    steps: int

    @property
    def done(self) -> bool:
        return self.steps == 0

    def __enter__(self) -> FakeBatch:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def step(self) -> None:
        self.steps -= 1


def test_results_that_are_tables_are_not_drawn(tmp_path: Path) -> None:
    for name, text in {"starts": '{"benchmark": "starts"}', "busy": '{"benchmark": "busy"}', "broken": "["}.items():
        (tmp_path / f"{name}.json").write_text(text)
    assert [plot.is_drawn(tmp_path / f"{name}.json") for name in ("starts", "busy", "broken")] == [False, True, True]


def test_the_clock_of_a_stretch_is_the_median_of_its_samples() -> None:
    lines = ("1980, 0x0000000000000000\n", "1410, 0x0000000000000004\n", "1500, 0x0000000000000044\n")
    samples = [(float(second), *gpu_clock.parse_line(line)) for second, line in enumerate(lines)]
    clock = gpu_clock.summary(samples)
    assert clock is not None
    assert clock.mhz == 1500
    assert clock.power_capped == pytest.approx(2 / 3)
    assert gpu_clock.summary([]) is None
