"""Routing and grouping on a GPU: one block does both for few tokens, where starting two kernels takes longer than running them.

What takes time with few tokens is waiting, for memory and for one operation after the other: so every thread scores an
expert, and a warp then chooses from shared memory.
"""

from max.gpu import (
    MAX_THREADS_PER_BLOCK_METADATA,
    WARP_SIZE,
    barrier,
    block_dim,
    thread_idx,
    warp_id,
)
from max.gpu.host import DeviceContext
from max.gpu.primitives.grid_controls import (
    PDLLevel,
    launch_dependent_grids,
    pdl_launch_attributes,
    wait_on_dependent_grids,
)
from std.math import ceildiv
from std.memory import unsafe_stack_allocation
from std.sys import is_nvidia_gpu
from std.sys._assembly import inlined_assembly
from std.utils.static_tuple import StaticTuple

from .choose_gpu import Share, assign_experts, group_chosen, score_experts
from .group_gpu import SharedIds, group_gpu
from .operands import Floats, Ids
from .route_gpu import route_gpu
from .stream_gpu import SharedFloats

comptime MAX_THREADS = 1024

comptime MAX_ASSIGNMENTS = 128
"""Assignments that the block holds in shared memory and ranks by comparing each with all. With more, two launches take
less time: for 64 tokens 10 microseconds instead of 48, for 16 about the same (on an H200)."""

comptime MAX_EXPERTS_A_LANE = 16

comptime SCORES = 4608
"""Scores that the block holds in shared memory at a time: those of 16 tokens with 288 experts."""


@always_inline
def bring(bias: Floats, share: Share):
    """Asks the cache that all multiprocessors share for what a choice adds; no value is looked at.
    """
    comptime if is_nvidia_gpu():
        inlined_assembly[
            "prefetch.global.L2 [$0];",
            NoneType,
            constraints="l,~{memory}",
        ](Int(bias.unsafe_offset(Int(share.first))))


@__llvm_metadata(
    MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](MAX_THREADS)
)
@__name(t"step3p5_assign_{normalize}_{experts_a_lane}")
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
    """All threads score the experts of some tokens, a warp a token chooses; at the end all threads group.

    Parameters:
        normalize: See `step3p5_moe_assign`.
        experts_a_lane: At least `experts / WARP_SIZE`.
    """
    comptime TOGETHER = SCORES // (experts_a_lane * WARP_SIZE)
    var chosen: SharedIds = unsafe_stack_allocation[
        MAX_ASSIGNMENTS + 4,
        Int32,
        alignment=16,
        address_space=AddressSpace.SHARED,
    ]()
    var scores: SharedFloats = unsafe_stack_allocation[
        SCORES, Float32, address_space=AddressSpace.SHARED
    ]()
    var keys: SharedIds = unsafe_stack_allocation[
        SCORES, Int32, address_space=AddressSpace.SHARED
    ]()
    var all = Int(experts)
    var each = Int(top_k)
    var share = Share(all)
    bring(bias, share)
    # The experts' kernel has something to read meanwhile, and waits for this one before it looks at a choice.
    launch_dependent_grids()
    wait_on_dependent_grids()
    for first in range(0, Int(tokens), TOGETHER):
        var size = min(Int(tokens) - first, TOGETHER)
        # All warps have chosen from what stands here before.
        barrier()
        score_experts(
            scores,
            keys,
            logits.unsafe_offset(first * all),
            bias,
            size * all,
            share,
        )
        barrier()
        for t in range(Int(warp_id()), size, Int(block_dim.x) // WARP_SIZE):
            var to = (first + t) * each
            assign_experts[normalize, experts_a_lane](
                ids.unsafe_offset(to),
                weights.unsafe_offset(to),
                chosen.unsafe_offset(to),
                scores.unsafe_offset(t * all),
                keys.unsafe_offset(t * all),
                all,
                each,
                scale,
            )
    var count = Int(tokens) * each
    if thread_idx.x < 4:
        chosen[unsafe_offset=count + Int(thread_idx.x)] = Int32.MAX
    barrier()
    group_chosen(rows, offsets, chosen, count, all)


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

    var threads = min(tokens * experts + top_k + 1, MAX_THREADS)

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
            block_dim=ceildiv(threads, WARP_SIZE) * WARP_SIZE,
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
