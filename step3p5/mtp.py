"""The graph of one multi-token-prediction depth: from a hidden state and the token after it, the next token.

Depth `k` at position `i` reads the token at `i + k + 1` and the hidden state at `i` of depth `k - 1` (of the target,
before its final norm, for `k = 0`), and predicts the token at `i + k + 2`:
`z = eh_proj( concat( enorm(embed(token)), hnorm(previous) ) )`, one decoder layer with a cache of its own, and
`logits = shared_head.output( shared_head.norm(z) )`. Every depth has its own head; the embedding is the target's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue, Type, Value, ops
from max.nn.embedding import Embedding
from max.nn.kv_cache import KVCacheParams, PagedCacheValues
from max.nn.layer import Module
from typing_extensions import override

from .checkpoint_tensors import TensorRole
from .kernels import greedy, linear
from .layer_config import LayerConfig, ModelConfig
from .layers.decoder import DecoderLayer
from .layers.linear import Linear
from .layers.norm import RMSNorm, summed
from .layers.rope import rope_table
from .layers.vocabulary import Head
from .precision import activation_dtype, weight_dtype
from .traced_module import TracedModule

UNKNOWN_TOKEN = -1
"""In `known`: the token after a request's last row has not been chosen yet, so the draft stands for it."""


HEAD_WEIGHT = "shared_head.output.weight"
"""`MTPDepth`'s name of its output projection, which it has where every token can be drafted."""


class SharedHead(Module):
    """A depth's own norm and output projection; the names are the checkpoint's."""

    def __init__(self, model: ModelConfig, dtype: DType, device: DeviceRef) -> None:
        super().__init__()
        self.norm = RMSNorm(model.hidden_size, model, weight_dtype(TensorRole.HIDDEN_NORM, dtype, device))
        self.output = Head(model.hidden_size, model.vocab_size, dtype, device)

    def input_types(self) -> tuple[TensorType, ...]:
        """What the head takes besides hidden states: nothing."""
        return ()

    def __call__(self, z: TensorValue) -> tuple[TensorValue, TensorValue]:
        """The likeliest tokens `[n]` int64 after hidden states `[n, hidden_size]`, and the logits `[n, vocab_size]`."""
        logits = self.output(self.norm(z))
        return _argmax(logits), logits


class PartialHead(Module):
    """A depth's norm and some rows of its output projection, which change from step to step.

    Args:
        size: Number of rows.
        model: Hidden size and norm constants.
        dtype: Type of the rows.
        device: Where the depth runs.
    """

    def __init__(self, size: int, model: ModelConfig, dtype: DType, device: DeviceRef) -> None:
        super().__init__()
        self.norm = RMSNorm(model.hidden_size, model, weight_dtype(TensorRole.HIDDEN_NORM, dtype, device))
        self._types = (
            TensorType(dtype, [size, model.hidden_size], device),
            TensorType(DType.int64, [size], device),
        )

    def input_types(self) -> tuple[TensorType, ...]:
        """The rows `[size, hidden_size]` and the tokens `[size]` int64 that they are for."""
        return self._types

    def __call__(self, z: TensorValue, rows: TensorValue, ids: TensorValue) -> tuple[TensorValue, TensorValue]:
        """The likeliest of `ids`, `[n]` int64, after hidden states `[n, hidden_size]`, and the logits `[n, size]`."""
        logits = linear(self.norm(z), rows, dtype=DType.float32)
        return ops.gather(ids, _argmax(logits), axis=0), logits


def _argmax(logits: TensorValue) -> TensorValue:
    return greedy(logits, ops.constant([int(logits.shape[-1])], DType.int64, device=logits.device))


