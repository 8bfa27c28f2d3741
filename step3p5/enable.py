"""Turns the import hook off for an environment and on again: `python -m step3p5.enable [--undo | --status]`.

MAX 26.7 has no place where a package could announce itself, so the package comes with a `.pth` file that lets Python
install an import hook as it starts. The hook acts in programs that import MAX, nowhere else. See `step3p5.hook`.
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

START_UP_FILE = (
    'import sys; exec("try: import step3p5.start_up; step3p5.start_up.install()\\nexcept Exception: pass")\n'
)
"""As installed: no program is to fail, or to hear of it, where the package is gone or damaged and the file was left."""


def enable(site_packages: Path) -> Path:
    """Writes the start-up file into `site_packages`, whole or not at all, and returns its path."""
    path = site_packages / FILE_NAME
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(START_UP_FILE)
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
        prog="python -m step3p5.enable",
        description=f"Turn the import hook on, as it is once installed: `max serve --model {SHORT_NAME}` works.",
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--undo", action="store_true", help="turn it off: MAX stays as it is")
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
