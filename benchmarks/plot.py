"""Draws results of the benchmarks as PNG files, each beside its JSON: those given, or all of `benchmarks/results/`.

    python benchmarks/plot.py [FILE …]

Needs matplotlib: `pip install ".[bench]"`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"

Result = Mapping[str, Any]


class NotDrawableError(ValueError):
    """A file that is no benchmark's result."""


def draw_forward(result: Result, figure: Figure) -> None:
    """Prefill and decode: median milliseconds with quartiles, and tokens a second."""
    prefill = [row for row in result["results"] if row["new_tokens"] > 1]
    decode = [row for row in result["results"] if row["new_tokens"] == 1]
    axes = figure.subplots(1, 2)
    for axis, rows, field, label in (
        (axes[0], prefill, "new_tokens", "prompt tokens"),
        (axes[1], decode, "batch_size", "batch size (decode)"),
    ):
        rows = sorted(rows, key=lambda row: int(row[field]))
        sizes = [row[field] for row in rows]
        spread = [row["seconds"] for row in rows]
        median = [1e3 * seconds["median"] for seconds in spread]
        below = [1e3 * (seconds["median"] - seconds["lower_quartile"]) for seconds in spread]
        above = [1e3 * (seconds["upper_quartile"] - seconds["median"]) for seconds in spread]
        axis.errorbar(sizes, median, yerr=[below, above], marker="o", capsize=3)
        for size, time, row in zip(sizes, median, rows, strict=True):
            rate = f"{row['tokens_per_second']:.0f} tokens/s"
            axis.annotate(rate, (size, time), xytext=(0, 12), textcoords="offset points", ha="center")
        _label(axis, label, "ms a forward pass")
        axis.margins(0.25)
        axis.set_ylim(bottom=0)


def draw_serving(result: Result, figure: Figure) -> None:
    """By load: time to the first token and between tokens (p50, p95, p99), and tokens a second."""
    axes = figure.subplots(1, 3)
    for loop, field, mark in (("closed loop, clients", "clients", "-"), ("open loop, requests a second", "rate", "--")):
        levels = [level for level in result["levels"] if level[field] is not None and level["first_token"] is not None]
        if not levels:
            continue
        loads = [level[field] for level in levels]
        for axis, times in ((axes[0], "first_token"), (axes[1], "token_gap")):
            for quantile, colour in (("p50", "C0"), ("p95", "C1"), ("p99", "C2")):
                known = [
                    (load, 1e3 * level[times][quantile])
                    for load, level in zip(loads, levels, strict=True)
                    if level[times]
                ]
                axis.plot(*zip(*known, strict=True), mark, marker="o", color=colour, label=f"{quantile}, {loop}")
        rates = [level["tokens_per_second"] for level in levels]
        axes[2].plot(loads, rates, mark, marker="o", label=loop)
    for axis, label in zip(axes, ("ms to the first token", "ms between tokens", "tokens a second"), strict=True):
        _label(axis, "load", label)
        axis.set_ylim(bottom=0)
    steps = result["overhead"]
    if steps:
        points = [step["clients"] for step in steps], [1e3 * step["step_seconds"] for step in steps]
        axes[1].plot(*points, ":", marker="x", color="black", label="decode step alone")
    for axis in axes:
        if axis.has_data():
            axis.legend(fontsize="x-small")


def draw_experts(result: Result, figure: Figure) -> None:
    """The first variant's routed experts by number of tokens: each routing's time, the floor set by bytes, vLLM's.

    Where there are none, the whole layer's time and floor.
    """
    axis = figure.subplots()
    by_routing = defaultdict(list)
    for row in result["experts"]:
        if row["variant"] == result["experts"][0]["variant"]:
            by_routing[row["routing"]].append(row)
    for routing, rows in by_routing.items():
        rows.sort(key=lambda row: row["tokens"])
        tokens = [row["tokens"] for row in rows]
        line = axis.plot(tokens, [row["ms"] for row in rows], marker="o", label=f"{routing} routing")
        axis.plot(tokens, [row["floor_ms"] for row in rows], ":", color=line[0].get_color(), label=f"{routing}, floor")
        peer = [(row["tokens"], row["vllm_ms"]) for row in rows if row["vllm_ms"] is not None]
        if peer:
            axis.plot(*zip(*peer, strict=True), "--", marker="x", color="black", label=f"{routing}, vLLM 0.23")
    if not by_routing:
        tokens = [row["tokens"] for row in result["layer"]]
        line = axis.plot(tokens, [row["ms"] for row in result["layer"]], marker="o", label="whole layer")
        axis.plot(tokens, [row["floor_ms"] for row in result["layer"]], ":", color=line[0].get_color(), label="floor")
    _label(axis, "tokens", "ms")
    axis.set_yscale("log")
    axis.legend(fontsize="x-small")


def draw_dense(result: Result, figure: Figure) -> None:
    """The dense layers by number of tokens: busy time over the floor set by bytes, of the faster variant."""
    axis = figure.subplots()
    best: dict[str, dict[int, float]] = defaultdict(dict)
    for row in result["rows"]:
        times = best[f"{row['op']} {row['in_features']} to {row['out_features']}"]
        times[row["tokens"]] = min(row["times_floor"], times.get(row["tokens"], row["times_floor"]))
    for name, times in best.items():
        axis.plot(*zip(*sorted(times.items()), strict=True), marker="o", label=name)
    _label(axis, "tokens", "times the floor")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize="x-small")


def draw_accuracy(result: Result, figure: Figure) -> None:
    """Largest and mean difference of the logits from float64 by prompt length, beside PyTorch's."""
    axis = figure.subplots()
    rows = sorted(result["results"], key=lambda row: int(row["length"]))
    lengths = [row["length"] for row in rows]
    for field, label, mark in (
        ("maximum", "largest", "-"),
        ("mean", "mean", "--"),
        ("torch_maximum", "largest, PyTorch", "-"),
        ("torch_mean", "mean, PyTorch", "--"),
    ):
        colour = "C1" if field.startswith("torch") else "C0"
        axis.plot(lengths, [row[field] for row in rows], mark, marker="o", color=colour, label=label)
    _label(axis, "prompt tokens", "difference")
    axis.set_yscale("log")
    axis.legend(fontsize="x-small")


def draw_cpu_peer(result: Result, figure: Figure) -> None:
    """Tokens a second of each pass here and in llama.cpp, by the weights' type; the median ratio above each pair."""
    axes = figure.subplots(1, len(result["encodings"]), squeeze=False)[0]
    for axis, encoding in zip(axes, result["encodings"], strict=True):
        rows = encoding["comparisons"]
        for offset, side, label in ((-0.2, "here", "here"), (0.2, "llama_cpp", "llama.cpp")):
            rates = [row["tokens"] / row[side]["median"] for row in rows]
            axis.bar([place + offset for place in range(len(rows))], rates, 0.4, label=label)
        for place, row in enumerate(rows):
            best = max(row["tokens"] / row[side]["median"] for side in ("here", "llama_cpp"))
            axis.annotate(f"{row['ratio']['median']:.2f} x", (place, best), ha="center", va="bottom")
        axis.set_xticks(range(len(rows)), [row["name"].split(", context")[0] for row in rows], rotation=15)
        axis.set_ylabel("tokens/s")
        axis.set_title(encoding["encoding"], fontsize="medium")
        axis.legend(fontsize="x-small")


def draw_speculation(result: Result, figure: Figure) -> None:
    """By batch: speed-up measured and by bytes, and draft and verify time, for each depth; by depth, acceptance."""
    axes = figure.subplots(1, 3)
    by_depth: dict[int | None, list[Result]] = defaultdict(list)
    for row in result["results"]:
        by_depth[row["depth"]].append(row)
    for depth, rows in by_depth.items():
        batches = [row["batch"] for row in rows]
        name = "chosen" if depth is None else f"depth {depth}"
        colour = "black" if depth is None else f"C{depth}"
        if depth != 0:
            axes[0].plot(batches, [row["speedup"] for row in rows], marker="o", color=colour, label=name)
            axes[1].plot(batches, [row["verify_ms"] for row in rows], marker="o", color=colour, label=f"verify, {name}")
            axes[1].plot(batches, [row["draft_ms"] for row in rows], "--", marker="x", color=colour, label="draft")
        if depth:
            axes[0].plot(batches, [row["predicted_speedup"] for row in rows], ":", color=colour, label="by bytes")
    axes[0].axhline(1, color="grey", linewidth=0.8)
    for axis, label in ((axes[0], "times plain decoding"), (axes[1], "ms a step")):
        _label(axis, "batch size", label)
        axis.set_ylim(bottom=0)
    for row in by_depth[max(depth for depth in by_depth if depth is not None)]:
        places = range(1, len(row["acceptance"]) + 1)
        axes[2].plot(places, row["acceptance"], marker="o", label=f"batch {row['batch']}")
    axes[2].set(xlabel="draft", ylabel="acceptance, those before it accepted", ylim=(0, 1), xticks=list(places))
    axes[2].grid(alpha=0.3)
    for axis in axes:
        axis.legend(fontsize="x-small")


def draw_speculation_moving(result: Result, figure: Figure) -> None:
    """Phase by phase: tokens a second of the chosen depth and of plain decoding, cost and acceptance beside them."""
    axis = figure.subplots()
    phases = result["phases"]
    for offset, field in ((-0.2, "plain"), (0.2, "chosen")):
        rates = [phase[field] for phase in phases]
        axis.bar([place + offset for place in range(len(phases))], rates, 0.4, label=field)
    for place, phase in enumerate(phases):
        note = f"{-phase['cost']:+.1%}\n{phase['mean_depth']:.1f} drafts"
        axis.annotate(note, (place, max(phase["plain"], phase["chosen"])), ha="center", va="bottom", fontsize="small")
    names = [
        f"batch {phase['batch']}\nacceptance {phase['acceptance'][0] if phase['acceptance'] else 0:.2f}"
        for phase in phases
    ]
    axis.set_xticks(range(len(phases)), names, fontsize="small")
    axis.set_ylabel("tokens/s")
    axis.margins(y=0.15)
    axis.legend(fontsize="x-small")


def draw_side_by_side(result: Result, figure: Figure) -> None:
    """Tokens a second of one process alone and of several at a time, each with its share of the rate alone."""
    axis = figure.subplots()
    rates = [result["alone"], *result["together"]]
    names = ["alone", *(f"process {index} of {len(result['together'])}" for index in range(len(result["together"])))]
    axis.bar(range(len(rates)), [rate["median"] for rate in rates], 0.5)
    for place, (rate, share) in enumerate(zip(result["together"], result["shares"], strict=True), start=1):
        axis.annotate(f"{share['median']:.2f} of alone", (place, rate["median"]), ha="center", va="bottom")
    axis.set_xticks(range(len(rates)), names)
    axis.set_ylabel("tokens/s")


def draw_busy(result: Result, figure: Figure) -> None:
    """Each pass's milliseconds with the device busy, and in gaps between its kernels."""
    axis = figure.subplots()
    rows = result["results"]
    busy = [row["timeline"]["busy"] for row in rows]
    axis.bar(range(len(rows)), busy, 0.5, label="device busy")
    axis.bar(range(len(rows)), [row["timeline"]["gaps"] for row in rows], 0.5, bottom=busy, label="gaps")
    for place, row in enumerate(rows):
        axis.annotate(f"{row['busy_over_bytes']:.2f} x bytes", (place, busy[place]), ha="center", va="bottom")
    axis.set_xticks(range(len(rows)), [row["name"] for row in rows])
    axis.set_ylabel("ms")
    axis.legend(fontsize="small")


def draw_parallel(result: Result, figure: Figure) -> None:
    """Each pass's milliseconds beside the plan's bound, and those of its collectives on the first GPU."""
    axis = figure.subplots()
    rows, passes = result["results"], {of["name"]: of for of in result["passes"]}
    collectives = [passes[row["name"]]["devices"][0]["collectives"] if row["name"] in passes else 0.0 for row in rows]
    bounds = [1e3 * (row["bound_seconds"] or 0.0) for row in rows]
    medians = [1e3 * row["seconds"]["median"] for row in rows]
    for shift, values, label in (
        (-0.25, medians, "median"),
        (0.0, bounds, "bound"),
        (0.25, collectives, "collectives"),
    ):
        axis.bar([place + shift for place in range(len(rows))], values, 0.22, label=label)
    for place, row in enumerate(rows):
        axis.annotate(f"{row['tokens_per_second']:.0f} tokens/s", (place, medians[place]), ha="center", va="bottom")
    axis.set_xticks(range(len(rows)), [row["name"] for row in rows])
    axis.set_ylabel("ms")
    axis.legend(fontsize="small")


KINDS: Mapping[str, Callable[[Result, Figure], None]] = {
    "forward": draw_forward,
    "serving": draw_serving,
    "moe": draw_experts,
    "dense": draw_dense,
    "accuracy": draw_accuracy,
    "cpu_peer": draw_cpu_peer,
    "speculation": draw_speculation,
    "speculation_moving": draw_speculation_moving,
    "side_by_side": draw_side_by_side,
    "busy": draw_busy,
    "parallel": draw_parallel,
}
"""What draws a result, by its `benchmark`; one without the field is `moe.py`'s."""

TABLES = frozenset({"attention", "host", "speculation_profile", "speculation_tokens", "starts"})
"""Benchmarks whose results are not drawn: their tables say all."""


def is_drawn(source: Path) -> bool:
    """Whether a result is of a benchmark that is drawn; what is no result is, so that drawing says why not."""
    try:
        return json.loads(source.read_text()).get("benchmark") not in TABLES
    except (AttributeError, ValueError):
        return True


def draw(source: Path, target: Path) -> None:
    """Draws the result in `source` to the PNG file `target`.

    Raises:
        NotDrawableError: `source` is no benchmark's result.
        OSError: It cannot be read, or `target` not be written.
    """
    from matplotlib.figure import Figure

    try:
        result = json.loads(source.read_text())
    except ValueError as error:
        raise NotDrawableError(f"{source}: found no JSON ({error}), expected a benchmark's result") from error
    known = result if isinstance(result, dict) else {}
    kind = str(known.get("benchmark", "moe" if "experts" in known else None))
    if kind not in KINDS:
        raise NotDrawableError(f"{source}: found benchmark {kind}, expected one of {', '.join(KINDS)}")
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    KINDS[kind](result, figure)
    figure.suptitle(f"{source.stem}: {_machine(result)}", fontsize="medium")
    figure.savefig(target, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit status is 1 if a file could not be drawn."""
    parser = argparse.ArgumentParser(prog="plot.py", description="Draw results of the benchmarks as PNG files.")
    parser.add_argument("files", metavar="FILE", type=Path, nargs="*", help="default: all of benchmarks/results/")
    files = parser.parse_args(arguments).files or sorted(filter(is_drawn, RESULTS.glob("*.json")))
    status = 0
    for source in files:
        try:
            draw(source, source.with_suffix(".png"))
            print(source.with_suffix(".png"))
        except (NotDrawableError, OSError) as error:
            print(f"plot.py: error: {error}", file=sys.stderr)
            status = 1
    return status


def _label(axis: Axes, load: str, times: str) -> None:
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel(load)
    axis.set_ylabel(times)
    axis.grid(alpha=0.3)


def _machine(result: Result) -> str:
    if "gpu" in result:
        return str(result["gpu"])
    environment = result["environment"]
    return f"{result['model']}, {environment['cpu']}, {environment['cores']} cores"


if __name__ == "__main__":
    sys.exit(main())
