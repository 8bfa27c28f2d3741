"""Joins the attention over parts of the keys on a GPU: `Σ_p 2^(m_p - m) o_p / Σ_p 2^(m_p - m) l_p`."""

from max.gpu import WARP_SIZE, block_idx, lane_id, warp_id
from max.gpu.host import DeviceContext
from max.gpu.primitives import warp
from max.gpu.primitives.grid_controls import (
    PDLLevel,
    launch_dependent_grids,
    pdl_launch_attributes,
    wait_on_dependent_grids,
)
from std.builtin.device_passable import DevicePassable, DeviceTypeEncoder
from std.math import ceildiv, exp2
from std.utils.numerics import neg_inf

from .key_tiles_gpu import HEAD_DIM
from .operands import Elements, Floats

comptime WARPS = 4

comptime WIDTH = HEAD_DIM // 32
"""Columns of a lane."""


@fieldwise_init
struct Parts(DevicePassable, TrivialRegisterPassable):
    """Results of parts of the keys, for every query of the batch."""

    var sums: Floats
    """Weighted values `[parts, queries, HEAD_DIM]`, undefined where a part holds no key that the query sees."""
    var softmax: Floats
    """The largest score times log2 e, -infinity where there was no key, and the sum of weights `[parts, queries, 2]`."""
    var count: Int
    """Number of parts, at most 32."""
    var queries: Int

    comptime device_type: AnyType = Self

    def _to_device_type(
        self, mut encoder: Some[DeviceTypeEncoder], target: MutOpaquePointer[_]
    ):
        encoder.encode(self, target)

    @staticmethod
    def get_type_name() -> String:
        return "Parts"

    @always_inline
    def sums_of(self, part: Int, query: Int) -> Floats:
        return self.sums.unsafe_offset((part * self.queries + query) * HEAD_DIM)

    @always_inline
    def softmax_of(self, part: Int, query: Int) -> Floats:
        return self.softmax.unsafe_offset((part * self.queries + query) * 2)


@__name("step3p5_attend_merge")
def merge_kernel(result: Elements[DType.bfloat16], parts: Parts):
    """A warp joins the parts of one query, in their order; lane `p` looks at part `p`.
    """
    wait_on_dependent_grids()
    launch_dependent_grids()
    var query = Int(block_idx.x) * WARPS + Int(warp_id())
    if query >= parts.queries:
        return
    var lane = Int(lane_id())
    var largest = neg_inf[DType.float32]()
    var total = Float32(0)
    if lane < parts.count:
        var softmax = parts.softmax_of(lane, query).unsafe_load[
            width=2, alignment=8
        ]()
        largest = softmax[0]
        total = softmax[1]
    var weight = exp2(largest - warp.max(largest))
    var whole = warp.sum(weight * total)
    var sums = SIMD[DType.float32, WIDTH](0)
    for p in range(parts.count):
        var of_part = warp.shuffle_idx(weight, UInt32(p))
        if of_part != 0:
            sums += (
                of_part
                * parts.sums_of(p, query)
                .unsafe_offset(lane * WIDTH)
                .unsafe_load[width=WIDTH, alignment=16]()
            )
    result.unsafe_offset(query * HEAD_DIM + lane * WIDTH).unsafe_store[
        alignment=8
    ]((sums / whole).cast[DType.bfloat16]())


def launch_merge(
    result: Elements[DType.bfloat16], parts: Parts, ctx: DeviceContext
) raises:
    """Enqueues `merge_kernel`, whose result is `[queries, HEAD_DIM]`."""
    ctx.enqueue_function[merge_kernel](
        result,
        parts,
        grid_dim=ceildiv(parts.queries, WARPS),
        block_dim=WARPS * WARP_SIZE,
        attributes=pdl_launch_attributes(PDLLevel.ON),
    )
