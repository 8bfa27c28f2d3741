"""What a user sees last when a configuration, checkpoint, flag or prompt is bad: one line that says what to do."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from faulty import ADD, CONFIG_ERROR, CORRECT, PER_LAYER, change_config, replace
from fresh_process import FreshProcesses, last_line_of_generate
from harness import FIRST_TEXT_TOKEN, Runner
from max.driver import Buffer
from max.dtype import DType
from max.graph.weights import SafetensorWeights, WeightData
from max.pipelines.context import SamplingParams, TextContext
from max.pipelines.context.exceptions import InputError, PromptTooLongError
from max.pipelines.lib import PipelineConfig
from max.pipelines.lib.pipeline_args import PipelineArgs
from max.pipelines.lib.registry import PIPELINE_REGISTRY
from max.pipelines.modeling.config_enums import SupportedEncoding
from max.pipelines.modeling.types import RequestID, TextGenerationRequest, TextGenerationRequestMessage
from safetensors.numpy import load_file, save_file

from step3p5.checkpoint_files import INDEX_NAME
from step3p5.checkpoint_tensors import CheckpointDtype
from step3p5.model_config import Step3p5Config
from step3p5.random_checkpoint.writer import write_random_checkpoint
from step3p5.tokenizer import Step3p5Tokenizer
from step3p5.weight_adapters import convert_safetensor_state_dict

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT_ERROR = "step3p5.checkpoint_files.CheckpointError: "


@pytest.fixture(scope="module")
def fresh() -> Iterator[FreshProcesses]:
    """Processes that load a model."""
    with FreshProcesses() as processes:
        yield processes


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX_NAME).read_bytes())["weight_map"][tensor]


CONFIG_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "missing field": (dict(hidden_size=...), f"hidden_size: found no such field, expected a positive integer. {ADD}"),
    "missing MoE field": (dict(moe_top_k=...), f"moe_top_k: found no such field, expected a positive integer. {ADD}"),
    "missing length": (
        dict(max_position_embeddings=...),
        f"max_position_embeddings: found no such field, expected a positive integer. {ADD}",
    ),
    "mistyped field": (
        dict(hidden_size="256"),
        f"hidden_size: found '256' (str), expected a positive integer. {CORRECT}",
    ),
    "mistyped flag": (
        dict(tie_word_embeddings="no"),
        f"tie_word_embeddings: found 'no' (str), expected true or false. {CORRECT}",
    ),
    "mistyped length": (
        dict(max_position_embeddings="4096"),
        f"max_position_embeddings: found '4096' (str), expected a positive integer. {CORRECT}",
    ),
    "short layer_types": (dict(layer_types=["full_attention"] * 7), f"layer_types: found 7 entries, {PER_LAYER}"),
    "short rope_theta": (dict(rope_theta=[1e4] * 4), f"rope_theta: found 4 entries, {PER_LAYER}"),
    "short swiglu_limits": (dict(swiglu_limits=[0.0] * 8), f"swiglu_limits: found 8 entries, {PER_LAYER}"),
    "top_k above experts": (
        dict(moe_top_k=17),
        "moe_top_k: found 17 (int), expected 1 to 16 (moe_num_experts is 16; the kernels route to at most 16). "
        f"{CORRECT}",
    ),
    "heads not a multiple": (
        dict(num_attention_heads=5),
        f"num_attention_heads: found 5 (int), expected a multiple of num_attention_groups, 2. {CORRECT}",
    ),
    "odd rotary size": (
        dict(partial_rotary_factors=[33 / 64] * 9),
        "partial_rotary_factors: found 0.515625 for layer 0, 33.0 of head_dim 64 dims rotated, expected an even number "
        f"of rotated dims, which are paired. {CORRECT}",
    ),
    "unknown rope type": (
        dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}),
        f"rope_scaling.rope_type: found 'yarn' (str), expected 'default' or 'llama3'. {CORRECT}",
    ),
    "unknown router activation": (
        dict(moe_router_activation="softmax"),
        f"moe_router_activation: found 'softmax' (str), expected 'sigmoid'. {CORRECT}",
    ),
    "unsupported layer type": (
        dict(layer_types=["full_attention"] * 5 + ["linear_attention"] * 4),
        "layer_types[5]: found 'linear_attention' (str), expected 'full_attention' or 'sliding_attention'. " + CORRECT,
    ),
    "quantisation": (
        dict(quantization_config={"quant_method": "fp8"}),
        "quantization_config.quant_method: found 'fp8' (str), expected no quantization_config (known methods: none; "
        "weights are float32 or bfloat16). Use the unquantised checkpoint.",
    ),
    "small window": (
        dict(sliding_window=127),
        "sliding_window: found 127, expected at least 128 on a CPU (MAX's attention kernel takes no smaller one). Use "
        "--devices gpu or a checkpoint with a larger window.",
    ),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_configuration(fresh: FreshProcesses, copy: Path, fault: str) -> None:
    changes, message = CONFIG_FAULTS[fault]
    change_config(copy, **changes)
    assert fresh.last_line_of_loading(copy) == CONFIG_ERROR + message


TENSOR = "model.layers.4.self_attn.q_proj.weight"

TENSOR_FAULTS: dict[str, tuple[Callable[[dict[str, np.ndarray[Any, Any]]], object], str]] = {
    "missing": (
        lambda tensors: tensors.pop(TENSOR),
        f"tensor {TENSOR}: found none of that name in the checkpoint (1 missing in all), expected shape [256, 256]. "
        "Complete the checkpoint, or correct config.json if it belongs to other weights.",
    ),
    "extra": (
        lambda tensors: tensors.update({"model.layers.4.self_attn.q_proj.bias": np.zeros(256, np.float32)}),
        "tensor model.layers.4.self_attn.q_proj.bias: found one of that name in the checkpoint (1 unknown in all), "
        "expected none from config.json. Check that config.json belongs to these weights: num_hidden_layers, "
        "moe_layers_enum, use_qk_norm, ...",
    ),
    "misshapen": (
        lambda tensors: tensors.update({TENSOR: np.zeros((256, 128), np.float32)}),
        f"tensor {TENSOR}: found shape [256, 128], expected [256, 256] from config.json. Check that config.json "
        "belongs to these weights.",
    ),
    "mistyped": (
        lambda tensors: tensors.update({TENSOR: np.zeros((256, 256), np.int8)}),
        f"tensor {TENSOR}: found dtype I8, expected float32 or bfloat16. Use the unquantised checkpoint.",
    ),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_tensor(fresh: FreshProcesses, copy: Path, fault: str) -> None:
    change, message = TENSOR_FAULTS[fault]
    shard = shard_of(copy, TENSOR)
    tensors = load_file(shard)
    shard.unlink()
    change(tensors)
    save_file(tensors, shard)
    assert fresh.last_line_of_loading(copy) == CHECKPOINT_ERROR + message


def test_a_tensor_in_two_files(fresh: FreshProcesses, copy: Path) -> None:
    save_file({TENSOR: np.zeros((256, 256), np.float32)}, copy / "other.safetensors")
    line = fresh.last_line_of_loading(copy)
    assert line.startswith(f"{CHECKPOINT_ERROR}tensor {TENSOR}: found one in ")
    assert "other.safetensors" in line
    assert line.endswith("expected one in all. Remove the wrong file, or name the right ones with --weight-path.")


def test_missing_shard(fresh: FreshProcesses, copy: Path) -> None:
    shard = shard_of(copy, TENSOR)
    shard.unlink()
    assert fresh.last_line_of_loading(copy) == (
        f"{CHECKPOINT_ERROR}{copy / INDEX_NAME}: found shard {shard.name} missing from the folder (1 missing in all), "
        "expected all 4 shards beside it. Download the missing ones."
    )


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"weight_map": []}'])
def test_damaged_index(fresh: FreshProcesses, copy: Path, content: bytes) -> None:
    replace(copy / INDEX_NAME, content)
    assert fresh.last_line_of_loading(copy) == (
        f"{CHECKPOINT_ERROR}{copy / INDEX_NAME}: found no weight_map, expected a JSON object that has it. "
        "Download the file again."
    )


@pytest.mark.parametrize("length", [0, 7, 8, 100, -4096, -1])
def test_truncated_file(fresh: FreshProcesses, copy: Path, length: int) -> None:
    shard = shard_of(copy, TENSOR)
    content = shard.read_bytes()
    replace(shard, content[:length])
    if length < 0:
        expected = f"{len(content)} bytes by its header"
    else:
        expected = f"at least {8 + int.from_bytes(content[: min(length, 8)], 'little')} bytes"
    assert fresh.last_line_of_loading(copy) == (
        f"{CHECKPOINT_ERROR}{shard}: found {shard.stat().st_size} bytes, expected {expected}. Download the file again."
    )


def test_git_lfs_pointer(fresh: FreshProcesses, copy: Path) -> None:
    shard = shard_of(copy, TENSOR)
    replace(shard, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert fresh.last_line_of_loading(copy) == (
        f"{CHECKPOINT_ERROR}{shard}: found a file that begins with b'version ', expected a safetensors file. Download "
        "the file again (a Git LFS pointer: run `git lfs pull`)."
    )


@pytest.mark.parametrize(
    "header", [b"{", b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [1]}}', b'{"a": {"dtype": "F32"}}']
)
def test_damaged_header(fresh: FreshProcesses, copy: Path, header: bytes) -> None:
    shard = shard_of(copy, TENSOR)
    replace(shard, len(header).to_bytes(8, "little") + header)
    line = fresh.last_line_of_loading(copy)
    assert (
        line
        == f"{CHECKPOINT_ERROR}{shard}: found a damaged header, expected a safetensors file. Download the file again."
    )


@pytest.mark.parametrize("length", [0, 4097])
def test_max_length_flag(fresh: FreshProcesses, tiny: Path, length: int) -> None:
    assert fresh.last_line_of_loading(tiny, max_length=length) == (
        f"{CONFIG_ERROR}--max-length: found {length}, expected 1 to 4096 (max_position_embeddings in config.json). "
        "Change the flag."
    )


@pytest.mark.parametrize("encoding", sorted({*get_args(SupportedEncoding)} - Step3p5Config.SUPPORTED_ENCODINGS))
def test_quantisation_flag(fresh: FreshProcesses, tiny: Path, encoding: str) -> None:
    assert fresh.last_line_of_loading(tiny, quantization_encoding=encoding) == (
        f"{CONFIG_ERROR}--quantization-encoding: found {encoding!r}, expected 'bfloat16' or 'float32'. Change the "
        "flag, or leave it out to run the checkpoint as it is."
    )


def test_weights_of_another_type(fresh: FreshProcesses, copy: Path) -> None:
    for shard in copy.glob("*.safetensors"):
        tensors = {name: tensor.astype(np.float16) for name, tensor in load_file(shard).items()}
        shard.unlink()
        save_file(tensors, shard)
    line = fresh.last_line_of_loading(copy)
    assert re.fullmatch(
        f"{CHECKPOINT_ERROR}tensor .*: found dtype F16, expected float32 or bfloat16. Use the unquantised checkpoint.",
        line,
    )


def test_a_checkpoint_without_weights(fresh: FreshProcesses, copy: Path) -> None:
    for file in (*copy.glob("*.safetensors"), copy / INDEX_NAME):
        file.unlink()
    line = fresh.last_line_of_loading(copy)
    assert line.startswith(f"{CHECKPOINT_ERROR}tensor model.embed_tokens.weight: found none of that name in the ")
    assert line.endswith("Complete the checkpoint, or correct config.json if it belongs to other weights.")


def test_the_command_ends_with_the_configuration_error(copy: Path) -> None:
    changes, message = CONFIG_FAULTS["unknown router activation"]
    change_config(copy, **changes)
    assert last_line_of_generate(copy) == CONFIG_ERROR + message


def test_the_command_ends_with_the_checkpoint_error(copy: Path) -> None:
    shard = shard_of(copy, TENSOR)
    replace(shard, shard.read_bytes()[:-1])
    assert last_line_of_generate(copy).startswith(f"{CHECKPOINT_ERROR}{shard}: found ")


def test_an_output_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    command = [sys.executable, "-m", "step3p5.random_checkpoint", str(out), "--preset", "tiny"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=dict(os.environ))
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].endswith(f"{out} is a folder with files in it: name a new or empty one")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]
    assert (out / "mine.txt").read_text() == "mine"


def pipeline_config(folder: Path, **options: Any) -> PipelineConfig:
    """The configuration that MAX makes of a command's flags."""
    flags: dict[str, Any] = {"custom_architectures": ["pipelines_registry"], "device_specs": "cpu", "max_length": 512}
    return PipelineConfig.from_args(PipelineArgs.from_flat_kwargs(model_path=str(folder), **(flags | options)))


