"""What only a GPU can show: its kernels against numpy in float64, and captured graphs against eager execution."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import speculation_harness as speculation
from expert_layer import LIMIT, Array, Layer, Operands, as_bfloat16, rounded
from max.driver import CPU, Accelerator, Buffer, accelerator_count
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import DeviceRef, Graph, TensorType, ops
from max.pipelines.context import SamplingParams
from max.pipelines.lib.auto_model import AutoModel

from step3p5 import attention_kernels, kernels
from step3p5.checkpoint_tensors import CheckpointDtype
from step3p5.random_checkpoint.writer import write_random_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(accelerator_count() == 0, reason="not run: no GPU")]

CROSSOVERS = (1, 2, 7, 8, 9, 63, 64, 65, 127, 255, 300, 1000)
"""Tokens on each side of every choice between paths."""

NUM_EXPERTS, TOP_K, HIDDEN, WIDTH = 32, 8, 512, 256
EPS = 1e-5

VOCAB = 128896
SHARED_ROWS = (1, 3, 40, 66)
"""Rows that several blocks share, from many to two (on an H200); from 67 on every row has one."""

DRAWN_ROWS = (*SHARED_ROWS, 67, 300)

TOLERANCE = 2.0**-7
"""A bfloat16 rounding of the result and one of the activations, as a share of the largest value."""


@pytest.fixture(scope="module")
def experts() -> Model:
    """The experts and dense layers in bfloat16, in the order of `Layer.expected`."""
    gpu = DeviceRef.GPU()
    types = [
        TensorType(DType.bfloat16, ("T", HIDDEN), gpu),
        *(TensorType(DType.bfloat16, (NUM_EXPERTS, WIDTH, HIDDEN), gpu) for _ in range(2)),
        TensorType(DType.bfloat16, (NUM_EXPERTS, HIDDEN, WIDTH), gpu),
        TensorType(DType.int32, ("TK",), gpu),
        TensorType(DType.int32, (NUM_EXPERTS + 1,), gpu),
        TensorType(DType.float32, ("T", TOP_K), gpu),
    ]
    with Graph("gpu_experts", input_types=types) as graph:
        x, gate, up, down, rows, offsets, weights = (value.tensor for value in graph.inputs)
        none, limit = (ops.constant(value, DType.float32, device=DeviceRef.CPU()) for value in (np.inf, LIMIT))
        act = kernels.gate_up(x, gate, up, rows, offsets, none)
        limited = kernels.gate_up(x, gate, up, rows, offsets, limit)
        y = kernels.down(act, down, rows, offsets, weights)
        # The first expert as the shared one: what it adds to `y` is known from its own products.
        both = kernels.gate_up_shared(x, gate, up, gate[0], up[0], rows, offsets, none, limit)
        with_shared = kernels.down_shared(both[0], down, both[1], down[0], rows, offsets, weights)
        product, gated = kernels.linear(x, gate[0]), kernels.swiglu(x, gate[0], up[0], limit)
        graph.output(act, limited, y, product, gated, *both, with_shared)
    return InferenceSession(devices=[Accelerator()]).load(graph)


def random_layer(rng: np.random.Generator, tokens: int, choose_from: int = NUM_EXPERTS) -> Layer:
    return Layer(rng, DType.bfloat16, (tokens, NUM_EXPERTS, TOP_K, HIDDEN, WIDTH), choose_from, DType.bfloat16)


def execute(model: Model, operands: Operands) -> list[Array]:
    """The results in float32."""
    buffers = [value if isinstance(value, Buffer) else Buffer.from_numpy(value) for value in operands]
    results = [result.to(CPU()) for result in model.execute(*(buffer.to(Accelerator()) for buffer in buffers))]
    return [as_float32(result) for result in results]


def as_float32(values: Buffer) -> Array:
    if values.dtype != DType.bfloat16:
        return values.to_numpy()
    halves = values.view(DType.uint16, values.shape).to_numpy()
    return (halves.astype(np.uint32) << 16).view(np.float32)


def run(model: Model, layer: Layer) -> list[Array]:
    """Executes on freed memory full of NaN."""
    x, layer.x = layer.x, np.full_like(layer.x, np.nan)
    execute(model, layer.operands())
    layer.x = x
    return execute(model, layer.operands())


@pytest.mark.parametrize("choose_from", [NUM_EXPERTS, TOP_K], ids=["all experts", "few experts"])
@pytest.mark.parametrize("tokens", CROSSOVERS)
def test_every_path_equals_float64(experts: Model, rng: np.random.Generator, tokens: int, choose_from: int) -> None:
    layer = random_layer(rng, tokens, choose_from)
    act, limited, y, product, gated = layer.expected()
    shared = y + gated @ layer.down[0].astype(np.float64).T
    results = [act, limited, y, product, gated, act, gated, shared]
    for found, expected in zip(run(experts, layer), results, strict=True):
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("tokens", CROSSOVERS)
def test_the_same_input_gives_the_same_bits(experts: Model, rng: np.random.Generator, tokens: int) -> None:
    layer = random_layer(rng, tokens)
    for first, second in zip(run(experts, layer), run(experts, layer), strict=True):
        assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("tokens", CROSSOVERS)
def test_nan_stays_in_its_token(experts: Model, rng: np.random.Generator, tokens: int) -> None:
    layer = random_layer(rng, tokens)
    results = run(experts, layer)
    broken = int(rng.integers(tokens))
    layer.x[broken, rng.integers(HIDDEN)] = np.nan
    others = np.arange(tokens) != broken
    for clean, found in zip(results, run(experts, layer), strict=True):
        if len(clean) != tokens:
            continue  # activations lie in the order of the experts
        assert np.isnan(found[broken]).any()
        assert found[others].tobytes() == clean[others].tobytes()


@pytest.fixture(scope="module")
def head_op() -> Model:
    """bfloat16 operands, and the float32 result of a router or a head."""
    types = [TensorType(DType.bfloat16, (rows, HIDDEN), DeviceRef.GPU()) for rows in ("T", "N")]
    with Graph("gpu_head", input_types=types) as graph:
        graph.output(kernels.linear(*(value.tensor for value in graph.inputs), dtype=DType.float32))
    return InferenceSession(devices=[Accelerator()]).load(graph)


@pytest.mark.parametrize("out_features", [288, 8200, 20016])
@pytest.mark.parametrize("tokens", CROSSOVERS)
def test_float32_logits_are_not_rounded(
    head_op: Model, rng: np.random.Generator, tokens: int, out_features: int
) -> None:
    x, w = (rounded(rng.standard_normal((rows, HIDDEN), np.float32), DType.bfloat16) for rows in (tokens, out_features))
    execute(head_op, [as_bfloat16(np.full_like(x, np.nan)), as_bfloat16(w)])
    (found,), (again,) = (execute(head_op, [as_bfloat16(x), as_bfloat16(w)]) for _ in range(2))
    expected = x.astype(np.float64) @ w.astype(np.float64).T
    np.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-14 * np.abs(expected).max())
    assert found.tobytes() == again.tobytes()


@pytest.fixture(scope="module")
def rows_ops() -> Model:
    """The gate of heads in bfloat16."""
    gpu = DeviceRef.GPU()
    types = [TensorType(DType.bfloat16, ("T", width), gpu) for width in (HIDDEN, HIDDEN // 128)]
    with Graph("gpu_rows", input_types=types) as graph:
        x, gate = (value.tensor for value in graph.inputs)
        graph.output(attention_kernels.head_gate(ops.reshape(x, (x.shape[0], HIDDEN // 128, 128)), gate))
    return InferenceSession(devices=[Accelerator()]).load(graph)


@pytest.mark.parametrize("tokens", [1, 3, 300])
def test_gated_heads_equal_float64(rows_ops: Model, rng: np.random.Generator, tokens: int) -> None:
    shapes = ((tokens, HIDDEN), (tokens, HIDDEN // 128))
    inputs = [rounded(rng.standard_normal(shape, np.float32), DType.bfloat16) for shape in shapes]
    execute(rows_ops, [as_bfloat16(np.full_like(values, np.nan)) for values in inputs])
    x, gate = (values.astype(np.float64) for values in inputs)
    expected = (x.reshape(tokens, -1, 128) / (1 + np.exp(-gate[..., None]))).reshape(tokens, HIDDEN)
    (found,) = execute(rows_ops, [as_bfloat16(values) for values in inputs])
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.fixture(scope="module")
def norm_ops() -> Model:
    """A norm, a residual sum with its norm, and the same of a bfloat16 addend."""
    gpu = DeviceRef.GPU()
    rows = TensorType(DType.bfloat16, ("T", "H"), gpu)
    types = [rows, TensorType(DType.float32, ("T", "H"), gpu), rows, TensorType(DType.float32, ("H",), gpu)]
    with Graph("gpu_norm", input_types=types) as graph:
        x, delta, rounded_delta, weight = (value.tensor for value in graph.inputs)
        graph.output(
            kernels.norm(x, weight, eps=EPS, offset=1.0),
            *kernels.add_norm(x, delta, weight, eps=EPS, offset=1.0),
            *kernels.add_norm(x, rounded_delta, weight, eps=EPS, offset=0.0),
        )
    return InferenceSession(devices=[Accelerator()]).load(graph)


@pytest.mark.parametrize("size", [5, 512, 4096, 4100, 9000])
@pytest.mark.parametrize("tokens", [1, 3, 300])
def test_norms_equal_float64(norm_ops: Model, rng: np.random.Generator, tokens: int, size: int) -> None:
    x, rounded_delta = (rounded(rng.standard_normal((tokens, size), np.float32), DType.bfloat16) for _ in range(2))
    delta, weight = rng.standard_normal((tokens, size), np.float32), rng.standard_normal(size, np.float32)
    poison = as_bfloat16(np.full_like(x, np.nan))
    execute(norm_ops, [poison, np.full_like(delta, np.nan), poison, weight])
    normed, *sums = execute(norm_ops, [as_bfloat16(x), delta, as_bfloat16(rounded_delta), weight])

    def expected_norm(rows: Array, scale: Array) -> Array:
        rows = rows.astype(np.float64)
        return rows / np.sqrt((rows**2).mean(-1, keepdims=True) + EPS) * scale

    def close(found: Array, expected: Array) -> None:
        np.testing.assert_allclose(found, expected, rtol=2.0**-8, atol=1e-6)

    close(normed, expected_norm(x, 1 + weight))
    for (total, of_total), addend, offset in zip((sums[:2], sums[2:]), (delta, rounded_delta), (1.0, 0.0), strict=True):
        close(total, x + addend)
        close(of_total, expected_norm(total, offset + weight))


@pytest.fixture(scope="module")
def greedy_op() -> Model:
    types = [TensorType(DType.float32, ("R", "V"), DeviceRef.GPU()), TensorType(DType.int64, (1,), DeviceRef.GPU())]
    with Graph("gpu_greedy", input_types=types) as graph:
        graph.output(kernels.greedy(*(value.tensor for value in graph.inputs)))
    return InferenceSession(devices=[Accelerator()]).load(graph)


def check_draws(model: Model, logits: Array, known: int) -> None:
    (found,) = execute(model, [logits, np.array([known])])
    expected = np.where(np.isnan(logits), -np.inf, logits)[:, :known].argmax(-1)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("vocab_size", [5, 1023, 40001, VOCAB])
@pytest.mark.parametrize("rows", DRAWN_ROWS)
def test_the_first_of_the_greatest_logits_is_drawn(
    greedy_op: Model, rng: np.random.Generator, rows: int, vocab_size: int
) -> None:
    logits = rng.standard_normal((rows, vocab_size), np.float32).round(1)
    logits[0, :2] = np.nan
    known = vocab_size - 2
    logits[:, known:] = 100
    check_draws(greedy_op, logits, known)


@pytest.mark.parametrize("vocab_size", [40001, VOCAB])
@pytest.mark.parametrize("rows", [*SHARED_ROWS, 67])
def test_one_token_is_drawn_wherever_it_is(
    greedy_op: Model, rng: np.random.Generator, rows: int, vocab_size: int
) -> None:
    """A greatest logit, then an equal one before or behind it, among minus infinities, NaN, lower or equal ones."""
    each = np.arange(rows)
    for others, greatest in ((-np.inf, -1e30), (np.nan, -1.0), (-2.0, -1.0), (0.0, 0.0)):
        logits = np.full((rows, vocab_size), others, np.float32)
        for _ in range(2):
            logits[each, rng.integers(vocab_size, size=rows)] = greatest
            check_draws(greedy_op, logits, vocab_size)
    logits[:, 0] = -0.0  # equal to the zeros behind it
    check_draws(greedy_op, logits, vocab_size)


@pytest.mark.parametrize("rows", SHARED_ROWS)
def test_ties_at_the_edges_of_blocks_go_to_the_first(greedy_op: Model, rows: int) -> None:
    """Equal logits on both sides of all places at which a block may begin, whatever their number."""
    each = np.arange(rows)
    for parts in range(2, 33):
        size = -(-(VOCAB // 4) // parts) * 4
        for start in range(0, parts - 1, rows):
            edges = ((start + each) % (parts - 1) + 1) * size
            logits = np.zeros((rows, VOCAB), np.float32)
            for places in (edges, edges - 1):
                logits[each, places] = 3
                check_draws(greedy_op, logits, VOCAB)


@pytest.mark.parametrize("rows", [*SHARED_ROWS, 67])
@pytest.mark.parametrize("known", [1, 2, 7, 500, 4031, 4033, VOCAB - 1, VOCAB, VOCAB + 5])
def test_unknown_tokens_are_not_drawn(greedy_op: Model, rng: np.random.Generator, rows: int, known: int) -> None:
    """However few are known: some blocks then have none."""
    logits = rng.standard_normal((rows, VOCAB), np.float32)
    logits[:, known:] = np.inf
    logits[:, :known][:, -1] = 10
    check_draws(greedy_op, logits, known)


@pytest.mark.parametrize("rows", DRAWN_ROWS)
@pytest.mark.parametrize("value", [-np.inf, np.nan])
def test_nothing_to_draw_gives_the_first_token(greedy_op: Model, rows: int, value: float) -> None:
    check_draws(greedy_op, np.full((rows, VOCAB), value, np.float32), VOCAB - 3)


def test_captured_graphs_give_the_tokens_of_eager_execution(tmp_path: Path, rng: np.random.Generator) -> None:
    checkpoint = tmp_path / "tiny"
    write_random_checkpoint(checkpoint, "tiny", None, CheckpointDtype.BFLOAT16, int(rng.integers(1 << 31)))
    prompts = [rng.integers(16, 500, size=length).tolist() for length in (1, 5, 129, 300)]
    answers = []
    for captured in (True, False):
        model = AutoModel(
            str(checkpoint),
            devices="gpu:0",
            custom_architectures=["pipelines_registry"],
            max_length=512,
            max_batch_size=len(prompts),
            device_graph_capture=captured,
            enable_overlap_scheduler=captured,
        )
        answers.append(model.generate(input_ids=prompts, max_new_tokens=24, temperature=0, ignore_eos=True).sequences)
        del model
    assert [list(tokens) for tokens in answers[0]] == [list(tokens) for tokens in answers[1]]


def test_captured_cycles_of_speculation_give_the_tokens_of_executed_ones(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    checkpoint, depth = tmp_path / "tiny", 3
    seed = int(rng.integers(1 << 31))
    write_random_checkpoint(checkpoint, "tiny", None, CheckpointDtype.BFLOAT16, seed, predictable=0.7)
    prompts = [rng.integers(16, 500, size=length).tolist() for length in (1, 5, 129, 300)]
    lengths = (60, 90, 120, 150)  # cycles of four requests, then of three, ...
    sampled = SamplingParams(temperature=0.7, top_k=20, seed=seed, ignore_eos=True)
    answers = []
    with speculation.load(checkpoint, depth, devices="gpu:0", max_batch_size=len(prompts)) as model:
        for captures in (True, False):
            model.pipeline.use_cycles(captures=captures)
            for sampling in (speculation.GREEDY, sampled):
                requests = [speculation.request(*pair, sampling) for pair in zip(prompts, lengths, strict=True)]
                answers.append(speculation.generate(model, requests))
            graphs = model.pipeline.cycles.graphs
            assert all(graph.captures == captures for graph in graphs.all), "a graph was not captured: see the log"
    assert answers[:2] == answers[2:]
    assert answers[0] != answers[1]
