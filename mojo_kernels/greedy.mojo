"""The token of the greatest logit."""

import extensibility
from extensibility import InputTensor, OutputTensor
from max.gpu.host import DeviceContext
from std.utils.numerics import neg_inf

from .greedy_gpu import greedy_gpu
from .operands import Floats, elements, expect_size


def greatest(logits: Floats, end: Int) -> Int:
    """The first place of the greatest of `end` logits; 0 where none is greater than minus infinity.
    """
    comptime WIDTH = 16
    var values = SIMD[DType.float32, WIDTH](neg_inf[DType.float32]())
    var rounds = SIMD[DType.int32, WIDTH](0)
    var whole = end // WIDTH
    for i in range(whole):
        var others = logits.unsafe_offset(i * WIDTH).unsafe_load[width=WIDTH]()
        var is_greater = others.gt(values)
        values = is_greater.select(others, values)
        rounds = is_greater.select(SIMD[DType.int32, WIDTH](i), rounds)
    var best = neg_inf[DType.float32]()
    var place = 0
    for lane in range(WIDTH):
        var at = Int(rounds[lane]) * WIDTH + lane
        if values[lane] > best or (values[lane] == best and at < place):
            best = values[lane]
            place = at
    for at in range(whole * WIDTH, end):
        if logits[unsafe_offset=at] > best:
            best = logits[unsafe_offset=at]
            place = at
    return place


@extensibility.register("step3p5_greedy")
struct Step3p5Greedy:
    """`ids[r] = argmax(logits[r, :known])`."""

    @staticmethod
    def execute[
        target: StaticString
    ](
        ids: OutputTensor[dtype=DType.int64, rank=1, ...],
        logits: InputTensor[dtype=DType.float32, rank=2, ...],
        known: InputTensor[dtype=DType.int64, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """Of equal logits the first counts; NaN is less than any number.

        Parameters:
            target: Kind of device.

        Args:
            ids: Result `[R]`.
            logits: `[R, V]`.
            known: How many logits of each row count, the first ones `[1]`.
            ctx: The device.
        """
        comptime op = "step3p5_greedy"
        var rows = logits.dim_size(0)
        var vocab_size = logits.dim_size(1)
        expect_size(op, "ids[R]", ids.dim_size(0), rows)
        expect_size(op, "known[1]", known.dim_size(0), 1)
        var results = elements(ids.unsafe_ptr())
        var values = elements(logits.unsafe_ptr())
        var end = elements(known.unsafe_ptr())
        comptime if target == "cpu":
            for row in range(rows):
                results[unsafe_offset=row] = Int64(
                    greatest(
                        values.unsafe_offset(row * vocab_size),
                        min(Int(end[unsafe_offset=0]), vocab_size),
                    )
                )
        else:
            greedy_gpu(results, values, end, rows, vocab_size, ctx)
