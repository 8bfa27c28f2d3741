"""`silu(gate x) * (up x)` as a grouped product on Hopper's tensor cores."""

from layout import Coord, TileTensor, row_major
from layout.tma_async import TMATensorTile, create_tma_tile
from max.gpu import MAX_THREADS_PER_BLOCK_METADATA, lane_id
from max.gpu.host import DeviceContext, Dim, FuncAttribute
from max.gpu.primitives.grid_controls import PDLLevel, pdl_launch_attributes
from std.math import ceildiv, exp, recip
from std.utils.static_tuple import StaticTuple

from .dense_ring_gpu import BF16, DenseRing, SWIZZLE, Sums, THREADS
from .grouped_pairs_gpu import Pair, store_transposed
from .grouped_tiles_gpu import TILE_K, TILE_M, TileWalk
from .grouped_wgmma_gpu import Grouped, run_tiles
from .operands import Elements, Ids, elements


@fieldwise_init
struct GateUpProduct(Grouped, ImplicitlyCopyable):
    """Eight rows of `gate` alternate with eight of `up`, so that a thread holds both sums of an activation.
    """

    comptime BOX_ROWS = 8
    comptime TENSORS = 2
    comptime BOX_TOKENS = 1

    var act: Elements[BF16]
    var rows: Ids
    var top_k: Int
    var intermediate_size: Int
    var limit: Float32

    @always_inline
    def source_row(self, slot: Int) -> Int:
        return Int(self.rows[unsafe_offset=slot]) // self.top_k

    @always_inline
    def activation(self, gate: Float32, up: Float32) -> Float32:
        # Comparisons, not min and max, which would drop a NaN.
        var gated = gate * recip(1 + exp(-gate))
        gated = self.limit if gated > self.limit else gated
        var linear = self.limit if up > self.limit else up
        linear = -self.limit if linear < -self.limit else linear
        return gated * linear

    @always_inline
    def store[
        N: Int
    ](self, sums: Sums[N], warp: Int, row: Int, slot: Int, tokens: Int):
        var m = row + warp * 8
        if m >= self.intermediate_size:
            return
        comptime for j in range(N // 8):
            var pair = Pair(
                self.activation(sums[4 * j], sums[4 * j + 2]).cast[BF16](),
                self.activation(sums[4 * j + 1], sums[4 * j + 3]).cast[BF16](),
            )
            var token = 8 * j + Int(lane_id()) // 4
            store_transposed(
                self.act.unsafe_offset(
                    (slot + token) * self.intermediate_size + m
                ),
                pair,
                token < tokens,
            )


@__llvm_metadata(MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](THREADS))
@__llvm_arg_metadata(gate, `nvvm.grid_constant`)
@__llvm_arg_metadata(up, `nvvm.grid_constant`)
@__llvm_arg_metadata(x, `nvvm.grid_constant`)
def gate_up_wgmma[
    MAX_N: Int,
    STAGES: Int,
    SHARERS: Int,
    w_shape: Coord,
    w_desc: Coord,
    x_shape: Coord,
    x_desc: Coord,
](
    act: Pointer[BFloat16, MutAnyOrigin],
    rows: Pointer[Int32, MutAnyOrigin],
    offsets: Pointer[Int32, MutAnyOrigin],
    gate: TMATensorTile[BF16, w_shape, w_desc],
    up: TMATensorTile[BF16, w_shape, w_desc],
    x: TMATensorTile[BF16, x_shape, x_desc],
    experts: Int32,
    top_k: Int32,
    hidden_size: Int32,
    intermediate_size: Int32,
    limit: Float32,
):
    """Writes `act [T * K, M]`; see `run_tiles`."""
    comptime ROWS = SHARERS * TILE_M // GateUpProduct.TENSORS
    run_tiles[G=GateUpProduct, MAX_N=MAX_N, STAGES=STAGES, SHARERS=SHARERS](
        GateUpProduct(
            elements(act),
            elements(rows),
            Int(top_k),
            Int(intermediate_size),
            limit,
        ),
        TileWalk[MAX_N](
            elements(offsets),
            Int(experts),
            ceildiv(Int(intermediate_size), ROWS),
        ),
        gate,
        up,
        x,
        Int(intermediate_size),
        0,
        Int(hidden_size),
    )


def launch_gate_up_wgmma[
    MAX_N: Int, STAGES: Int, SHARERS: Int
](
    product: GateUpProduct,
    x: Elements[BF16],
    gate: Elements[BF16],
    up: Elements[BF16],
    offsets: Ids,
    tokens: Int,
    experts: Int,
    hidden_size: Int,
    ctx: DeviceContext,
) raises:
    """Enqueues `gate_up_wgmma` for experts of mostly up to `MAX_N` tokens."""
    comptime BYTES = DenseRing[MAX_N, STAGES, SHARERS].BYTES
    var shape = Coord(experts * product.intermediate_size, hidden_size)
    var gate_tma = create_tma_tile[
        GateUpProduct.BOX_ROWS, TILE_K, swizzle_mode=SWIZZLE
    ](ctx, TileTensor(gate, row_major(shape)))
    var up_tma = create_tma_tile[
        GateUpProduct.BOX_ROWS, TILE_K, swizzle_mode=SWIZZLE
    ](ctx, TileTensor(up, row_major(shape)))
    var x_tma = create_tma_tile[
        GateUpProduct.BOX_TOKENS, TILE_K, swizzle_mode=SWIZZLE
    ](ctx, TileTensor(x, row_major(Coord(tokens, hidden_size))))
    comptime W = type_of(gate_tma)
    comptime X = type_of(x_tma)
    comptime kernel = gate_up_wgmma[
        MAX_N,
        STAGES,
        SHARERS,
        W.tile_shape,
        W.desc_shape,
        X.tile_shape,
        X.desc_shape,
    ]
    ctx.enqueue_function[kernel](
        product.act,
        product.rows,
        offsets,
        gate_tma,
        up_tma,
        x_tma,
        Int32(experts),
        Int32(product.top_k),
        Int32(hidden_size),
        Int32(product.intermediate_size),
        product.limit,
        grid_dim=ctx.default_device_info.sm_count // SHARERS * SHARERS,
        block_dim=THREADS,
        cluster_dim=Dim(SHARERS),
        shared_mem_bytes=BYTES,
        func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(
            UInt32(BYTES)
        ),
        attributes=pdl_launch_attributes(PDLLevel.ON),
    )
