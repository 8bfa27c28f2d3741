"""The comparison with llama.cpp, without llama.cpp and without a model."""

from __future__ import annotations

import ctypes
import importlib
import io
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flash_config import flash_config

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import cpu_peer
import llama_cpp_build
from forward_cases import Case
from step_profile import StepProfile

from step3p5.checkpoint_tensors import CheckpointDtype
from step3p5.config_parser import parse_model_config

PREFILL = Case("prefill", batch_size=1, prompt_length=5, decode_steps=0)
DECODE = Case("decode", batch_size=2, prompt_length=3, decode_steps=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}"], "one of the arguments --peer --build is required"),
        (["{folder}", "--peer", "{folder}"], "--peer: found no {folder}/runtime/bin/python, expected a folder that"),
        (["{folder}", "--build", "{folder}"], "--build: found files in {folder}, expected a new folder"),
        (["{folder}/none", "--build", "new"], "MODEL: found no {folder}/none/config.json, expected a checkpoint's"),
        (["{folder}", "--build", "new", "--encodings", "q8_0"], "argument --encodings: found 'q8_0', expected float32"),
    ],
)
def test_an_unusable_argument_is_one_line_and_status_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit) as exit_info:
        cpu_peer.parse_arguments([argument.format(folder=tmp_path) for argument in arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert exit_info.value.code == 2
    assert line.startswith("cpu_peer.py: error: " + message.format(folder=tmp_path))


def test_the_ratio_is_the_median_over_rounds_of_each_rounds_own() -> None:
    rounds = cpu_peer.Rounds(DECODE, here=[1.0, 2.0, 10.0], llama_cpp=[2.0, 2.0, 5.0])
    result = rounds.comparison(parse_model_config(flash_config()), CheckpointDtype.BFLOAT16, copy_rate=1e12)
    assert (result.ratio.median, result.ratio.minimum, result.ratio.maximum) == (1.0, 0.5, 2.0)
    assert (result.here.median, result.llama_cpp.median, result.tokens) == (2.0, 2.0, 2)
    assert result.of_copy == pytest.approx(33.2e9 / 2 / 1e12, rel=0.01)


@pytest.mark.parametrize(("case", "here", "peer"), [(PREFILL, 9.0, 8.0), (DECODE, 1.0, 2.0)])
def test_a_round_gives_both_sides_the_same_prompts_and_keeps_its_median(case: Case, here: float, peer: float) -> None:
    model, llama_cpp = FakeModel([9.0, 1.0, 1.0, 7.0, 1.0]), FakePeer([8.0, 2.0, 2.0, 2.0, 9.0])
    rounds = cpu_peer.Rounds(case, [], [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_peer, "run_here", model.run)
        for keep in (False, True):
            rounds.run(model, llama_cpp, np.random.default_rng(), keep)  # type: ignore[arg-type]
    assert (rounds.here, rounds.llama_cpp) == ([here], [peer])
    assert model.prompts == llama_cpp.prompts
    assert [len(prompt) for prompt in model.prompts[-1]] == [case.prompt_length] * case.batch_size
    assert (rounds.same, rounds.compared) == (1, case.batch_size)


def test_the_peer_answers_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, sys\n"
        'print(json.dumps({"load_seconds": 1.5}), flush=True)\n'
        "for line in sys.stdin:\n"
        "    asked = json.loads(line)\n"
        '    answer = {"seconds": [0.5] * asked["steps"], "first_tokens": asked["prompts"][0], "resident_bytes": 7}\n'
        "    print(json.dumps(answer), flush=True)\n"
        '    sys.exit(3) if asked["steps"] == 0 else None\n'
    )
    monkeypatch.setattr(cpu_peer, "WORKER", worker)
    with cpu_peer.LlamaCpp(Path(sys.executable), tmp_path / "any.gguf", 2, 64, 8) as peer:
        assert peer.load_seconds == 1.5
        assert peer.run([[4, 5]], 2) == ([0.5, 0.5], [4, 5])
        assert peer.resident_bytes == 7
        peer.run([[4]], 0)
        peer._process.wait()
        with pytest.raises(RuntimeError, match=r"worker\.py ended with status 3"):
            peer.run([[4]], 0)


def test_the_worker_feeds_llama_cpp_every_request_at_its_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeLlamaCpp()
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    monkeypatch.delitem(sys.modules, "llama_cpp_worker", raising=False)
    worker = importlib.import_module("llama_cpp_worker")
    result = worker.run(worker.Context("any.gguf", 2, 64, 8), [[1, 2], [3, 4]], 1)
    assert len(result["seconds"]) == 2
    # The stand-in's likeliest token is twice the entry's index.
    assert result["first_tokens"] == [2, 6]
    assert library.decoded == [
        [(1, 0, 0, False), (2, 1, 0, True), (3, 0, 1, False), (4, 1, 1, True)],
        [(2, 2, 0, True), (6, 2, 1, True)],
    ]


def test_only_the_converter_is_taken_from_the_archive(tmp_path: Path) -> None:
    archive = tmp_path / "llama_cpp_python-0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("convert_hf_to_gguf.py", "conversion/base.py", "gguf-py/gguf/x.py", "src/llama.cpp", "README.md"):
            member = tarfile.TarInfo(f"llama_cpp_python-0/vendor/llama.cpp/{name}")
            tar.addfile(member, io.BytesIO())
        tar.addfile(tarfile.TarInfo("llama_cpp_python-0/pyproject.toml"), io.BytesIO())
    llama_cpp_build._extract_converter(archive, tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {"convert_hf_to_gguf.py", "conversion/base.py", "gguf-py/gguf/x.py"}


def test_a_build_leaves_a_folder_with_files_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="expected a new or an empty one"):
        llama_cpp_build.build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_profile_splits_a_step_and_leaves_the_pipeline_as_it_was() -> None:
    graph = FakeGraph()
    pipeline_model = SimpleNamespace(model=graph)
    profile = StepProfile.measure(FakeModel([0.0] * 3, pipeline_model), context=4, decode_steps=2)
    assert profile.graph_seconds >= FakeGraph.SECONDS
    assert profile.rest_seconds >= FakeBatch.SECONDS
    assert profile.step_seconds == pytest.approx(profile.graph_seconds + profile.rest_seconds)
    assert pipeline_model.model is graph
    assert profile.text().startswith("a decode step of ")


class FakePeer:
    """Stands for `LlamaCpp`."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds
        self.prompts: list[list[list[int]]] = []

    def run(self, prompts: list[list[int]], steps: int) -> tuple[list[float], list[int]]:
        self.prompts.append(prompts)
        return self.seconds[: steps + 1], [1] * len(prompts)


class FakeModel:
    """Stands for `AutoModel`: of two requests, the second one's first token is another than the peer's."""

    def __init__(self, seconds: list[float], pipeline_model: Any = None) -> None:
        self.seconds = seconds
        self.prompts: list[list[list[int]]] = []
        self.pipeline = SimpleNamespace(
            tokenizer=SimpleNamespace(tokenizer_vocab_size=100), _pipeline_model=pipeline_model
        )

    def run(self, _: object, prompts: list[list[int]], steps: int) -> tuple[list[float], list[int]]:
        self.prompts.append(prompts)
        return self.seconds[: steps + 1], [1, 2][: len(prompts)]

    def generate_iter(self, prompts: list[list[int]], **_: object) -> FakeBatch:
        return FakeBatch(len(self.seconds), self.pipeline._pipeline_model)


class FakeGraph:
    """A compiled model that takes its time."""

    SECONDS = 0.004

    def execute(self) -> list[Any]:
        time.sleep(self.SECONDS)
        return [SimpleNamespace(to_numpy=lambda: None)]


class FakeBatch:
    """A batch whose steps run the graph and take time besides."""

    SECONDS = 0.002

    def __init__(self, steps: int, pipeline_model: Any) -> None:
        self.steps = steps
        self.pipeline_model = pipeline_model

    @property
    def done(self) -> bool:
        return self.steps == 0

    def __enter__(self) -> FakeBatch:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def step(self) -> None:
        self.steps -= 1
        time.sleep(self.SECONDS)
        self.pipeline_model.model.execute()


class FakeLlamaCpp:
    """Stands for the module `llama_cpp`: keeps what is decoded."""

    vocabulary = 20

    def __init__(self) -> None:
        self.decoded: list[list[tuple[int, int, int, bool]]] = []
        self.llama_context_default_params = SimpleNamespace
        self.llama_model_default_params = SimpleNamespace

    def llama_backend_init(self) -> None:
        pass

    llama_synchronize = llama_memory_clear = llama_get_memory = lambda self, *_: None
    llama_model_load_from_file = llama_init_from_model = llama_model_get_vocab = lambda self, *_: object()

    def llama_vocab_n_tokens(self, _: object) -> int:
        return self.vocabulary

    def llama_batch_init(self, size: int, *_: int) -> SimpleNamespace:
        fields = {name: [0] * size for name in ("token", "pos", "n_seq_id", "logits")}
        return SimpleNamespace(n_tokens=0, seq_id=[[0] for _ in range(size)], **fields)

    def llama_decode(self, _: object, batch: SimpleNamespace) -> int:
        rows = zip(batch.token, batch.pos, batch.seq_id, batch.logits, strict=True)
        self.decoded.append([(token, pos, seq[0], logits) for token, pos, seq, logits in rows][: batch.n_tokens])
        return 0

    def llama_get_logits_ith(self, _: object, index: int) -> Any:
        values = (ctypes.c_float * self.vocabulary)()
        values[2 * index] = 1.0
        return ctypes.cast(values, ctypes.POINTER(ctypes.c_float))
