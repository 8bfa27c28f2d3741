"""The Mojo kernels as a compiled package: built once for a revision of their sources, then taken from a cache.

Building takes seconds, at every start of a process. Artifacts compiled ahead carry the package along.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path

from mojo.run import subprocess_run_mojo

logger = logging.getLogger("max.pipelines")

_PACKAGE = Path(__file__).resolve().parent
_PLACES = (_PACKAGE / "mojo_kernels", _PACKAGE.parent / "mojo_kernels")
"""In an installation the kernels lie inside this package, in a checkout beside it."""

CACHE_VARIABLE = "MODULAR_MAX_CACHE_DIR"


@cache
def kernels_path() -> Path:
    """The folder of the Mojo package `mojo_kernels`.

    Raises:
        FileNotFoundError: If the package was installed without its kernels.
    """
    for place in _PLACES:
        if (place / "__init__.mojo").is_file():
            return place
    raise FileNotFoundError(
        f"mojo_kernels: found no __init__.mojo in {' or '.join(map(str, _PLACES))}; reinstall the package"
    )


def sources_digest(folder: Path) -> str:
    """Of a folder's Mojo sources, in the order of their names."""
    sources = sorted(folder.glob("*.mojo"))
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in sources)).hexdigest()[:16]


def package_name(folder: Path) -> str:
    """A compiled package's file name, which says what it was built of; Mojo takes the module's name from it."""
    revision = f"{sources_digest(folder)}_{version('modular').replace('.', '_')}"
    return f"step3p5_kernels_{revision}.mojoc"


def cache_folder() -> Path:
    """Where packages are kept: beside MAX's compiled graphs if their place is named, else in the user's cache."""
    named = os.environ.get(CACHE_VARIABLE)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else base / "step3p5"


def compiled_package(folder: Path, *places: Path) -> Path:
    """The package built of `folder`'s sources: from the first place that has it, else built into the cache.

    Raises:
        subprocess.CalledProcessError: The sources do not compile; the compiler's words are in `stderr`.
    """
    name, target = package_name(folder), cache_folder()
    for place in (*places, target):
        if (place / name).is_file():
            return place / name
    try:
        target.mkdir(parents=True, exist_ok=True)
        build(folder, target / name)
    except OSError as error:
        logger.warning("%s: cannot keep the compiled Mojo kernels there (%s); each start builds them.", target, error)
        target = Path(tempfile.mkdtemp(prefix="step3p5-"))
        build(folder, target / name)
    return target / name


def build(folder: Path, package: Path) -> None:
    """Compiles `folder`'s sources to `package`, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=package.parent, prefix=".building-") as staging:
        # The file must have its last name when it is compiled: the module's name is taken from it.
        unfinished = Path(staging) / package.name
        subprocess_run_mojo(["precompile", str(folder), "-o", str(unfinished)], capture_output=True, check=True)
        unfinished.replace(package)
