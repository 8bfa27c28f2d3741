"""How weights are stored: bits, scales and blocks by tensor role."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from step3p5.byte_account import EXPERT_ROLES
from step3p5.checkpoint_files import StoredTensor
from step3p5.checkpoint_tensors import FLOAT32_ROLES, TensorRole, TensorSpec
from step3p5.parallel_plan import NO_BLOCKS, QuantisedBlocks


@dataclass(frozen=True)
class WeightFormat:
    """A form of the checkpoint.

    Roles in `blocks` are stored with `quantised_bits` an element and `scale_bytes` a block, `FLOAT32_ROLES` in float32,
    all others in `itemsize` bytes, which activations and caches take as well. `fp8_products`: quantised matrices are
    multiplied in fp8.
    """

    name: str
    itemsize: int
    quantised_bits: float
    scale_bytes: int
    blocks: QuantisedBlocks
    fp8_products: bool

    def num_bytes(self, shape: tuple[int, ...], role: TensorRole) -> float:
        """Bytes of a tensor, or of a part of one, of `shape`."""
        elements = math.prod(shape)
        if role in FLOAT32_ROLES:
            return elements * 4.0
        if role not in self.blocks.roles:
            return float(elements * self.itemsize)
        *stacked, rows, columns = shape
        blocks = math.prod(stacked) * math.ceil(rows / self.blocks.rows) * math.ceil(columns / self.blocks.columns)
        return elements * self.quantised_bits / 8 + blocks * self.scale_bytes


_MATRICES = frozenset(TensorRole) - FLOAT32_ROLES - {TensorRole.HIDDEN_NORM, TensorRole.QK_NORM, TensorRole.ROUTER}

FORMATS: Mapping[str, WeightFormat] = {
    "float32": WeightFormat("float32", 4, 32, 0, NO_BLOCKS, fp8_products=False),
    "bf16": WeightFormat("bf16", 2, 16, 0, NO_BLOCKS, fp8_products=False),
    # e4m3 with float32 scales of 128 x 128 blocks, routed experts only: with attention and the dense MLPs quantised
    # too, the checkpoint would take 189 GiB; with the experts alone it takes 194, and the released one 195.
    "fp8": WeightFormat("fp8", 2, 8, 4, QuantisedBlocks(128, 128, EXPERT_ROLES), fp8_products=True),
    # GGUF's Q4_K: 256 elements of a row in 144 bytes. 111 GB; the released Q4_K_S file, a few tensors of which are
    # kept in more bits, takes 111.5.
    "int4": WeightFormat("int4", 2, 4.5, 0, QuantisedBlocks(1, 256, _MATRICES), fp8_products=False),
}
"""The formats by the name that `--dtype` takes."""


def stored_format(tensors: Mapping[str, TensorSpec], headers: Mapping[str, StoredTensor]) -> WeightFormat:
    """The format that a checkpoint's headers show, with the roles that are quantised in it.

    Args:
        tensors: The model's tensors by hub name.
        headers: What the files hold, by hub name.
    """
    dtypes = {name: headers[name].dtype for name in tensors if name in headers}
    quantised = frozenset(tensors[name].role for name, dtype in dtypes.items() if dtype == "F8_E4M3")
    if quantised:
        fp8 = FORMATS["fp8"]
        return replace(fp8, blocks=replace(fp8.blocks, roles=quantised))
    is_float32 = any(dtypes[name] == "float32" for name in dtypes if tensors[name].role not in FLOAT32_ROLES)
    return FORMATS["float32" if is_float32 else "bf16"]
