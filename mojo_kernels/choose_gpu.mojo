"""Parts of the kernels that route few tokens in one block: a warp chooses a token's experts, all threads group the choices.
"""

from max.gpu import WARP_SIZE, block_dim, lane_id, thread_idx

from .operands import Floats, Ids
from .route_gpu import warp_best
from .score import order_key, sigmoid
from .stream_gpu import SharedFloats, SharedIds


@always_inline
def score_expert(
    scores: SharedFloats,
    keys: SharedIds,
    index: Int,
    logit: Float32,
    bias: Float32,
):
    """Stores the score of a token's expert and what orders it."""
    var score = sigmoid(logit)
    scores[unsafe_offset=index] = score
    keys[unsafe_offset=index] = order_key(score + bias)


@always_inline
def choose_experts[
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
    """A warp chooses a token's experts; lane `e % WARP_SIZE` holds the key of expert `e`.

    Parameters:
        normalize: See `step3p5_moe_assign`.
        experts_a_lane: At least `experts / WARP_SIZE`.

    Args:
        ids: The token's experts `[K]`.
        weights: Their weights `[K]`.
        chosen: The same experts in shared memory `[K]`.
        scores: The token's scores `[E]`.
        keys: What orders the experts `[E]`, see `order_key`.
        experts: `E`.
        top_k: `K`, at most `WARP_SIZE`.
        scale: Multiplies the weights last.
    """
    var lane = Int(lane_id())
    var own = Array[Int32, experts_a_lane](fill=Int32.MIN)
    comptime for j in range(experts_a_lane):
        var e = lane + j * WARP_SIZE
        if e < experts:
            own[j] = keys[unsafe_offset=e]
    var total = Float32(0)
    var kept = Float32(0)
    var kept_id = Int32(0)
    for k in range(top_k):
        var key = Int32.MIN
        var index = Int32.MAX
        comptime for j in range(experts_a_lane):
            if own[j] > key:
                key = own[j]
                index = Int32(lane + j * WARP_SIZE)
        var best = Int(warp_best(key, index))
        comptime for j in range(experts_a_lane):
            if best == lane + j * WARP_SIZE:
                own[j] = Int32.MIN
        var score = scores[unsafe_offset=best]
        total += score
        if lane == k:
            kept = score
            kept_id = Int32(best)
    if lane < top_k:
        chosen[unsafe_offset=lane] = kept_id
        ids[unsafe_offset=lane] = kept_id
        comptime if normalize:
            kept /= total + 1e-20
        weights[unsafe_offset=lane] = kept * scale


@always_inline
def group_chosen(
    rows: Ids, offsets: Ids, chosen: SharedIds, count: Int, experts: Int
):
    """All threads of the block rank the choices by comparing each with all.

    Args:
        rows: Assignments grouped by expert, ascending within each `[T * K]`.
        offsets: First assignment of every expert in `rows`, and the end `[E + 1]`.
        chosen: Experts of all assignments in shared memory `[T * K]`.
        count: `T * K`.
        experts: `E`.
    """
    var threads = Int(block_dim.x)
    for a in range(Int(thread_idx.x), count, threads):
        var expert = chosen[unsafe_offset=a]
        var place = 0
        for b in range(count):
            var other = chosen[unsafe_offset=b]
            place += Int(other < expert or (other == expert and b < a))
        rows[unsafe_offset=place] = Int32(a)
    for e in range(Int(thread_idx.x), experts + 1, threads):
        var before = 0
        for b in range(count):
            before += Int(chosen[unsafe_offset=b] < Int32(e))
        offsets[unsafe_offset=e] = Int32(before)
