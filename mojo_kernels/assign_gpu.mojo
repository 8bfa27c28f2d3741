"""Routing and grouping on a GPU: one block does both for few tokens, where starting two kernels takes longer than running them.
"""

from max.gpu import WARP_SIZE, barrier, lane_id, thread_idx, warp_id
from max.gpu.host import DeviceContext
from max.gpu.primitives import warp
from max.gpu.primitives.grid_controls import (
    PDLLevel,
    launch_dependent_grids,
    pdl_launch_attributes,
    wait_on_dependent_grids,
)
from std.memory import unsafe_stack_allocation

from .group_gpu import SharedIds, group_gpu
from .operands import Floats, Ids
from .route_gpu import route_gpu, warp_best
from .score import order_key, sigmoid

comptime WARPS = 16

comptime MAX_ASSIGNMENTS = 512
"""Assignments that the block holds in shared memory and ranks by comparing each with all."""

comptime MAX_EXPERTS_A_LANE = 16


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
):
    """A warp routes a token with its scores in registers, lane `e % WARP_SIZE` those of expert `e`; then all threads rank the choices.

    Parameters:
        normalize: See `step3p5_moe_assign`.
        experts_a_lane: At least `experts / WARP_SIZE`.
    """
    var chosen: SharedIds = unsafe_stack_allocation[
        MAX_ASSIGNMENTS, Int32, address_space=AddressSpace.SHARED
    ]()
    var lane = Int(lane_id())
    wait_on_dependent_grids()
    launch_dependent_grids()
    for token in range(Int(warp_id()), Int(tokens), WARPS):
        var scores = Array[Float32, experts_a_lane](fill=0)
        var keys = Array[Int32, experts_a_lane](fill=Int32.MIN)
        comptime for j in range(experts_a_lane):
            var e = lane + j * WARP_SIZE
            if e < Int(experts):
                scores[j] = sigmoid(
                    logits[unsafe_offset=token * Int(experts) + e]
                )
                keys[j] = order_key(scores[j] + bias[unsafe_offset=e])
        var total = Float32(0)
        var kept = Float32(0)
        for k in range(Int(top_k)):
            var key = Int32.MIN
            var index = Int32.MAX
            comptime for j in range(experts_a_lane):
                if keys[j] > key:
                    key = keys[j]
                    index = Int32(lane + j * WARP_SIZE)
            var best = Int(warp_best(key, index))
            var score = Float32(0)
            comptime for j in range(experts_a_lane):
                if best == lane + j * WARP_SIZE:
                    score = scores[j]
                    keys[j] = Int32.MIN
            score = warp.shuffle_idx(score, UInt32(best % WARP_SIZE))
            total += score
            if lane == k:
                kept = score
                chosen[unsafe_offset=token * Int(top_k) + k] = Int32(best)
                ids[unsafe_offset=token * Int(top_k) + k] = Int32(best)
        if lane < Int(top_k):
            comptime if normalize:
                kept /= total + 1e-20
            weights[unsafe_offset=token * Int(top_k) + lane] = kept * scale
    barrier()
    var count = Int(tokens * top_k)
    comptime threads = WARPS * WARP_SIZE
    for a in range(Int(thread_idx.x), count, threads):
        var expert = chosen[unsafe_offset=a]
        var place = 0
        for b in range(count):
            var other = chosen[unsafe_offset=b]
            place += Int(other < expert or (other == expert and b < a))
        rows[unsafe_offset=place] = Int32(a)
    for e in range(Int(thread_idx.x), Int(experts) + 1, threads):
        var before = 0
        for b in range(count):
            before += Int(chosen[unsafe_offset=b] < Int32(e))
        offsets[unsafe_offset=e] = Int32(before)


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
            grid_dim=1,
            block_dim=WARPS * WARP_SIZE,
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
