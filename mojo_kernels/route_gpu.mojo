"""Chooses experts on a GPU: a warp a token, its scores in shared memory."""

from max.gpu import WARP_SIZE, block_idx, lane_id, warp_id
from max.gpu.host import DeviceContext
from max.gpu.memory import external_memory
from max.gpu.primitives import warp
from max.gpu.primitives.grid_controls import (
    PDLLevel,
    launch_dependent_grids,
    pdl_launch_attributes,
    wait_on_dependent_grids,
)
from max.gpu.sync import syncwarp
from std.math import ceildiv
from std.memory import unsafe_stack_allocation
from std.sys import size_of

from .choose_gpu import assign_experts
from .group_gpu import SharedIds
from .operands import Floats, Ids
from .score import order_key, sigmoid
from .stream_gpu import SharedFloats

comptime WARPS = 4
"""Tokens of a block."""


@always_inline
def warp_best(key: Int32, index: Int32) -> Int32:
    """The index of the largest key of all lanes, the lowest among equals."""
    var best_key = key
    var best = index
    var distance = WARP_SIZE // 2
    while distance > 0:
        var other_key = warp.shuffle_xor(best_key, UInt32(distance))
        var other = warp.shuffle_xor(best, UInt32(distance))
        if other_key > best_key or (other_key == best_key and other < best):
            best_key = other_key
            best = other
        distance //= 2
    return best


@__name(t"step3p5_route_any_{normalize}")
def route_any_kernel[
    normalize: Bool
](
    ids: Ids,
    weights: Floats,
    logits: Floats,
    bias: Floats,
    tokens: Int32,
    experts: Int32,
    top_k: Int32,
    scale: Float32,
):
    """Experts of a token and their weights.

    A warp's shared memory holds the scores, the keys that order them, and the choice: a chosen expert's key becomes
    the lowest integer.
    """
    wait_on_dependent_grids()
    launch_dependent_grids()
    var token = Int(block_idx.x) * WARPS + Int(warp_id())
    if token >= Int(tokens):
        return
    var lane = Int(lane_id())
    var shared = external_memory[
        Float32, address_space=AddressSpace.SHARED, alignment=16
    ]()
    var scores = shared.unsafe_offset(
        Int(warp_id()) * (2 * Int(experts) + Int(top_k))
    )
    var keys = scores.unsafe_offset(Int(experts)).unsafe_bitcast[Int32]()
    var chosen = keys.unsafe_offset(Int(experts))
    for e in range(lane, Int(experts), WARP_SIZE):
        var score = sigmoid(logits[unsafe_offset=token * Int(experts) + e])
        scores[unsafe_offset=e] = score
        keys[unsafe_offset=e] = order_key(score + bias[unsafe_offset=e])
    # A lane reads and changes the keys of its own experts only.
    var total = Float32(0)
    for k in range(Int(top_k)):
        var key = Int32.MIN
        var index = Int32.MAX
        for e in range(lane, Int(experts), WARP_SIZE):
            if keys[unsafe_offset=e] > key:
                key = keys[unsafe_offset=e]
                index = Int32(e)
        var best = Int(warp_best(key, index))
        syncwarp()
        total += scores[unsafe_offset=best]
        if best % WARP_SIZE == lane:
            keys[unsafe_offset=best] = Int32.MIN
        if lane == 0:
            chosen[unsafe_offset=k] = Int32(best)
    syncwarp()
    for k in range(lane, Int(top_k), WARP_SIZE):
        var best = chosen[unsafe_offset=k]
        var weight = scores[unsafe_offset=Int(best)]
        comptime if normalize:
            weight /= total + 1e-20
        ids[unsafe_offset=token * Int(top_k) + k] = best
        weights[unsafe_offset=token * Int(top_k) + k] = weight * scale


@__name(t"step3p5_route_{normalize}_{experts_a_lane}")
def route_kernel[
    normalize: Bool, experts_a_lane: Int
](
    ids: Ids,
    weights: Floats,
    logits: Floats,
    bias: Floats,
    tokens: Int32,
    experts: Int32,
    top_k: Int32,
    scale: Float32,
):
    """As `route_any_kernel`; the lanes choose from registers.

    Parameters:
        normalize: See `step3p5_moe_route`.
        experts_a_lane: At least `experts / WARP_SIZE`.
    """
    comptime EXPERTS = experts_a_lane * WARP_SIZE
    var scores: SharedFloats = unsafe_stack_allocation[
        WARPS * EXPERTS, Float32, address_space=AddressSpace.SHARED
    ]()
    var keys: SharedIds = unsafe_stack_allocation[
        WARPS * EXPERTS, Int32, address_space=AddressSpace.SHARED
    ]()
    var chosen: SharedIds = unsafe_stack_allocation[
        WARPS * WARP_SIZE, Int32, address_space=AddressSpace.SHARED
    ]()
    wait_on_dependent_grids()
    launch_dependent_grids()
    var of_block = Int(warp_id())
    var token = Int(block_idx.x) * WARPS + of_block
    if token >= Int(tokens):
        return
    var all = Int(experts)
    var each = Int(top_k)
    scores = scores.unsafe_offset(of_block * EXPERTS)
    keys = keys.unsafe_offset(of_block * EXPERTS)
    comptime for i in range(experts_a_lane):
        var e = i * WARP_SIZE + Int(lane_id())
        if e < all:
            var score = sigmoid(logits[unsafe_offset=token * all + e])
            scores[unsafe_offset=e] = score
            keys[unsafe_offset=e] = order_key(score + bias[unsafe_offset=e])
    syncwarp()
    assign_experts[normalize, experts_a_lane](
        ids.unsafe_offset(token * each),
        weights.unsafe_offset(token * each),
        chosen.unsafe_offset(of_block * WARP_SIZE),
        scores,
        keys,
        all,
        each,
        scale,
    )


def route_gpu[
    normalize: Bool
](
    ids: Ids,
    weights: Floats,
    logits: Floats,
    bias: Floats,
    tokens: Int,
    experts: Int,
    top_k: Int,
    scale: Float32,
    ctx: DeviceContext,
) raises:
    """Enqueues `route_kernel`, or `route_any_kernel` for more experts than a warp holds or chooses.
    """
    if tokens == 0 or top_k == 0:
        return

    def enqueue[experts_a_lane: Int]() raises {imm}:
        comptime kernel = route_kernel[normalize, experts_a_lane]
        ctx.enqueue_function[kernel](
            ids,
            weights,
            logits,
            bias,
            Int32(tokens),
            Int32(experts),
            Int32(top_k),
            scale,
            grid_dim=ceildiv(tokens, WARPS),
            block_dim=WARPS * WARP_SIZE,
            attributes=pdl_launch_attributes(PDLLevel.ON),
        )

    if top_k <= WARP_SIZE:
        comptime for experts_a_lane in [4, 9, 16]:
            if experts <= experts_a_lane * WARP_SIZE:
                return enqueue[experts_a_lane]()
    comptime kernel = route_any_kernel[normalize]
    ctx.enqueue_function[kernel](
        ids,
        weights,
        logits,
        bias,
        Int32(tokens),
        Int32(experts),
        Int32(top_k),
        scale,
        grid_dim=ceildiv(tokens, WARPS),
        block_dim=WARPS * WARP_SIZE,
        shared_mem_bytes=WARPS
        * (2 * experts + top_k)
        * size_of[DType.float32](),
        attributes=pdl_launch_attributes(PDLLevel.ON),
    )
