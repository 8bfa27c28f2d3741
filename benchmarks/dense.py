"""Times the dense layers on one NVIDIA GPU, against the bytes that they must move and the operations that they must do.

    python benchmarks/dense.py compile DIR    cross-compiles for sm_90a, on a machine without a GPU
    python benchmarks/dense.py run DIR        on the GPU's machine, which needs PyTorch

`run` checks every result against PyTorch in float32 on the same bfloat16 operands (outputs are written to memory that
held NaN), that the same input gives the same bits and that a NaN stays in its token. Times are the device's busy time
over back-to-back launches, each with other weights. Sizes are Step-3.5-Flash's.

`--set FILE.NAME=VALUE` compiles with another value of a kernel constant, under the name of `--variant`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TOKENS = (16, 32, 64, 65, 128, 256, 512, 1024, 2048, 8192)

VARIANTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ("linear", "swiglu")),
    "few": (("crossover.DENSE_FROM_TOKENS=1",), ("linear",)),
    "single": (("dense_wgmma_gpu.SHARERS=1",), ("linear",)),
}
"""What `compile` makes without `--variant`: other values of constants, and the ops to compile."""


def compile_one(file: Path, op: str, constants: tuple[str, ...]) -> None:
    """Writes one graph; in a process of its own, for a session's later files hold the kernels of the earlier ones."""
    from max.driver import (
        Accelerator,
        set_virtual_device_api,
        set_virtual_device_count,
        set_virtual_device_target_arch,
    )

    set_virtual_device_api("cuda")
    set_virtual_device_target_arch("sm_90a")
    set_virtual_device_count(1)
    from dense_graphs import GRAPHS
    from max.engine import InferenceSession
    from moe import kernels_with

    with kernels_with(constants):
        InferenceSession(devices=[Accelerator()]).compile(GRAPHS[op]()).export_mef(file)
    print(file, flush=True)
    os._exit(0)  # with virtual devices, MAX's threads can abort the interpreter's ordinary exit


def compile_variants(folder: Path, variants: dict[str, tuple[tuple[str, ...], tuple[str, ...]]]) -> None:
    """Writes `DIR/VARIANT/OP.mef`."""
    for name, (constants, all_ops) in variants.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for op in all_ops:
            command = [sys.executable, __file__, "compile-one", str(folder / name / f"{op}.mef"), op, *constants]
            with tempfile.TemporaryDirectory() as cache:
                environment = dict(os.environ, MODULAR_MAX_CACHE_DIR=cache, MODULAR_CACHE_DIR=cache)
                subprocess.run(command, check=True, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    compiling = commands.add_parser("compile", help="cross-compile for sm_90a")
    compiling.add_argument("folder", type=Path, metavar="DIR")
    compiling.add_argument("--variant", help="name of one variant to compile: a known one, or a new one with --set")
    compiling.add_argument("--set", action="append", default=[], metavar="FILE.NAME=VALUE", dest="constants")
    one = commands.add_parser("compile-one", help="one graph (used by compile)")
    one.add_argument("file", type=Path)
    one.add_argument("op")
    one.add_argument("constants", nargs="*")
    running = commands.add_parser("run", help="check and measure on this machine's GPU")
    running.add_argument("folder", type=Path, metavar="DIR")
    running.add_argument("--variants", nargs="+", default=None, help="default: all in DIR")
    running.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    running.add_argument("--json", type=Path, default=Path(__file__).resolve().parent / "results" / "dense.json")
    args = parser.parse_args()
    if args.command == "run":
        import dense_run

        dense_run.run(args.folder, args.variants, args.tokens, args.json)
    elif args.command == "compile-one":
        compile_one(args.file, args.op, tuple(args.constants))
    elif args.variant is None:
        compile_variants(args.folder, VARIANTS)
    else:
        constants, all_ops = VARIANTS.get(args.variant, ((), ("linear", "swiglu")))
        compile_variants(args.folder, {args.variant: (constants + tuple(args.constants), all_ops)})


if __name__ == "__main__":
    main()
