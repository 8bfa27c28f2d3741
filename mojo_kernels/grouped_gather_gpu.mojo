"""Brings the tokens of all assignments in the order of the experts."""

from max.gpu import block_idx, thread_idx
from max.gpu.host import DeviceContext

from .operands import Elements, Ids

comptime THREADS = 128

comptime WIDTH = 8
"""Values in 16 bytes."""


def gather_gpu(
    gathered: Pointer[BFloat16, MutAnyOrigin],
    x: Pointer[BFloat16, MutAnyOrigin],
    rows: Pointer[Int32, MutAnyOrigin],
    top_k: Int32,
    columns: Int32,
):
    """`gathered[s] = x[rows[s] / top_k]`: a block is an assignment."""
    var slot = Int(block_idx.x)
    var token = Int(rows[unsafe_offset=slot] // top_k)
    for c in range(Int(thread_idx.x) * WIDTH, Int(columns), THREADS * WIDTH):
        gathered.unsafe_offset(slot * Int(columns) + c).unsafe_store[
            alignment=16
        ](
            x.unsafe_offset(token * Int(columns) + c).unsafe_load[
                width=WIDTH, alignment=16
            ]()
        )


def launch_gather(
    gathered: Elements[DType.bfloat16],
    x: Elements[DType.bfloat16],
    rows: Ids,
    assignments: Int,
    top_k: Int,
    columns: Int,
    ctx: DeviceContext,
) raises:
    """Enqueues `gather_gpu`; `columns` is a multiple of 8."""
    ctx.enqueue_function[gather_gpu](
        gathered,
        x,
        rows,
        Int32(top_k),
        Int32(columns),
        grid_dim=assignments,
        block_dim=THREADS,
    )
