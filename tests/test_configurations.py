"""The whole model on drawn configurations: every field that the decoder reads, against the float64 reference."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from conftest import SEED
from harness import FIRST_TEXT_TOKEN, NEAR_TIE, Runner, assert_close
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from reference import Reference
from safetensors.numpy import save_file

from step3p5.checkpoint_tensors import checkpoint_tensors
from step3p5.config_parser import parse_model_config
from step3p5.layer_config import ModelConfig
from step3p5.random_checkpoint.tokenizer import tokenizer_files

EXAMPLES = int(os.environ.get("STEP3P5_TEST_CONFIGURATIONS", "2"))
"""Each is a compilation."""

HEAD_DIM = 32
VOCAB_SIZE = 320
FIRST_ROLE_TOKEN = 300


@st.composite
def hub_configs(draw: st.DrawFn) -> dict[str, Any]:
    """A `config.json` of three decoder layers and up to two MTP layers whose tensors are absent."""
    layers, mtp = 3, draw(st.integers(0, 2))
    experts = draw(st.sampled_from([5, 24, 40]))

    def per_layer(values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
        return st.lists(values, min_size=layers + mtp, max_size=layers + mtp + 2)

    config: dict[str, Any] = {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "auto_map": {"AutoConfig": "configuration_step3p5.Step3p5Config"},
        "torch_dtype": "float32",
        "hidden_size": draw(st.sampled_from([72, 96])),
        "intermediate_size": draw(st.sampled_from([56, 130])),
        "vocab_size": VOCAB_SIZE,
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": mtp,
        "max_position_embeddings": 2048,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        "num_attention_heads": draw(st.sampled_from([2, 4])),
        "num_attention_groups": draw(st.sampled_from([1, 2])),
        "head_dim": HEAD_DIM,
        "sliding_window": draw(st.sampled_from([128, 160])),
        "layer_types": draw(per_layer(st.sampled_from(["full_attention", "sliding_attention"]))),
        "rope_theta": draw(st.one_of(st.just(10000.0), per_layer(st.sampled_from([1e4, 5e6])))),
        "partial_rotary_factors": draw(per_layer(st.sampled_from([0.25, 0.5, 1.0]))),
        "use_head_wise_attn_gate": draw(st.booleans()),
        "use_qk_norm": draw(st.booleans()),
        "zero_centered": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "moe_num_experts": experts,
        "moe_top_k": draw(st.integers(1, min(experts, 16))),
        "moe_intermediate_size": draw(st.sampled_from([24, 37])),
        "share_expert_dim": draw(st.sampled_from([24, 40])),
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "norm_expert_weight": draw(st.booleans()),
        "use_moe_router_bias": draw(st.booleans()),
        "need_fp32_gate": draw(st.booleans()),
        "swiglu_limits": draw(per_layer(st.sampled_from([None, 0, 0.3]))),
        "swiglu_limits_shared": draw(per_layer(st.sampled_from([None, 0.0, 0.2]))),
        "bos_token_id": 0,
        "eos_token_id": [1, 2],
    }
    if draw(st.booleans()):
        config["attention_other_setting"] = {
            "attention_type": "sliding_attention",
            "num_attention_heads": 6,
            "num_attention_groups": draw(st.sampled_from([1, 2, 3])),
            "head_dim": HEAD_DIM,
        }
    if draw(st.booleans()):
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 8.0,
            "original_max_position_embeddings": 64,
        }
        config["yarn_only_types"] = draw(st.sampled_from([["full_attention"], ["sliding_attention"]]))
    if draw(st.booleans()):
        config["use_rope_layers"] = draw(per_layer(st.sampled_from([0, 1])))
    moe_layers = draw(st.sampled_from([None, "1,2", [0, 2], "2"]))
    if moe_layers is not None:
        config["moe_layers_enum"] = moe_layers
    return config


def random_tensors(model: ModelConfig, rng: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    """Float32 tensors of the decoder at scales that keep every part of it at work; none for MTP."""
    tensors = {}
    for name, spec in checkpoint_tensors(model).items():
        if name.endswith("norm.weight"):
            values = rng.normal(0.0 if model.zero_centered_norm else 1.0, 0.2, spec.shape)
        elif name.endswith("router_bias"):
            values = rng.normal(0.0, 0.2, spec.shape)
        elif name == "model.embed_tokens.weight":
            values = rng.normal(0.0, 1.0, spec.shape)
        else:
            values = rng.normal(0.0, 1.5 * spec.shape[-1] ** -0.5, spec.shape)
        tensors[name] = values.astype(np.float32)
    return tensors


def write_checkpoint(folder: Path, config: dict[str, Any], rng: np.random.Generator) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_tensors(parse_model_config(config), rng), folder / "model.safetensors")
    for name, text in tokenizer_files(FIRST_ROLE_TOKEN, 2048).items():
        (folder / name).write_text(text)


@seed(SEED)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(config=hub_configs(), numbers=st.integers(0, 2**32 - 1))
def test_logits_on_a_drawn_configuration(config: dict[str, Any], numbers: int) -> None:
    rng = np.random.default_rng(numbers)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder, config, rng)
        reference = Reference.from_checkpoint(folder)
        runner = Runner(folder)
        compared = 0
        for length in (1, 40, 200):
            prompt = rng.integers(FIRST_TEXT_TOKEN, FIRST_ROLE_TOKEN, size=length).tolist()
            (tokens,), (logits,) = runner.run([prompt], steps=3)
            reference.router_margin = np.inf
            want = reference.logits(prompt + tokens[:-1])[len(prompt) - 1 :]
            if reference.router_margin > NEAR_TIE:
                assert_close(logits, want)
                compared += 1
        assert compared > 0, "every prompt met a near tie in the router"
