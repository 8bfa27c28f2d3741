"""Command lines of the benchmarks of single ops: their graphs are compiled on a machine without a GPU, with other
values of kernel constants if asked, and measured on the GPU's machine.

    python benchmarks/SCRIPT.py compile DIR [--variant NAME] [--set FILE.NAME=VALUE ...] [--graphs GRAPH ...]
    python benchmarks/SCRIPT.py run DIR [options of the script]

`compile` writes `DIR/VARIANT/GRAPH.mef` for sm_90a; without `--variant`, all of the script's variants. `--set` compiles
with another value of a kernel constant, under the name of `--variant`. `run` needs PyTorch.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from max.driver import (
    Accelerator,
    set_virtual_device_api,
    set_virtual_device_count,
    set_virtual_device_target_arch,
)
from max.engine import InferenceSession
from max.graph import Graph

from step3p5 import custom_ops
from step3p5.kernel_package import compiled_package, kernels_path


@dataclass(frozen=True)
class Variant:
    """Kernels with other constants, `FILE.NAME=VALUE`, and the graphs to compile of them."""

    constants: tuple[str, ...]
    graphs: tuple[str, ...]


@dataclass(frozen=True)
class OpBenchmark:
    """A benchmark of single ops.

    Args:
        script: Its file.
        graphs: What it measures, by name.
        variants: What `compile` makes without `--variant`.
    """

    script: Path
    graphs: Mapping[str, Callable[[], Graph]]
    variants: Mapping[str, Variant]

    def sweep(self, description: str | None, tokens: Sequence[int]) -> None:
        """Runs the command line of a benchmark that `SCRIPT_run.run` measures variant by variant.

        Args:
            description: See `main`.
            tokens: Numbers of tokens to measure by default.
        """
        name = self.script.stem

        def add_options(running: argparse.ArgumentParser) -> None:
            running.add_argument("--variants", nargs="+", default=None, help="default: all in DIR")
            running.add_argument("--tokens", type=int, nargs="+", default=list(tokens))
            running.add_argument("--json", type=Path, default=self.script.resolve().parent / "results" / f"{name}.json")

        def run(options: argparse.Namespace) -> None:
            # It imports PyTorch, which no machine needs to compile.
            measuring = importlib.import_module(f"{name}_run")
            measuring.run(options.folder, options.variants, options.tokens, options.json)

        self.main(description, add_options, run)

    def main(
        self,
        description: str | None,
        add_options: Callable[[argparse.ArgumentParser], None],
        run: Callable[[argparse.Namespace], None],
    ) -> None:
        """Runs the command line.

        Args:
            description: The script's docstring.
            add_options: Adds the options of `run`.
            run: Measures what lies in the options' `folder`.
        """
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        commands = parser.add_subparsers(dest="command", required=True)
        compiling = commands.add_parser("compile", help="cross-compile for sm_90a")
        compiling.add_argument("folder", type=Path, metavar="DIR")
        compiling.add_argument("--variant", help="name of one variant to compile: a known one, or a new one with --set")
        compiling.add_argument("--set", action="append", default=[], metavar="FILE.NAME=VALUE", dest="constants")
        compiling.add_argument("--graphs", nargs="+", choices=self.graphs, help="only these (default: the variant's)")
        one = commands.add_parser("compile-one", help="one graph (used by compile)")
        one.add_argument("file", type=Path)
        one.add_argument("graph", choices=self.graphs)
        one.add_argument("constants", nargs="*")
        running = commands.add_parser("run", help="check and measure on this machine's GPU")
        running.add_argument("folder", type=Path, metavar="DIR")
        add_options(running)
        options = parser.parse_args()
        if options.command == "run":
            run(options)
        elif options.command == "compile-one":
            compile_one(options.file, self.graphs[options.graph], tuple(options.constants))
        else:
            self._compile(options.folder, self._chosen(options))

    def _chosen(self, options: argparse.Namespace) -> dict[str, Variant]:
        variants = dict(self.variants)
        if options.variant is not None:
            known = variants.get(options.variant, Variant((), tuple(self.graphs)))
            variants = {options.variant: replace(known, constants=(*known.constants, *options.constants))}
        if options.graphs is not None:
            variants = {name: replace(variant, graphs=tuple(options.graphs)) for name, variant in variants.items()}
        return variants

    def _compile(self, folder: Path, variants: Mapping[str, Variant]) -> None:
        """In a process for each graph: a session's later files hold the kernels of the earlier ones."""
        for name, variant in variants.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            for graph in variant.graphs:
                command: list[str | Path] = [
                    sys.executable,
                    self.script,
                    "compile-one",
                    folder / name / f"{graph}.mef",
                    graph,
                ]
                with tempfile.TemporaryDirectory() as cache:
                    environment = dict(os.environ, MODULAR_MAX_CACHE_DIR=cache, MODULAR_CACHE_DIR=cache)
                    subprocess.run([*command, *variant.constants], check=True, env=environment)


@contextlib.contextmanager
def kernels_with(constants: tuple[str, ...]) -> Iterator[None]:
    """Lets graphs use the kernels with other values of `FILE.NAME=VALUE`.

    Raises:
        ValueError: If a file has no such constant.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "mojo_kernels"
        shutil.copytree(kernels_path(), copy)
        for constant in constants:
            file, name, value = re.split(r"[.=]", constant, maxsplit=2)
            text = (copy / f"{file}.mojo").read_text()
            text, count = re.subn(rf"(?m)^comptime {name} = .*$", f"comptime {name} = {value}", text)
            if count != 1:
                raise ValueError(f"--set {constant}: {file}.mojo has {count} lines 'comptime {name} = …', expected 1")
            (copy / f"{file}.mojo").write_text(text)
        before = custom_ops.compiled_kernels()
        custom_ops.use_kernels(compiled_package(copy))
        try:
            yield
        finally:
            custom_ops.use_kernels(*before)


def compile_one(file: Path, build: Callable[[], Graph], constants: tuple[str, ...]) -> None:
    """Writes one graph, and ends the process."""
    set_virtual_device_api("cuda")
    set_virtual_device_target_arch("sm_90a")
    set_virtual_device_count(1)
    with kernels_with(constants):
        InferenceSession(devices=[Accelerator()]).compile(build()).export_mef(file)
    print(file, flush=True)
    os._exit(0)  # with virtual devices, MAX's threads can abort the interpreter's ordinary exit
