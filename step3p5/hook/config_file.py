"""Checks a `config.json` as it lies in the checkpoint, for the faults that keep transformers from reading it at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from step3p5.config_fields import MismatchError, fail, list_of, read_field, shown
from step3p5.config_parser import parse_model_config
from step3p5.hook.short_name import SHORT_NAMED

ARCHITECTURE = "Step3p5ForCausalLM"
MODEL_TYPE = "step3p5"


def check_config_file(repo: Any, asked_for: bool) -> None:
    """Refuses the `config.json` of `repo`, MAX's handle of a checkpoint, if it is a faulty one of Step-3.5.

    Args:
        repo: Where the checkpoint lies.
        asked_for: Whether this package was asked for, so that a file that says nothing of its model is taken as its.

    Raises:
        ConfigError: The file is no JSON object, lacks `model_type`, is another model's though the checkpoint was asked
            for as `step3p5`, or is no valid configuration.
    """
    path = _config_path(repo)
    if path is None:
        return
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        if asked_for:
            _refuse_content(path, f"no JSON ({error})")
        return
    if not isinstance(config, dict):
        if asked_for:
            _refuse_content(path, f"a {type(config).__name__}")
        return
    model_type, architectures = config.get("model_type"), config.get("architectures")
    if model_type is None and (asked_for or _names(architectures)):
        found = "null" if "model_type" in config else "no such field"
        fail("model_type", found, repr(MODEL_TYPE), "Add the field to config.json.")
    if model_type == MODEL_TYPE or _names(architectures):
        if architectures is not None:
            read_field("architectures", list_of(_string), architectures)
        parse_model_config(config)
    elif repo.repo_id in SHORT_NAMED:
        fail(f"model_type of {repo.repo_id}", shown(model_type), repr(MODEL_TYPE), "Correct STEP3P5_MODEL.")


def _config_path(repo: Any) -> Path | None:
    """Where the file lies on this machine; a hub's checkpoint has been fetched by the reading that failed."""
    name = "config.json" if repo.subfolder is None else f"{repo.subfolder}/config.json"
    if repo.repo_type == "local":
        path = Path(repo.local_path, name)
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repo.repo_id, name, revision=repo.revision)
    return Path(cached) if isinstance(cached, str) else None


def _names(architectures: object) -> bool:
    """Whether `architectures` names this package's, be it a list, as it should, or a string."""
    return isinstance(architectures, str | list) and ARCHITECTURE in architectures


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise MismatchError("a string")
    return value


def _refuse_content(path: Path, found: str) -> None:
    fail(str(path), found, "a JSON object", "Download the file again, or check --model.")
