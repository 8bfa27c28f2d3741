"""The model name `step3p5`: how it is turned on and off, what it stands for, and that it leaves the rest alone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from server import LOCALHOST, listening_addresses

from step3p5.config_fields import ConfigError
from step3p5.enable import FILE_NAME, enable, main
from step3p5.hook.short_name import PUBLISHED, VARIABLE, resolve

ROOT = Path(__file__).resolve().parent.parent
MAX = str(Path(sys.executable).parent / "max")
START_UP = 600
"""Seconds for a server to compile and start on a small machine."""


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is enabled, and that Python takes for one of packages if it is on `PYTHONPATH`."""
    folder = tmp_path_factory.mktemp("site")
    enable(folder)
    (folder / "sitecustomize.py").write_text(f"import site\nsite.addsitedir({str(folder)!r})\n")
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with an empty sub-folder `step3p5`, as the project's own root has one that is no checkpoint."""
    (tmp_path / "elsewhere" / "step3p5").mkdir(parents=True)
    return tmp_path / "elsewhere"


def enabled(site: Path, model: Path | str | None = None) -> dict[str, str]:
    """The environment variables of a process in an enabled environment."""
    # Importing MAX changes the process's environment behind Python's back: hand children Python's view of it.
    variables = dict(os.environ) | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}
    return variables if model is None else variables | {VARIABLE: str(model)}


def run(command: list[str], folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=variables, timeout=START_UP)


def test_enable_and_undo_leave_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / FILE_NAME
    for arguments, output, files in [
        (["--status"], f"off: {file}\nstep3p5: {PUBLISHED}\n", []),
        (["--undo"], f"off already: no {file}\n", []),
        ([], f"on: wrote {file}\nstep3p5 stands for $STEP3P5_MODEL if set, else {PUBLISHED}\n", [file]),
        ([], f"on: wrote {file}\nstep3p5 stands for $STEP3P5_MODEL if set, else {PUBLISHED}\n", [file]),
        (["--status"], f"on: {file}\nstep3p5: {PUBLISHED}\n", [file]),
        (["--undo"], f"off: removed {file}\n", []),
    ]:
        assert main(arguments, tmp_path) == 0
        assert capsys.readouterr().out == output
        assert list(tmp_path.iterdir()) == files


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([], tmp_path / "none")
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"python -m step3p5.enable: error: {tmp_path / 'none' / FILE_NAME}: found 'No such file or directory', "
        "expected a folder of yours to write in. Use a venv."
    )


def test_other_programs_import_two_small_modules_and_no_more(site: Path) -> None:
    script = "import sys; names = list(sys.modules); import json; print(json.dumps(names))"
    plain = run([sys.executable, "-c", script], site, dict(os.environ) | {"PYTHONPATH": str(ROOT)})
    hooked = run([sys.executable, "-c", script], site, enabled(site))
    added = set(json.loads(hooked.stdout)) - set(json.loads(plain.stdout)) - {"sitecustomize"}
    assert added == {"step3p5", "step3p5.start_up"}


def test_a_start_up_file_whose_package_is_gone_says_nothing(site: Path) -> None:
    script = f"import site; site.addsitedir({str(site)!r}); print('started')"
    done = run([sys.executable, "-S", "-I", "-c", script], site, dict(os.environ))
    assert (done.stdout, done.stderr) == ("started\n", "")


def test_another_max_is_left_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "max" / "pipelines" / "lib"
    folder.mkdir(parents=True)
    for name in ("pipeline_args", "_hf_config", "auto_model"):
        (folder / f"{name}.py").write_text(f"import sys\nprint({name!r})\n")
    script = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]
import step3p5.start_up
step3p5.start_up.install()
from max.pipelines.lib import pipeline_args, _hf_config, auto_model
"""
    done = run([sys.executable, "-S", "-I", "-c", script], tmp_path, dict(os.environ))
    assert done.stdout.split() == ["pipeline_args", "_hf_config", "auto_model"]
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("--model step3p5 is not available: this is not the MAX that it was") for line in lines)


def test_what_the_name_stands_for(elsewhere: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(elsewhere)
    assert resolve("step3p5") == PUBLISHED
    (elsewhere / "step3p5" / "config.json").write_text("{}")
    assert resolve("step3p5") is None  # a checkpoint of that name: MAX's own meaning
    for chosen, expected in [
        (str(tiny), str(tiny)),
        ("step3p5", str(elsewhere / "step3p5")),
        ("someone/Step-3.5", "someone/Step-3.5"),
        ("", None),
    ]:
        monkeypatch.setenv(VARIABLE, chosen)
        assert resolve("step3p5") == expected
    for other in ("stepfun-ai/Step-3.5-Flash", "./step3p5", "", None, Path("step3p5")):
        assert resolve(other) is None


@pytest.mark.parametrize(
    ("chosen", "fault"),
    [
        (".", "a folder without config.json"),
        ("/no/such/folder", "neither a folder nor a hub name (OWNER/NAME)"),
        ("Step-3.5-Flash", "neither a folder nor a hub name (OWNER/NAME)"),
        ("hub/a/b", "neither a folder nor a hub name (OWNER/NAME)"),
    ],
)
def test_a_choice_that_is_no_checkpoint(
    elsewhere: Path, chosen: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv(VARIABLE, chosen)
    with pytest.raises(ConfigError) as error:
        resolve("step3p5")
    assert str(error.value) == (
        f"STEP3P5_MODEL: found {chosen!r}, {fault}, expected a checkpoint's folder or hub name. Correct the variable, "
        f"or unset it for {PUBLISHED}."
    )


ARGUMENTS = """
import json, sys
from max.pipelines.lib import PIPELINE_REGISTRY, PipelineArgs, PipelineConfig
from max.pipelines.lib.auto_model import AutoTokenizer
from max.pipelines.lib.pipeline_runtime_config import PipelineRuntimeConfig

