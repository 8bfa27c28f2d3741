"""Times the routed experts, the router and the grouping on one NVIDIA GPU, against the bytes that they must read.

    python benchmarks/moe.py compile DIR    cross-compiles for sm_90a, on a machine without a GPU
    python benchmarks/moe.py run DIR        on the GPU's machine, which needs PyTorch

`run` checks every result against PyTorch in float32 on the same bfloat16 weights (outputs are written to memory that
held NaN), that the same input gives the same bits and that a NaN stays in its token, and measures the copy rate from
which the floor follows: the bytes of the experts that the tokens hit over that rate. Times are medians of replays of a
captured graph of launches, each with other experts or too large for the cache. Sizes are Step-3.5-Flash's.

`--set FILE.NAME=VALUE` compiles with another value of a kernel constant, under the name of `--variant`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if sys.argv[1:2] and sys.argv[1].startswith("compile"):
    from max.driver import set_virtual_device_api, set_virtual_device_count, set_virtual_device_target_arch

    set_virtual_device_api("cuda")
    set_virtual_device_target_arch("sm_90a")
    set_virtual_device_count(1)

from max.driver import Accelerator
from max.engine import InferenceSession
from moe_graphs import GRAPHS

from step3p5 import custom_ops
from step3p5.kernel_package import compiled_package, kernels_path


@dataclasses.dataclass(frozen=True)
class Variant:
    """Kernels with other constants, and the graphs to compile of them."""

    constants: tuple[str, ...]
    graphs: tuple[str, ...]


VARIANTS = {
    "default": Variant((), tuple(GRAPHS)),
    "streamed": Variant(("crossover.GROUPED_FROM_TOKENS=1000000",), ("experts",)),
    "grouped": Variant(("crossover.GROUPED_FROM_TOKENS=1",), ("experts",)),
}
"""What `compile` makes without `--variant`: the kernels as they are, and both paths for the crossover."""


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


def compile_one(file: Path, graph: str, constants: tuple[str, ...]) -> None:
    """Writes one graph; in a process of its own, for a session's later files hold the kernels of the earlier ones."""
    with kernels_with(constants):
        InferenceSession(devices=[Accelerator()]).compile(GRAPHS[graph]()).export_mef(file)
    print(file, flush=True)
    os._exit(0)  # with virtual devices, MAX's threads can abort the interpreter's ordinary exit


def compile_variants(folder: Path, variants: dict[str, Variant]) -> None:
    """Writes `DIR/VARIANT/GRAPH.mef`."""
    for name, variant in variants.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for graph in variant.graphs:
            command = [sys.executable, __file__, "compile-one", str(folder / name / f"{graph}.mef"), graph]
            with tempfile.TemporaryDirectory() as cache:
                environment = dict(os.environ, MODULAR_MAX_CACHE_DIR=cache, MODULAR_CACHE_DIR=cache)
                subprocess.run([*command, *variant.constants], check=True, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    compiling = commands.add_parser("compile", help="cross-compile for sm_90a")
    compiling.add_argument("folder", type=Path, metavar="DIR")
    compiling.add_argument("--variant", help="name of one variant to compile: a known one, or a new one with --set")
    compiling.add_argument("--set", action="append", default=[], metavar="FILE.NAME=VALUE", dest="constants")
    compiling.add_argument("--graphs", nargs="+", choices=GRAPHS, help="only these (default: the variant's)")
    one = commands.add_parser("compile-one", help="one graph (used by compile)")
    one.add_argument("file", type=Path)
    one.add_argument("graph", choices=GRAPHS)
    one.add_argument("constants", nargs="*")
    running = commands.add_parser("run", help="check and measure on this machine's GPU")
    running.add_argument("folder", type=Path, metavar="DIR")
    running.add_argument("--variants", nargs="+", default=None, help="default: all in DIR")
    running.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192])
    running.add_argument("--json", type=Path, default=Path(__file__).resolve().parent / "results" / "moe.json")
    args = parser.parse_args()
    if args.command == "run":
        import moe_run

        moe_run.run(args.folder, args.variants, args.tokens, args.json)
        return
    if args.command == "compile-one":
        compile_one(args.file, args.graph, tuple(args.constants))
    variants = VARIANTS
    if args.variant is not None:
        known = VARIANTS.get(args.variant, Variant((), tuple(GRAPHS)))
        variants = {args.variant: dataclasses.replace(known, constants=known.constants + tuple(args.constants))}
    if args.graphs is not None:
        variants = {name: dataclasses.replace(each, graphs=tuple(args.graphs)) for name, each in variants.items()}
    compile_variants(args.folder, variants)


if __name__ == "__main__":
    main()
