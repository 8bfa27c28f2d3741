"""Groups the assignments of tokens to experts by expert."""

import extensibility
from extensibility import InputTensor, OutputTensor
from max.gpu.host import DeviceContext

from .group_gpu import group_gpu
from .operands import Ids, elements, expect_size


def expect_experts(ids: Ids, total: Int, experts: Int) raises:
    """Raises unless every id names an expert."""
    for a in range(total):
        var e = Int(ids[unsafe_offset=a])
        if e < 0 or e >= experts:
            raise Error(
                "step3p5_moe_group: ids[T, K] holds expert ",
                e,
                ", expected 0 to ",
                experts - 1,
            )


def group_cpu(rows: Ids, starts: Ids, ids: Ids, total: Int, experts: Int):
    """Counts, then places; every id must name an expert."""
    for e in range(experts + 1):
        starts[unsafe_offset=e] = 0
    for a in range(total):
        starts[unsafe_offset=Int(ids[unsafe_offset=a]) + 1] += 1
    for e in range(experts):
        starts[unsafe_offset=e + 1] += starts[unsafe_offset=e]
    var next = List[Int32](capacity=experts)
    for e in range(experts):
        next.append(starts[unsafe_offset=e])
    for a in range(total):
        var e = Int(ids[unsafe_offset=a])
        rows[unsafe_offset=Int(next[e])] = Int32(a)
        next[e] += 1


@extensibility.register("step3p5_moe_group")
struct Step3p5MoeGroup:
    """A stable counting sort of the assignments `a = t * K + k` by expert."""

    @staticmethod
    def execute[
        target: StaticString
    ](
        rows: OutputTensor[dtype=DType.int32, rank=1, ...],
        offsets: OutputTensor[dtype=DType.int32, rank=1, ...],
        ids: InputTensor[dtype=DType.int32, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        """Lists every expert's assignments in ascending order.

        Parameters:
            target: Kind of device.

        Args:
            rows: Assignments grouped by expert `[T * K]`.
            offsets: First assignment of every expert in `rows`, and the end `[E + 1]`.
            ids: Experts of every token `[T, K]`, each in `0 .. E - 1`; only a CPU checks it.
            ctx: The device.
        """
        comptime op = "step3p5_moe_group"
        var total = ids.dim_size(0) * ids.dim_size(1)
        var experts = offsets.dim_size(0) - 1
        expect_size(op, "rows[T*K]", rows.dim_size(0), total)
        comptime if target == "cpu":
            expect_experts(elements(ids.unsafe_ptr()), total, experts)
            group_cpu(
                elements(rows.unsafe_ptr()),
                elements(offsets.unsafe_ptr()),
                elements(ids.unsafe_ptr()),
                total,
                experts,
            )
        else:
            group_gpu(
                elements(rows.unsafe_ptr()),
                elements(offsets.unsafe_ptr()),
                elements(ids.unsafe_ptr()),
                total,
                experts,
                ctx,
            )
