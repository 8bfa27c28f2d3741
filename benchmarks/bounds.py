"""The least time of a pass on this machine's GPUs, as `step3p5.plan` computes it from the data sheet."""

from __future__ import annotations

from forward_cases import Case

from step3p5.parallel_plan import ParallelPlan
from step3p5.plan.gpus import GPU, GPUS
from step3p5.plan.step_time import decode_step, prefill_step
from step3p5.plan.weight_formats import FORMATS


def known_gpu(name: str) -> GPU | None:
    """The plan's GPU of a device's name, as `torch.cuda.get_device_name` gives it; `None` where it knows none."""
    return next((gpu for key, gpu in GPUS.items() if key in name.lower()), None)


def this_gpu() -> GPU | None:
    """The plan's GPU that is here; `None` without PyTorch, or where the plan does not know the GPU."""
    try:
        import torch
    except ImportError:
        return None
    return known_gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def bound_seconds(case: Case, plan: ParallelPlan, gpu: GPU) -> float:
    """The least seconds of a case's pass with bfloat16 weights, latencies aside."""
    forward, weights = case.forward, FORMATS["bf16"]
    if case.decode_steps:
        return decode_step(plan, weights, gpu, forward.batch_size, forward.context).seconds
    return prefill_step(plan, weights, gpu, forward.batch_size, forward.new_tokens).seconds
