"""Which type every tensor has in memory while the model runs.

A GPU runs in one type. A CPU multiplies in float32 whatever the weights are, so there bfloat16 weights save bytes to
read and nothing else: activations and cache are float32, and so are the weights that are too small to count.
"""

from __future__ import annotations

from max.dtype import DType
from max.graph import DeviceRef
from max.pipelines.modeling import config_enums

from .checkpoint_tensors import FLOAT32_ROLES, TensorRole

CPU_FLOAT32_ROLES = FLOAT32_ROLES | {TensorRole.HIDDEN_NORM, TensorRole.QK_NORM, TensorRole.ROUTER}
"""Roles whose weights a CPU holds in float32 whatever the encoding."""


def weight_dtype(role: TensorRole, encoding: DType, device: DeviceRef) -> DType:
    """The type in which a weight of `role` is held, for a model that runs in `encoding`."""
    float32_roles = CPU_FLOAT32_ROLES if device.is_cpu() else FLOAT32_ROLES
    return DType.float32 if role in float32_roles else encoding


def activation_dtype(encoding: DType, device: DeviceRef) -> DType:
    """The type of hidden states, keys and values."""
    return DType.float32 if device.is_cpu() else encoding


def allow_bfloat16_on_cpus() -> None:
    """Enters CPUs as devices for bfloat16 in MAX's table, which is one for all architectures of the process.

    MAX asks the table before it asks an architecture. For another architecture that has no kernels for it, an error at
    compile time then takes the place of the refusal.
    """
    devices = config_enums._SUPPORTED_DEVICES
    devices["bfloat16"] = tuple(dict.fromkeys(("cpu", *devices["bfloat16"])))
