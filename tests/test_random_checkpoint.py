"""Random checkpoints: complete, readable by the usual libraries, reproducible, and written all or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import route
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedConfig

from step3p5.byte_account import experts_hit
from step3p5.checkpoint_tensors import CheckpointDtype, TensorRole, TensorSpec, checkpoint_tensors, mtp_tensors
from step3p5.config_parser import parse_model_config
from step3p5.layer_config import AttentionKind, MoEConfig
from step3p5.pretrained_config import Step3p5PretrainedConfig
from step3p5.random_checkpoint import RandomCheckpointError, write_random_checkpoint, writer
from step3p5.random_checkpoint.__main__ import main
from step3p5.random_checkpoint.hub_config import hub_config
from step3p5.random_checkpoint.presets import PRESETS
from step3p5.random_checkpoint.random_values import bfloat16_bits
from step3p5.random_checkpoint.scales import distribution
from step3p5.random_checkpoint.tokenizer import tokenizer_files

SEED = 11


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("random") / "tiny"
    write_random_checkpoint(out, "tiny", seed=SEED)
    return out


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    assert Step3p5PretrainedConfig.model_type == "step3p5"  # importing it is what lets transformers read the folder
    return AutoTokenizer.from_pretrained(tiny, trust_remote_code=False)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stored_tensors(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of every tensor by name, found through the index."""
    stored = {}
    weight_map: dict[str, str] = read_json(folder / "model.safetensors.index.json")["weight_map"]
    for file_name in sorted(set(weight_map.values())):
        with safe_open(folder / file_name, framework="np") as file:
            names = file.keys()
            for name in names:
                assert weight_map[name] == file_name
                tensor = file.get_slice(name)
                stored[name] = (tensor.get_dtype(), tensor.get_shape())
    assert stored.keys() == weight_map.keys()
    return stored


def raw_bits(folder: Path, name: str) -> np.ndarray:
    file_name = read_json(folder / "model.safetensors.index.json")["weight_map"][name]
    data = (folder / file_name).read_bytes()
    header_end = 8 + int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:header_end])[name]
    begin, end = entry["data_offsets"]
    return np.frombuffer(
        data[header_end + begin : header_end + end], np.uint32 if entry["dtype"] == "F32" else np.uint16
    )


@pytest.mark.parametrize("dtype", CheckpointDtype)
def test_every_tensor_is_stored_with_its_shape_and_dtype(tmp_path: Path, dtype: CheckpointDtype) -> None:
    write_random_checkpoint(tmp_path / "out", "tiny", dtype=dtype)
    config = read_json(tmp_path / "out/config.json")
    model = parse_model_config(config)
    codes = {CheckpointDtype.FLOAT32: "F32", CheckpointDtype.BFLOAT16: "BF16"}
    expected = checkpoint_tensors(model) | mtp_tensors(model)
    assert stored_tensors(tmp_path / "out") == {
        name: (codes[spec.dtype(dtype)], list(spec.shape)) for name, spec in expected.items()
    }
    assert config["torch_dtype"] == dtype.value


def test_tiny_is_sharded_and_the_index_counts_its_bytes(tiny: Path) -> None:
    shards = sorted(tiny.glob("*.safetensors"))
    assert len(shards) >= 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    total = read_json(tiny / "model.safetensors.index.json")["metadata"]["total_size"]
    header_bytes = sum(8 + int.from_bytes(shard.read_bytes()[:8], "little") for shard in shards)
    assert total == sum(shard.stat().st_size for shard in shards) - header_bytes


def test_every_element_was_written(tiny: Path) -> None:
    for name in stored_tensors(tiny):
        assert np.count_nonzero(raw_bits(tiny, name)) == raw_bits(tiny, name).size, name


def test_tensors_are_normal_with_the_scale_of_their_role(tiny: Path) -> None:
    experts = raw_bits(tiny, "model.layers.3.moe.up_proj.weight").view(np.float32)
    qk_norm = np.concatenate(
        [raw_bits(tiny, f"model.layers.{i}.self_attn.{x}_norm.weight").view(np.float32) for i in range(9) for x in "qk"]
    )
    assert experts.std() == pytest.approx(3 / 16, rel=0.01)
    assert abs(experts.mean()) < 0.001
    assert np.abs(experts).max() > 4 * experts.std()
    assert qk_norm.mean() == pytest.approx(0.4, abs=0.03)


@pytest.mark.parametrize("num_tokens", [32, 64, 256])
def test_experts_are_hit_as_evenly_as_bytes_are_counted(rng: np.random.Generator, num_tokens: int) -> None:
    """At the released sizes, where hidden states are normal and nothing they share draws them to the same experts."""
    model = parse_model_config(hub_config(PRESETS["flash"], 4, CheckpointDtype.FLOAT32))
    moe = model.layers[3].mlp
    assert isinstance(moe, MoEConfig)
    shapes = {TensorRole.ROUTER: (moe.num_experts, model.hidden_size), TensorRole.ROUTER_BIAS: (moe.num_experts,)}
    weights = {role: distribution(TensorSpec(shape, role)) for role, shape in shapes.items()}
    router, bias = (rng.normal(weights[role].mean, weights[role].std, shape) for role, shape in shapes.items())
    experts, _ = route(rng.standard_normal((num_tokens, model.hidden_size)) @ router.T, bias, moe.top_k, True, 1.0)
    assert len(np.unique(experts)) > 0.9 * experts_hit(moe, num_tokens)


