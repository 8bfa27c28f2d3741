"""Groups assignments by expert on a GPU in one kernel, without atomic operations whose order would matter.

A block places one assignment a thread. It counts all assignments of every expert, and those before its own, itself:
that takes less time than another kernel would take to start.
"""

from max.gpu import (
    WARP_SIZE,
    barrier,
    block_dim,
    block_idx,
    lane_id,
    thread_idx,
    warp_id,
)
from max.gpu.host import DeviceContext, FuncAttribute
from max.gpu.memory import external_memory
from max.gpu.primitives import warp
from max.gpu.primitives.grid_controls import (
    PDLLevel,
    launch_dependent_grids,
    pdl_launch_attributes,
    wait_on_dependent_grids,
)
from std.atomic import Atomic, Ordering
from std.bit import pop_count
from std.math import ceildiv
from std.sys import is_nvidia_gpu, size_of
from std.sys._assembly import inlined_assembly

from .operands import Ids

comptime FEW = 256
"""Threads of a block where they suffice for all assignments."""

comptime MANY = 1024
"""Threads of a block elsewhere."""

comptime UNROLL = 8
"""Assignments that a thread requests before it counts the first."""

comptime SharedIds = Pointer[
    Int32, MutUntrackedOrigin, address_space=AddressSpace.SHARED
]


@always_inline
def rank_among_equals(value: Int32) -> Tuple[Int, Int]:
    """How many lower lanes hold the same value, and how many lanes do."""
    comptime if is_nvidia_gpu():
        var mask = inlined_assembly[
            "match.any.sync.b32 $0, $1, $2;",
            UInt32,
            constraints="=r,r,r",
            has_side_effect=True,
        ](value, UInt32(0xFFFFFFFF))
        var below = mask & ((UInt32(1) << UInt32(lane_id())) - 1)
        return Int(pop_count(below)), Int(pop_count(mask))
    else:
        var below = 0
        var all = 0
        for lane in range(WARP_SIZE):
            var equal = Int(warp.shuffle_idx(value, UInt32(lane)) == value)
            all += equal
            if lane < Int(lane_id()):
                below += equal
        return below, all


@always_inline
def count_equals(counts: SharedIds, value: Int32):
    """Adds the number of lanes that hold a value to its count; negative values do not count.
    """
    var below, all = rank_among_equals(value)
    if below == 0 and value >= 0:
        _ = Atomic[Int32].fetch_add[ordering=Ordering.RELAXED](
            counts.unsafe_offset(Int(value)), Int32(all)
        )


@always_inline
def scan_counts(starts: SharedIds, counts: SharedIds, experts: Int):
    """`starts[e]` becomes the sum of all `counts` below `e`, up to `starts[experts]`; by one warp.
    """
    var each = ceildiv(experts, WARP_SIZE)
    var first = min(Int(lane_id()) * each, experts)
    var last = min(first + each, experts)
    var sum = Int32(0)
    for e in range(first, last):
        sum += counts[unsafe_offset=e]
    var before = warp.prefix_sum[exclusive=True](sum)
    for e in range(first, last):
        starts[unsafe_offset=e] = before
        before += counts[unsafe_offset=e]
    if (
        last == experts
        and first < last
        or (experts == 0 and Int(lane_id()) == 0)
    ):
        starts[unsafe_offset=experts] = before


@__name("step3p5_group")
def group_kernel(
    rows: Ids, offsets: Ids, ids: Ids, total: Int32, experts: Int32
):
    """Places the block's assignments; the first block also writes `offsets`.

    Shared memory, in rows of `experts + 1`: the counts of all assignments, the counts of those before the block's, the
    experts' starts, and for every warp the counts of its own.
    """
    var row = Int(experts) + 1
    var all = external_memory[
        Int32, address_space=AddressSpace.SHARED, alignment=16
    ]()
    var before = all.unsafe_offset(row)
    var starts = before.unsafe_offset(row)
    var own = starts.unsafe_offset(row)
    var threads = Int(block_dim.x)
    var thread = Int(thread_idx.x)
    var warps = threads // WARP_SIZE
    for i in range(thread, (3 + warps) * row, threads):
        all[unsafe_offset=i] = 0
    wait_on_dependent_grids()
    launch_dependent_grids()
    barrier()
    var begin = Int(block_idx.x) * threads
    for base in range(0, Int(total), threads * UNROLL):
        var values = Array[Int32, UNROLL](fill=-1)
        comptime for u in range(UNROLL):
            var a = base + u * threads + thread
            if a < Int(total):
                values[u] = ids[unsafe_offset=a]
        comptime for u in range(UNROLL):
            var first = base + u * threads
            if first < Int(total):
                count_equals(all, values[u])
                if first < begin:
                    count_equals(before, values[u])
    var assignment = begin + thread
    var expert = Int32(-1)
    if assignment < Int(total):
        expert = ids[unsafe_offset=assignment]
    var rank, count = rank_among_equals(expert)
    if rank == 0 and expert >= 0:
        own[unsafe_offset=Int(warp_id()) * row + Int(expert)] = Int32(count)
    barrier()
    if warp_id() == 0:
        scan_counts(starts, all, Int(experts))
    barrier()
    if block_idx.x == 0:
        for e in range(thread, row, threads):
            offsets[unsafe_offset=e] = starts[unsafe_offset=e]
    if expert >= 0:
        var place = starts[unsafe_offset=Int(expert)]
        place += before[unsafe_offset=Int(expert)] + Int32(rank)
        for w in range(Int(warp_id())):
            place += own[unsafe_offset=w * row + Int(expert)]
        rows[unsafe_offset=Int(place)] = Int32(assignment)


def group_gpu(
    rows: Ids,
    offsets: Ids,
    ids: Ids,
    total: Int,
    experts: Int,
    ctx: DeviceContext,
) raises:
    """Enqueues `group_kernel`."""
    var threads = FEW if total <= FEW else MANY
    var bytes = (
        (3 + threads // WARP_SIZE) * (experts + 1) * size_of[DType.int32]()
    )
    ctx.enqueue_function[group_kernel](
        rows,
        offsets,
        ids,
        Int32(total),
        Int32(experts),
        grid_dim=max(ceildiv(total, threads), 1),
        block_dim=threads,
        shared_mem_bytes=bytes,
        func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(
            UInt32(bytes)
        ),
        attributes=pdl_launch_attributes(PDLLevel.ON),
    )
