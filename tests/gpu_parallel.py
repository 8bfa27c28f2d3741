"""A program that compiles the model for several GPUs of a target, without one.

    python tests/gpu_parallel.py cuda:sm_90a tp-ep 2

Virtual devices are a property of the process, so that every target needs one of its own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    from max.driver import set_virtual_device_api, set_virtual_device_count, set_virtual_device_target_arch

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    _api, _arch = sys.argv[1].split(":")
    set_virtual_device_api(_api)
    set_virtual_device_target_arch(_arch)
    set_virtual_device_count(int(sys.argv[3]))

from max.driver import Accelerator
from max.dtype import DType
from max.engine import InferenceSession
from max.graph import DeviceRef, Graph
from parallel_runner import cache_params, parallel_model, trace
from test_parallel_graph import SMALLEST
from test_parallel_plan import plan_of

from step3p5.config_parser import parse_model_config

CONFIG = SMALLEST | {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512, "head_dim": 64}
CONFIG |= {"moe_intermediate_size": 128, "share_expert_dim": 128}
CONFIG["attention_other_setting"] = CONFIG["attention_other_setting"] | {"head_dim": 64}


def parallel_graph(mode: str, num_devices: int) -> Graph:
    """The graph in bfloat16, with weights that have names and no values."""
    plan = plan_of(parse_model_config(CONFIG), mode, num_devices)
    devices = [DeviceRef.GPU(index) for index in range(num_devices)]
    module = parallel_model(plan, devices, DType.bfloat16, cache_params(plan, devices, DType.bfloat16))
    for name, weight in module.raw_state_dict().items():
        weight.name = name
    return trace(module)


if __name__ == "__main__":
    session = InferenceSession(devices=[Accelerator(index) for index in range(int(sys.argv[3]))])
    session.compile(parallel_graph(sys.argv[2], int(sys.argv[3])))
    sys.stdout.write("compiled")
    sys.stdout.flush()
    os._exit(0)  # with virtual devices, MAX's threads can abort the interpreter's ordinary exit
