"""The Mojo ops of the mixture-of-experts layer against numpy in float64.

All sizes are symbolic. A run is preceded by one on NaN, so that outputs are allocated from memory that holds NaN.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from expert_layer import LIMIT, Array, Layer, grouped
from max.dtype import DType
from max.engine import Model
from max.graph import DeviceRef, TensorType, TensorValue, ops
from small_graphs import Ops, graph_of

from step3p5 import kernels as graph_ops

SCALE = 2.5


def tensor(*shape: str, dtype: DType = DType.float32) -> TensorType:
    return TensorType(dtype, shape, DeviceRef.CPU())


def router(logits: TensorValue, bias: TensorValue, chosen: TensorValue) -> list[TensorValue]:
    """(logits [T, E], bias [E], any [K]) -> ids, weights, plain weights, rows, offsets."""
    top_k = chosen.shape[0]
    chosen = graph_ops.assign(logits, bias, top_k=top_k, normalize=True, scale=SCALE)
    _, plain = graph_ops.route(logits, bias, top_k=top_k, normalize=False, scale=1.0)
    return [chosen.ids, chosen.weights, plain, chosen.rows, chosen.offsets]


def grouping(ids: TensorValue, experts: TensorValue) -> list[TensorValue]:
    """(ids [T, K], any [E]) -> rows, offsets."""
    return list(graph_ops.group(ids, num_experts=experts.shape[0]))


def experts(
    x: TensorValue,
    gate: TensorValue,
    up: TensorValue,
    down: TensorValue,
    rows: TensorValue,
    offsets: TensorValue,
    weights: TensorValue,
) -> list[TensorValue]:
    """-> act, act with a limit, y, and `linear` and `swiglu` of x with the first expert's matrices."""
    none, limit = (ops.constant(value, DType.float32, device=DeviceRef.CPU()) for value in (np.inf, LIMIT))
    act = graph_ops.gate_up(x, gate, up, rows, offsets, none)
    limited = graph_ops.gate_up(x, gate, up, rows, offsets, limit)
    y = graph_ops.down(act, down, rows, offsets, weights)
    return [act, limited, y, graph_ops.linear(x, gate[0]), graph_ops.swiglu(x, gate[0], up[0], limit)]


def experts_inputs(dtype: DType) -> list[TensorType]:
    """Every size has a name of its own, so that the ops are the ones to find a misfit."""
    float_sizes = [("T", "H"), ("E", "M", "gate_H"), ("up_E", "up_M", "up_H"), ("down_E", "down_H", "down_M")]
    x, *matrices = float_sizes
    return [
        tensor(*x),
        *(tensor(*sizes, dtype=dtype) for sizes in matrices),
        tensor("TK", dtype=DType.int32),
        tensor("E1", dtype=DType.int32),
        tensor("weights_T", "K"),
    ]


GRAPHS = {
    "moe_router": graph_of(router, [tensor("T", "E"), tensor("B"), tensor("K")]),
    "moe_grouping": graph_of(grouping, [tensor("T", "K", dtype=DType.int32), tensor("E")]),
    "moe_float32": graph_of(experts, experts_inputs(DType.float32)),
    "moe_bfloat16": graph_of(experts, experts_inputs(DType.bfloat16)),
}


@pytest.fixture(scope="session")
def kernels(small_models: Mapping[str, Model]) -> Ops:
    return Ops(small_models, "moe")


