"""A real `max serve` process for the tests: started, watched and stopped as an operator would."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import httpx
from openai import AsyncOpenAI, OpenAI

ROOT = Path(__file__).resolve().parent.parent
MAX = str(Path(sys.executable).parent / "max")
START_UP = 600
"""Seconds for a server to compile and start on a small machine."""

SHUT_DOWN = 60
LOCALHOST = "0100007F"
"""127.0.0.1 as /proc/net/tcp spells it."""

MAX_LENGTH = 1024
MAX_BATCH_SIZE = 64
CHUNK = 128
"""Tokens that a step reads at most, so that a longer prompt is read in pieces."""

LENGTHS = ("--max-length", str(MAX_LENGTH), "--max-batch-input-tokens", str(CHUNK))
SIZES = ("--max-batch-size", str(MAX_BATCH_SIZE), *LENGTHS)
LONG_FORM = ("--custom-architectures", f"{ROOT}:pipelines_registry", "--devices", "cpu", *SIZES)
"""What serves a checkpoint with this package. Servers of the same sizes share one compiled model."""


class Server:
    """One `max serve` process group on localhost; a context manager that waits until it answers, and ends it.

    Args:
        model: What to serve, as clients call it too.
        folder: Where the process runs and leaves its log.
        options: Command-line options beside model and port.
        variables: Environment variables over the usual ones.

    Attributes:
        command: The command line.
        log: The file with all that the process writes.
    """

    def __init__(
        self,
        model: Path | str,
        folder: Path,
        options: Sequence[str] = LONG_FORM,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.model = str(model)
        self.port, self.metrics_port = free_ports(2)
        self.address = f"http://127.0.0.1:{self.port}"
        self.log = folder / "log"
        self.command = [MAX, "serve", "--model", self.model, "--port", str(self.port), *options]
        self._variables = variables
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, cwd=folder, env=self.environment(), start_new_session=True
            )

    def __enter__(self) -> Server:
        wait_for(self._answers, START_UP, "the server to start")
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self.process.poll() is None:
                self.stop()
        finally:
            for pid in self.processes():
                os.kill(pid, signal.SIGKILL)
            self.process.wait()

    def environment(self) -> dict[str, str]:
        """What the process's environment is: no telemetry, metrics at a port of its own."""
        # Importing MAX changes the process's environment behind Python's back: hand children Python's view of it.
        own = {"MAX_SERVE_METRICS_ENDPOINT_PORT": str(self.metrics_port), "OTEL_SDK_DISABLED": "true"}
        variables = {name: value for name, value in os.environ.items() if name != "MAX_SERVE_HOST"}
        return variables | own | dict(self._variables)

    def stop(self) -> int:
        """Asks the server to end, as a supervisor does, waits for all of it and returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Waits for the server and its processes to end; returns its exit status."""
        status = self.process.wait(SHUT_DOWN)
        # Some end when they find the first one gone.
        wait_for(lambda: not self.processes(), SHUT_DOWN, "every process of the server to end")
        return status

    def processes(self) -> list[int]:
        """The live processes that belong to the server: all of its session."""
        pids = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(session) == self.process.pid and state != "Z":
                pids.append(int(stat.parent.name))
        return pids

    def resident_mib(self) -> float:
        """Memory of their own that the server's processes hold, in MiB; files that are mapped come and go."""
        statuses = (Path(f"/proc/{pid}/status").read_text() for pid in self.processes())
        return sum(int(re.findall(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)[0]) for status in statuses) / 1024

    def metric(self, name: str, batch_type: str = "") -> float:
        """The sum over labels of metric `name`, of one `batch_type` (`CE`, `TG`) if given; 0 before its first value."""
        text = httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=60).text
        labels = rf'{{.*batch_type="{batch_type}".*}}' if batch_type else "(?:{.*})?"
        return sum(float(value) for value in re.findall(rf"^{name}{labels} (\S+)$", text, re.MULTILINE))

    def client(self) -> OpenAI:
        """A client that does not try twice."""
        return OpenAI(base_url=f"{self.address}/v1", api_key="unused", max_retries=0, timeout=120)

    def async_client(self) -> AsyncOpenAI:
        """As `client`, for many requests at a time."""
        return AsyncOpenAI(base_url=f"{self.address}/v1", api_key="unused", max_retries=0, timeout=120)

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return httpx.get(f"{self.address}/health", timeout=5).is_success
        except httpx.TransportError:
            return False


def listening_addresses(port: int) -> set[str]:
    """The addresses on which something listens at `port`, as the system spells them (`LOCALHOST`)."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    local = [row[1].split(":") for row in rows if row[3] == "0A"]
    return {address for address, number in local if int(number, 16) == port}


def free_ports(count: int) -> list[int]:
    """Ports of localhost that nothing listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Waits until `condition` holds; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)
