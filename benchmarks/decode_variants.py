"""Times the MoE layer's kernels at few tokens in captured graphs, each variant of `DIR` beside the others.

    python benchmarks/decode_variants.py DIR [--tokens 1 2 4 8] [--seconds 60]

`DIR/VARIANT/layer-8.mef` and `DIR/VARIANT/experts-8.mef` come from `moe.py`'s machinery. Every result is checked as
`moe.py run` does; the times are those of replays of a captured graph, which the host cannot hold up, and beside them
those of eager launches. A timeline of the kernels of one replay, by `torch.profiler`, comes first; the table last.
"""

from __future__ import annotations

import argparse
import statistics
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from max.driver import Buffer
from max.engine import Model
from moe_graphs import HIDDEN, WIDTH
from moe_layer import Layer, measure_layer
from moe_run import DEVICE, Experts, Machine, Routing, measure_experts, random_ids
from report import format_table

REPEATS = 8
REPLAYS = 20
ROUNDS = 5


def replay_us(machine: Machine, model: Model, operands: Sequence[Buffer], key: int) -> tuple[float, float]:
    """Median and least microseconds a launch of replays behind one another."""
    torch.cuda.synchronize()
    outputs = model.capture(key, *operands)
    machine.device.synchronize()
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        for _ in range(REPLAYS):
            model.replay(key, *operands)
        machine.device.synchronize()
        times.append(1e6 * (time.perf_counter() - start) / (REPLAYS * REPEATS))
    del outputs
    return statistics.median(times[1:]), min(times[1:])


def timeline(machine: Machine, model: Model, operands: Sequence[Buffer], key: int) -> None:
    """Prints when the kernels of a replay begin and end; the last three launches."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            model.replay(key, *operands)
        machine.device.synchronize()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type.name == "CUDA"]
    events.sort(key=lambda event: event.time_range.start)
    shown = events[-12:]
    for event in shown:
        begin = event.time_range.start - shown[0].time_range.start
        print(f"    {begin:9.1f} us + {event.time_range.end - event.time_range.start:7.1f}  {event.name[:90]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=60, help="begins no other measurement after so many")
    args = parser.parse_args()
    begun = time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    machine = Machine()
    rate, _ = machine.memory_rates()
    print(f"{torch.cuda.get_device_name()}, copies at {rate:.2f} TB/s")
    experts = Experts()
    rows = list[list[str]]()
    names = sorted(path.name for path in args.folder.iterdir() if path.is_dir())
    for name in names:
        for graph in ("layer", "experts"):
            file = args.folder / name / f"{graph}-{REPEATS}.mef"
            if not file.exists():
                continue
            print(f"{name} {graph}, after {time.monotonic() - begun:.0f} s", flush=True)
            try:
                model = machine.load(file)
                for key, tokens in enumerate(args.tokens):
                    if time.monotonic() - begun > args.seconds:
                        print("    no time left")
                        break
                    torch.manual_seed(tokens)
                    if graph == "layer":
                        row = measure_layer(
                            machine.execute,
                            machine.seconds,
                            experts.routed,
                            experts.buffers(),
                            model,
                            REPEATS,
                            tokens,
                            rate,
                        )
                        layer = Layer()
                        xs = [torch.randn(tokens, HIDDEN, device=DEVICE).to(torch.bfloat16) for _ in range(REPEATS)]
                        operands = [*layer.buffers(experts.buffers()), *(Buffer.from_dlpack(x) for x in xs)]
                        hit = statistics.mean(len(layer.route(x)[0].unique()) for x in xs)
                        floor = ((3 * hit + 3) * 2 * HIDDEN * WIDTH + 2 * layer.router.numel()) / (rate * 1e6)
                    else:
                        row = measure_experts(machine, experts, model, REPEATS, name, "random", tokens, rate)
                        x = torch.randn(tokens, HIDDEN, device=DEVICE).to(torch.bfloat16)
                        routings = [Routing.of(random_ids(tokens)) for _ in range(REPEATS)]
                        operands = [Buffer.from_dlpack(x), *experts.buffers()]
                        operands += [buffer for each in routings for buffer in each.buffers()]
                        hit = statistics.mean(each.experts_hit() for each in routings)
                        floor = 3 * hit * 2 * HIDDEN * WIDTH / (rate * 1e6)
                    right = row.error < 1e-2 and row.same_bits and row.nan_contained
                    cells = [name, graph, str(tokens), f"{floor:.1f}"]
                    try:
                        median, least = replay_us(machine, model, operands, 100 + key)
                        cells += [f"{median:.1f}", f"{least:.1f}", f"{median / floor:.3f}"]
                        if tokens == args.tokens[0]:
                            timeline(machine, model, operands, 100 + key)
                    except Exception:
                        traceback.print_exc()
                        cells += ["failed"] * (7 - len(cells))
                    cells += [f"{1e3 * row.ms:.1f}", f"{row.times_floor:.3f}", "yes" if right else f"NO: {row}"]
                    rows.append(cells)
                del model
            except Exception:
                traceback.print_exc()
    header = ["variant", "graph", "tokens", "floor, us", "replayed, us", "least", "x floor"]
    print(format_table([*header, "eager, us", "x its floor", "right"], rows))


if __name__ == "__main__":
    main()
