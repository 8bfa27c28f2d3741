"""What every benchmark reports in the same way: spreads, the machine, the versions, a table and a JSON file."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import re
import resource
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PACKAGES = ("step3p5-max", "modular", "mojo", "numpy")
"""Distributions whose versions a report names."""

NOT_INSTALLED = "not installed (run from a source tree)"


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median, quartiles and extremes of repeated measurements."""

    median: float
    lower_quartile: float
    upper_quartile: float
    minimum: float
    maximum: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Summarises one measurement or more.

        Raises:
            ValueError: If there is none.
        """
        if not samples:
            raise ValueError("samples: found none, expected at least one measurement")
        lower, median, upper = (
            statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else list(samples) * 3
        )
        return cls(median, lower, upper, min(samples), max(samples), len(samples))

    def text(self, scale: float = 1.0, digits: int = 2) -> str:
        """`median (lower quartile - upper quartile)`, each multiplied by `scale`."""
        median, lower, upper = (
            f"{scale * value:.{digits}f}" for value in (self.median, self.lower_quartile, self.upper_quartile)
        )
        return f"{median} ({lower} - {upper})"


@dataclasses.dataclass(frozen=True)
class Environment:
    """Where and with what a benchmark ran."""

    date: str
    command: str
    cpu: str
    cores: int
    memory_bytes: int
    system: str
    python: str
    versions: Mapping[str, str]

    @classmethod
    def of_this_process(cls, cores: int) -> Environment:
        """Describes this process; `cores` is how many of the machine's it uses."""
        return cls(
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            command=shlex.join(["python", *sys.argv]),
            cpu=cpu_model(),
            cores=cores,
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            system=f"{platform.system()} {platform.release()} {platform.machine()}",
            python=platform.python_version(),
            versions={name: _version(name) for name in PACKAGES},
        )

    def lines(self) -> list[str]:
        """The same for people."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return [
            f"{self.date}  {self.command}",
            f"{self.cpu}, {self.cores} cores, {self.memory_bytes / 2**30:.0f} GiB; {self.system}",
            f"{versions}, python {self.python}",
        ]


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, with family and model where the name alone says little (as under a hypervisor)."""
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", text, re.MULTILINE))
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned, the first to the left and the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def peak_memory_bytes(status: Path = Path("/proc/self/status")) -> int:
    """Most memory that this process has held at once, mapped files included."""
    if status.exists():
        # Linux carries `ru_maxrss` over from the program that started this one.
        match = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
        if match is not None:
            return int(match[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def write_json(path: Path, report: DataclassInstance) -> None:
    """Writes a report as one object, with the names of its fields; makes the folder where it is missing.

    Raises:
        OSError: If the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n")


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED
