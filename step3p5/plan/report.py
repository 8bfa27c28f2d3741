"""A case as numbers (`summary`, for `--json`) and as text; comparisons and speculation as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from step3p5.layer_config import MoEConfig
from step3p5.plan.case import MODES, Case, Refused
from step3p5.plan.links import ExpertExchange, expert_exchange, layer_sent_bytes, num_collectives
from step3p5.plan.memory import UTILIZATION
from step3p5.plan.speculation import expected_speedup
from step3p5.plan.step_time import Part, decode_step, draft_step

DEPTHS = (1, 2, 3)
ACCEPTANCES = (0.2, 0.5, 0.8, 0.95)
BATCHES = (1, 8, 64)
"""What the table of speculation has."""


def summary(case: Case) -> dict[str, Any]:
    """Everything that is counted, in bytes, operations and seconds."""
    memory, step, load = case.memory, case.step, case.load
    return {
        "model": case.source.name,
        "dtype": case.source.weights.name,
        "gpu": case.gpu.name,
        "count": case.count,
        "mode": case.mode,
        "flags": MODES[case.mode].flags(case.count),
        "batch": load.batch,
        "context": load.context,
        "memory_per_device": {
            "weights": memory.weights,
            "kv_cache": dict(memory.cache),
            "activations": memory.activations,
            "signal_buffers": memory.signals,
            "graphs": memory.graphs,
            "total": memory.total,
            "usable": UTILIZATION * case.gpu.memory,
            "fits": case.fits,
        },
        "largest_batch_at_context": case.largest_batch,
        "largest_context_at_batch": case.largest_context,
        "step": {
            "parts": {
                part.value: {"bytes": work.num_bytes, "flops": work.flops, "seconds": work.seconds}
                for part, work in step.work.items()
            },
            "memory_bytes_per_device": step.memory_bytes,
            "flops_per_device": step.flops,
            "bytes_per_token": step.memory_bytes * case.count / load.batch,
            "flops_per_token": step.flops * case.count / load.batch,
            "link_bytes_per_device": step.link_bytes,
            "link_bytes_per_layer": link_bytes_per_layer(case),
            "expert_exchange": {} if (ways := expert_exchange_of(case)) is None else asdict(ways),
            "collectives": num_collectives(case.plan),
            "seconds": step.seconds,
        },
        "tokens_per_second_per_request": 1 / step.seconds,
        "tokens_per_second": step.tokens_per_second,
    }


def link_bytes_per_layer(case: Case) -> dict[str, float]:
    """Bytes that every device sends in a dense and in a MoE layer of a decode step."""
    sent: dict[str, float] = {}
    for layer in case.source.model.layers:
        kind = "moe" if isinstance(layer.mlp, MoEConfig) else "dense"
        sent.setdefault(kind, layer_sent_bytes(case.plan, layer, case.load.batch, case.source.weights.itemsize))
    return sent


def expert_exchange_of(case: Case) -> ExpertExchange | None:
    """Ways to bring a step's tokens to the experts of a MoE layer; `None` where every device has every token."""
    moe = next((layer.mlp for layer in case.source.model.layers if isinstance(layer.mlp, MoEConfig)), None)
    if moe is None or not case.plan.own_requests:
        return None
    token_bytes = case.source.model.hidden_size * case.source.weights.itemsize
    return expert_exchange(moe, case.count, case.load.batch, token_bytes)


def text(case: Case) -> str:
    """One case in full."""
    memory, step, load = case.memory, case.step, case.load
    usable = UTILIZATION * case.gpu.memory
    lines = [
        f"{case.source.name}, {case.source.weights.name}, on {case.count} x {case.gpu.name}, {case.mode}",
        f"{MODES[case.mode].flags(case.count)}",
        "",
        f"GB on each device{'batch ' + str(load.batch) + ', context ' + str(load.context):>40}",
        *(
            f"  {name:<34}{num_bytes / 1e9:>9.2f}"
            for name, num_bytes in (
                ("weights", memory.weights),
                *((f"KV cache, {kind}", of_kind) for kind, of_kind in memory.cache.items()),
                ("activations", memory.activations),
                ("buffers of the collectives", memory.signals),
                ("kernels and graphs (allowance)", memory.graphs),
                ("in all", memory.total),
            )
        ),
        f"  {'usable':<34}{usable / 1e9:>9.2f}  {UTILIZATION:.0%} of {case.gpu.memory / 1e9:.0f}: "
        + ("fits" if case.fits else "does NOT fit"),
        f"largest batch at context {load.context}: {case.largest_batch}",
        f"largest context at batch {load.batch}: {case.largest_context}",
        "",
        f"{'a decode step, busiest device':<36}{'MB':>10}{'GFLOP':>10}{'us':>10}",
        *(
            f"  {part.value + (' (sent)' if part is Part.LINKS else ''):<34}{work.num_bytes / 1e6:>10.1f}"
            f"{work.flops / 1e9:>10.2f}{work.seconds * 1e6:>10.1f}"
            for part, work in step.work.items()
            if work.num_bytes
        ),
        f"  {'least time, latencies aside':<34}{step.memory_bytes / 1e6:>10.1f}{step.flops / 1e9:>10.2f}"
        f"{step.seconds * 1e6:>10.1f}",
        f"a token, all devices: {step.memory_bytes * case.count / load.batch / 1e9:.2f} GB, "
        f"{step.flops * case.count / load.batch / 1e9:.1f} GFLOP",
    ]
    if case.count > 1:
        sent = ", ".join(f"{kind} {num_bytes / 1e3:.1f} kB" for kind, num_bytes in link_bytes_per_layer(case).items())
        lines.append(f"each device sends a layer: {sent}; {num_collectives(case.plan)} collectives a step")
    if (ways := expert_exchange_of(case)) is not None:
        lines += [
            "ways to the experts and back, kB that each device sends a layer:",
            f"  {'gather, reduce-scatter':<36}{ways.gather_and_scatter / 1e3:>10.1f}",
            f"  {'gather, all-reduce':<36}{ways.gather_and_all_reduce / 1e3:>10.1f}",
            f"  {'dispatch, combine: to devices (plan)':<36}{ways.dispatch_to_devices / 1e3:>10.1f}",
            f"  {'dispatch, combine: to experts':<36}{ways.dispatch_to_experts / 1e3:>10.1f}",
        ]
    lines.append(
        f"at most {1 / step.seconds:.0f} tokens/s a request, {step.tokens_per_second:.0f} tokens/s for the node"
    )
    return "\n".join(lines)


def comparison(rows: Sequence[Case | Refused], marked: Sequence[Case], overall: Case | None) -> str:
    """A line a case: `*` marks the best of its number of devices, `**` the best of all."""
    lines = [
        f"{'GPUs':>4} {'mode':<6}{'weights':>9}{'in all':>9}{'largest':>10}{'step':>9}{'a request':>11}{'node':>10}",
        f"{'':>4} {'':<6}{'GB each':>9}{'GB each':>9}{'batch':>10}{'ms':>9}{'tokens/s':>11}{'tokens/s':>10}",
    ]
    for row in rows:
        if isinstance(row, Refused):
            lines.append(f"{row.count:>4} {row.mode:<6}  refused: {row.error}")
            continue
        mark = "**" if row is overall else "*" if any(row is case for case in marked) else ""
        line = (
            f"{row.count:>4} {row.mode:<6}{row.memory.weights / 1e9:>9.1f}{row.memory.total / 1e9:>9.1f}"
            f"{row.largest_batch:>10}"
        )
        if row.fits:
            line += (
                f"{row.step.seconds * 1e3:>9.3f}{1 / row.step.seconds:>11.0f}{row.step.tokens_per_second:>10.0f} {mark}"
            )
        else:
            line += "  does not fit"
        lines.append(line.rstrip())
    return "\n".join(lines)


def speculation(case: Case) -> list[dict[str, float]]:
    """Expected speed-up of drafting with the MTP layers, by batch, depth and acceptance, from the least times."""
    weights, context = case.source.weights, case.load.context

    def forward_cost(batch: int, new_tokens: int) -> float:
        return decode_step(case.plan, weights, case.gpu, batch, context, new_tokens).seconds

    def draft_cost(batch: int) -> float:
        return draft_step(case.plan, weights, case.gpu, batch, context).seconds

    speedup = partial(expected_speedup, forward_cost=forward_cost, draft_cost=draft_cost)
    return [
        {"batch": batch, "depth": depth, "acceptance": acceptance, "speedup": speedup(batch, depth, acceptance)}
        for batch in sorted({*BATCHES, case.load.batch})
        for depth in DEPTHS[: len(case.source.model.mtp_layers)]
        for acceptance in ACCEPTANCES
    ]


def speculation_text(rows: Sequence[dict[str, float]]) -> str:
    """The speed-ups as a table: a line for each batch and depth, a column for each acceptance."""
    lines = ["expected speed-up of drafting", f"{'batch':>6}{'depth':>7}" + "".join(f"{a:>8}" for a in ACCEPTANCES)]
    for start in range(0, len(rows), len(ACCEPTANCES)):
        line = rows[start : start + len(ACCEPTANCES)]
        lines.append(f"{line[0]['batch']:>6}{line[0]['depth']:>7}" + "".join(f"{row['speedup']:>8.2f}" for row in line))
    return "\n".join(lines)
