"""Loads models as new processes do: with `max generate`, or each in a fork of one that has imported MAX, and of this
package no more than the import hook.

In a process in which this package was imported before, its own class would read `config.json` from the start.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MAX = str(Path(sys.executable).parent / "max")
UNHOOK = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if type(finder).__module__ != "step3p5.start_up"]
"""
"""Takes out the import hook, which the environment of the tests has as every other one."""

SECONDS = 60
"""A fault must show before anything is compiled, which takes longer than this."""


class FreshProcesses:
    """Forks a process for each loading; a context manager.

    Args:
        start_up: What Python runs before it imports MAX.
    """

    def __init__(self, start_up: str = "") -> None:
        # Importing MAX changes the process's environment behind Python's back: hand children Python's view of it.
        self._server = subprocess.Popen(
            [sys.executable, __file__, start_up],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=dict(os.environ),
        )

    def __enter__(self) -> FreshProcesses:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.communicate()

    def last_line_of_loading(self, folder: Path | str, **options: object) -> str:
        """The last line that Python prints of the exception that ends `AutoModel(folder, **options)` on a CPU."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps({"model_path": str(folder), **options}) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        assert isinstance(answer, str), f"the process ended with status {answer}"
        return answer


def last_line_of_generate(folder: Path) -> str:
    """The last line of standard error of `max generate`, which has to fail."""
    command = [MAX, "generate", "--model", str(folder), "--custom-architectures", "pipelines_registry"]
    command += ["--devices", "cpu", "--max-length", "512", "--prompt", "hi"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=dict(os.environ), timeout=100)
    assert run.returncode == 1, run.stdout
    return run.stderr.strip().splitlines()[-1]


def serve() -> None:
    """Answers requests, a JSON line each, on the original standard output."""
    sys.path.append(str(ROOT))
    exec(sys.argv[1])
    import max.pipelines.lib.auto_model  # noqa: F401  # forks need not import it again

    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            os.write(writer, json.dumps(load(json.loads(line))).encode())
            os._exit(0)
        os.close(writer)
        with open(reader, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(child, 0)
        os.write(answers, (answer or json.dumps(status).encode()) + b"\n")


def load(options: dict[str, Any]) -> str:
    """The last line of the exception that ends a loading."""
    from max.pipelines.lib.auto_model import AutoModel

    signal.alarm(SECONDS)
    settings: dict[str, Any] = {"devices": "cpu", "custom_architectures": ["pipelines_registry"], "max_length": 512}
    sys.path.insert(0, str(ROOT))
    try:
        AutoModel(**(settings | options))
    except Exception:
        return traceback.format_exc().strip().splitlines()[-1]
    return "loaded"


if __name__ == "__main__":
    serve()
