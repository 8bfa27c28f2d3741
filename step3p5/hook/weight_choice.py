"""Checks weights that MAX cannot place: the type that the flag asks for, and the files in the checkpoint."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from step3p5.checkpoint_files import check_tensors, decoder_tensors, read_headers
from step3p5.config_fields import fail
from step3p5.pretrained_config import as_step3p5_config


def check_weight_choice(model_config: Any, encodings: Collection[str]) -> None:
    """Refuses the weights of `model_config`, MAX's handle of a checkpoint and its flags, if they are at fault.

    Args:
        model_config: What to run.
        encodings: The types that this package runs.

    Raises:
        ConfigError: `--quantization-encoding` asks for another type.
        CheckpointError: A local checkpoint has not the tensors that its `config.json` says, or not in such a type.
    """
    encoding = model_config.quantization_encoding
    if encoding is not None and encoding not in encodings:
        fail(
            "--quantization-encoding",
            repr(encoding),
            " or ".join(map(repr, sorted(encodings))),
            "Change the flag, or leave it out to run the checkpoint as it is.",
        )
    repo = model_config.huggingface_weight_repo
    if repo.repo_type == "local" and not model_config.weight_path:
        headers = read_headers(sorted(Path(repo.local_path).glob("*.safetensors")))
        model = as_step3p5_config(model_config.huggingface_config).model_config
        check_tensors(decoder_tensors(headers, model), model)
