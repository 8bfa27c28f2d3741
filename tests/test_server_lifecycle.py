"""How a server starts and ends: its port, its address, SIGTERM."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server import LOCALHOST, ROOT, SIZES, START_UP, Server, listening_addresses

RECIPE = ("--config-file", str(ROOT / "step3p5" / "recipes" / "cpu.yaml"), *SIZES)
PARSERS = ("--reasoning-parser", "step3p5", "--tool-parser", "step3p5")


@pytest.fixture(scope="module")
def own_server(steady: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that the tests of this module may end, started with a recipe, the parsers' names and no `--host`."""
    options, variables = (*RECIPE, *PARSERS), {"PYTHONPATH": str(ROOT)}
    with Server(steady, tmp_path_factory.mktemp("own_server"), options, variables) as running:
        yield running


def test_a_server_told_to_keeps_to_localhost(server: Server) -> None:
    assert listening_addresses(server.port) == {LOCALHOST}
    assert listening_addresses(server.metrics_port) == {LOCALHOST}


def test_a_server_keeps_to_localhost_unless_told_otherwise(own_server: Server) -> None:
    assert listening_addresses(own_server.port) == {LOCALHOST}
    assert listening_addresses(own_server.metrics_port) == {LOCALHOST}
    assert "listens on 127.0.0.1 alone" in own_server.log.read_text()


def test_a_second_server_on_the_same_port_says_so_before_it_loads_a_model(server: Server, tmp_path: Path) -> None:
    command = [str(server.port) if part == str(server.port) else part for part in server.command]
    second = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=server.environment(), timeout=START_UP
    )
    assert second.returncode != 0
    assert second.stderr.strip().splitlines()[-1] == f"ValueError: The network port {server.port} is already in use"
    assert "compiling" not in second.stderr
    assert httpx.get(f"{server.address}/health").status_code == 200


def test_sigterm_while_streaming_lets_the_answer_end_and_leaves_no_process(own_server: Server) -> None:
    assert len(own_server.processes()) >= 3
    streaming = own_server.client().completions.create(
        model=own_server.model,
        prompt="Once",
        max_tokens=20,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    first = next(streaming)
    own_server.process.terminate()
    reasons = [choice.finish_reason for chunk in (first, *streaming) for choice in chunk.choices]
    assert own_server.wait() == 128 + signal.SIGTERM  # a shell's convention
    assert "Traceback" not in own_server.log.read_text()
    assert reasons[-1] == "length"
    assert listening_addresses(own_server.port) == set()