class MTPDepth(TracedModule):
    """One depth. Depths of one shape make the same graph: what differs, weights aside, comes in as a value.

    Weight names are the checkpoint's less `model.layers.{index}.` and `transformer.`.

    Args:
        layer: The depth's decoder layer.
        model: Hidden size, vocabulary and norm constants.
        kv_params: The cache that holds this kind of layer.
        head: What the drafts are chosen with.
        dtype: Storage type of the weights.
        device: Where the depth runs.
    """

    def __init__(
        self,
        layer: LayerConfig,
        model: ModelConfig,
        kv_params: KVCacheParams,
        head: SharedHead | PartialHead,
        dtype: DType,
        device: DeviceRef,
    ) -> None:
        super().__init__()
        hidden_size = model.hidden_size
        self.config, self.kv_params = layer, kv_params
        self.hidden_size, self.dtype, self.device = hidden_size, activation_dtype(dtype, device), device
        self.embed_tokens = Embedding(model.vocab_size, hidden_size, dtype, device)
        norm_dtype = weight_dtype(TensorRole.HIDDEN_NORM, dtype, device)
        self.enorm = RMSNorm(hidden_size, model, norm_dtype)
        self.hnorm = RMSNorm(hidden_size, model, norm_dtype)
        self.eh_proj = Linear(2 * hidden_size, hidden_size, dtype, device)
        self.layer = DecoderLayer(layer, model, kv_params, dtype, device)
        self.shared_head = head

    def __call__(
        self,
        previous: TensorValue,
        tokens: TensorValue,
        following: TensorValue,
        last_rows: TensorValue,
        known: TensorValue,
        input_row_offsets: TensorValue,
        cache_layer: TensorValue,
        swiglu_limit: TensorValue,
        kv_collection: PagedCacheValues,
        *head_inputs: TensorValue,
    ) -> tuple[TensorValue, TensorValue, TensorValue, TensorValue]:
        """Runs the depth over a ragged batch and drafts one token a request.

        Args:
            previous: Hidden states of the depth before, `[rows, hidden_size]`.
            tokens: The token that each row joins with its hidden state, `[rows]` int64.
            following: `[rows]` int64, where each row's token at the next depth stands in `tokens` followed by the
                `batch` tokens chosen here.
            last_rows: `[batch]` int64, the row of each request after which a token is drafted. Rows behind it are
                of no consequence to it.
            known: `[batch]` int64, the token after that row's, or `UNKNOWN_TOKEN`.
            input_row_offsets: `[batch + 1]` uint32.
            cache_layer: This depth's index within its cache, a uint32 scalar on the host.
            swiglu_limit: Clamp limit of the MLP, a float32 scalar on the host; infinite where there is none.
            kv_collection: The paged cache; its lengths are those of this depth.
            head_inputs: What the head takes besides hidden states.

        Returns:
            The depth's hidden states `[rows, hidden_size]`; the next depth's `tokens [rows]`; the drafted tokens
            `[batch]`; the float32 logits that they were chosen by.
        """
        rope = self.config.attention.rope
        embedded = ops.cast(self.embed_tokens(tokens), self.dtype)
        joined = ops.concat([self.enorm(embedded), self.hnorm(previous)], axis=-1)
        table = () if rope is None else (rope_table(rope, tokens, input_row_offsets, kv_collection.cache_lengths),)
        stream = [self.eh_proj(joined)]
        z = summed(
            *self.layer(stream, cache_layer, kv_collection, input_row_offsets, swiglu_limit, swiglu_limit, *table)
        )
        best, logits = self.shared_head(ops.gather(z, last_rows, axis=0), *head_inputs)
        drafts = ops.rebind(best, known.shape)
        chosen = ops.where(known == UNKNOWN_TOKEN, drafts, known)
        return z, ops.gather(ops.concat([tokens, chosen]), following, axis=0), drafts, logits

    def input_types(self) -> tuple[Type[Any], ...]:
        """The graph's inputs: those of `__call__`, in its order."""
        host = DeviceRef.CPU()
        return (
            TensorType(self.dtype, ["rows", self.hidden_size], self.device),
            TensorType(DType.int64, ["rows"], self.device),
            TensorType(DType.int64, ["rows"], self.device),
            TensorType(DType.int64, ["batch"], self.device),
            TensorType(DType.int64, ["batch"], self.device),
            TensorType(DType.uint32, ["input_row_offsets_len"], self.device),
            TensorType(DType.uint32, [], host),
            TensorType(DType.float32, [], host),
            *self.shared_head.input_types(),
            *self.kv_params.flattened_kv_inputs(),
        )

    @override
    def call_with(self, *inputs: Value[Any]) -> tuple[TensorValue, ...]:
        """Calls the module with values of `input_types()`."""
        first_cache = 8 + len(self.shared_head.input_types())
        first = [value.tensor for value in inputs[:first_cache]]
        (collection,) = self.kv_params.unflatten_kv_inputs(iter(inputs[first_cache:]))
        return self(*first[:8], collection, *first[8:])


def depth_weights(state_dict: Mapping[str, Any], layer: LayerConfig) -> dict[str, Any]:
    """The weights of one depth by `MTPDepth`'s names, from the loaded checkpoint's by graph name."""
    prefix = f"layers.{layer.index}."
    weights = {"embed_tokens.weight": state_dict["embed_tokens.weight"]}
    for name, data in state_dict.items():
        if name.startswith(prefix):
            own = name.removeprefix(prefix).removeprefix("transformer.")
            outside = own.split(".")[0] in ("enorm", "hnorm", "eh_proj", "shared_head")
            weights[own if outside else f"layer.{own}"] = data
    return weights


def swiglu_limit(layer: LayerConfig) -> float:
    """The clamp limit of a depth's MLP; infinite where there is none."""
    return layer.mlp.swiglu_limit or math.inf
