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
        ConfigError: The file is missing or no JSON object, lacks `model_type` or `architectures`, is another model's
            though the checkpoint was asked for as `step3p5`, or is no valid configuration.
    """
    path = _config_path(repo)
    if path is None:
        return
    config = _json_object(path)
    if isinstance(config, str):
        if asked_for:
            fail(str(path), config, "a JSON object", "Download the file, or check --model.")
        return
    model_type, architectures = config.get("model_type"), config.get("architectures")
    names_it = isinstance(architectures, str | list) and ARCHITECTURE in architectures
    if not isinstance(model_type, str) and (asked_for or names_it):
        fail("model_type", _found("model_type", config), repr(MODEL_TYPE), "Add it to config.json.")
    if model_type == MODEL_TYPE or names_it:
        if architectures is None or architectures == []:
            fail("architectures", _found("architectures", config), f"[{ARCHITECTURE!r}]", "Add it to config.json.")
        read_field("architectures", list_of(_string), architectures)
        parse_model_config(config)
    elif repo.repo_id in SHORT_NAMED:
        fail(f"model_type of {repo.repo_id}", shown(model_type), repr(MODEL_TYPE), "Correct STEP3P5_MODEL.")


def _json_object(path: Path) -> dict[str, Any] | str:
    """The content of the file, or what it is instead."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        return str(error.strerror).lower()
    except ValueError as error:
        return f"no JSON ({error})"
    return content if isinstance(content, dict) else shown(content)


def _found(name: str, config: dict[str, Any]) -> str:
    return shown(config[name]) if name in config else "no such field"


def _config_path(repo: Any) -> Path | None:
    """Where the file lies on this machine; nowhere if a hub's has not been fetched by the reading that failed."""
    name = "config.json" if repo.subfolder is None else f"{repo.subfolder}/config.json"
    if repo.repo_type == "local":
        return Path(repo.local_path, name)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repo.repo_id, name, revision=repo.revision)
    return Path(cached) if isinstance(cached, str) else None


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise MismatchError("a string")
    return value
