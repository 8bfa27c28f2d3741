"""`python -m step3p5.aot CONFIG OUT --target cuda:sm_90a [MAX flags]`: compile for a GPU on a machine without one.

Compiling needs the checkpoint's `config.json` and tokenizer, and of the tensors only names and shapes. Where CONFIG has
no weights, a stand-in with true headers and no data (a sparse file) is compiled instead, so that the 392 GB of the
released checkpoint need not be where the compiler runs. The artifacts in OUT are loaded with
`--precompiled-mefs OUT`; `artifacts.py` tells a run that does not fit them what differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from step3p5.checkpoint_tensors import CheckpointDtype, checkpoint_tensors, mtp_tensors
from step3p5.config_fields import ConfigError
from step3p5.config_parser import parse_model_config
from step3p5.random_checkpoint.shards import INDEX_NAME, index_json, plan_shards

SHARD_BYTES = 4_000_000_000
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def write_stand_in(source: Path, out: Path) -> None:
    """Writes a bfloat16 checkpoint without data: `source`'s configuration and tokenizer, and every tensor's header.

    Raises:
        ConfigError: `config.json` is not a valid configuration.
        OSError: A file is missing or cannot be written.
    """
    model = parse_model_config(json.loads((source / "config.json").read_text(encoding="utf-8")))
    for name in _COMPANIONS:
        if (source / name).is_file():
            shutil.copy(source / name, out)
    shards = plan_shards(checkpoint_tensors(model) | mtp_tensors(model), CheckpointDtype.BFLOAT16, SHARD_BYTES)
    (out / INDEX_NAME).write_text(json.dumps(index_json(shards)))
    for shard in shards:
        shard.create(out)


def warm_cache_command(model: Path, out: Path, target: str, flags: Sequence[str]) -> list[str]:
    """MAX's own command for the same; `flags` come last, so that they win."""
    return [
        str(Path(sys.executable).parent / "max"),
        "warm-cache",
        *("--model", str(model)),
        *("--target", target),
        *("--export-mefs", str(out)),
        *("--custom-architectures", "pipelines_registry"),
        *("--devices", "gpu:0"),
        *flags,
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; exits with status 2 on unusable arguments, else with that of `max warm-cache`."""
    parser = argparse.ArgumentParser(
        prog="python -m step3p5.aot",
        description="Compile the model for a GPU that need not be here.",
        epilog="Further flags go to max warm-cache: --devices gpu:0,1 for two GPUs, --ep-size, ...",
    )
    parser.add_argument("model", metavar="CONFIG", type=Path, help="checkpoint, or a folder with its config.json alone")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the artifacts")
    parser.add_argument(
        "--target", required=True, help="cuda:sm_90a (Hopper), cuda:sm_100a (B200), hip:gfx942 (MI300X)"
    )
    options, flags = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        model = options.model.resolve()
        if not any(model.glob("*.safetensors")):
            try:
                write_stand_in(model, Path(folder))
            except (ConfigError, OSError) as error:
                parser.exit(2, f"{parser.prog}: error: CONFIG {model}: {error}\n")
            model = Path(folder)
        command = warm_cache_command(model, options.out.resolve(), options.target, flags)
        sys.exit(subprocess.run(command, env=dict(os.environ)).returncode)


if __name__ == "__main__":
    main()
