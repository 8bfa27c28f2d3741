"""Brings the tokens of every GPU to those GPUs that have experts of theirs.

Every GPU puts its tokens into its own mailbox; every GPU then takes out of all mailboxes what its experts need. A token
thus crosses a link once for each GPU that has experts of it, and no GPU has to know beforehand how many will come.
"""

import extensibility
from extensibility import InputTensor, OutputTensor
from extensibility import _MutableInputTensor as MutableInputTensor
from max.gpu import block_idx, grid_dim, thread_idx
from max.gpu.host import DeviceContext

from .mailbox_gpu import (
    BLOCKS,
    MAX_DEVICES,
    THREADS,
    TOKENS,
    WIDTH,
    Bounds,
    Mailboxes,
    any_here,
    mailboxes,
    owner_of,
    row_bounds,
)
from .operands import Elements, Floats, Ids, elements, expect_size


@always_inline
def copy_row[
    dtype: DType
](to: Elements[dtype], source: Elements[dtype], size: Int):
    """Copies a row with the block's threads."""
    for c in range(Int(thread_idx.x) * WIDTH, size, THREADS * WIDTH):
        to.unsafe_offset(c).unsafe_store[alignment=16](
            source.unsafe_offset(c).unsafe_load[width=WIDTH, alignment=16]()
        )


@__name(t"step3p5_send_tokens_{dtype}")
def send_tokens[
    dtype: DType
](
    boxes: Mailboxes[dtype],
    x: Elements[dtype],
    ids: Ids,
    weights: Floats,
    tokens: Int32,
):
    """Puts this GPU's tokens, their experts and weights into its mailbox."""
    var k = Int(thread_idx.x)
    for t in range(Int(block_idx.x), Int(tokens), Int(grid_dim.x)):
        if k < boxes.top_k:
            var a = t * boxes.top_k + k
            boxes.ids(boxes.device, t)[unsafe_offset=k] = ids[unsafe_offset=a]
            boxes.weights(boxes.device, t)[unsafe_offset=k] = weights[
                unsafe_offset=a
            ]
        copy_row(
            boxes.hidden(boxes.device, t),
            x.unsafe_offset(t * boxes.hidden_size),
            boxes.hidden_size,
        )
    boxes.announce(TOKENS)


@__name(t"step3p5_receive_tokens_{dtype}")
def receive_tokens[
    dtype: DType
](
    boxes: Mailboxes[dtype],
    x: Elements[dtype],
    ids: Ids,
    weights: Floats,
    bounds: Bounds,
    first: Int32,
    end: Int32,
):
    """Takes all tokens' experts and weights, zeros for experts of other GPUs, and the tokens that have one here.
    """
    boxes.await_all(TOKENS)
    var k = Int(thread_idx.x)
    var owner = 0
    for row in range(
        Int(block_idx.x), Int(bounds[boxes.devices]), Int(grid_dim.x)
    ):
        owner = owner_of(row, bounds, owner)
        var t = row - Int(bounds[owner])
        var chosen = boxes.ids(owner, t)
        if k < boxes.top_k:
            var id = chosen[unsafe_offset=k]
            var is_here = id >= first and id < end
            var weight = boxes.weights(owner, t)[unsafe_offset=k]
            ids[unsafe_offset=row * boxes.top_k + k] = id
            weights[
                unsafe_offset=row * boxes.top_k + k
            ] = weight if is_here else 0
        if any_here(chosen, boxes.top_k, first, end):
            copy_row(
                x.unsafe_offset(row * boxes.hidden_size),
                boxes.hidden(owner, t),
                boxes.hidden_size,
            )


