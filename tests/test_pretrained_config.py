"""`Step3p5PretrainedConfig`: loading through transformers, the view that MAX's code reads, and the round trip."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flash_config import LLAMA3, flash_config, transformers_config
from max.pipelines.lib.pipeline_variants.utils import get_rope_theta
from transformers import AutoConfig

from step3p5.config_parser import ConfigError, parse_model_config
from step3p5.pretrained_config import Step3p5PretrainedConfig


def write(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path, config: dict[str, Any], **kwargs: Any) -> Step3p5PretrainedConfig:
    loaded = AutoConfig.from_pretrained(write(folder, config), **kwargs)
    assert isinstance(loaded, Step3p5PretrainedConfig)
    return loaded


@pytest.mark.parametrize("trust_remote_code", [True, False, None])
def test_remote_code_is_never_looked_for(tmp_path: Path, trust_remote_code: bool | None) -> None:
    """The folder holds no `configuration_step3p5.py`, at which `auto_map` points."""
    loaded = load(tmp_path, flash_config(), trust_remote_code=trust_remote_code)
    assert loaded.model_config == parse_model_config(flash_config())


def test_the_view_of_what_is_uniform(tmp_path: Path) -> None:
    loaded = load(tmp_path, flash_config())
    expected = {
        "architectures": ["Step3p5ForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": [1, 2, 128007],
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11264,
        "max_position_embeddings": 262144,
        "moe_num_experts": 288,
        "num_attention_groups": 8,
        "num_attention_heads": 64,
        "num_hidden_layers": 45,
        "num_key_value_heads": 8,
        "num_nextn_predict_layers": 3,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {"rope_theta": 5e6, **LLAMA3},
        "rope_theta": 5e6,
        "tie_word_embeddings": False,
        "vocab_size": 128896,
    }
    assert {name: getattr(loaded, name) for name in expected} == expected
    assert loaded.layer_types == flash_config()["layer_types"][:45]
    assert str(loaded.dtype).removeprefix("torch.") == "bfloat16"
    assert "tie_word_embeddings" in loaded
    assert get_rope_theta(loaded) == 5e6
    loaded.validate()


def test_the_view_without_full_layers_or_rope(tmp_path: Path) -> None:
    sliding = load(tmp_path, flash_config(layer_types=["sliding_attention"] * 48, rope_theta=7.0))
    assert (sliding.num_attention_heads, sliding.rope_theta) == (96, 7.0)
    assert sliding.rope_scaling == {"rope_theta": 7.0, "rope_type": "default"}
    assert load(tmp_path, flash_config(use_rope_layers=[False] * 48)).rope_theta is None


@pytest.mark.parametrize("config", [flash_config(), transformers_config()], ids=["hub", "transformers"])
def test_source_is_what_the_file_says(tmp_path: Path, config: dict[str, Any]) -> None:
    loaded = load(tmp_path, config)
    assert dict(loaded.source) == config
    with pytest.raises(TypeError):
        loaded.source["hidden_size"] = 1  # type: ignore[index]


@pytest.mark.parametrize("config", [flash_config(), transformers_config()], ids=["hub", "transformers"])
def test_round_trip(tmp_path: Path, config: dict[str, Any]) -> None:
    loaded = load(tmp_path / "first", config)
    loaded.pad_token_id = 5
    loaded.save_pretrained(tmp_path / "second")
    saved = json.loads((tmp_path / "second" / "config.json").read_text())
    assert {name: saved[name] for name in config} == config
    assert saved.keys() - config.keys() == {"dtype", "pad_token_id", "transformers_version"}
    again = AutoConfig.from_pretrained(tmp_path / "second")
    assert again.model_config == loaded.model_config
    assert again.pad_token_id == 5


def test_round_trip_of_a_changed_dtype(tmp_path: Path) -> None:
    load(tmp_path / "first", flash_config(), dtype="float32").save_pretrained(tmp_path / "second")
    saved = json.loads((tmp_path / "second" / "config.json").read_text())
    assert (saved["dtype"], saved["torch_dtype"]) == ("float32", "float32")


def test_text_config_of_a_multimodal_model(tmp_path: Path) -> None:
    config = {"model_type": "step3p5", "text_config": flash_config(), "vision_config": {"hidden_size": 1536}}
    loaded = load(tmp_path / "first", config)
    assert loaded.model_config == parse_model_config(flash_config())
    assert (loaded.hidden_size, loaded.eos_token_id) == (4096, [1, 2, 128007])
    loaded.save_pretrained(tmp_path / "second")
    assert AutoConfig.from_pretrained(tmp_path / "second").model_config == loaded.model_config
    assert load(tmp_path / "third", config, sliding_window=256).model_config.layers[1].attention.sliding_window == 256


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies_are_whole(tmp_path: Path, clone: Any) -> None:
    loaded = load(tmp_path, flash_config())
    cloned = clone(loaded)
    assert cloned == loaded
    assert cloned.model_config == loaded.model_config
    assert cloned.to_dict() == loaded.to_dict()


def test_overrides_take_part_in_the_parse(tmp_path: Path) -> None:
    loaded = load(tmp_path, flash_config(), sliding_window=256, rope_theta=3.0, num_nextn_predict_layers=0)
    assert loaded.model_config == parse_model_config(
        flash_config(sliding_window=256, rope_theta=3.0, num_nextn_predict_layers=0)
    )
    assert (loaded.sliding_window, loaded.rope_theta) == (256, 3.0)
    with pytest.raises(ConfigError, match=r"^moe_layers_enum: found layer 3, expected layers 0 to 1,"):
        load(tmp_path, flash_config(), num_hidden_layers=2)


def test_unused_arguments_are_handed_back(tmp_path: Path) -> None:
    path = write(tmp_path, flash_config())
    config, unused = AutoConfig.from_pretrained(path, return_unused_kwargs=True, sliding_window=256, other=1)
    assert config.sliding_window == 256
    assert unused == {"other": 1}


def test_shape_attributes_are_read_only(tmp_path: Path) -> None:
    loaded = load(tmp_path, flash_config())
    for name in ("num_hidden_layers", "num_key_value_heads", "moe_top_k", "swiglu_limits"):
        with pytest.raises(ConfigError, match=rf"^{name}: cannot be set to 2 .*from_pretrained\(path, {name}=2\)"):
            setattr(loaded, name, 2)
    loaded.rope_scaling = None
    loaded.eos_token_id = 7
    assert loaded.model_config == parse_model_config(flash_config())
    assert loaded.to_dict()["rope_scaling"] == LLAMA3
    assert loaded.to_dict()["eos_token_id"] == 7


def test_the_caller_s_lists_are_not_shared() -> None:
    config = flash_config()
    loaded = Step3p5PretrainedConfig(**config)
    config["swiglu_limits"][44] = 1.0
    loaded.to_dict()["layer_types"].clear()
    assert dict(loaded.source) == flash_config()


def test_an_error_in_the_file_is_the_last_line(tmp_path: Path) -> None:
    write(tmp_path, flash_config(moe_top_k=17))
    with pytest.raises(ConfigError, match=r"^moe_top_k: found 17 ") as caught:
        AutoConfig.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


IMPORTED_BEFORE_MAX = """
import step3p5.pretrained_config as ours
import max.pipelines
from max.pipelines.architectures import register_all_models
register_all_models()
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert CONFIG_MAPPING["step3p5"] is ours.Step3p5PretrainedConfig, CONFIG_MAPPING["step3p5"]
"""


def test_max_does_not_replace_the_class_when_it_comes_later() -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", IMPORTED_BEFORE_MAX]
    # MAX sets PYTHONEXECUTABLE behind `os.environ`, which a child given no `env` would inherit and start elsewhere by.
    done = subprocess.run(command, cwd=root, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_earlier_registration_is_replaced() -> None:
    from max.pipelines.architectures import hf_config_shims
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from step3p5.pretrained_config import register_pretrained_config

    AutoConfig.register("step3p5", hf_config_shims.Step3p5PretrainedConfig, exist_ok=True)
    try:
        assert CONFIG_MAPPING["step3p5"] is not Step3p5PretrainedConfig
    finally:
        register_pretrained_config()
    assert CONFIG_MAPPING["step3p5"] is Step3p5PretrainedConfig
