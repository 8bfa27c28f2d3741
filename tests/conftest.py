"""Shared fixtures: random checkpoints and compiled models, each made once a session."""

from __future__ import annotations

import os

# numpy's own threads, on top of the engine's, oversubscribe a small machine; set before numpy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import sharded_model
import test_attention_ops
import test_cycle_graphs
import test_mailboxes
import test_moe_ops
from gpu_compilation import HOPPER, Compilation, models
from harness import Runner, silence_unknown, write_checkpoint
from max.driver import CPU, Buffer, batch_inplace_copy
from max.dtype import DType
from max.engine import Model
from max.pipelines import graph_input_stager
from reference import Reference
from server import LONG_FORM, Server
from small_graphs import load_together
from test_parallel_plan import MODES

STEADY_SEED = 3
SEED = int(os.environ.get("STEP3P5_TEST_SEED", secrets.randbelow(1 << 31)))


HOPPER_MODELS = pytest.StashKey[Compilation]()


def pytest_report_header() -> str:
    return f"random inputs: STEP3P5_TEST_SEED={SEED}"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Fresh numbers for each test and session; the seed stands in the report's header."""
    return np.random.default_rng([SEED, *request.node.nodeid.encode()])


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `tiny` checkpoint: every kind of layer."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny", seed=SEED)


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A folder of links to the files of `tiny`, any of which may be replaced."""
    for path in tiny.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.fixture(scope="session")
def tiny_reference(tiny: Path) -> Reference:
    """`tiny` in float64."""
    return Reference.from_checkpoint(tiny)


@pytest.fixture(scope="session")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `tiny` that is the same in every session: for what servers do with a model's words, where a fresh one may have
    nothing to say but special tokens. What its tokenizer does not know, which a server never samples, is never best."""
    folder = write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "steady", seed=STEADY_SEED)
    silence_unknown(folder)
    return folder


@pytest.fixture(scope="session")
def steady_reference(steady: Path) -> Reference:
    """`steady` in float64."""
    return Reference.from_checkpoint(steady)


@pytest.fixture(scope="session")
def small_models() -> dict[str, Model]:
    """The graphs of single ops that tests of several files run."""
    of_files = (test_attention_ops, test_cycle_graphs, test_mailboxes, test_moe_ops, sharded_model)
    return load_together({name: build for of_file in of_files for name, build in of_file.GRAPHS.items()})


@pytest.fixture(scope="session")
def tiny_model(tiny: Path) -> Runner:
    """`tiny` in MAX on the CPU, up to three requests at a time."""
    return Runner(tiny)


@pytest.fixture
def late_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets MAX's copies of every step's inputs wait for another, of many milliseconds."""
    source, to = (Buffer.zeros((1 << 27,), DType.uint8, CPU()) for _ in range(2))

    def copy_later(dsts: Sequence[Buffer], srcs: Sequence[Buffer]) -> None:
        to.inplace_copy_from(source)
        batch_inplace_copy(dsts, srcs)

    monkeypatch.setattr(graph_input_stager, "batch_inplace_copy", copy_later)


@pytest.fixture(scope="session")
def server(steady: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on `steady` that all tests share: none may end it."""
    with Server(steady, tmp_path_factory.mktemp("server"), options=(*LONG_FORM, "--host", "127.0.0.1")) as running:
        yield running


def pytest_collection_finish(session: pytest.Session) -> None:
    """Starts a compilation of minutes on one core, to go on beside the tests; what waits for it comes last."""
    waiting = [item for item in session.items if "hopper_models" in getattr(item, "fixturenames", ())]
    if waiting and not session.config.option.collectonly:
        session.items.sort(key=waiting.__contains__)
        session.stash[HOPPER_MODELS] = models(HOPPER, 2, ("ops", "whole", "mtp", *MODES))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Ends the compilation if nothing has waited for it."""
    if (compilation := session.stash.get(HOPPER_MODELS, None)) is not None:
        compilation.stop()


@pytest.fixture(scope="session")
def hopper_models(request: pytest.FixtureRequest) -> Compilation:
    """The compilation for Hopper: of every op, the model on one device, with its drafts, and in every mode on two."""
    return request.session.stash[HOPPER_MODELS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the figures that tests have recorded."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties if report.when == "call" else ():
            terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {name}: {value}")
