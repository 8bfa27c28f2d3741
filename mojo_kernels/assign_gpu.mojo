"""Routing and grouping on a GPU: one block does both for few tokens, where starting two kernels takes longer than running them.

What takes time with few tokens is waiting: for memory, for the instructions themselves, for one operation after the other.
So every thread scores an expert, a warp then chooses from shared memory, and all of it runs once in vain beforehand.
"""

from max.gpu import (
    MAX_THREADS_PER_BLOCK_METADATA,
    WARP_SIZE,
    barrier,
    block_dim,
    lane_id,
    thread_idx,
    warp_id,
)
from max.gpu.host import DeviceContext
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
from std.sys import is_nvidia_gpu
from std.sys._assembly import inlined_assembly
from std.utils.static_tuple import StaticTuple

from .group_gpu import SharedIds, group_gpu
from .operands import Floats, Ids
from .route_gpu import route_gpu
from .score import order_key, sigmoid

comptime MAX_THREADS = 1024

comptime MAX_ASSIGNMENTS = 512
"""Assignments that the block holds in shared memory and ranks by comparing each with all."""

comptime MAX_EXPERTS_A_LANE = 16

comptime SCORES = 4608
"""Scores that the block holds in shared memory at a time: those of 16 tokens with 288 experts."""

comptime TURNS = 2
"""Times that the kernel runs through. All but the last only bring its instructions, while the kernel before still runs."""

comptime SharedFloats = Pointer[
    Float32, MutUntrackedOrigin, address_space=AddressSpace.SHARED
]


@always_inline
def is_first_with_most(key: Int32) -> Bool:
    """Whether the calling lane's key is the largest, and no lower lane's is as large.
    """
    comptime if is_nvidia_gpu():
        var largest = inlined_assembly[
            "redux.sync.max.s32 $0, $1, 0xffffffff;",
            Int32,
            constraints="=r,r",
            has_side_effect=True,
        ](key)
        var lanes = warp.vote[DType.uint32](key == largest)
        var lower = (UInt32(1) << UInt32(lane_id())) - 1
        return key == largest and lanes & lower == 0
    else:
        var largest = key
        var distance = WARP_SIZE // 2
        while distance > 0:
            largest = max(largest, warp.shuffle_xor(largest, UInt32(distance)))
            distance //= 2
        var lanes = warp.vote[DType.uint64](key == largest)
        var lower = (UInt64(1) << UInt64(lane_id())) - 1
        return key == largest and lanes & lower == 0


@always_inline
def bring(bias: Floats, experts: Int):
    """Asks the cache that all multiprocessors share for what a choice adds; no value is looked at.
    """
    comptime if is_nvidia_gpu():
        if Int(thread_idx.x) < experts:
            inlined_assembly[
                "prefetch.global.L2 [$0];",
                NoneType,
                constraints="l,~{memory}",
            ](Int(bias.unsafe_offset(Int(thread_idx.x))))


@fieldwise_init
struct Share(ImplicitlyCopyable):
    """The experts whose scores are a thread's: those of logits `thread`, `thread + threads`, ... of tokens in a row.
    """

    var first: UInt32
    """Expert of the first logit."""
    var step: UInt32
    """From one logit to the next, modulo `experts`."""
    var experts: UInt32

    @always_inline
    def __init__(out self, experts: Int):
        self.experts = UInt32(experts)
        self.first = UInt32(thread_idx.x) % max(self.experts, 1)
        self.step = UInt32(block_dim.x) % max(self.experts, 1)

    @always_inline
    def behind(self, expert: UInt32) -> UInt32:
        """The expert of the logit behind that of `expert`."""
        var sum = expert + self.step
        return sum - self.experts if sum >= self.experts else sum


@always_inline
def score_experts(
    scores: SharedFloats,
    keys: SharedIds,
    logits: Floats,
    bias: Floats,
    size: Int,
    share: Share,
    real: Bool,
):
    """All threads score `size` logits of whole tokens; a thread requests its next logit before it looks at one.

    Args:
        scores: Results.
        keys: What orders them, see `order_key`.
        logits: The logits `[size]`.
        bias: What the choice adds to an expert's score.
        size: Number of logits.
        share: The thread's.
        real: Otherwise memory is not looked at.
    """
    var next = Int(thread_idx.x)
    var expert = share.first
    var next_logit = Float32(0)
    var next_bias = Float32(0)
    if real and next < size:
        next_logit = logits[unsafe_offset=next]
        next_bias = bias[unsafe_offset=Int(expert)]
    while next < size:
        var i = next
        var logit = next_logit
        var added = next_bias
        next += Int(block_dim.x)
        expert = share.behind(expert)
        if real and next < size:
            next_logit = logits[unsafe_offset=next]
            next_bias = bias[unsafe_offset=Int(expert)]
        var score = sigmoid(logit)
        scores[unsafe_offset=i] = score
        keys[unsafe_offset=i] = order_key(score + added)


