"""The model name `step3p5`: which checkpoint it stands for."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

SHORT_NAME = "step3p5"
VARIABLE = "STEP3P5_MODEL"
PUBLISHED = "stepfun-ai/Step-3.5-Flash"

SHORT_NAMED: set[str] = set()
"""The checkpoints that this process asked for by the short name."""

logger = logging.getLogger("max.pipelines")


def resolve(model_path: object) -> str | None:
    """The checkpoint that `model_path` stands for if it is the short name, else nothing.

    It is that of `$STEP3P5_MODEL`, a folder or a hub name; without the variable, the published one, unless the current
    folder holds a checkpoint in a folder `step3p5`, which is then what the name means to MAX.

    Raises:
        ConfigError: `$STEP3P5_MODEL` is neither a folder with a `config.json` nor spelled like a hub name.
    """
    if model_path != SHORT_NAME:
        return None
    chosen = os.environ.get(VARIABLE)
    if not chosen:
        if Path(SHORT_NAME, "config.json").is_file():
            return None
        chosen = PUBLISHED
    elif Path(chosen).expanduser().is_dir():
        chosen = _checkpoint_folder(Path(chosen).expanduser())
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", chosen):
        _refuse(chosen, "neither a folder nor a hub name (OWNER/NAME)")
    if chosen not in SHORT_NAMED:
        logger.info("--model %s: %s", SHORT_NAME, chosen)
    SHORT_NAMED.add(chosen)
    return chosen


def _checkpoint_folder(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        _refuse(str(folder), "a folder without config.json")
    return str(folder.absolute())


def _refuse(chosen: str, fault: str) -> None:
    from step3p5.config_fields import fail

    fail(
        VARIABLE,
        f"{chosen!r}, {fault}",
        "a checkpoint's folder or hub name",
        f"Correct the variable, or unset it for {PUBLISHED}.",
    )
