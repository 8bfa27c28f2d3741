"""The Mojo kernels of the linear layers and the experts as graph functions.

Names of dimensions: `T` tokens, `E` experts, `K` experts a token, `H` hidden size, `M` an expert's intermediate size.
An assignment `a = t * K + k` is the `k`-th choice of token `t`.
"""

from __future__ import annotations

from typing import NamedTuple

from max.dtype import DType
from max.graph import DeviceRef, Dim, DimLike, TensorType, TensorValue, ops

from .custom_ops import custom_op


def route(
    logits: TensorValue, bias: TensorValue, *, top_k: DimLike, normalize: bool, scale: float
) -> tuple[TensorValue, TensorValue]:
    """Chooses the `K` experts with the largest `sigmoid(logits) + bias` for every token.

    Args:
        logits: Router logits `[T, E]`, float32.
        bias: Router bias `[E]`, float32; decides the choice, not the weights.
        top_k: `K`, at most `E`.
        normalize: Divides a token's weights by their sum + 1e-20.
        scale: Multiplies the weights last.

    Returns:
        Experts `[T, K]`, int32, in descending order of their score (the lower index first among equals), and their
        weights `[T, K]`, float32: `sigmoid(logits)`, normalised and scaled. A NaN ranks first: its token's experts are
        valid and distinct, its weights NaN.
    """
    shape = (logits.shape[0], top_k)
    ids, weights = custom_op(
        "step3p5_moe_route",
        logits.device,
        [logits, bias, scalar(scale)],
        [TensorType(DType.int32, shape, logits.device), TensorType(DType.float32, shape, logits.device)],
        parameters={"normalize": normalize},
    )
    return ids, weights


def group(ids: TensorValue, *, num_experts: DimLike) -> tuple[TensorValue, TensorValue]:
    """Groups the assignments by expert, in ascending order within each.

    Args:
        ids: Experts of every token `[T, K]`, int32.
        num_experts: `E`.

    Returns:
        The assignments `[T * K]`, int32, and every expert's first place among them with the end behind, `[E + 1]`,
        int32.
    """
    rows, offsets = custom_op(
        "step3p5_moe_group",
        ids.device,
        [ids],
        [
            TensorType(DType.int32, (ids.shape[0] * ids.shape[1],), ids.device),
            TensorType(DType.int32, (Dim(num_experts) + 1,), ids.device),
        ],
    )
    return rows, offsets


class Assignments(NamedTuple):
    """The results of `route`, then those of `group`."""

    ids: TensorValue
    weights: TensorValue
    rows: TensorValue
    offsets: TensorValue


def assign(logits: TensorValue, bias: TensorValue, *, top_k: DimLike, normalize: bool, scale: float) -> Assignments:
    """`route`, and `group` of what it chose, in one op: at few tokens one launch takes less time than two."""
    device, tokens, experts = logits.device, logits.shape[0], logits.shape[1]
    return Assignments(
        *custom_op(
            "step3p5_moe_assign",
            device,
            [logits, bias, scalar(scale)],
            [
                TensorType(DType.int32, (tokens, top_k), device),
                TensorType(DType.float32, (tokens, top_k), device),
                TensorType(DType.int32, (tokens * Dim(top_k),), device),
                TensorType(DType.int32, (experts + 1,), device),
            ],
            parameters={"normalize": normalize},
        )
    )


def gate_up(
    x: TensorValue,
    gate: TensorValue,
    up: TensorValue,
    rows: TensorValue,
    offsets: TensorValue,
    limit: TensorValue,
) -> TensorValue:
    """`silu(gate x) * (up x)` of every assignment, or `min(silu(gate x), L) * clamp(up x, -L, L)` with a limit.

    Args:
        x: Tokens `[T, H]`, float32; on a GPU also bfloat16.
        gate: Gate matrices `[E, M, H]`, float32 or bfloat16.
        up: Up matrices `[E, M, H]`, as `gate`.
        rows: From `group`, `[T * K]`.
        offsets: From `group`, `[E + 1]`.
        limit: `L`, a float32 scalar on the host; infinite clamps nothing.

    Returns:
        Activations `[T * K, M]` of the type of `x`, in the order of `rows`.
    """
    return custom_op(
        "step3p5_moe_gate_up",
        x.device,
        [x, gate, up, rows, offsets, limit],
        [TensorType(x.dtype, (rows.shape[0], gate.shape[1]), x.device)],
    )[0]


def down(
    act: TensorValue, down: TensorValue, rows: TensorValue, offsets: TensorValue, weights: TensorValue
) -> TensorValue:
    """`y_t = sum_k weights[t, k] * (down_e act)`, summed in float32 in a fixed order of a token's experts.

    Args:
        act: From `gate_up`, `[T * K, M]`; a token's experts are distinct.
        down: Down matrices `[E, H, M]`, float32 or bfloat16.
        rows: From `group`, `[T * K]`.
        offsets: From `group`, `[E + 1]`.
        weights: From `route`, `[T, K]`, float32.

    Returns:
        `y [T, H]`, float32.
    """
    return custom_op(
        "step3p5_moe_down",
        act.device,
        [act, down, rows, offsets, weights],
        [TensorType(DType.float32, (weights.shape[0], down.shape[1]), act.device)],
    )[0]


