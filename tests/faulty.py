"""Checkpoints with a fault in `config.json`, and the parts that the messages about them share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG_ERROR = "step3p5.config_fields.ConfigError: "
CORRECT = "Correct the field in config.json."
ADD = "Add the field to config.json."
PER_LAYER = (
    "expected 9, one for each of num_hidden_layers + num_nextn_predict_layers. Complete the list (or lower "
    "num_nextn_predict_layers, if the checkpoint has no MTP layers)."
)


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def change_config(folder: Path, **changes: Any) -> None:
    """Replaces fields of `config.json`; `...` removes one."""
    config = json.loads((folder / "config.json").read_bytes()) | changes
    config = {name: value for name, value in config.items() if value is not ...}
    replace(folder / "config.json", json.dumps(config).encode())