def test_bfloat16_checkpoint_is_the_float32_one_rounded(tiny: Path, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "out", "tiny", dtype=CheckpointDtype.BFLOAT16, seed=SEED)
    for name in ("model.embed_tokens.weight", "model.layers.2.moe.down_proj.weight", "model.layers.8.enorm.weight"):
        full = raw_bits(tiny, name)
        # Nearest: what rounding moved is at most half of the sixteen bits that it dropped.
        moved = (raw_bits(tmp_path / "out", name).astype(np.int64) << 16) - full
        assert np.abs(moved).max() <= 0x8000
        assert moved.min() < 0 < moved.max()


def test_bfloat16_rounding_breaks_ties_to_even() -> None:
    values = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF807FFF, 0x3FFFFFFF], np.uint32).view(np.float32)
    assert bfloat16_bits(values).tolist() == [0x3F80, 0x3F82, 0x3F81, 0xBF80, 0x4000]


def test_same_seed_gives_the_same_bytes(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    write_random_checkpoint(tmp_path / "again", "tiny", seed=SEED)
    assert files_of(tmp_path / "again") == files_of(tiny)


def test_other_seed_changes_every_tensor_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "other", "tiny", seed=SEED + 1)
    for name in stored_tensors(tiny):
        assert (raw_bits(tmp_path / "other", name) != raw_bits(tiny, name)).any(), name
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        assert (tmp_path / "other" / name).read_bytes() == (tiny / name).read_bytes()


def test_tensors_and_slabs_of_a_tensor_differ(tiny: Path) -> None:
    gate, up = (raw_bits(tiny, f"model.layers.2.moe.{name}_proj.weight") for name in ("gate", "up"))
    halves = gate.reshape(2, -1)
    assert np.mean(gate == up) < 0.01
    assert np.mean(halves[0] == halves[1]) < 0.01


def test_tiny_has_every_kind_of_layer(tiny: Path) -> None:
    model = parse_model_config(read_json(tiny / "config.json"))
    kinds = {(layer.attention.kind, isinstance(layer.mlp, MoEConfig)) for layer in model.layers}
    assert kinds == {(kind, moe) for kind in AttentionKind for moe in (False, True)}
    full, sliding = model.layers[0].attention, model.layers[1].attention
    assert full.num_attention_heads != sliding.num_attention_heads
    assert full.rope is not None
    assert sliding.rope is not None
    assert (full.rope.rotary_dim, sliding.rope.rotary_dim) == (full.head_dim // 2, sliding.head_dim)
    assert full.rope.scaling is not None
    assert sliding.rope.scaling is None
    assert (full.sliding_window, sliding.sliding_window) == (None, 128)
    experts = [layer.mlp for layer in model.layers if isinstance(layer.mlp, MoEConfig)]
    clamps = {(moe.swiglu_limit is not None, moe.shared_expert.swiglu_limit is not None) for moe in experts}
    assert clamps == {(False, False), (True, False), (True, True)}
    dense = [layer.mlp for layer in model.layers if not isinstance(layer.mlp, MoEConfig)]
    assert {mlp.swiglu_limit is not None for mlp in dense} == {False, True}


@pytest.mark.parametrize(("preset", "parameters"), [("mid", 660e6), ("flash", 196.9e9)])
def test_preset_has_the_stated_number_of_decoder_parameters(preset: str, parameters: float) -> None:
    config = hub_config(PRESETS[preset], PRESETS[preset].num_hidden_layers, CheckpointDtype.BFLOAT16)
    tensors = checkpoint_tensors(parse_model_config(config))
    assert sum(spec.num_elements for spec in tensors.values()) == pytest.approx(parameters, rel=0.001)


def test_flash_configuration_is_the_released_one() -> None:
    config = hub_config(PRESETS["flash"], 45, CheckpointDtype.BFLOAT16)
    expected = {
        "model_type": "step3p5",
        "hidden_size": 4096,
        "intermediate_size": 11264,
        "num_attention_heads": 64,
        "num_attention_groups": 8,
        "sliding_window": 512,
        "moe_layers_enum": ",".join(str(i) for i in range(3, 45)),
        "moe_num_experts": 288,
        "moe_top_k": 8,
        "moe_intermediate_size": 1280,
        "share_expert_dim": 1280,
        "max_position_embeddings": 262144,
        "vocab_size": 128896,
        "bos_token_id": 0,
        "eos_token_id": [1, 2, 128007],
        "swiglu_limits": [0.0] * 43 + [7.0, 7.0] + [0.0] * 3,
        "layer_types": ["full_attention" if i % 4 == 0 else "sliding_attention" for i in range(48)],
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 2.0,
            "original_max_position_embeddings": 131072,
            "low_freq_factor": 1.0,
            "high_freq_factor": 32.0,
        },
    }
    assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_layers_keeps_the_first_layers_and_the_mtp_tail(tmp_path: Path, layers: int) -> None:
    write_random_checkpoint(tmp_path / "out", "tiny", num_layers=layers)
    config = read_json(tmp_path / "out/config.json")
    model = parse_model_config(config)
    complete = parse_model_config(hub_config(PRESETS["tiny"], 6, CheckpointDtype.FLOAT32))
    assert model.layers == complete.layers[:layers]
    assert [layer.index for layer in model.mtp_layers] == [layers, layers + 1, layers + 2]
    for name in ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared"):
        assert len(config[name]) == layers + 3
    assert stored_tensors(tmp_path / "out").keys() == (checkpoint_tensors(model) | mtp_tensors(model)).keys()


