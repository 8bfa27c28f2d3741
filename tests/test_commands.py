"""MAX's own entry points, run as a user runs them: `max generate`, `max serve` and the `LLM` class."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX = str(Path(sys.executable).parent / "max")
START_UP = 600
"""Seconds for a server to compile and start on a small machine."""


def environment() -> dict[str, str]:
    # Importing MAX changes the process's environment behind Python's back: hand children Python's view of it.
    return dict(os.environ)


def test_generate_streams_text_and_reports_its_speed(tiny: Path, tmp_path: Path) -> None:
    command = [MAX, "generate", "--model", str(tiny), "--custom-architectures", f"{ROOT}:pipelines_registry"]
    command += ["--devices", "cpu", "--max-length", "256", "--max-new-tokens", "8", "--prompt", "Hello"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=START_UP)
    assert run.returncode == 0, run.stderr
    assert "Time to first token" in run.stdout
    assert "tokens per second" in run.stdout


def test_the_llm_class_completes_prompts(tiny: Path) -> None:
    script = f"""
from max._entrypoints.llm import LLM
from max.pipelines.lib import PipelineArgs

llm = LLM(PipelineArgs.from_flat_kwargs(
    model_path={str(tiny)!r}, custom_architectures=["pipelines_registry"], device_specs="cpu", max_length=256,
))
answers = llm.generate(["one", "two, three"], max_new_tokens=5, use_tqdm=False)
assert len(answers) == 2 and all(answers), answers
del llm  # its thread keeps the process alive until then
print("completed")
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=START_UP
    )
    assert "completed" in run.stdout, run.stderr


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server on `tiny`."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [MAX, "serve", "--model", str(tiny), "--custom-architectures", f"{ROOT}:pipelines_registry"]
    command += ["--devices", "cpu", "--max-length", "512", "--max-batch-size", "3", "--port", str(port)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment())
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(address, process, folder / "log")
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def wait_until_healthy(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_UP
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"the server did not start in {START_UP} s: {log.read_text()}")


def post(address: str, path: str, **body: object) -> dict[str, object]:
    request = urllib.request.Request(
        address + path, json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer = json.load(response)
    assert isinstance(answer, dict)
    return answer


def test_a_server_completes_text_the_same_way_twice(server: str, tiny: Path) -> None:
    ask = {"model": str(tiny), "prompt": "Once upon a time", "max_tokens": 6, "temperature": 0}
    first, second = (post(server, "/v1/completions", **ask)["choices"] for _ in range(2))
    assert first == second


def test_a_server_answers_a_chat(server: str, tiny: Path) -> None:
    messages = [{"role": "user", "content": "Say something."}]
    answer = post(server, "/v1/chat/completions", model=str(tiny), messages=messages, max_tokens=6, temperature=0)
    usage = answer["usage"]
    assert isinstance(usage, dict)
    assert 0 < usage["completion_tokens"] <= 6
