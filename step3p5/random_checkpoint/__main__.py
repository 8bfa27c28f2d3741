"""`python -m step3p5.random_checkpoint OUT --preset tiny|mid|flash`: write a random checkpoint."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from step3p5.checkpoint_tensors import CheckpointDtype
from step3p5.random_checkpoint.presets import PRESETS
from step3p5.random_checkpoint.writer import RandomCheckpointError, write_random_checkpoint

_EXIT_USAGE = 2
_EXIT_FAILED = 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with status 2 on unusable arguments and 1 on a failed write."""
    parser = argparse.ArgumentParser(
        prog="python -m step3p5.random_checkpoint",
        description="Write a random Step-3.5 checkpoint: configuration, weights with MTP layers, and tokenizer.",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to create")
    parser.add_argument("--preset", required=True, choices=list(PRESETS), help="model shape")
    parser.add_argument("--layers", metavar="N", type=int, help="keep only the first N decoder layers (default: all)")
    parser.add_argument(
        "--dtype", choices=[dtype.value for dtype in CheckpointDtype], default=CheckpointDtype.FLOAT32.value
    )
    parser.add_argument("--seed", metavar="S", type=int, default=0)
    parser.add_argument(
        "--predictable",
        metavar="P",
        type=float,
        help="make the next token predictable; each MTP layer drafts it right at about the rate P (0 to 1)",
    )
    options = parser.parse_args(arguments)

    try:
        summary = write_random_checkpoint(
            options.out,
            options.preset,
            options.layers,
            CheckpointDtype(options.dtype),
            options.seed,
            options.predictable,
        )
    except RandomCheckpointError as error:
        parser.exit(_EXIT_USAGE, f"{parser.prog}: error: {error}\n")
    except OSError as error:
        parser.exit(_EXIT_FAILED, f"{parser.prog}: error: writing {options.out} failed: {error}\n")
    except KeyboardInterrupt:
        parser.exit(128 + signal.SIGINT, f"{parser.prog}: interrupted; nothing was kept\n")
    print(
        f"{options.out}: {summary.num_tensors} tensors, {summary.num_parameters / 1e6:.1f} M parameters, "
        f"{summary.num_bytes / 1e9:.2f} GB in {summary.num_shards} safetensors files"
    )


def _exit_on_signal(signal_number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + signal_number)


if __name__ == "__main__":
    # A terminated run must remove its unfinished folder like an interrupted one.
    signal.signal(signal.SIGTERM, _exit_on_signal)
    main()