@extensibility.register("step3p5_dispatch_send")
struct Step3p5DispatchSend:
    """Puts a GPU's tokens where all GPUs find them."""

    @staticmethod
    def execute[
        dtype: DType, //, target: StaticString
    ](
        mailbox: MutableInputTensor[dtype=DType.uint8, rank=1, ...],
        addresses: InputTensor[dtype=DType.int64, rank=1, ...],
        x: InputTensor[dtype=dtype, rank=2, ...],
        ids: InputTensor[dtype=DType.int32, rank=2, ...],
        weights: InputTensor[dtype=DType.float32, rank=2, ...],
        device: Int32,
        ctx: DeviceContext,
    ) raises:
        """Fills the first part of this GPU's mailbox.

        Parameters:
            dtype: Type of the hidden states.
            target: Kind of device; a GPU.

        Args:
            mailbox: This GPU's; see `Mailboxes`.
            addresses: Of all GPUs' mailboxes `[N]`, on the host.
            x: Hidden states of this GPU's tokens `[T, H]`.
            ids: Their experts `[T, K]`.
            weights: The experts' weights `[T, K]`.
            device: This GPU among all.
            ctx: The device.
        """
        comptime op = "step3p5_dispatch_send"
        var tokens = x.dim_size(0)
        expect_size(op, "ids[T, K] dim T", ids.dim_size(0), tokens)
        expect_size(op, "weights[T, K] dim T", weights.dim_size(0), tokens)
        expect_size(
            op, "weights[T, K] dim K", weights.dim_size(1), ids.dim_size(1)
        )
        var boxes = mailboxes[dtype](
            op,
            mailbox.dim_size(0),
            addresses,
            Int(device),
            tokens,
            ids.dim_size(1),
            x.dim_size(1),
        )
        comptime if target == "cpu":
            raise Error(op, ": on a CPU, expected a GPU")
        else:
            ctx.enqueue_function[send_tokens[dtype]](
                boxes,
                elements(x.unsafe_ptr()),
                elements(ids.unsafe_ptr()),
                elements(weights.unsafe_ptr()),
                Int32(tokens),
                grid_dim=max(min(tokens, BLOCKS), 1),
                block_dim=THREADS,
            )


@extensibility.register("step3p5_dispatch_receive")
struct Step3p5DispatchReceive:
    """Takes the tokens of all GPUs that have experts on this one."""

    @staticmethod
    def execute[
        dtype: DType, //, target: StaticString
    ](
        x: OutputTensor[dtype=dtype, rank=2, ...],
        ids: OutputTensor[dtype=DType.int32, rank=2, ...],
        weights: OutputTensor[dtype=DType.float32, rank=2, ...],
        mailbox: MutableInputTensor[dtype=DType.uint8, rank=1, ...],
        addresses: InputTensor[dtype=DType.int64, rank=1, ...],
        bounds: InputTensor[dtype=DType.int64, rank=1, ...],
        device: Int32,
        first: Int32,
        end: Int32,
        ctx: DeviceContext,
    ) raises:
        """Waits for all GPUs' tokens and takes those that it needs.

        Parameters:
            dtype: Type of the hidden states.
            target: Kind of device; a GPU.

        Args:
            x: Hidden states of all tokens `[R, H]`; those without an expert here stay undefined.
            ids: All tokens' experts `[R, K]`.
            weights: The experts' weights `[R, K]`, zero for those of other GPUs.
            mailbox: This GPU's; see `Mailboxes`.
            addresses: Of all GPUs' mailboxes `[N]`, on the host.
            bounds: Where every GPU's tokens begin among all, and the end `[N + 1]`, on the host.
            device: This GPU among all.
            first: The first expert here.
            end: The first expert behind those here.
            ctx: The device.
        """
        comptime op = "step3p5_dispatch_receive"
        var rows = x.dim_size(0)
        expect_size(op, "ids[R, K] dim R", ids.dim_size(0), rows)
        expect_size(op, "weights[R, K] dim R", weights.dim_size(0), rows)
        expect_size(
            op, "weights[R, K] dim K", weights.dim_size(1), ids.dim_size(1)
        )
        var starts = row_bounds(op, bounds, addresses.dim_size(0))
        expect_size(op, "x[R, H] dim R", rows, Int(starts[MAX_DEVICES]))
        var boxes = mailboxes[dtype](
            op,
            mailbox.dim_size(0),
            addresses,
            Int(device),
            0,
            ids.dim_size(1),
            x.dim_size(1),
        )
        comptime if target == "cpu":
            raise Error(op, ": on a CPU, expected a GPU")
        else:
            ctx.enqueue_function[receive_tokens[dtype]](
                boxes,
                elements(x.unsafe_ptr()),
                elements(ids.unsafe_ptr()),
                elements(weights.unsafe_ptr()),
                starts,
                first,
                end,
                grid_dim=max(min(rows, BLOCKS), 1),
                block_dim=THREADS,
            )
