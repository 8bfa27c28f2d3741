"""Brings the sums of every GPU's experts back to the GPUs whose tokens they are of, which add them up.

The way back of `dispatch_gpu`: each GPU puts its sums into its own mailbox, and each takes those of its own tokens from
the GPUs that have experts of them, in the GPUs' order. The same input thus gives the same bits.
"""

import extensibility
from extensibility import InputTensor, OutputTensor
from extensibility import _MutableInputTensor as MutableInputTensor
from max.gpu import block_idx, grid_dim, thread_idx
from max.gpu.host import DeviceContext

from .mailbox_gpu import (
    BLOCKS,
    MAX_DEVICES,
    SUMS,
    THREADS,
    WIDTH,
    Bounds,
    Mailboxes,
    any_here,
    mailboxes,
    owner_of,
    row_bounds,
)
from .operands import Elements, Floats, Ids, elements, expect_size


@__name(t"step3p5_send_sums_{dtype}")
def send_sums[
    dtype: DType
](
    boxes: Mailboxes[dtype],
    y: Floats,
    ids: Ids,
    bounds: Bounds,
    first: Int32,
    end: Int32,
):
    """Puts the sums of the tokens that have experts here into this GPU's mailbox.
    """
    var owner = 0
    for row in range(
        Int(block_idx.x), Int(bounds[boxes.devices]), Int(grid_dim.x)
    ):
        var chosen = ids.unsafe_offset(row * boxes.top_k)
        if not any_here(chosen, boxes.top_k, first, end):
            continue
        owner = owner_of(row, bounds, owner)
        var sums = boxes.sums(boxes.device, owner, row - Int(bounds[owner]))
        for c in range(
            Int(thread_idx.x) * WIDTH, boxes.hidden_size, THREADS * WIDTH
        ):
            var sum = y.unsafe_offset(row * boxes.hidden_size + c).unsafe_load[
                width=WIDTH, alignment=16
            ]()
            sums.unsafe_offset(c).unsafe_store[alignment=16](sum.cast[dtype]())
    boxes.announce(SUMS)


@__name(t"step3p5_receive_sums_{dtype}")
def receive_sums[
    dtype: DType
](
    boxes: Mailboxes[dtype],
    y: Elements[dtype],
    ids: Ids,
    tokens: Int32,
    experts_each: Int32,
):
    """Adds up what the experts of this GPU's tokens give, in float32."""
    boxes.await_all(SUMS)
    for t in range(Int(block_idx.x), Int(tokens), Int(grid_dim.x)):
        var devices = UInt32(0)
        for k in range(boxes.top_k):
            var id = ids[unsafe_offset=t * boxes.top_k + k]
            devices |= UInt32(1) << UInt32(id // experts_each)
        for c in range(
            Int(thread_idx.x) * WIDTH, boxes.hidden_size, THREADS * WIDTH
        ):
            var total = SIMD[DType.float32, WIDTH](0)
            comptime for device in range(MAX_DEVICES):
                if (devices >> UInt32(device)) & 1 != 0:
                    total += (
                        boxes.sums(device, boxes.device, t)
                        .unsafe_offset(c)
                        .unsafe_load[width=WIDTH, alignment=16]()
                        .cast[DType.float32]()
                    )
            y.unsafe_offset(t * boxes.hidden_size + c).unsafe_store[
                alignment=16
            ](total.cast[dtype]())


@extensibility.register("step3p5_combine_send")
struct Step3p5CombineSend:
    """Puts the sums of a GPU's experts where all GPUs find them."""

    @staticmethod
    def execute[
        target: StaticString, dtype: DType
    ](
        mailbox: MutableInputTensor[dtype=DType.uint8, rank=1, ...],
        addresses: InputTensor[dtype=DType.int64, rank=1, ...],
        y: InputTensor[dtype=DType.float32, rank=2, ...],
        ids: InputTensor[dtype=DType.int32, rank=2, ...],
        bounds: InputTensor[dtype=DType.int64, rank=1, ...],
        device: Int32,
        first: Int32,
        end: Int32,
        ctx: DeviceContext,
    ) raises:
        """Fills the second part of this GPU's mailbox.

        Parameters:
            target: Kind of device; a GPU.
            dtype: Type of the hidden states, to which the sums are rounded.

        Args:
            mailbox: This GPU's; see `Mailboxes`.
            addresses: Of all GPUs' mailboxes `[N]`, on the host.
            y: The experts' sums for all tokens `[R, H]`.
            ids: All tokens' experts `[R, K]`.
            bounds: Where every GPU's tokens begin among all, and the end `[N + 1]`, on the host.
            device: This GPU among all.
            first: The first expert here.
            end: The first expert behind those here.
            ctx: The device.
        """
        comptime op = "step3p5_combine_send"
        var rows = y.dim_size(0)
        expect_size(op, "ids[R, K] dim R", ids.dim_size(0), rows)
        var starts = row_bounds(op, bounds, addresses.dim_size(0))
        expect_size(op, "y[R, H] dim R", rows, Int(starts[MAX_DEVICES]))
        var boxes = mailboxes[dtype](
            op,
            mailbox.dim_size(0),
            addresses,
            Int(device),
            0,
            ids.dim_size(1),
            y.dim_size(1),
        )
        comptime if target == "cpu":
            raise Error(op, ": on a CPU, expected a GPU")
        else:
            ctx.enqueue_function[send_sums[dtype]](
                boxes,
                elements(y.unsafe_ptr()),
                elements(ids.unsafe_ptr()),
                starts,
                first,
                end,
                grid_dim=max(min(rows, BLOCKS), 1),
                block_dim=THREADS,
            )


@extensibility.register("step3p5_combine_receive")
struct Step3p5CombineReceive:
    """Adds up the sums of all GPUs' experts for a GPU's own tokens."""

    @staticmethod
    def execute[
        dtype: DType, //, target: StaticString
    ](
        y: OutputTensor[dtype=dtype, rank=2, ...],
        mailbox: MutableInputTensor[dtype=DType.uint8, rank=1, ...],
        addresses: InputTensor[dtype=DType.int64, rank=1, ...],
        ids: InputTensor[dtype=DType.int32, rank=2, ...],
        device: Int32,
        experts: Int32,
        ctx: DeviceContext,
    ) raises:
        """Waits for all GPUs' sums and adds up those of its own tokens.

        Parameters:
            dtype: Type of the hidden states.
            target: Kind of device; a GPU.

        Args:
            y: The sums `[T, H]`.
            mailbox: This GPU's; see `Mailboxes`.
            addresses: Of all GPUs' mailboxes `[N]`, on the host.
            ids: The tokens' experts `[T, K]`.
            device: This GPU among all.
            experts: Number of experts, of which every GPU has as many, in order.
            ctx: The device.
        """
        comptime op = "step3p5_combine_receive"
        var tokens = y.dim_size(0)
        expect_size(op, "ids[T, K] dim T", ids.dim_size(0), tokens)
        var boxes = mailboxes[dtype](
            op,
            mailbox.dim_size(0),
            addresses,
            Int(device),
            tokens,
            ids.dim_size(1),
            y.dim_size(1),
        )
        comptime if target == "cpu":
            raise Error(op, ": on a CPU, expected a GPU")
        else:
            ctx.enqueue_function[receive_sums[dtype]](
                boxes,
                elements(y.unsafe_ptr()),
                elements(ids.unsafe_ptr()),
                Int32(tokens),
                experts // Int32(addresses.dim_size(0)),
                grid_dim=max(min(tokens, BLOCKS), 1),
                block_dim=THREADS,
            )
