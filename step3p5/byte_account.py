"""What one forward pass costs: the bytes that it must read from memory and its floating-point operations.

Counted from the parsed configuration and the table of checkpoint tensors alone, whatever runs the model. Every weight
is read once, except two: the embedding, of which each token reads one row, and the routed experts, of which a layer
reads those that its tokens hit. How many that is depends on the router; the count is the expectation under uniform
routing. Activations are left out: they are small and can stay in a cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from step3p5.checkpoint_tensors import CheckpointDtype, TensorRole, TensorSpec, checkpoint_tensors, mtp_layer_tensors
from step3p5.layer_config import AttentionConfig, ModelConfig, MoEConfig

EXPERT_ROLES = frozenset({TensorRole.EXPERT_GATE, TensorRole.EXPERT_UP, TensorRole.EXPERT_DOWN})
"""Roles of the stacked tensors of which a token reads `top_k` experts."""

_NOT_MULTIPLIED = frozenset(
    {TensorRole.EMBEDDING, TensorRole.HIDDEN_NORM, TensorRole.QK_NORM, TensorRole.ROUTER_BIAS, TensorRole.LM_HEAD}
)


@dataclass(frozen=True)
class Forward:
    """One forward pass over a batch of `batch_size` equal requests.

    Each brings `new_tokens` tokens, the last of its `context` tokens: those before them are in the KV cache. A prefill
    has `new_tokens == context`, a decode step `new_tokens == 1`.

    Raises:
        ValueError: If a number is not positive or a request has more new tokens than context.
    """

    batch_size: int
    new_tokens: int
    context: int

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not 1 <= self.new_tokens <= self.context:
            raise ValueError(f"{self}: expected batch_size >= 1 and 1 <= new_tokens <= context")

    @property
    def num_tokens(self) -> int:
        """New tokens of the whole batch."""
        return self.batch_size * self.new_tokens


def experts_hit(moe: MoEConfig, num_tokens: int) -> float:
    """Expected number of distinct experts of one layer that `num_tokens` tokens hit, each `top_k` uniformly drawn."""
    missed = (1 - moe.top_k / moe.num_experts) ** num_tokens
    return moe.num_experts * (1 - missed)


def weight_bytes(model: ModelConfig, dtype: CheckpointDtype, num_tokens: int) -> dict[str, float]:
    """Expected bytes that a forward pass reads of each of the decoder's tensors, by hub name.

    Args:
        model: The model.
        dtype: Type in which the weights are held in memory.
        num_tokens: New tokens of the whole batch.
    """
    read = {}
    for name, spec in checkpoint_tensors(model).items():
        num_bytes = float(spec.num_bytes(dtype))
        if spec.role is TensorRole.EMBEDDING:
            rows = num_tokens + (model.vocab_size if model.tie_word_embeddings else 0)
            num_bytes *= rows / model.vocab_size
        elif spec.role in EXPERT_ROLES:
            moe = _moe_of(model, name)
            num_bytes *= experts_hit(moe, num_tokens) / moe.num_experts
        read[name] = num_bytes
    return read


def cache_bytes(model: ModelConfig, dtype: CheckpointDtype, forward: Forward) -> int:
    """Bytes of keys and values, held in `dtype`, that the queries of a forward pass see.

    Full layers see the context; sliding layers see the window before each query and no more than the context.
    """
    per_request = 0
    for layer in model.layers:
        attention = layer.attention
        seen = forward.context
        if attention.sliding_window is not None:
            seen = min(seen, attention.sliding_window - 1 + forward.new_tokens)
        per_request += 2 * seen * attention.num_key_value_heads * attention.head_dim * dtype.itemsize
    return forward.batch_size * per_request


def forward_bytes(
    model: ModelConfig, forward: Forward, weight_dtype: CheckpointDtype, cache_dtype: CheckpointDtype
) -> float:
    """Expected bytes that a forward pass must read: weights, embedding rows, keys and values."""
    weights = sum(weight_bytes(model, weight_dtype, forward.num_tokens).values())
    return weights + cache_bytes(model, cache_dtype, forward)


def drafting_tensors(model: ModelConfig, depth: int, draft_vocabulary: int) -> dict[str, TensorSpec]:
    """The tensors of the first `depth` MTP layers, by hub name, as they lie on a device.

    Of their heads these are the rows of the `draft_vocabulary` tokens that can be drafted.
    """
    tensors = {}
    for layer in model.mtp_layers[:depth]:
        for name, spec in mtp_layer_tensors(model, layer).items():
            if spec.role is TensorRole.LM_HEAD:
                spec = replace(spec, shape=(min(spec.shape[0], draft_vocabulary), *spec.shape[1:]))
            tensors[name] = spec
    return tensors


def draft_bytes(model: ModelConfig, depth: int, weight_dtype: CheckpointDtype, draft_vocabulary: int) -> int:
    """Bytes that drafting `depth` tokens of every request must read: the weights of as many MTP layers.

    A layer's cache is a few thousandths of its weights and is left out, and so are the embedding's rows.
    """
    return sum(spec.num_bytes(weight_dtype) for spec in drafting_tensors(model, depth, draft_vocabulary).values())


def cycle_bytes(
    model: ModelConfig,
    batch_size: int,
    depth: int,
    context: int,
    weight_dtype: CheckpointDtype,
    cache_dtype: CheckpointDtype,
    draft_vocabulary: int,
) -> float:
    """Expected bytes of a cycle of speculation: drafting `depth` tokens of each request and verifying them.

    With depth 0 it is a plain decode step. `context` counts the tokens before the new ones, `draft_vocabulary` the
    tokens that can be drafted.
    """
    verified = Forward(batch_size, 1 + depth, context + 1 + depth)
    drafting = draft_bytes(model, depth, weight_dtype, draft_vocabulary)
    return forward_bytes(model, verified, weight_dtype, cache_dtype) + drafting


def forward_flops(model: ModelConfig, forward: Forward) -> float:
    """Floating-point operations of a forward pass: two a multiply-add of every matrix product and of attention.

    The head runs on each request's last token only. Norms, RoPE, softmax and activations are left out.
    """
    per_token = 0.0
    for name, spec in checkpoint_tensors(model).items():
        if spec.role in EXPERT_ROLES:
            moe = _moe_of(model, name)
            per_token += 2.0 * spec.num_elements * moe.top_k / moe.num_experts
        elif spec.role not in _NOT_MULTIPLIED:
            per_token += 2.0 * spec.num_elements
    head = 2.0 * model.vocab_size * model.hidden_size
    attention = sum(attention_flops(layer.attention, forward) for layer in model.layers)
    return forward.num_tokens * per_token + forward.batch_size * (head + attention)


def attention_flops(attention: AttentionConfig, forward: Forward) -> float:
    """Scores and weighted values of one request's new tokens: two products over every visible query-key pair."""
    before = forward.context - forward.new_tokens
    pairs = _causal_pairs(forward.context, attention.sliding_window) - _causal_pairs(before, attention.sliding_window)
    return 4.0 * attention.num_attention_heads * attention.head_dim * pairs


def _causal_pairs(length: int, window: int | None) -> int:
    """Query-key pairs of a whole sequence: query `p` sees `min(p + 1, window)` keys."""
    ramp = length if window is None else min(length, window)
    return ramp * (ramp + 1) // 2 + (length - ramp) * ramp


def _moe_of(model: ModelConfig, tensor_name: str) -> MoEConfig:
    """The mixture of experts that a tensor `model.layers.{index}.…` belongs to."""
    index = int(tensor_name.split(".")[2])
    mlp = next(layer.mlp for layer in model.layers if layer.index == index)
    assert isinstance(mlp, MoEConfig)
    return mlp
