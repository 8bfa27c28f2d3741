"""Routing and grouping on a GPU: one block does both for few tokens, where starting two kernels takes longer than running them.
"""

from max.gpu import WARP_SIZE, barrier, thread_idx, warp_id
from max.gpu.host import DeviceContext
from max.gpu.memory import external_memory
from max.gpu.primitives.grid_controls import (
    PDLLevel,
    launch_dependent_grids,
    pdl_launch_attributes,
    wait_on_dependent_grids,
)
from std.memory import unsafe_stack_allocation

from .choose_gpu import choose_experts, group_chosen, score_expert
from .group_gpu import group_gpu
from .operands import Floats, Ids
from .route_gpu import route_gpu
from .stream_gpu import SharedIds

comptime WARPS = 16

comptime MAX_ASSIGNMENTS = 512
"""Assignments that the block holds in shared memory and ranks by comparing each with all."""

comptime MAX_EXPERTS_A_LANE = 16

comptime SCORE_BYTES = 8
"""Shared memory of an expert's score and key."""

comptime ROUND_BYTES = 40960
"""Shared memory of a round's scores and keys, so that the block needs no more than a kernel gets unasked."""


def assign_kernel[
    normalize: Bool, experts_a_lane: Int
](
    ids: Ids,
    weights: Floats,
    rows: Ids,
    offsets: Ids,
    logits: Floats,
    bias: Floats,
    tokens: Int32,
    experts: Int32,
    top_k: Int32,
    scale: Float32,
    together: Int32,
):
    """Rounds of `together <= WARPS` tokens: all threads score their experts, a warp a token chooses; at the end all threads group.

    Parameters:
        normalize: See `step3p5_moe_assign`.
        experts_a_lane: At least `experts / WARP_SIZE`.
    """
    comptime THREADS = WARPS * WARP_SIZE
    var chosen: SharedIds = unsafe_stack_allocation[
        MAX_ASSIGNMENTS, Int32, address_space=AddressSpace.SHARED
    ]()
    var scores = external_memory[
        Float32, address_space=AddressSpace.SHARED, alignment=16
    ]()
    var keys = scores.unsafe_offset(Int(together * experts)).unsafe_bitcast[
        Int32
    ]()
    wait_on_dependent_grids()
    launch_dependent_grids()
    for first in range(0, Int(tokens), Int(together)):
        var size = min(Int(tokens) - first, Int(together))
        var source = logits.unsafe_offset(first * Int(experts))
        for i in range(Int(thread_idx.x), size * Int(experts), THREADS):
            score_expert(
                scores,
                keys,
                i,
                source[unsafe_offset=i],
                bias[unsafe_offset=Int(UInt32(i) % UInt32(experts))],
            )
        barrier()
        var own = Int(warp_id())
        if own < size:
            var at = (first + own) * Int(top_k)
            choose_experts[normalize, experts_a_lane](
                ids.unsafe_offset(at),
                weights.unsafe_offset(at),
                chosen.unsafe_offset(at),
                scores.unsafe_offset(own * Int(experts)),
                keys.unsafe_offset(own * Int(experts)),
                Int(experts),
                Int(top_k),
                scale,
            )
        barrier()
    group_chosen(rows, offsets, chosen, Int(tokens * top_k), Int(experts))


def assign_gpu[
    normalize: Bool
](
    ids: Ids,
    weights: Floats,
    rows: Ids,
    offsets: Ids,
    logits: Floats,
    bias: Floats,
    tokens: Int,
    experts: Int,
    top_k: Int,
    scale: Float32,
    ctx: DeviceContext,
) raises:
    """Enqueues `assign_kernel`, or the kernels of routing and grouping for more than it takes.
    """

    def enqueue[experts_a_lane: Int]() raises {imm}:
        comptime kernel = assign_kernel[normalize, experts_a_lane]
        var each = max(experts, 1) * SCORE_BYTES
        var together = min(ROUND_BYTES // each, WARPS)
        ctx.enqueue_function[kernel](
            ids,
            weights,
            rows,
            offsets,
            logits,
            bias,
            Int32(tokens),
            Int32(experts),
            Int32(top_k),
            scale,
            Int32(together),
            grid_dim=1,
            block_dim=WARPS * WARP_SIZE,
            shared_mem_bytes=together * each,
            attributes=pdl_launch_attributes(PDLLevel.ON),
        )

    var few = tokens * top_k <= MAX_ASSIGNMENTS and top_k <= WARP_SIZE
    if few and experts <= 4 * WARP_SIZE:
        enqueue[4]()
    elif few and experts <= 9 * WARP_SIZE:
        enqueue[9]()
    elif few and experts <= MAX_EXPERTS_A_LANE * WARP_SIZE:
        enqueue[MAX_EXPERTS_A_LANE]()
    else:
        route_gpu[normalize](
            ids, weights, logits, bias, tokens, experts, top_k, scale, ctx
        )
        group_gpu(rows, offsets, ids, tokens * top_k, experts, ctx)