@pytest.fixture(params=[DType.float32, DType.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> DType:
    """Type of the experts' weights."""
    return request.param


def assert_close(found: Array, expected: Array, scale: float = 0.0) -> None:
    """Within float32's rounding of the largest value expected, or of `scale` where that is more."""
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * np.abs(expected).max(initial=max(scale, 1e-3)))


EXPERT_CASES = {  # tokens, experts, top_k, hidden size, intermediate size; experts to choose from
    "one token": ((1, 16, 4, 64, 48), 16),
    "one of everything": ((1, 1, 1, 1, 1), 1),
    "widths below a vector": ((2, 5, 2, 5, 3), 5),
    "odd widths": ((7, 5, 3, 37, 29), 5),
    "odd widths, full tiles": ((8, 16, 16, 130, 67), 16),
    "all tokens on one of many experts": ((9, 288, 1, 33, 20), 1),
    "few of many experts": ((64, 288, 8, 17, 31), 11),
    "every expert many tokens": ((64, 5, 5, 100, 50), 5),
    "many tokens, one long expert": ((300, 1, 1, 1031, 70), 1),
    "many tokens, many experts": ((300, 288, 8, 48, 40), 288),
    "many tokens, top 16": ((300, 16, 16, 21, 19), 16),
}


@pytest.mark.parametrize(("sizes", "choose_from"), EXPERT_CASES.values(), ids=EXPERT_CASES)
def test_experts_and_dense_layers_equal_float64(
    kernels: Ops, dtype: DType, sizes: tuple[int, int, int, int, int], choose_from: int, rng: np.random.Generator
) -> None:
    layer = Layer(rng, dtype, sizes, choose_from)
    act, limited, y, product, gated = layer.expected()
    # A clamped factor carries on the other one's rounding, which is that of the sums, however small the clamp.
    of_sums = LIMIT * float(np.abs(product).max())
    scales = (0.0, of_sums, 0.0, 0.0, of_sums)
    wanted = (act, limited, y, product, gated)
    for found, expected, scale in zip(kernels.run(dtype.name, *layer.operands()), wanted, scales, strict=True):
        assert_close(found, expected, scale)


def test_the_limit_clamps_gate_from_above_and_up_on_both_sides(
    kernels: Ops, dtype: DType, rng: np.random.Generator
) -> None:
    layer = Layer(rng, dtype, (64, 5, 3, 40, 36), 5)
    act, limited, *_ = kernels.run(dtype.name, *layer.operands())
    assert np.abs(limited).max() <= np.float32(LIMIT) * np.float32(LIMIT)
    assert np.abs(act).max() > 1
    assert limited.max() == np.float32(LIMIT) * np.float32(LIMIT) == -limited.min()


def test_the_same_input_gives_the_same_bits(kernels: Ops, dtype: DType, rng: np.random.Generator) -> None:
    layer = Layer(rng, dtype, (64, 16, 8, 130, 67), 16)
    for first, second in zip(
        kernels.run(dtype.name, *layer.operands()), kernels.run(dtype.name, *layer.operands()), strict=True
    ):
        assert first.tobytes() == second.tobytes()


def test_a_token_has_the_same_bits_in_any_batch(kernels: Ops, dtype: DType, rng: np.random.Generator) -> None:
    layer = Layer(rng, dtype, (300, 8, 4, 130, 67), 8)
    _, _, y, product, gated = kernels.run(dtype.name, *layer.operands())
    for tokens in (50, 3, 1):
        layer.keep(tokens)
        _, _, y_few, product_few, gated_few = kernels.run(dtype.name, *layer.operands())
        assert y_few.tobytes() == y[:tokens].tobytes()
        assert product_few.tobytes() == product[:tokens].tobytes()
        assert gated_few.tobytes() == gated[:tokens].tobytes()


@pytest.mark.parametrize("tokens", [7, 300])
def test_some_of_the_experts_take_their_own_assignments_only(
    kernels: Ops, dtype: DType, tokens: int, rng: np.random.Generator
) -> None:
    layer = Layer(rng, dtype, (tokens, 9, 3, 37, 29), 9)
    x, _, _, _, rows, _, weights = layer.operands()
    layer.weights = np.where((layer.ids >= 2) & (layer.ids < 6), layer.weights, 0).astype(np.float32)
    expected = layer.expected()[2]
    layer.gate, layer.up, layer.down = (v[2:6] for v in (layer.gate, layer.up, layer.down))
    _, gate, up, down, *_ = layer.operands()
    assert_close(kernels.run(dtype.name, x, gate, up, down, rows, layer.offsets[2:7].copy(), weights)[2], expected)


@pytest.mark.parametrize("tokens", [1, 8, 300])
def test_nan_stays_in_its_token(kernels: Ops, dtype: DType, tokens: int, rng: np.random.Generator) -> None:
    layer = Layer(rng, dtype, (tokens, 5, 3, 40, 36), 5)
    clean = kernels.run(dtype.name, *layer.operands())
    broken = int(rng.integers(tokens))
    layer.x[broken, rng.integers(40)] = np.nan
    act, limited, y, product, gated = kernels.run(dtype.name, *layer.operands())
    of_broken = layer.rows // 3 == broken
    for found, expected, bad in (
        (act, clean[0], of_broken),
        (limited, clean[1], of_broken),
        (y, clean[2], np.arange(tokens) == broken),
        (product, clean[3], np.arange(tokens) == broken),
        (gated, clean[4], np.arange(tokens) == broken),
    ):
        assert np.isnan(found[bad]).all()
        assert found[~bad].tobytes() == expected[~bad].tobytes()


def test_no_tokens_give_empty_results(kernels: Ops, dtype: DType, rng: np.random.Generator) -> None:
    layer = Layer(rng, dtype, (0, 5, 2, 8, 6), 5)
    assert [v.shape for v in kernels.run(dtype.name, *layer.operands())] == [(0, 6), (0, 6), (0, 8), (0, 6), (0, 6)]


ROUTER_SIZES = [(1, 1, 1), (2, 5, 3), (7, 16, 16), (8, 288, 8), (64, 288, 16), (300, 64, 8)]


@pytest.mark.parametrize(("tokens", "num_experts", "top_k"), ROUTER_SIZES)
def test_router_equals_float64(
    kernels: Ops, tokens: int, num_experts: int, top_k: int, rng: np.random.Generator
) -> None:
    # Scores and their distances to one another are far above float32's rounding, so the choice is unique.
    scores = rng.permuted(np.tile(np.linspace(0.01, 0.99, num_experts), (tokens, 1)), axis=1)
    logits = np.log(scores / (1 - scores)).astype(np.float32)
    bias = (rng.permutation(num_experts) * 1.7 / num_experts).astype(np.float32)
    s = 1 / (1 + np.exp(-logits.astype(np.float64)))
    choice = s + bias
    distinct = [t for t in range(tokens) if np.diff(np.sort(choice[t])).min(initial=1) > 1e-6]
    assert len(distinct) >= tokens // 2
    expected = np.argsort(-choice, axis=1, kind="stable")[:, :top_k]
    ids, weights, plain, rows, offsets = kernels.run("router", logits, bias, np.zeros(top_k, np.float32))
    np.testing.assert_array_equal(ids[distinct], expected[distinct])
    chosen = np.take_along_axis(s, ids.astype(np.int64), 1)
    np.testing.assert_allclose(plain, chosen, rtol=1.2e-7)
    np.testing.assert_allclose(weights, SCALE * chosen / (chosen.sum(1, keepdims=True) + 1e-20), rtol=2e-6)
    expected_rows, expected_offsets = grouped(ids, num_experts)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(offsets, expected_offsets)


def test_scores_are_float32s_nearest(kernels: Ops, rng: np.random.Generator) -> None:
    logits = rng.uniform(-80, 80, (500, 8)).astype(np.float32)
    ids, _, plain, _, _ = kernels.run("router", logits, np.zeros(8, np.float32), np.zeros(8, np.float32))
    exact = 1 / (1 + np.exp(-np.take_along_axis(logits, ids.astype(np.int64), 1).astype(np.float64)))
    np.testing.assert_array_max_ulp(plain, exact.astype(np.float32), maxulp=1)


def test_equal_scores_choose_the_lower_expert_first(kernels: Ops, rng: np.random.Generator) -> None:
    logits = np.zeros((3, 20), np.float32)
    logits[1, [4, 17]] = 2
    logits[2] = -np.inf
    ids = kernels.run("router", logits, np.zeros(20, np.float32), np.zeros(5, np.float32))[0]
    np.testing.assert_array_equal(ids, [[0, 1, 2, 3, 4], [4, 17, 0, 1, 2], [0, 1, 2, 3, 4]])


def test_the_bias_chooses_but_does_not_weigh(kernels: Ops) -> None:
    bias = np.array([0, 0, -5, 5, -np.inf], np.float32)
    ids, _, plain, _, _ = kernels.run("router", np.zeros((1, 5), np.float32), bias, np.zeros(4, np.float32))
    np.testing.assert_array_equal(ids, [[3, 0, 1, 2]])
    np.testing.assert_array_equal(plain, np.full((1, 4), 0.5, np.float32))


@pytest.mark.parametrize("broken_experts", [[3], list(range(16))], ids=["one", "all"])
def test_router_keeps_nan_in_its_token(kernels: Ops, broken_experts: list[int], rng: np.random.Generator) -> None:
    logits, bias = rng.standard_normal((9, 16), np.float32), rng.standard_normal(16, np.float32)
    top_k = np.zeros(16, np.float32)
    clean = kernels.run("router", logits, bias, top_k)
    logits[4, broken_experts] = np.nan
    ids, weights, plain, rows, offsets = kernels.run("router", logits, bias, top_k)
    others = np.arange(9) != 4
    for found, expected in zip((ids, weights, plain), clean[:3], strict=True):
        assert found[others].tobytes() == expected[others].tobytes()
    assert np.isnan(weights[4]).all()
    assert sorted(ids[4]) == list(range(16))
    assert sorted(rows) == list(range(9 * 16))
    np.testing.assert_array_equal(offsets, np.arange(17) * 9)


@pytest.mark.parametrize(("tokens", "num_experts", "top_k"), [(1, 288, 8), (9, 5, 5), (300, 288, 16), (0, 7, 2)])
def test_grouping_is_a_stable_sort_by_expert(
    kernels: Ops, tokens: int, num_experts: int, top_k: int, rng: np.random.Generator
) -> None:
    ids = rng.integers(0, num_experts, (tokens, top_k)).astype(np.int32)
    rows, offsets = kernels.run("grouping", ids, np.zeros(num_experts, np.float32))
    expected_rows, expected_offsets = grouped(ids, num_experts)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(offsets, expected_offsets)


def test_grouping_names_an_expert_that_does_not_exist(kernels: Ops) -> None:
    with pytest.raises(Exception, match=r"step3p5_moe_group: ids\[T, K\] holds expert 5, expected 0 to 4"):
        kernels.execute("grouping", np.array([[1, 5]], np.int32), np.zeros(5, np.float32))


def test_routing_names_a_top_k_above_the_experts(kernels: Ops) -> None:
    with pytest.raises(Exception, match=r"step3p5_moe_(assign|route): top_k is 4, expected at most the 3 experts"):
        kernels.execute("router", np.zeros((1, 3), np.float32), np.zeros(3, np.float32), np.zeros(4, np.float32))


@pytest.mark.parametrize(
    ("operand", "axis", "message"),
    [
        (1, 2, r"step3p5_moe_gate_up: gate\[E, M, H\] dim H is 9, the other operands imply 8"),
        (2, 1, r"step3p5_moe_gate_up: up\[E, M, H\] dim M is 7, the other operands imply 6"),
        (3, 2, r"step3p5_moe_down: down\[E, H, M\] dim M is 7, the other operands imply 6"),
        (5, 0, r"step3p5_moe_gate_up: offsets\[E\+1\] is 7, the other operands imply 6"),
    ],
)
def test_a_shape_that_does_not_fit_is_named(
    kernels: Ops, operand: int, axis: int, message: str, rng: np.random.Generator
) -> None:
    operands = Layer(rng, DType.float32, (3, 5, 2, 8, 6), 5).operands()
    array = operands[operand]
    assert isinstance(array, np.ndarray)
    operands[operand] = np.repeat(array, [1] * (array.shape[axis] - 1) + [2], axis=axis)
    with pytest.raises(Exception, match=message):
        kernels.execute("float32", *operands)