def gate_up_shared(
    x: TensorValue,
    gate: TensorValue,
    up: TensorValue,
    shared_gate: TensorValue,
    shared_up: TensorValue,
    rows: TensorValue,
    offsets: TensorValue,
    limit: TensorValue,
    shared_limit: TensorValue,
) -> tuple[TensorValue, TensorValue]:
    """`gate_up`, and `swiglu` of the same tokens with `shared_gate` and `shared_up [S, H]`; on a GPU only.

    `rows` and `offsets` must follow from `x`, as a router's do: what the shared expert reads is read before they are
    complete.

    Returns:
        Activations `[T * K, M]` as those of `gate_up`, and those of the shared expert `[T, S]`.
    """
    act, shared_act = custom_op(
        "step3p5_moe_gate_up_shared",
        x.device,
        [x, gate, up, shared_gate, shared_up, rows, offsets, limit, shared_limit],
        [
            TensorType(x.dtype, (rows.shape[0], gate.shape[1]), x.device),
            TensorType(x.dtype, (x.shape[0], shared_gate.shape[0]), x.device),
        ],
    )
    return act, shared_act


def down_shared(
    act: TensorValue,
    down: TensorValue,
    shared_act: TensorValue,
    shared_down: TensorValue,
    rows: TensorValue,
    offsets: TensorValue,
    weights: TensorValue,
) -> TensorValue:
    """`down`, plus the product of `shared_act [T, S]` with `shared_down [H, S]`: `[T, H]` float32; on a GPU only.

    From some number of tokens on, the shared expert's product is rounded to bfloat16 before it is added.
    """
    return custom_op(
        "step3p5_moe_down_shared",
        act.device,
        [act, down, shared_act, shared_down, rows, offsets, weights],
        [TensorType(DType.float32, (weights.shape[0], down.shape[1]), act.device)],
    )[0]


def linear(x: TensorValue, w: TensorValue, *, dtype: DType | None = None) -> TensorValue:
    """`x w^T`, accumulated in float32.

    Args:
        x: Tokens `[T, K]`, float32; on a GPU also bfloat16.
        w: Weights `[N, K]`, float32 or bfloat16.
        dtype: Type of the result, that of `x` by default; bfloat16 operands with a float32 result lose nothing but the
            sums' rounding.

    Returns:
        `[T, N]`.
    """
    return custom_op(
        "step3p5_linear",
        x.device,
        [x, w],
        [TensorType(dtype or x.dtype, (x.shape[0], w.shape[0]), x.device)],
    )[0]


def linear4(
    x: TensorValue, w0: TensorValue, w1: TensorValue, w2: TensorValue, w3: TensorValue
) -> tuple[TensorValue, TensorValue, TensorValue, TensorValue]:
    """`linear` with four matrices `[N_i, K]` and the type of `x`, in one launch where launches count."""
    y0, y1, y2, y3 = custom_op(
        "step3p5_linear4",
        x.device,
        [x, w0, w1, w2, w3],
        [TensorType(x.dtype, (x.shape[0], w.shape[0]), x.device) for w in (w0, w1, w2, w3)],
    )
    return y0, y1, y2, y3


def swiglu(x: TensorValue, gate: TensorValue, up: TensorValue, limit: TensorValue) -> TensorValue:
    """`gate_up` for one expert that has every token: `x [T, H]`, `gate` and `up [M, H]`, `limit` as there: `[T, M]`."""
    return custom_op(
        "step3p5_swiglu",
        x.device,
        [x, gate, up, limit],
        [TensorType(x.dtype, (x.shape[0], gate.shape[0]), x.device)],
    )[0]


def norm(x: TensorValue, weight: TensorValue, *, eps: float, offset: float) -> TensorValue:
    """`x * rsqrt(mean(x²) + eps) * (offset + weight)` over each row, computed in float32; on a GPU only.

    Args:
        x: Rows `[T, H]`.
        weight: `[H]`.
        eps: Added to the mean of the squares.
        offset: Added to the weights.

    Returns:
        As `x`.
    """
    return custom_op("step3p5_norm", x.device, [x, weight, scalar(eps), scalar(offset)], [x.type])[0]


def add_norm(
    x: TensorValue, delta: TensorValue, weight: TensorValue, *, eps: float, offset: float
) -> tuple[TensorValue, TensorValue]:
    """`x + delta`, and `norm` of it, in one launch; `delta [T, H]` may have another type than `x`."""
    total, y = custom_op(
        "step3p5_add_norm", x.device, [x, delta, weight, scalar(eps), scalar(offset)], [x.type, x.type]
    )
    return total, y


def greedy(logits: TensorValue, known: TensorValue) -> TensorValue:
    """The place of the greatest logit of every row, of equal ones the first; NaN is less than any number.

    Args:
        logits: `[R, V]` float32.
        known: How many logits of each row count, the first ones, `[1]` int64.

    Returns:
        `[R]` int64.
    """
    out_type = TensorType(DType.int64, (logits.shape[0],), logits.device)
    return custom_op("step3p5_greedy", logits.device, [logits, known], [out_type])[0]


def scalar(value: float) -> TensorValue:
    """A float32 on the host."""
    return ops.constant(value, DType.float32, device=DeviceRef.CPU())
