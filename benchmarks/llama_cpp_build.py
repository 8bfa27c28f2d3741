"""Builds llama.cpp for this machine and converts checkpoints for it, all in one folder.

`runtime/` is a virtual environment with llama-cpp-python built from its source archive for this machine's instructions;
`llama.cpp/` the converter out of that archive, `convert/` the environment that it runs in, `gguf/` what it wrote.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

VERSION = "0.3.36"
"""The release of llama-cpp-python; its archive holds the llama.cpp that it is made of."""

CMAKE_ARGS = "-DGGML_NATIVE=ON -DLLAMA_BUILD_TOOLS=OFF -DMTMD_BUILD=OFF"
CONVERTER_PACKAGES = ("torch", "transformers<5.13", "safetensors", "sentencepiece", "numpy", "pyyaml")
OUT_TYPES = {"float32": "f32", "bfloat16": "bf16"}

_CONVERTER_FILES = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/")

_CONVERT = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
sys.path.insert(1, sys.argv[1] + "/gguf-py")
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from conversion import base
AutoTokenizer.from_pretrained = classmethod(lambda cls, path, **_: PreTrainedTokenizerFast.from_pretrained(path))
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0] + "/convert_hf_to_gguf.py", run_name="__main__")
"""
"""Runs the converter on a random checkpoint: its model type has no tokenizer class, and its tokenizer no known name."""


def build(folder: Path) -> None:
    """Downloads, builds and installs all of it; about ten minutes on two cores.

    Raises:
        subprocess.CalledProcessError: If pip fails.
        FileExistsError: If the folder exists and is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: found a folder with files in it, expected a new or an empty one")
    folder.mkdir(parents=True, exist_ok=True)
    _pip(folder, "runtime", "download", "--no-deps", "--no-binary", ":all:", f"llama-cpp-python=={VERSION}")
    (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
    _extract_converter(archive, folder / "llama.cpp")
    _pip(folder, "runtime", "install", str(archive), environment={"CMAKE_ARGS": CMAKE_ARGS})
    _pip(folder, "convert", "install", *CONVERTER_PACKAGES)


def convert(folder: Path, model: Path, dtype: str) -> Path:
    """The checkpoint as a GGUF file in `dtype`, converted unless it was before.

    Raises:
        subprocess.CalledProcessError: If the converter fails.
    """
    target = folder / "gguf" / f"{model.name}-{dtype}.gguf"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        partial = target.with_suffix(".partial")
        command: list[str | Path] = [python_of(folder, "convert"), "-c", _CONVERT, folder / "llama.cpp", model]
        command += ["--outtype", OUT_TYPES[dtype], "--outfile", partial]
        subprocess.run(command, check=True, env=_environment(), stdout=sys.stderr)
        partial.rename(target)
    return target


def python_of(folder: Path, environment: str) -> Path:
    """The Python of one of the folder's virtual environments."""
    return folder / environment / "bin" / "python"


def _pip(folder: Path, name: str, command: str, *arguments: str, environment: dict[str, str] | None = None) -> None:
    if not python_of(folder, name).exists():
        venv.create(folder / name, with_pip=True)
    subprocess.run(
        [python_of(folder, name), "-m", "pip", "--disable-pip-version-check", command, *arguments],
        check=True,
        cwd=folder,
        env=_environment() | (environment or {}),
        stdout=sys.stderr,
    )


def _environment() -> dict[str, str]:
    """Python's view of the environment, which importing MAX alters behind its back, less this project's path."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _extract_converter(archive: Path, target: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            _, _, path = member.name.partition("/vendor/llama.cpp/")
            if path.startswith(_CONVERTER_FILES):
                member.name = path
                tar.extract(member, target, filter="data")
