"""Command-line arguments as every benchmark reads them: a fault is one line on stderr and exit status 2."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from max.driver import accelerator_count

CPU_ENCODINGS = ("float32", "bfloat16")


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors come without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Ends the program; see `--help` for the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive_int(text: str) -> int:
    """Reads an integer of at least 1.

    Raises:
        argparse.ArgumentTypeError: If it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number of at least 1")
    return int(text)


def positive_ints(text: str) -> tuple[int, ...]:
    """Reads integers of at least 1, separated by commas; repeated ones count once.

    Raises:
        argparse.ArgumentTypeError: If it is none.
    """
    if not re.fullmatch(r"\d+(,\d+)*", text) or any(int(number) < 1 for number in text.split(",")):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected whole numbers of at least 1, such as 1,4,8")
    return tuple(dict.fromkeys(int(number) for number in text.split(",")))


def encodings(text: str) -> tuple[str, ...]:
    """Reads encodings of weights on a CPU, separated by commas.

    Raises:
        argparse.ArgumentTypeError: If one is unknown.
    """
    found = tuple(text.split(","))
    if unknown := [one for one in found if one not in CPU_ENCODINGS]:
        raise argparse.ArgumentTypeError(
            f"found {unknown[0]!r}, expected {' or '.join(CPU_ENCODINGS)}, or both with a comma"
        )
    return found


def devices(text: str) -> str:
    """Reads devices as MAX's `--devices` takes them: `cpu`, `gpu`, or `gpu:` with numbers.

    Raises:
        argparse.ArgumentTypeError: If they are written otherwise or this machine has no such GPU.
    """
    match = re.fullmatch(r"cpu|gpu(?::(\d+(?:,\d+)*))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected cpu, gpu, gpu:0 or gpu:0,1")
    if text != "cpu":
        highest = max(int(number) for number in (match[1] or "0").split(","))
        if highest >= (count := accelerator_count()):
            raise argparse.ArgumentTypeError(
                f"found {text!r}, but MAX sees {count} GPUs here; use cpu or another number"
            )
    return text
