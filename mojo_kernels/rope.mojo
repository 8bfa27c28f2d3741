"""The angles of the rotary embedding.

Angles are counted in turns, as 64-bit fixed-point fractions: `position * frequency` modulo one turn is then one wrapping
integer multiplication, exact for any position, with no table over the context length and no large-argument sine.
"""

import extensibility
from extensibility import InputTensor, OutputTensor
from max.gpu.host import DeviceContext
from std.math import cos, sin

from .operands import elements
from .rope_gpu import rope_table_gpu

comptime TWO_PI = Float64(6.283185307179586476925286766559)
comptime TURN = Float64(18446744073709551616.0)
"""One turn in the fixed-point unit: 2^64."""


@extensibility.register("step3p5_rope_table")
struct RopeTable:
    """`table[t] = [cos(angle_0) … cos(angle_{R/2-1}), sin(angle_0) …]`, `angle_i = position(t) * frequency_i`.
    """

    @staticmethod
    def execute[
        target: StaticString
    ](
        table: OutputTensor[dtype=DType.float32, rank=2, ...],
        row_offsets: InputTensor[dtype=DType.uint32, rank=1, ...],
        cache_lengths: InputTensor[dtype=DType.uint32, rank=1, ...],
        turns: InputTensor[dtype=DType.uint64, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        var half = turns.dim_size(0)
        if table.dim_size(1) != 2 * half:
            raise Error(
                "step3p5_rope_table: the table has ",
                table.dim_size(1),
                " columns, expected 2 x ",
                half,
            )
        comptime if target == "cpu":
            for request in range(cache_lengths.dim_size(0)):
                var first = Int(row_offsets[request])
                var position = UInt64(cache_lengths[request])
                for t in range(first, Int(row_offsets[request + 1])):
                    for i in range(half):
                        # Signed, so that the angle lies in [-pi, pi).
                        var turn = Int64(turns[i] * position)
                        var angle = turn.cast[DType.float64]() * (TWO_PI / TURN)
                        table[t, i] = cos(angle).cast[DType.float32]()
                        table[t, half + i] = sin(angle).cast[DType.float32]()
                    position += 1
        else:
            rope_table_gpu(
                elements(table.unsafe_ptr()),
                elements(row_offsets.unsafe_ptr()),
                elements(cache_lengths.unsafe_ptr()),
                elements(turns.unsafe_ptr()),
                cache_lengths.dim_size(0),
                table.dim_size(0),
                half,
                ctx,
            )
