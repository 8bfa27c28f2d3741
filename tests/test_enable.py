"""The model name `step3p5`: what it stands for, that it leaves the rest alone, and how it is turned off and on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from greedy import assert_equal_but_for_ties
from reference import Reference
from server import LOCALHOST, MAX, ROOT, START_UP, Server, listening_addresses

from step3p5.config_fields import ConfigError
from step3p5.enable import FILE_NAME, enable, main
from step3p5.hook.short_name import PUBLISHED, VARIABLE, resolve


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with an empty sub-folder `step3p5`, as the project's own root has one that is no checkpoint."""
    (tmp_path / "elsewhere" / "step3p5").mkdir(parents=True)
    return tmp_path / "elsewhere"


def named(model: Path) -> dict[str, str]:
    """The environment variables of a process in which the name stands for `model`."""
    # Importing MAX changes the process's environment behind Python's back: hand children Python's view of it.
    return dict(os.environ) | {VARIABLE: str(model)}


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


@pytest.mark.parametrize("content", [None, "def", "raise OSError"])
def test_a_start_up_file_says_nothing_where_the_package_is_gone_or_damaged(tmp_path: Path, content: str | None) -> None:
    enable(tmp_path)
    if content is not None:
        (tmp_path / "step3p5.py").write_text(content)
    script = f"import site; site.addsitedir({str(tmp_path)!r}); print('started')"
    done = run([sys.executable, "-S", "-I", "-c", script], tmp_path, dict(os.environ))
    assert (done.stdout, done.stderr) == ("started\n", "")


def test_another_max_is_left_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "max" / "pipelines" / "lib"
    (folder / "config").mkdir(parents=True)
    for name in ("pipeline_args", "_hf_config", "auto_model", "config/config"):
        (folder / f"{name}.py").write_text(f"import sys\nprint({name!r})\n")
    script = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]
import step3p5.start_up
step3p5.start_up.install()
from max.pipelines.lib import pipeline_args, _hf_config, auto_model
from max.pipelines.lib.config import config
"""
    done = run([sys.executable, "-S", "-I", "-c", script], tmp_path, dict(os.environ))
    assert done.stdout.split() == ["pipeline_args", "_hf_config", "auto_model", "config/config"]
    lines = done.stderr.splitlines()
    assert len(lines) == 4
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


def test_the_python_interface(elsewhere: Path, tiny: Path) -> None:
    recipe = elsewhere / "recipe.yaml"
    recipe.write_text(json.dumps({"model": {"max_length": 7, "device_specs": "cpu"}, "runtime": {"max_batch_size": 4}}))
    done = run([sys.executable, "-c", ARGUMENTS, str(tiny), str(recipe)], elsewhere, named(tiny))
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


def test_a_choice_of_another_model_is_refused(elsewhere: Path, tmp_path: Path) -> None:
    llama = tmp_path / "llama"
    llama.mkdir()
    (llama / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    done = run([MAX, "generate", "--model", "step3p5", "--devices", "cpu"], elsewhere, named(llama))
    assert done.stderr.splitlines()[-1] == (
        f"step3p5.config_fields.ConfigError: model_type of {llama}: found 'llama' (str), expected 'step3p5'. Correct "
        "STEP3P5_MODEL."
    )


def test_max_serve_model_step3p5(elsewhere: Path, steady: Path) -> None:
    with Server("step3p5", elsewhere, options=(), variables=named(steady)) as server:
        assert listening_addresses(server.port) == {LOCALHOST}
        answer: Any = server.client().chat.completions.create(
            model="step3p5",
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=4,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        assert (answer.model, answer.usage.completion_tokens) == ("step3p5", 4)
        assert answer.choices[
            0
        ].message.reasoning_content  # the parser is in use, and knows that the template opens a thought


def test_max_generate_model_step3p5(elsewhere: Path, steady: Path) -> None:
    command = [MAX, "generate", "--model", "step3p5", "--prompt", "Hello", "--max-new-tokens", "4", "--ignore-eos"]
    done = run(command, elsewhere, named(steady))
    assert done.returncode == 0, done.stderr
    assert "Output size: 4" in done.stdout


PYTHON = """
import json

from max._entrypoints.llm import LLM
from max.pipelines.lib import PipelineArgs
from max.pipelines.lib.auto_model import AutoModel, AutoTokenizer

if __name__ == "__main__":
    prompt = AutoTokenizer("step3p5")(["Hello"])
    result = AutoModel("step3p5").generate(**prompt, max_new_tokens=4, temperature=0, ignore_eos=True)
    llm = LLM(PipelineArgs.from_flat_kwargs(model_path="step3p5"))
    texts = llm.generate(["Hello", "Hi"], max_new_tokens=4, use_tqdm=False)
    del llm
    sequences = [[int(token) for token in tokens] for tokens in (prompt["input_ids"][0], result.sequences[0])]
    print(json.dumps([*sequences, texts]))
"""


def test_auto_model_and_llm_generate(elsewhere: Path, steady: Path, steady_reference: Reference) -> None:
    script = elsewhere / "script.py"
    script.write_text(PYTHON)
    variables = named(steady) | {"OTEL_SDK_DISABLED": "true"}
    done = run([sys.executable, str(script)], elsewhere, variables)
    assert done.returncode == 0, done.stderr
    prompt, sequence, texts = json.loads(done.stdout.splitlines()[-1])
    assert sequence[: len(prompt)] == prompt
    want: list[int] = []
    for _ in range(4):
        want.append(int(steady_reference.logits([*prompt, *want])[-1].argmax()))
    assert_equal_but_for_ties(steady_reference, prompt, sequence[len(prompt) :], want)
    assert [type(text) for text in texts] == [str, str]
