"""Attention on a GPU, from the projections to the gated heads, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from expert_layer import Array, Operands, as_bfloat16, rounded
from gpu_ops import HEAD_DIM, HEADS, KEY_HEADS, PAGE_SIZE, ROTARY_DIM, attend, attend_inputs, attention
from max.driver import CPU, Accelerator, Buffer, accelerator_count
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import Graph
from test_attention_ops import normed, rotated
from test_gpu import TOLERANCE, as_float32

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(accelerator_count() == 0, reason="not run: no GPU")]

WINDOW = 40
ON_HOST = range(11, 16)
"""Operands that lie on the host."""

MOST_OF_OURS = 32
"""New tokens of a request that our attention takes, for `HEADS / KEY_HEADS` query heads a key head; MAX's takes
any, and single ones that see all keys where requests are few."""


class Requests:
    """Requests over a paged cache, in whose other places, those of the new tokens too, stands `elsewhere`."""

    def __init__(self, rng: np.random.Generator, lengths: list[int], new: list[int], elsewhere: float) -> None:
        self.lengths, self.new, self.layer = lengths, new, 1
        pages_each = -(-max(length + count for length, count in zip(lengths, new, strict=True)) // PAGE_SIZE)
        num_layers, num_pages, tokens = 2, len(new) * pages_each + 1, sum(new)
        shape = (num_pages, 2, num_layers, PAGE_SIZE, KEY_HEADS, HEAD_DIM)

        def draw(*shape: int) -> Array:
            return rounded(rng.standard_normal(shape, np.float32), DType.bfloat16)

        self.q, self.k, self.v = (draw(tokens, heads, HEAD_DIM) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
        self.gate = draw(tokens, HEADS)
        # Larger ones make a softmax of large scores, in which the rounding of keys counts for much.
        self.weights = [rounded(0.1 * draw(HEAD_DIM), DType.bfloat16) for _ in range(2)]
        angles = [rng.uniform(-3, 3, (tokens, columns // 2)).astype(np.float32) for columns in (ROTARY_DIM, HEAD_DIM)]
        self.tables = [np.concatenate([np.cos(own), np.sin(own)], axis=1) for own in angles]
        self.cache = draw(*shape)
        self.pages = rng.permutation(num_pages)[: len(new) * pages_each].reshape(len(new), -1).astype(np.uint32)
        self.offsets = np.cumsum([0, *new]).astype(np.uint32)
        held = np.zeros((num_pages, PAGE_SIZE), bool)
        for request, end in enumerate(lengths):
            places = np.arange(end)
            held[self.pages[request, places // PAGE_SIZE], places % PAGE_SIZE] = True
        self.cache[np.broadcast_to(~held[:, None, None, :, None, None], shape)] = elsewhere

    def expected(self, window: int | None) -> Array:
        """Gated heads `[T, HEADS * HEAD_DIM]` in float64."""
        table = self.tables[0 if window is None else 1].astype(np.float64)
        q, k = (
            rotated(normed(x.astype(np.float64), w.astype(np.float64)), table)
            for x, w in zip((self.q, self.k), self.weights, strict=True)
        )
        want = np.empty(self.q.shape)
        for request, (length, count) in enumerate(zip(self.lengths, self.new, strict=True)):
            own = slice(self.offsets[request], self.offsets[request + 1])
            held = np.concatenate(self.cache[self.pages[request], :, self.layer], axis=1)[:, :length]
            rows = np.concatenate([held.astype(np.float64), np.stack([k[own], self.v[own]])], axis=1)
            for i in range(count):
                keys, values = rows[:, max(length + i + 1 - (window or 1 << 20), 0) : length + i + 1]
                for head in range(HEADS):
                    kv, token = head // (HEADS // KEY_HEADS), self.offsets[request] + i
                    scores = keys[:, kv] @ q[token, head] * HEAD_DIM**-0.5
                    weights = np.exp(scores - scores.max())
                    want[token, head] = weights @ values[:, kv] / weights.sum()
        return (want / (1 + np.exp(-self.gate.astype(np.float64)))[..., None]).reshape(len(want), -1)

    def operands(self) -> Operands:
        """In the order of `attend_inputs`, the pages with the columns behind a row that MAX's kernel may read."""
        pages = np.pad(self.pages, ((0, 0), (0, 16)))
        longest = max(self.new)
        host = [np.array([-1]), np.array(self.layer, np.uint32), np.array([longest], np.uint32)]
        host += [np.array([max(self.lengths)], np.uint32), np.array([len(self.new), longest, 1, max(self.lengths)])]
        rows = [values.reshape(len(values), -1) for values in (self.q, self.k, self.v, self.gate)]
        halves = [as_bfloat16(values) for values in (*rows, *self.weights)]
        lengths = np.array(self.lengths, np.uint32)
        return [*halves, *self.tables, self.offsets, lengths, pages, *host, as_bfloat16(self.cache)]


