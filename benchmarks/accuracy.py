"""How far a model's bfloat16 logits are from float64, beside those of a plain PyTorch bfloat16 forward.

    python benchmarks/accuracy.py MODEL [--devices gpu] [--lengths 1,5,64,...] [--precompiled-mefs DIR] [--json FILE]

Prompts are random. Both bfloat16 passes and the float64 pass read the same checkpoint (`torch_forward.py`). The
reference runs first, in a process of its own, so that it and MAX need not share the device's memory. Lengths lie on
both sides of every place where the kernels change their path (`mojo_kernels/crossover.mojo`).
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from arguments import OneLineParser, devices, positive_int, positive_ints
from bandwidth import usable_cores
from max.pipelines.lib.auto_model import AutoModel
from report import Environment, format_table, write_json

Logits = npt.NDArray[np.float64]

LENGTHS = (1, 2, 7, 8, 9, 63, 64, 65, 127, 255, 300, 1000)


@dataclass(frozen=True)
class Row:
    """One prompt length: shares of the largest logit, over all prompts."""

    length: int
    maximum: float
    mean: float
    torch_maximum: float
    torch_mean: float
    same_first: int
    torch_same_first: int
    prompts: int

    HEADER: ClassVar[tuple[str, ...]] = (
        "prompt",
        "max here",
        "max PyTorch",
        "mean here",
        "mean PyTorch",
        "best token kept here",
        "PyTorch",
    )

    def row(self) -> tuple[str, ...]:
        """The cells under `HEADER`."""
        return (
            str(self.length),
            f"{self.maximum:.4f}",
            f"{self.torch_maximum:.4f}",
            f"{self.mean:.5f}",
            f"{self.torch_mean:.5f}",
            f"{self.same_first} of {self.prompts}",
            f"{self.torch_same_first} of {self.prompts}",
        )


@dataclass(frozen=True)
class Report:
    """All that a run found; what `--json` writes."""

    benchmark: str
    environment: Environment
    model: str
    devices: str
    seed: int
    results: list[Row]

    def text(self) -> str:
        """The same for people."""
        table = format_table(Row.HEADER, [result.row() for result in self.results])
        return "\n".join([*self.environment.lines(), f"{self.model} on {self.devices}, seed {self.seed}", "", table])


def reference_logits(model: str, device: str, prompts: Sequence[list[int]], out: Path) -> None:
    """Writes the float64 and the bfloat16 logits of each prompt to `out`; run in a process of its own."""
    import torch
    from torch_forward import TorchForward

    forward = TorchForward(Path(model), device)
    passes = (torch.float64, torch.bfloat16)
    logits = [np.stack([forward.last_logits(p, dtype).cpu().numpy() for p in prompts]) for dtype in passes]
    np.save(out, np.stack(logits))


def compare(length: int, exact: Logits, here: Logits, torch: Logits) -> Row:
    """Sets logits `[prompts, vocab_size]` of one prompt length against the exact ones."""
    largest = np.abs(exact).max(axis=1, keepdims=True)
    errors = [np.abs(logits - exact) / largest for logits in (here, torch)]
    kept = [int((logits.argmax(1) == exact.argmax(1)).sum()) for logits in (here, torch)]
    return Row(
        length=length,
        maximum=float(errors[0].max()),
        mean=float(errors[0].mean()),
        torch_maximum=float(errors[1].max()),
        torch_mean=float(errors[1].mean()),
        same_first=kept[0],
        torch_same_first=kept[1],
        prompts=len(exact),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; exits with status 2 on unusable arguments."""
    parser = OneLineParser(prog="accuracy.py", description="Compare bfloat16 logits with float64 and with PyTorch.")
    add = parser.add_argument
    add("model", metavar="MODEL", help="checkpoint folder")
    add("--devices", type=devices, default="gpu", help="as MAX's --devices (default: %(default)s)")
    add("--lengths", metavar="N,N", type=positive_ints, default=LENGTHS, help="prompt lengths")
    add("--prompts", metavar="N", type=positive_int, default=4, help="prompts a length (default: %(default)s)")
    add("--max-batch-size", metavar="N", type=positive_int, default=1, help="as MAX's (default: %(default)s)")
    add("--max-length", metavar="N", type=positive_int, default=2048, help="as MAX's (default: %(default)s)")
    add("--precompiled-mefs", metavar="DIR", help="artifacts compiled ahead")
    add("--seed", type=int, default=None, help="of the prompts; another one each time where absent")
    add("--json", metavar="FILE", type=Path, help="write the report to FILE as well")
    options: argparse.Namespace = parser.parse_args(arguments)
    if not (Path(options.model) / "config.json").is_file():
        parser.error(f"MODEL: found no config.json in {options.model}, expected a checkpoint's folder")
    seed = secrets.randbelow(1 << 31) if options.seed is None else options.seed
    logging.getLogger("max.pipelines").setLevel(logging.WARNING)
    extra = {"precompiled_mefs": options.precompiled_mefs} if options.precompiled_mefs else {}
    rng = np.random.default_rng(seed)
    vocab_size = json.loads((Path(options.model) / "config.json").read_text())["vocab_size"]
    lengths = [length for length in options.lengths for _ in range(options.prompts)]
    prompts = [rng.integers(vocab_size, size=length).tolist() for length in lengths]
    file = Path(options.model) / ".accuracy.npy"
    torch_device = "cpu" if options.devices == "cpu" else "cuda"
    process = multiprocessing.get_context("spawn").Process(
        target=reference_logits, args=(options.model, torch_device, prompts, file)
    )
    process.start()
    process.join()
    if process.exitcode != 0:
        parser.error(f"the PyTorch forward ended with status {process.exitcode}; its message stands above")
    exact, torch_logits = np.load(file)
    file.unlink()
    with AutoModel(
        options.model,
        devices=options.devices,
        custom_architectures=["pipelines_registry"],
        max_batch_size=options.max_batch_size,
        max_length=options.max_length,
        quantization_encoding="bfloat16",
        device_graph_capture=options.devices != "cpu",
        **extra,
    ) as model:
        here = np.stack(
            [model.generate([p], max_new_tokens=1, temperature=0.0, output_logits=True).logits[0][-1] for p in prompts]
        )
    results = []
    for length in options.lengths:
        chosen = [i for i, other in enumerate(lengths) if other == length]
        results.append(compare(length, exact[chosen], here[chosen], torch_logits[chosen]))
    report = Report(
        "accuracy", Environment.of_this_process(usable_cores()), options.model, options.devices, seed, results
    )
    print(report.text())
    if options.json is not None:
        write_json(options.json, report)


if __name__ == "__main__":
    main()