@always_inline
def choose_experts[
    experts_a_lane: Int
](chosen: SharedIds, keys: SharedIds, experts: Int, top_k: Int):
    """A warp chooses a token's experts; each lane holds the keys of neighbouring ones.

    Parameters:
        experts_a_lane: At least `experts / WARP_SIZE`.

    Args:
        chosen: Result `[top_k]`; equal keys choose the lower expert first.
        keys: What orders the experts `[experts]`.
        experts: Number of experts.
        top_k: How many of them to choose.
    """
    var first = Int32(lane_id()) * Int32(experts_a_lane)
    var own = Array[Int32, experts_a_lane](fill=Int32.MIN)
    comptime for j in range(experts_a_lane):
        if first + Int32(j) < Int32(experts):
            own[j] = keys[unsafe_offset=Int(first) + j]
    for k in range(top_k):
        var most = own[0]
        comptime for j in range(1, experts_a_lane):
            most = max(most, own[j])
        var place = Int32(0)
        comptime for j in reversed(range(experts_a_lane)):
            if own[j] == most:
                place = Int32(j)
        if is_first_with_most(most):
            chosen[unsafe_offset=k] = first + place
            comptime for j in range(experts_a_lane):
                if place == Int32(j):
                    own[j] = Int32.MIN


@always_inline
def sum_in_order(value: Float32, count: Int) -> Float32:
    """The sum of the lower `count` lanes' values in the order of the lanes; those above hold zero.
    """
    comptime TOGETHER = 8
    var total = Float32(0)
    for first in range(0, count, TOGETHER):
        comptime for i in range(TOGETHER):
            total += warp.shuffle_idx(value, UInt32(first + i))
    return total


@always_inline
def group_chosen(
    rows: Ids,
    offsets: Ids,
    chosen: SharedIds,
    count: Int,
    experts: Int,
    real: Bool,
):
    """All threads of the block rank the choices by comparing each with all.

    Args:
        rows: Assignments grouped by expert, ascending within each `[count]`.
        offsets: First assignment of every expert in `rows`, and the end `[experts + 1]`.
        chosen: Experts of all assignments, and higher numbers behind them up to a multiple of four.
        count: Number of assignments.
        experts: Number of experts.
        real: Otherwise nothing is stored.
    """
    for i in range(Int(thread_idx.x), count + experts + 1, Int(block_dim.x)):
        var expert = Int32(i - count)
        var equals = 0
        if i < count:
            expert = chosen[unsafe_offset=i]
            equals = i
        var before = 0
        for b in range(0, count, 4):
            var others = chosen.unsafe_offset(b).unsafe_load[
                width=4, alignment=16
            ]()
            comptime for j in range(4):
                before += Int(
                    others[j] < expert
                    or (others[j] == expert and b + j < equals)
                )
        if real:
            if i < count:
                rows[unsafe_offset=before] = Int32(i)
            else:
                offsets[unsafe_offset=i - count] = Int32(before)


@__llvm_metadata(
    MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](MAX_THREADS)
)
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
    turns: Int32,
):
    """All threads score the experts of some tokens, a warp a token chooses; at the end all threads group.

    Before the last turn one token without logits goes the same way, to no result.

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
    var lane = Int(lane_id())
    var all = Int(experts)
    var each = Int(top_k)
    var share = Share(all)
    bring(bias, all)
    for turn in range(Int(turns)):
        var real = turn == Int(turns) - 1
        var end = Int(tokens) if real else min(Int(tokens), 1)
        if real:
            wait_on_dependent_grids()
            launch_dependent_grids()
        for first in range(0, end, TOGETHER):
            var size = min(end - first, TOGETHER)
            barrier()
            score_experts(
                scores,
                keys,
                logits.unsafe_offset(first * all),
                bias,
                size * all,
                share,
                real,
            )
            barrier()
            for t in range(Int(warp_id()), size, Int(block_dim.x) // WARP_SIZE):
                var to = (first + t) * each
                choose_experts[experts_a_lane](
                    chosen.unsafe_offset(to),
                    keys.unsafe_offset(t * all),
                    all,
                    each,
                )
                syncwarp()
                var expert = Int32(0)
                var weight = Float32(0)
                if lane < each:
                    expert = chosen[unsafe_offset=to + lane]
                    weight = scores[unsafe_offset=t * all + Int(expert)]
                comptime if normalize:
                    weight /= sum_in_order(weight, each) + 1e-20
                if real and lane < each:
                    ids[unsafe_offset=to + lane] = expert
                    weights[unsafe_offset=to + lane] = weight * scale
        if thread_idx.x < 4:
            chosen[unsafe_offset=end * each + Int(thread_idx.x)] = Int32.MAX
        barrier()
        group_chosen(rows, offsets, chosen, end * each, all, real)


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
            Int32(TURNS),
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
