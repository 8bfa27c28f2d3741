"""The wheel carries everything: installed alone, it runs a model from any folder. So does an editable installation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from step3p5.enable import FILE_NAME, START_UP_FILE

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources that git would package."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_every_source_file(wheel: Path) -> None:
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "step3p5").rglob("*.py")}
    expected |= {f"step3p5/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "mojo_kernels").rglob("*.mojo")}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "step3p5").rglob("*.yaml")}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "step3p5").rglob("*.jinja")}
    expected |= {"pipelines_registry.py", FILE_NAME}
    contents = set(zipfile.ZipFile(wheel).namelist())
    assert expected <= contents
    assert {name.split("/")[0] for name in contents - expected} == {"step3p5_max-0.1.0.dist-info"}


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_an_installation_has_the_start_up_file_until_it_is_removed(wheel: Path, tmp_path: Path, editable: bool) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    (packages,) = environment.glob("lib/python*/site-packages")
    python = str(environment / "bin" / "python")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=variables)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def pip(*command: str) -> None:
        run(sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, *command)

    def modules() -> set[str]:
        return set(json.loads(run(python, "-c", "import json, sys; print(json.dumps([*sys.modules]))")))

    plain = modules()
    pip("install", "--no-deps", *(["--editable", str(ROOT)] if editable else [str(wheel)]))
    assert (packages / FILE_NAME).read_text() == START_UP_FILE
    assert modules() - plain == {"step3p5", "step3p5.start_up"}
    pip("uninstall", "--yes", "step3p5-max")
    assert not list(packages.glob("*"))
    assert modules() == plain


def test_the_wheel_alone_writes_and_runs_a_checkpoint(wheel: Path, tmp_path: Path) -> None:
    site, folder = tmp_path / "site", tmp_path / "elsewhere"
    folder.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    environment = dict(os.environ) | {"PYTHONPATH": str(site)}

    def run(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(sys.executable, "-c", "import step3p5.kernel_package as kernels; print(kernels.kernels_path())").strip()
    assert Path(where) == site / "step3p5" / "mojo_kernels"
    run(sys.executable, "-m", "step3p5.random_checkpoint", "model", "--preset", "tiny")
    max_command = str(Path(sys.executable).parent / "max")
    options = ["--custom-architectures", "pipelines_registry", "--devices", "cpu", "--max-length", "256"]
    text = run(max_command, "generate", "--model", "model", *options, "--max-new-tokens", "4", "--prompt", "Hello")
    assert "Time to first token" in text
