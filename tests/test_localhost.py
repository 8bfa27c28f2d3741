"""Where a server of this package listens: on localhost, unless it is told otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from server import ROOT

SCRIPT = """
import os
from max._entrypoints.cli.serve import serve_api_and_model_worker as entry
from max.serve.config import Settings
import pipelines_registry, step3p5.localhost

def host(**settings):
    return entry.fastapi_config(app=type("App", (), {"routes": []}), server_settings=Settings(**settings)).host

step3p5.localhost.keep_to_localhost()
print(host(), host(MAX_SERVE_HOST="0.0.0.0"), host(MAX_SERVE_HOST="10.0.0.1"))
os.environ["MAX_SERVE_HOST"] = "10.0.0.2"
print(host())
"""


def test_a_server_keeps_to_localhost_unless_told_otherwise(tmp_path: Path) -> None:
    # Importing MAX changes the process's environment behind Python's back: hand children Python's view of it.
    variables = {name: value for name, value in os.environ.items() if name != "MAX_SERVE_HOST"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=variables | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.stdout.split() == ["127.0.0.1", "0.0.0.0", "10.0.0.1", "10.0.0.2"], done.stderr
