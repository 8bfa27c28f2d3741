"""MAX's own entry points besides `max serve`, run as a user runs them: `max generate` and the `LLM` class."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX = str(Path(sys.executable).parent / "max")
START_UP = 600
"""Seconds for a command to compile and start on a small machine."""


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