def adapted(folder: Path, **options: Any) -> tuple[SafetensorWeights, dict[str, WeightData]]:
    """A checkpoint's weights as stored, and as the adapter hands them to the graph."""
    config = pipeline_config(folder, **options)
    weights = SafetensorWeights(sorted(folder.glob("*.safetensors")))
    return weights, convert_safetensor_state_dict(dict(weights.items()), config.model.huggingface_config, config)


def test_a_bfloat16_checkpoint_runs_in_float32(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "bf16", "tiny", None, CheckpointDtype.BFLOAT16)
    stored, graph = adapted(tmp_path / "bf16", quantization_encoding="float32")
    assert {data.dtype for data in graph.values()} == {DType.float32}
    bits = Buffer.from_dlpack(stored.model.norm.weight.data().data).view(DType.uint16).to_numpy()
    np.testing.assert_array_equal(
        np.from_dlpack(graph["norm.weight"].data).view(np.uint32), bits.astype(np.uint32) << 16
    )


def test_weights_of_the_right_type_are_not_copied(tiny: Path) -> None:
    stored, graph = adapted(tiny)
    assert graph
    for name, data in graph.items():
        source = name if name == "lm_head.weight" else f"model.{name}"
        assert data.data is dict(stored.items())[source].data().data


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Step3p5Tokenizer:
    """The tokenizer as MAX makes it for a server or `max generate`, without the model."""
    made = PIPELINE_REGISTRY.retrieve_factory(pipeline_config(tiny)).tokenizer
    assert isinstance(made, Step3p5Tokenizer)
    return made