tiny, recipe = sys.argv[1:]
flags = dict(device_specs="cpu", max_length=512)

def shown(args):
    runtime = args.runtime
    return [args.model_path, args.served_model_name, args.max_length, runtime.custom_architectures,
            runtime.max_batch_size, args.device_specs[0].device_type]

answers = {"other": shown(PipelineArgs.from_flat_kwargs(model_path=tiny, max_batch_size=3, **flags))}
answers["imported for another"] = "step3p5.arch" in sys.modules
answers["flat"] = shown(PipelineArgs.from_flat_kwargs(model_path="step3p5", max_batch_size=3, **flags))
answers["served as"] = shown(PipelineArgs.from_flat_kwargs(
    model_path="step3p5", served_model_name="mine", custom_architectures=["pipelines_registry"], **flags))
answers["recipe"] = shown(PipelineArgs.from_flat_kwargs(model_path="step3p5", config_file=recipe))
answers["direct"] = shown(PipelineArgs(
    model_path="step3p5", runtime=PipelineRuntimeConfig(max_batch_size=5), **flags))
config = PipelineConfig.from_args(PipelineArgs.from_flat_kwargs(model_path="step3p5", **flags))
answers["runs"] = PIPELINE_REGISTRY.architecture_for_config(config).pipeline_model.__module__
answers["tokenizer"] = AutoTokenizer("step3p5")(["hi"])["input_ids"] == AutoTokenizer(tiny)(["hi"])["input_ids"]
print(json.dumps(answers))
"""


def test_the_python_interface(site: Path, elsewhere: Path, tiny: Path) -> None:
    recipe = elsewhere / "recipe.yaml"
    recipe.write_text(json.dumps({"model": {"max_length": 7, "device_specs": "cpu"}, "runtime": {"max_batch_size": 4}}))
    done = run([sys.executable, "-c", ARGUMENTS, str(tiny), str(recipe)], elsewhere, enabled(site, tiny))
    assert done.returncode == 0, done.stderr
    ours = ["pipelines_registry"]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "other": [str(tiny), None, 512, [], 3, "cpu"],
        "imported for another": False,
        "flat": [str(tiny), "step3p5", 512, ours, 3, "cpu"],
        "served as": [str(tiny), "mine", 512, ours, None, "cpu"],
        "recipe": [str(tiny), "step3p5", 7, ours, 4, "cpu"],
        "direct": [str(tiny), "step3p5", 512, ours, 5, "cpu"],
        "runs": "step3p5.model",
        "tokenizer": True,
    }


def test_a_choice_of_another_model_is_refused(site: Path, elsewhere: Path, tmp_path: Path) -> None:
    llama = tmp_path / "llama"
    llama.mkdir()
    (llama / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    done = run([MAX, "generate", "--model", "step3p5", "--devices", "cpu"], elsewhere, enabled(site, llama))
    assert done.stderr.splitlines()[-1] == (
        f"step3p5.config_fields.ConfigError: model_type of {llama}: found 'llama' (str), expected 'step3p5'. Correct "
        "STEP3P5_MODEL."
    )


def test_a_server_of_this_package_keeps_to_localhost_unless_told_otherwise(site: Path, elsewhere: Path) -> None:
    script = """
import os, sys
from max.serve.config import Settings

def host(*arguments, **settings):
    sys.argv = ["max", "serve", *arguments]
    return Settings(**settings).host

print(host("--model", "step3p5"), host("--model=step3p5"), host("--custom-architectures", "/x/y:pipelines_registry"))
print(host("--model", "other"), host("--model", "step3p5", MAX_SERVE_HOST="0.0.0.0"))
os.environ["MAX_SERVE_HOST"] = "10.0.0.1"
print(host("--model", "step3p5"))
"""
    done = run([sys.executable, "-c", script], elsewhere, enabled(site))
    assert done.stdout.split() == ["127.0.0.1"] * 3 + ["0.0.0.0"] * 2 + ["10.0.0.1"], done.stderr


def test_max_serve_model_step3p5(site: Path, elsewhere: Path, tiny: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [MAX, "serve", "--model", "step3p5", "--port", str(port)]
    with (elsewhere / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=elsewhere, env=enabled(site, tiny))
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_UP
        while not answers(f"{address}/health"):
            assert process.poll() is None, (elsewhere / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        ask = {"model": "step3p5", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        request = urllib.request.Request(
            f"{address}/v1/chat/completions", json.dumps(ask).encode(), headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            answer = json.load(response)
        assert answer["model"] == "step3p5"
        assert listening_addresses(port) == {LOCALHOST}
        assert 0 < answer["usage"]["completion_tokens"] <= 4
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False
