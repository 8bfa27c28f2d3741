"""The router on a GPU: its product against float64, the choice and its order against numpy on the logits found, and the
experts that begin before it has ended."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from expert_layer import LIMIT, Array, Layer, Operands, as_bfloat16, grouped, rounded
from max.driver import CPU, Accelerator, Buffer, accelerator_count
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import DeviceRef, Graph, TensorType, TensorValue, ops
from test_gpu import TOLERANCE, as_float32, execute

from step3p5 import kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(accelerator_count() == 0, reason="not run: no GPU")]

TOP_K = 8
SCALE = 3.0
EPS = 1e-5

SIZES = {"flash": (288, 4096), "small": (32, 512)}
"""Experts and hidden size."""

FEW = (1, 2, 7, 8, 9, 33, 63, 64)
"""Tokens whose logits one kernel computes; for the first of these sizes one block chooses the experts."""

MORE = (65, 300)

SUMS = 2.0**-14
"""Roundings of a float32 sum, as a share of the largest."""


class Routed(NamedTuple):
    """The results for one kind of logits."""

    logits: Array
    ids: Array
    weights: Array
    rows: Array
    offsets: Array


@pytest.fixture(scope="module")
def router() -> Model:
    """Both kinds of router: float32 logits with normalised weights, rounded ones with weights as they are."""
    gpu = DeviceRef.GPU()
    types = [TensorType(DType.bfloat16, (rows, "H"), gpu) for rows in ("T", "E")]
    with Graph("gpu_router", input_types=[*types, TensorType(DType.float32, ("E",), gpu)]) as graph:
        x, w, bias = (value.tensor for value in graph.inputs)
        logits = kernels.linear(x, w, dtype=DType.float32)
        rounded_logits = ops.cast(kernels.linear(x, w), DType.float32)
        graph.output(
            *(logits, *kernels.assign(logits, bias, top_k=TOP_K, normalize=True, scale=SCALE)),
            *(rounded_logits, *kernels.assign(rounded_logits, bias, top_k=TOP_K, normalize=False, scale=1.0)),
        )
    return InferenceSession(devices=[Accelerator()]).load(graph)


class Router:
    """Random tokens and weights, and what a GPU makes of them."""

    def __init__(self, rng: np.random.Generator, tokens: int, sizes: tuple[int, int]) -> None:
        experts, hidden = sizes
        self.x = rounded(rng.standard_normal((tokens, hidden), np.float32), DType.bfloat16)
        w = rng.standard_normal((experts, hidden), np.float32) / np.float32(np.sqrt(hidden))
        self.w = rounded(w, DType.bfloat16)
        self.bias = rng.uniform(-0.2, 0.2, experts).astype(np.float32)

    def run(self, model: Model) -> tuple[Routed, Routed]:
        """Executes on freed memory full of NaN."""
        for x in (np.full_like(self.x, np.nan), self.x):
            results = execute(model, [as_bfloat16(x), as_bfloat16(self.w), self.bias])
        return Routed(*results[:5]), Routed(*results[5:])


def check_choice(found: Routed, bias: Array, normalize: bool, scale: float) -> None:
    """Whether the choice follows from the logits."""
    scores = (1 / (1 + np.exp(-found.logits.astype(np.float64)))).astype(np.float32)
    # A stable sort keeps the lower of two equal experts first.
    ids = np.argsort(-(scores + bias), axis=1, kind="stable")[:, :TOP_K]
    np.testing.assert_array_equal(found.ids, ids)
    weights = np.take_along_axis(scores, ids, 1).astype(np.float64)
    if normalize:
        weights /= weights.sum(1, keepdims=True) + 1e-20
    np.testing.assert_allclose(found.weights, scale * weights, rtol=2e-6)
    check_order(found, len(bias))


def check_order(found: Routed, num_experts: int) -> None:
    for order, expected in zip((found.rows, found.offsets), grouped(found.ids, num_experts), strict=True):
        np.testing.assert_array_equal(order, expected)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("tokens", [*FEW, *MORE])
def test_logits_equal_float64_and_the_choice_follows(
    router: Model, rng: np.random.Generator, tokens: int, sizes: tuple[int, int]
) -> None:
    operands = Router(rng, tokens, sizes)
    exact, coarse = operands.run(router)
    expected = operands.x.astype(np.float64) @ operands.w.astype(np.float64).T
    for found, tolerance in ((exact, SUMS), (coarse, TOLERANCE)):
        np.testing.assert_allclose(found.logits, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    np.testing.assert_array_equal(coarse.logits, rounded(coarse.logits, DType.bfloat16))
    check_choice(exact, operands.bias, normalize=True, scale=SCALE)
    check_choice(coarse, operands.bias, normalize=False, scale=1.0)


@pytest.mark.parametrize("tokens", [*FEW, *MORE])
def test_equal_experts_are_chosen_in_order(router: Model, rng: np.random.Generator, tokens: int) -> None:
    operands = Router(rng, tokens, SIZES["flash"])
    operands.w[1::2], operands.bias[1::2] = operands.w[::2], operands.bias[::2]
    # More equal experts than are chosen: several of a lane, and of many lanes.
    operands.w[100:], operands.bias[100:] = operands.w[100], 2.0
    for found, normalize, scale in zip(operands.run(router), (True, False), (SCALE, 1.0), strict=True):
        np.testing.assert_array_equal(found.logits[:, 1::2], found.logits[:, ::2])
        check_choice(found, operands.bias, normalize, scale)
        np.testing.assert_array_equal(found.ids, np.broadcast_to(100 + np.arange(TOP_K), (tokens, TOP_K)))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("tokens", [*FEW, *MORE])
def test_nan_stays_in_its_token(router: Model, rng: np.random.Generator, tokens: int, sizes: tuple[int, int]) -> None:
    operands = Router(rng, tokens, sizes)
    clean = operands.run(router)
    broken = int(rng.integers(tokens))
    operands.x[broken, rng.integers(sizes[1])] = np.nan
    others = np.arange(tokens) != broken
    for before, found in zip(clean, operands.run(router), strict=True):
        for was, now in zip(before[:3], found[:3], strict=True):
            assert now[others].tobytes() == was[others].tobytes()
        assert np.isnan(found.logits[broken]).all()
        assert np.isnan(found.weights[broken]).all()
        assert len({*found.ids[broken]} & {*range(sizes[0])}) == TOP_K
        check_order(found, sizes[0])


@pytest.mark.parametrize("tokens", [*FEW, *MORE])
def test_the_same_input_gives_the_same_bits(router: Model, rng: np.random.Generator, tokens: int) -> None:
    operands = Router(rng, tokens, SIZES["flash"])
    first = operands.run(router)
    for _ in range(5):
        for before, again in zip(first, operands.run(router), strict=True):
            assert [values.tobytes() for values in again] == [values.tobytes() for values in before]


def test_a_token_has_the_same_bits_in_any_few(router: Model, rng: np.random.Generator) -> None:
    operands = Router(rng, max(FEW), SIZES["flash"])
    together, _ = operands.run(router)
    for tokens in sorted(FEW, reverse=True):
        operands.x = operands.x[:tokens]
        few, _ = operands.run(router)
        for alone, of_all in zip(few[:3], together[:3], strict=True):
            assert alone.tobytes() == of_all[: len(alone)].tobytes()


LAYERS = 4
LAYER_SIZES = (32, TOP_K, 512, 256)
"""Experts, experts a token, hidden size, intermediate size."""


@pytest.fixture(scope="module")
def layers() -> Model:
    """Layers behind one another as a model has them: the router follows a norm, the experts the router."""
    num_experts, top_k, hidden, width = LAYER_SIZES
    gpu = DeviceRef.GPU()
    types = [
        *LAYERS * [TensorType(DType.bfloat16, ("T", hidden), gpu)],
        TensorType(DType.bfloat16, (num_experts, hidden), gpu),
        *2 * [TensorType(DType.bfloat16, (num_experts, width, hidden), gpu)],
        TensorType(DType.bfloat16, (num_experts, hidden, width), gpu),
        TensorType(DType.bfloat16, (hidden,), gpu),
        TensorType(DType.float32, (num_experts,), gpu),
    ]
    with Graph("gpu_layers", input_types=types) as graph:
        values = [value.tensor for value in graph.inputs]
        w, gate, up, down, norm_weight, bias = values[LAYERS:]
        none, limit = (ops.constant(value, DType.float32, device=DeviceRef.CPU()) for value in (np.inf, LIMIT))
        outputs = list[TensorValue]()
        for h in values[:LAYERS]:
            x = kernels.norm(h, norm_weight, eps=EPS, offset=1.0)
            logits = kernels.linear(x, w, dtype=DType.float32)
            chosen = kernels.assign(logits, bias, top_k=top_k, normalize=True, scale=SCALE)
            act, shared_act = kernels.gate_up_shared(
                x, gate, up, gate[0], up[0], chosen.rows, chosen.offsets, none, limit
            )
            y = kernels.down_shared(act, down, shared_act, down[0], chosen.rows, chosen.offsets, chosen.weights)
            outputs += [x, *chosen, act, shared_act, y]
        graph.output(*outputs)
    return InferenceSession(devices=[Accelerator()]).load(graph)


@pytest.mark.parametrize("tokens", [1, 2, 8, 11, 12, 64, 65])
def test_experts_that_begin_early_have_the_tokens(layers: Model, rng: np.random.Generator, tokens: int) -> None:
    num_experts, _, hidden, _ = LAYER_SIZES
    layer = Layer(rng, DType.bfloat16, (tokens, *LAYER_SIZES), num_experts, DType.bfloat16)
    router = Router(rng, tokens, (num_experts, hidden))
    hs = [rounded(rng.standard_normal((tokens, hidden), np.float32), DType.bfloat16) for _ in range(LAYERS)]
    matrices = (router.w, layer.gate, layer.up, layer.down, np.zeros(hidden, np.float32))
    fixed: Operands = [*(as_bfloat16(matrix) for matrix in matrices), router.bias]
    for inputs in ([np.full_like(h, np.nan) for h in hs], hs):
        results = execute(layers, [*(as_bfloat16(h) for h in inputs), *fixed])
    each = len(results) // LAYERS
    for i in range(LAYERS):
        x, ids, weights, rows, offsets, *found = results[each * i : each * (i + 1)]
        layer.x, layer.ids, layer.weights = x, ids, weights
        layer.rows, layer.offsets = grouped(ids, num_experts)
        np.testing.assert_array_equal(rows, layer.rows)
        np.testing.assert_array_equal(offsets, layer.offsets)
        act, _, y, _, gated = layer.expected()
        shared = y + gated @ layer.down[0].astype(np.float64).T
        for result, expected in zip(found, (act, gated, shared), strict=True):
            np.testing.assert_allclose(result, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
    assert_replays_equal(layers, [*(as_bfloat16(h) for h in hs), *fixed], results)


def assert_replays_equal(model: Model, operands: Operands, expected: list[Array]) -> None:
    """Replays of the captured graph, behind one another, give the same bits."""
    device = Accelerator()
    buffers = [value if isinstance(value, Buffer) else Buffer.from_numpy(value) for value in operands]
    moved = [buffer.to(device) for buffer in buffers]
    outputs = model.capture(1, *moved)
    for _ in range(5):
        model.replay(1, *moved)
    device.synchronize()
    for output, before in zip(outputs, expected, strict=True):
        assert as_float32(output.to(CPU())).tobytes() == before.tobytes()
    model.release_captured_graph(1)
