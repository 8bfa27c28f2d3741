"""`python -m step3p5.plan --model PATH|step3p5 --gpu h100 …`: what fits where, and how fast it can be."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from step3p5.checkpoint_files import CheckpointError
from step3p5.config_fields import ConfigError
from step3p5.parallel_plan import ParallelPlanError
from step3p5.plan.case import COUNTS, MODES, Case, Load, Refused, best, cases
from step3p5.plan.gpus import GPUS
from step3p5.plan.report import comparison, speculation, speculation_text, summary, text
from step3p5.plan.source import RELEASED, ModelSource, read_model

_EXIT_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with status 2 on what cannot be planned."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        source = read_model(options.model, options.dtype)
        load = _load(options, source)
        if options.compare:
            _compare(options, source, load)
        else:
            _describe(options, source, load)
    except (ConfigError, CheckpointError, ParallelPlanError) as error:
        parser.exit(_EXIT_USAGE, f"{parser.prog}: error: {error}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m step3p5.plan",
        description="What fits where and the least time of a token, from the shapes alone. Nothing is loaded.",
    )
    parser.add_argument("--model", default=RELEASED, metavar=f"PATH|{RELEASED}", help="checkpoint folder, or released")
    parser.add_argument("--gpu", required=True, choices=list(GPUS))
    parser.add_argument("--count", type=int, metavar="N", help="GPUs of the node (default: 8; --compare: 1, 2, 4, 8)")
    parser.add_argument("--mode", choices=list(MODES), help="default: the one with most tokens a second that fits")
    parser.add_argument("--dtype", choices=["bf16", "fp8", "int4"], help="default: as stored; bf16 if nothing is")
    parser.add_argument("--context", type=int, default=8192, metavar="L", help="tokens a request (default: 8192)")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="requests on all GPUs together (default: 1)")
    parser.add_argument("--json", action="store_true", help="numbers in bytes, operations and seconds")
    parser.add_argument("--compare", action="store_true", help="all modes and numbers of GPUs as a table")
    parser.add_argument("--mtp", action="store_true", help="load the MTP layers, and show where drafting pays")
    return parser


def _load(options: argparse.Namespace, source: ModelSource) -> Load:
    limit = source.model.max_position_embeddings
    if not 1 <= options.context <= limit:
        raise ParallelPlanError(
            f"--context: found {options.context}, expected 1 to {limit} (max_position_embeddings). Change the flag."
        )
    if options.batch < 1:
        raise ParallelPlanError(f"--batch: found {options.batch}, expected 1 or more. Change the flag.")
    depth = len(source.model.mtp_layers) if options.mtp else 0
    if options.mtp and not depth:
        raise ParallelPlanError("--mtp: found no MTP layers in the model (num_nextn_predict_layers). Leave it out.")
    return Load(options.batch, options.context, depth)


def _describe(options: argparse.Namespace, source: ModelSource, load: Load) -> None:
    count = 8 if options.count is None else options.count
    case = _chosen(options, source, load, count)
    drafting = speculation(case) if options.mtp else []
    if options.json:
        print(json.dumps(summary(case) | ({"speculation": drafting} if options.mtp else {}), indent=2))
        return
    print(text(case))
    if options.mtp:
        print("\n" + speculation_text(drafting))


def _chosen(options: argparse.Namespace, source: ModelSource, load: Load, count: int) -> Case:
    gpu = GPUS[options.gpu]
    if options.mode is not None:
        return Case(source, gpu, count, options.mode, load)
    candidates = list(cases(source, gpu, load, count))
    possible = [case for case in candidates if isinstance(case, Case)]
    if not possible:
        raise next(refused.error for refused in candidates if isinstance(refused, Refused))
    return best(possible) or min(possible, key=lambda case: case.memory.total)


def _compare(options: argparse.Namespace, source: ModelSource, load: Load) -> None:
    gpu = GPUS[options.gpu]
    rows: list[Case | Refused] = []
    marked: list[Case] = []
    for count in COUNTS if options.count is None else [options.count]:
        of_count = list(cases(source, gpu, load, count))
        winner = best([case for case in of_count if isinstance(case, Case)])
        rows += of_count
        marked += [winner] if winner is not None else []
    overall = best(marked)
    if options.json:
        table = [summary(row) if isinstance(row, Case) else _refused(row) for row in rows]
        print(json.dumps(table, indent=2))
        return
    print(f"{source.name}, {source.weights.name}, {gpu.name}, batch {load.batch}, context {load.context}\n")
    print(comparison(rows, marked, overall))
    print("\n* most tokens/s of its number of GPUs, ** of all; least times, latencies aside")


def _refused(row: Refused) -> dict[str, object]:
    return {"count": row.count, "mode": row.mode, "refused": str(row.error)}


if __name__ == "__main__":
    main()
