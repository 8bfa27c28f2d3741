"""Turns the model name `step3p5` on and off for an environment: `python -m step3p5.enable [--undo | --status]`.

MAX 26.7 has no place where a package could announce itself, so a `.pth` file in the environment's site-packages lets
Python install an import hook as it starts. It acts in programs that import MAX, nowhere else. See `step3p5.hook`.
"""

from __future__ import annotations

import argparse
import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from step3p5.hook.short_name import PUBLISHED, SHORT_NAME, VARIABLE

FILE_NAME = "step3p5.pth"

START_UP_LINE = "try: import step3p5.start_up; step3p5.start_up.install()\nexcept ImportError: pass"
"""What Python runs; without a word where the package is gone but the file was left."""


def enable(site_packages: Path) -> Path:
    """Writes the start-up file into `site_packages`, whole or not at all, and returns its path."""
    path = site_packages / FILE_NAME
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(f"import sys; exec({START_UP_LINE!r})\n")
    unfinished.replace(path)
    return path


def disable(site_packages: Path) -> bool:
    """Removes the start-up file from `site_packages`; whether there was one."""
    path = site_packages / FILE_NAME
    found = path.exists()
    path.unlink(missing_ok=True)
    return found


def main(arguments: Sequence[str] | None = None, site_packages: Path | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m step3p5.enable", description=f"Make `max serve --model {SHORT_NAME}` work in this environment."
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--undo", action="store_true", help="remove what this command wrote")
    action.add_argument("--status", action="store_true", help="say whether it is on, and what the name stands for")
    options = parser.parse_args(arguments)
    folder = site_packages or Path(sysconfig.get_path("purelib"))
    path = folder / FILE_NAME
    try:
        if options.undo:
            print(f"off: removed {path}" if disable(folder) else f"off already: no {path}")
        elif options.status:
            print(f"{'on' if path.exists() else 'off'}: {path}")
            print(f"{SHORT_NAME}: {os.environ.get(VARIABLE) or PUBLISHED}")
        else:
            print(f"on: wrote {enable(folder)}")
            print(f"{SHORT_NAME} stands for ${VARIABLE} if set, else {PUBLISHED}")
    except OSError as error:
        parser.error(f"{path}: found {error.strerror!r}, expected a folder of yours to write in. Use a venv.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
