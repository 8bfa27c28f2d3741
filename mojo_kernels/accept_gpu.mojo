"""Acceptance on a GPU: a block for a part of a request's hidden states; the first of them sees to the tokens."""

from max.gpu import barrier, block_idx, thread_idx
from max.gpu.host import DeviceContext
from max.gpu.primitives.grid_controls import (
    PDLLevel,
    launch_dependent_grids,
    pdl_launch_attributes,
    wait_on_dependent_grids,
)
from std.math import ceildiv

from .accepted import Accepted

comptime THREADS = 128

comptime WIDTH = 8
"""Columns of a thread."""


@__name(t"step3p5_accept_{dtype}_{width}")
def accept_kernel[dtype: DType, width: Int](all: Accepted[dtype]):
    """One part of one request.

    Parameters:
        dtype: Type of the hidden states.
        width: Columns of a thread, a divisor of their number.
    """
    wait_on_dependent_grids()
    launch_dependent_grids()
    var request = Int(block_idx.x)
    var count = all.count(request)
    if block_idx.y == 0:
        for first in range(0, all.rows(), THREADS):
            var row = first + Int(thread_idx.x)
            if row < all.rows():
                all.store_row(request, row, count)
        # A window is narrower than a block, which the launch sees to.
        var place = Int(thread_idx.x)
        var token = Int64(0)
        if place <= all.keep:
            token = all.token(request, count + 1 + place)
        # All have read the window, and the drafts that are accepted.
        barrier()
        if place <= all.keep:
            all.store_window(request, place, token)
    var column = (Int(block_idx.y) * THREADS + Int(thread_idx.x)) * width
    if column < all.hidden_size:
        all.move_states[width](request, count, column)


def accept_gpu[dtype: DType](all: Accepted[dtype], ctx: DeviceContext) raises:
    """Enqueues the kernel."""
    if all.requests == 0:
        return
    if all.keep >= THREADS:
        raise Error(
            "step3p5_accept: kept[B, K, H], dim K is ",
            all.keep,
            ", expected less than ",
            THREADS,
        )

    def launch[width: Int]() raises {imm}:
        ctx.enqueue_function[accept_kernel[dtype, width]](
            all,
            grid_dim=(
                all.requests,
                ceildiv(all.hidden_size, THREADS * width),
            ),
            block_dim=THREADS,
            attributes=pdl_launch_attributes(PDLLevel.ON),
        )

    if all.hidden_size % WIDTH == 0:
        launch[WIDTH]()
    else:
        launch[1]()
