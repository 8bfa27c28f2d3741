"""Parts of the kernel that routes few tokens in one block: all threads score, a warp a token chooses, all threads group.
"""

from max.gpu import WARP_SIZE, block_dim, lane_id, thread_idx
from max.gpu.primitives import warp
from max.gpu.sync import syncwarp
from std.sys import is_nvidia_gpu
from std.sys._assembly import inlined_assembly

from .group_gpu import SharedIds
from .operands import Floats, Ids
from .score import order_key, sigmoid
from .stream_gpu import SharedFloats


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
):
    """All threads score `size` logits of whole tokens; a thread requests its next logit before it looks at one.

    Args:
        scores: Results.
        keys: What orders them, see `order_key`.
        logits: The logits `[size]`.
        bias: What the choice adds to an expert's score.
        size: Number of logits.
        share: The thread's.
    """
    var next = Int(thread_idx.x)
    var expert = share.first
    var next_logit = Float32(0)
    var next_bias = Float32(0)
    if next < size:
        next_logit = logits[unsafe_offset=next]
        next_bias = bias[unsafe_offset=Int(expert)]
    while next < size:
        var i = next
        var logit = next_logit
        var added = next_bias
        next += Int(block_dim.x)
        expert = share.behind(expert)
        if next < size:
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
def assign_experts[
    normalize: Bool, experts_a_lane: Int
](
    ids: Ids,
    weights: Floats,
    chosen: SharedIds,
    scores: SharedFloats,
    keys: SharedIds,
    experts: Int,
    top_k: Int,
    scale: Float32,
):
    """A warp chooses a token's experts and weighs them; a lane weighs one, so that `top_k` is at most `WARP_SIZE`.

    Parameters:
        normalize: See `step3p5_moe_route`.
        experts_a_lane: At least `experts / WARP_SIZE`.

    Args:
        ids: Result, the token's `[top_k]`.
        weights: Result, likewise.
        chosen: The same experts, in shared memory.
        scores: Of the token's experts `[experts]`.
        keys: See `choose_experts`.
        experts: Number of experts.
        top_k: How many of them to choose.
        scale: Multiplies the weights last.
    """
    choose_experts[experts_a_lane](chosen, keys, experts, top_k)
    syncwarp()
    var lane = Int(lane_id())
    var expert = Int32(0)
    var weight = Float32(0)
    if lane < top_k:
        expert = chosen[unsafe_offset=lane]
        weight = scores[unsafe_offset=Int(expert)]
    comptime if normalize:
        weight /= sum_in_order(weight, top_k) + 1e-20
    if lane < top_k:
        ids[unsafe_offset=lane] = expert
        weights[unsafe_offset=lane] = weight * scale


@always_inline
def group_chosen(
    rows: Ids,
    offsets: Ids,
    chosen: SharedIds,
    count: Int,
    experts: Int,
):
    """All threads of the block rank the choices by comparing each with all.

    Args:
        rows: Assignments grouped by expert, ascending within each `[count]`.
        offsets: First assignment of every expert in `rows`, and the end `[experts + 1]`.
        chosen: Experts of all assignments, and higher numbers behind them up to a multiple of four.
        count: Number of assignments.
        experts: Number of experts.
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
        if i < count:
            rows[unsafe_offset=before] = Int32(i)
        else:
            offsets[unsafe_offset=i - count] = Int32(before)
