"""The model's graphs on GPUs, and a program that compiles some of them for a target without one.

    python tests/gpu_models.py cuda:sm_90a 2 ops whole tp tp-ep dp-ep

Graphs that are compiled together share what is equal in them, which is nearly all of the time that they take. Virtual
devices are a property of the process, so that every target needs one of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

if __name__ == "__main__":
    from max.driver import set_virtual_device_api, set_virtual_device_count, set_virtual_device_target_arch

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    _api, _arch = sys.argv[1].split(":")
    set_virtual_device_api(_api)
    set_virtual_device_target_arch(_arch)
    set_virtual_device_count(int(sys.argv[2]))

from gpu_ops import all_ops
from max import tree
from max.driver import Accelerator
from max.dtype import DType
from max.engine import InferenceSession
from max.graph import DeviceRef, Graph, Module
from max.nn.kv_cache import KVCacheParams
from parallel_runner import cache_params, graph_config
from test_parallel_graph import SMALLEST
from test_parallel_plan import MODES, plan_of

from step3p5.config_parser import parse_model_config
from step3p5.greedy_draw import GreedyDraw
from step3p5.layer_config import ModelConfig
from step3p5.mtp import MTPDepth, PartialHead, SharedHead
from step3p5.parallel_plan import parallel_plan
from step3p5.parallel_step3p5 import ParallelStep3p5
from step3p5.speculation.cycle_graphs import Acceptance, Handover
from step3p5.speculation.graphs import RowSelection, TokenSelection, VerifyingStep3p5
from step3p5.step3p5 import Step3p5

HEADS, SLIDING_HEADS = 8, 12
"""Query heads a KV head, as in the released model, on full and on sliding layers: attention kernels depend on it."""

PER_LAYER = ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared")

DTYPE = DType.bfloat16


def model_of(mode: str, num_devices: int) -> ModelConfig:
    """As few layers as have every kind of operation; every device has one KV head, so that the attention kernels of all
    modes are the same."""
    groups = 1 if mode in ("whole", "mtp", "dp-ep") else num_devices
    other = {"attention_type": "sliding_attention", "head_dim": 128, "num_attention_groups": groups}
    # The draft's layer is as the last of the others.
    lists = {name: [*value, value[-1]] for name, value in SMALLEST.items() if name in PER_LAYER}
    return parse_model_config(
        SMALLEST
        | lists
        | {
            "hidden_size": 256,
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "share_expert_dim": 128,
            "vocab_size": 512,
            "head_dim": 128,
            "num_attention_groups": groups,
            "num_attention_heads": HEADS * groups,
            "attention_other_setting": other | {"num_attention_heads": SLIDING_HEADS * groups},
            "num_nextn_predict_layers": 1,
        }
    )


def named(module: Any) -> Any:
    """The module, its weights with names and no values."""
    for name, weight in module.raw_state_dict().items():
        weight.name = name
    return module


def parallel_graph(mode: str, num_devices: int, module: Module | None = None) -> Graph:
    """The model on several GPUs."""
    plan = plan_of(model_of(mode, num_devices), mode, num_devices)
    devices = [DeviceRef.GPU(index) for index in range(num_devices)]
    config = graph_config(plan, devices, DTYPE, cache_params(plan, devices, DTYPE))
    model = named(ParallelStep3p5(cast(Any, config)))
    return model.trace(*tree.leaves(model.input_tree()), name=f"parallel_{mode.replace('-', '_')}", module=module)


def single_config() -> SimpleNamespace:
    """What the graphs for one GPU read of a configuration."""
    plan, devices = parallel_plan(model_of("whole", 1), 1), [DeviceRef.GPU()]
    return graph_config(plan, devices, DTYPE, cache_params(plan, devices, DTYPE))


def whole_graph(module: Module) -> Graph:
    """The model on one GPU."""
    model = named(Step3p5(cast(Any, single_config())))
    return model.trace(*tree.leaves(model.input_tree()), name="whole", module=module)


def mtp_graphs(module: Module) -> Graph:
    """The graphs of speculation: the target that verifies, a depth that drafts, tokens and rows between them."""
    config = single_config()
    target = named(VerifyingStep3p5(cast(Any, config)))
    target.trace(*tree.leaves(target.input_tree()), name="target", module=module)
    (layer,) = config.model.mtp_layers
    cache = config.kv_params.child(layer.attention.kind, KVCacheParams)
    heads: list[SharedHead | PartialHead] = [
        SharedHead(config.model, DTYPE, DeviceRef.GPU()),
        PartialHead(64, config.model, DTYPE, DeviceRef.GPU()),
    ]
    for index, head in enumerate(heads):
        draft = named(MTPDepth(layer, config.model, cache, head, DTYPE, DeviceRef.GPU()))
        graph = draft.trace(*draft.input_types(), name=f"draft_{index}", module=module)
    rows = RowSelection(config.model.hidden_size, DTYPE, DeviceRef.GPU())
    rows.trace(*rows.input_types(), name="rows", module=module)
    tokens = TokenSelection(1, DeviceRef.GPU())
    tokens.trace(*tokens.input_types(), name="tokens", module=module)
    draw = GreedyDraw(config.model.vocab_size, DeviceRef.GPU())
    draw.trace(*draw.input_types(), name="draw", module=module)
    accept = Acceptance(3, config.model.hidden_size, DTYPE, DeviceRef.GPU())
    accept.trace(*accept.input_types(), name="acceptance", module=module)
    handover = Handover(3, DeviceRef.GPU())
    handover.trace(*handover.input_types(), name="handover", module=module)
    return graph


OTHERS: dict[str, Callable[[Module], Graph]] = {"ops": partial(all_ops, "ops"), "whole": whole_graph, "mtp": mtp_graphs}
"""What is not a mode."""


def compile_graphs(num_devices: int, names: list[str]) -> None:
    """Compiles graphs for the process's virtual devices: `ops` for all of them, `whole`, `mtp` or a mode."""
    module = Module()
    libraries: dict[Path, None] = {}
    for name in names:
        graph = parallel_graph(name, num_devices, module) if name in MODES else OTHERS[name](module)
        libraries |= dict.fromkeys(graph.kernel_libraries_paths)
    session = InferenceSession(devices=[Accelerator(index) for index in range(num_devices)])
    session.compile(module, custom_extensions=list(libraries))


if __name__ == "__main__":
    compile_graphs(int(sys.argv[2]), sys.argv[3:])
    sys.stdout.write("compiled")
    sys.stdout.flush()
    os._exit(0)  # with virtual devices, MAX's threads can abort the interpreter's ordinary exit