@pytest.fixture(scope="module")
def attention_ops() -> dict[str, Model]:
    """The plain attention and the one of a model: over all keys, then within a window, whose keys stay in the cache."""
    models = {}
    for name, build in {"plain": attend, "model": attention}.items():
        with Graph(f"gpu_attention_{name}", input_types=attend_inputs()) as graph:
            graph.output(*(build(graph.inputs, window) for window in (None, WINDOW)))
        models[name] = InferenceSession(devices=[Accelerator()]).load(graph)
    return models


@pytest.mark.parametrize(
    ("lengths", "new"),
    [
        ([0], [1]),
        ([200], [4]),
        ([0, 5, 300, 63], [1, 6, 2, 4]),
        ([4000, 0], [1, 1]),
        ([500], [8]),
        ([4000], [12]),
        ([9000], [16]),
        ([61, 62, 63, 64, 126, 127], [4, 4, 4, 4, 4, 4]),
        ([100] * 12, [3] * 12),
        ([100] * 70, [4] * 70),
        ([100] * 140, [1] * 140),
        ([64, 127, 1000], [20, 32, 1]),
        ([0, 5, 300], [130, 1, 6]),
    ],
)
def test_attention_equals_float64(
    attention_ops: dict[str, Model], rng: np.random.Generator, lengths: list[int], new: list[int]
) -> None:
    # MAX's kernel multiplies by zero what lies behind the last key.
    is_ours = 1 < max(new) <= MOST_OF_OURS or len(new) > 100
    requests = Requests(rng, lengths, new, elsewhere=np.nan if is_ours else 1e30)
    expected = [requests.expected(window) for window in (None, WINDOW)]
    for model in attention_ops.values():
        results = run_attention(model, requests)
        for found, want in zip(results, expected, strict=True):
            np.testing.assert_allclose(found, want, rtol=0, atol=TOLERANCE * np.abs(want).max())
        for found, again in zip(results, run_attention(model, requests), strict=True):
            assert again.tobytes() == found.tobytes()


def test_new_keys_and_values_are_in_the_cache(attention_ops: dict[str, Model], rng: np.random.Generator) -> None:
    """Where the plain ops put them, and nothing else changes."""
    requests = Requests(rng, [0, 62, 300], [1, 4, 6], elsewhere=1e30)
    caches = []
    for name in ("plain", "model"):
        operands = on_device(requests)
        attention_ops[name].execute(*operands)
        caches.append(as_float32(operands[-1].to(CPU())))
    assert (caches[0] != as_float32(on_device(requests)[-1].to(CPU()))).any()
    np.testing.assert_allclose(caches[1], caches[0], rtol=2.0**-7)


def on_device(requests: Requests) -> list[Buffer]:
    """The operands where the op has them."""
    operands = [value if isinstance(value, Buffer) else Buffer.from_numpy(value) for value in requests.operands()]
    return [operand if i in ON_HOST else operand.to(Accelerator()) for i, operand in enumerate(operands)]


def run_attention(model: Model, requests: Requests) -> list[Array]:
    """Executes on freed memory full of NaN."""
    operands = on_device(requests)
    poisoned = as_bfloat16(np.full((len(requests.q), HEADS * HEAD_DIM), np.nan, np.float32)).to(Accelerator())
    model.execute(poisoned, *operands[1:])
    return [as_float32(result.to(CPU())) for result in model.execute(*operands)]