def context(
    tokenizer: Step3p5Tokenizer, prompt: str | list[int] | None, messages: list[str] | None = None
) -> TextContext:
    request = TextGenerationRequest(
        request_id=RequestID(),
        model_name="model",
        prompt=prompt,
        messages=[TextGenerationRequestMessage(role="user", content=text) for text in messages or []],
        sampling_params=SamplingParams(max_new_tokens=4),
    )
    return asyncio.run(tokenizer.new_context(request))


@pytest.mark.parametrize(("prompt", "messages"), [("", []), ([], []), (None, []), (None, [""]), (None, ["", ""])])
def test_empty_prompt(tokenizer: Step3p5Tokenizer, prompt: str | list[int] | None, messages: list[str]) -> None:
    with pytest.raises(InputError) as error:
        context(tokenizer, prompt, messages)
    assert str(error.value) == "prompt: found nothing, expected at least one character or token. Give a prompt."


@pytest.mark.parametrize("token", [-1, 512, 1 << 63, 1 << 70])
@pytest.mark.parametrize("index", [0, 2])
def test_token_out_of_range(tokenizer: Step3p5Tokenizer, token: int, index: int) -> None:
    prompt = [FIRST_TEXT_TOKEN] * 3
    prompt[index] = token
    with pytest.raises(InputError) as error:
        context(tokenizer, prompt)
    assert str(error.value) == (
        f"prompt[{index}]: found token {token}, expected 0 to 511 (vocab_size in config.json). Encode the prompt with "
        "this model's tokenizer."
    )