@pytest.mark.parametrize("layers", [0, -1, 7])
def test_layers_out_of_range_is_refused(tmp_path: Path, layers: int) -> None:
    with pytest.raises(RandomCheckpointError, match=rf"--layers is {layers}, but preset tiny has 6 layers"):
        write_random_checkpoint(tmp_path / "out", "tiny", num_layers=layers)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "Plain words, and  double  spaces.",
        "größe 日本語 🙂 \u202e\x00 é é",
        "\n\t\r\n",
        "<think>a</think><tool_call><tool",
        "",
    ],
)
def test_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_any_unicode_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    "token",
    ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>", "<|begin_of_sentence|>"],
)
def test_control_token_is_one_token_anywhere(tokenizer: Any, token: str) -> None:
    ids = tokenizer(f"a{token}b").input_ids
    assert len(ids) == 3
    assert ids[1] == tokenizer.convert_tokens_to_ids(token)


def test_parsers_see_thinking_and_tool_tokens_in_decoded_text(tokenizer: Any) -> None:
    ids = tokenizer("<|im_start|><think>x</think><tool_call></tool_call><|im_end|>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>x</think><tool_call></tool_call>"


@pytest.mark.parametrize("preset", PRESETS)
def test_token_ids_of_the_configuration_are_the_tokenizers(preset: str, tmp_path: Path) -> None:
    shape = PRESETS[preset]
    for name, text in tokenizer_files(shape.first_role_token_id, shape.max_position_embeddings).items():
        (tmp_path / name).write_text(text)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, config=PreTrainedConfig())
    config: dict[str, Any] = hub_config(shape, 1, CheckpointDtype.FLOAT32)
    assert config["bos_token_id"] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id in config["eos_token_id"]
    assert config["pad_token_id"] == tokenizer.pad_token_id
    assert len(tokenizer) <= config["vocab_size"]
    assert max(config["eos_token_id"]) < len(tokenizer)
    assert all(tokenizer.convert_ids_to_tokens(id_) is not None for id_ in range(0, len(tokenizer), 97))


def test_generation_config_repeats_the_token_ids(tiny: Path) -> None:
    config, generation = read_json(tiny / "config.json"), read_json(tiny / "generation_config.json")
    assert generation == {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def test_folder_in_use_is_refused_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        main([str(out), "--preset", "tiny"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        f"python -m step3p5.random_checkpoint: error: {out} is a folder with files in it: name a new or empty one\n"
    )
    assert files_of(out) == {"notes.txt": b"mine"}
    assert list(tmp_path.iterdir()) == [out]


def test_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(RandomCheckpointError, match="is a file: name a new or empty folder"):
        write_random_checkpoint(tmp_path / "out", "tiny")
    assert files_of(tmp_path) == {"out": b"mine"}


def test_leftover_of_a_killed_run_is_named_and_kept(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/model").write_text("half")
    with pytest.raises(RandomCheckpointError, match=r"out\.partial exists"):
        write_random_checkpoint(tmp_path / "out", "tiny")
    assert files_of(tmp_path / "out.partial") == {"model": b"half"}


def test_full_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**7))
    with pytest.raises(RandomCheckpointError, match=r"takes 0\.05 GB, but .* has 0\.01 GB free"):
        write_random_checkpoint(tmp_path / "new" / "out", "tiny")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_failed_run_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException] | BaseException
) -> None:
    written = []

    def fail_at_the_third(descriptor: int, data: memoryview, offset: int) -> int:
        written.append(offset)
        if len(written) >= 3:
            raise failure
        return len(data)

    monkeypatch.setattr(writer, "_write_at", fail_at_the_third)
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "out"), "--preset", "tiny"])
    assert stopped.value.code == (130 if failure is KeyboardInterrupt else 1)
    assert list(tmp_path.iterdir()) == []


def test_empty_folder_is_used(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, "tiny", num_layers=1)
    assert (tmp_path / "config.json").exists()


def test_command_line_writes_the_checkpoint_it_was_asked_for(tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "step3p5.random_checkpoint", "out", "--preset", "tiny", "--seed", str(SEED)]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "out: 146 tensors, 12.4 M parameters, 0.05 GB in 4 safetensors files\n"
    assert files_of(tmp_path / "out") == files_of(tiny)


def test_unknown_preset_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "out"), "--preset", "huge"])
    assert stopped.value.code == 2
    assert "choose from" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