def test_prompt_longer_than_max_length(tokenizer: Step3p5Tokenizer) -> None:
    message = (
        "Prompt is too long: {} tokens exceeds the configured maximum context length of 512 tokens. "
        "Please shorten your prompt."
    )
    with pytest.raises(PromptTooLongError) as error:
        context(tokenizer, [FIRST_TEXT_TOKEN] * 513)
    assert str(error.value) == message.format(513)
    with pytest.raises(PromptTooLongError):
        context(tokenizer, "word " * 600)
    with pytest.raises(PromptTooLongError):
        context(tokenizer, None, ["word " * 600])


def test_good_prompts_pass(tokenizer: Step3p5Tokenizer) -> None:
    assert context(tokenizer, [0, 511]).tokens.all.tolist() == [0, 511]
    assert context(tokenizer, [FIRST_TEXT_TOKEN] * 512).tokens.prompt_length == 512
    assert context(tokenizer, " ").tokens.prompt_length > 0
    assert context(tokenizer, None, ["", "hi"]).tokens.prompt_length > 0


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "array must be non-empty: got length 0"),
        (
            [FIRST_TEXT_TOKEN] * 1024,
            "Row 0 needs at least 1025 tokens (1024 prompt + 1 new), but the pipeline's planned max length is 1024. "
            "Raise max_length.",
        ),
        (
            [FIRST_TEXT_TOKEN, 512],
            "prompt[1]: found token 512, expected 0 to 511 (vocab_size in config.json). Encode the prompt with this "
            "model's tokenizer.",
        ),
        (
            [-1],
            "prompt[0]: found token -1, expected 0 to 511 (vocab_size in config.json). Encode the prompt with this "
            "model's tokenizer.",
        ),
    ],
)
def test_prompts_of_the_python_interface(tiny_model: Runner, prompt: list[int], message: str) -> None:
    """`AutoModel.generate` takes token ids and no tokenizer; the first two messages are MAX's."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tiny_model.model.generate([prompt], max_new_tokens=2)
