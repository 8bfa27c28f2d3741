"""The graph of Step-3.5-Flash: embedding, decoder layers over a hybrid KV cache, final norm and head."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from max.dtype import DType
from max.graph import DeviceRef, Graph, TensorValue, Value, ops
from max.nn.embedding import Embedding
from max.nn.kv_cache import KVCacheParams, PagedCacheValues
from max.nn.layer import LayerList
from max.nn.transformer.transformer import forward_sequential_layers, logits_postprocess
from max.pipelines.lib.interfaces.batch_processor import ragged_kv_symbolic_input_tree
from max.tree import Tree
from typing_extensions import override

from .checkpoint_tensors import TensorRole
from .layer_config import AttentionKind, LayerConfig, MoEConfig, RopeConfig
from .layers.decoder import DecoderLayer
from .layers.norm import RMSNorm, summed
from .layers.rope import rope_table
from .layers.vocabulary import Head
from .model_config import Step3p5Config
from .precision import activation_dtype, weight_dtype
from .traced_module import TracedModule


class Step3p5(TracedModule):
    """Step-3.5-Flash on one device.

    Module and weight names are the checkpoint's less the leading `model.`, so that weights load by name.
    """

    def __init__(self, config: Step3p5Config) -> None:
        super().__init__()
        model, dtype, device = config.model, config.dtype, config.devices[0]
        self.config = config
        self.kv_params = config.kv_params
        self.embed_tokens = Embedding(model.vocab_size, model.hidden_size, dtype, device)
        self.layers = LayerList(
            [
                DecoderLayer(
                    layer,
                    model,
                    self.kv_params.child(layer.attention.kind, KVCacheParams),
                    dtype,
                    device,
                )
                for layer in model.layers
            ]
        )
        self.norm = RMSNorm(model.hidden_size, model, weight_dtype(TensorRole.HIDDEN_NORM, dtype, device))
        self.lm_head = Head(model.hidden_size, model.vocab_size, dtype, device)
        if model.tie_word_embeddings:
            self.lm_head.set_shared_weight("weight", self.embed_tokens.weight)

    def __call__(
        self,
        tokens: TensorValue,
        input_row_offsets: TensorValue,
        return_n_logits: TensorValue,
        kv_collections: Mapping[AttentionKind, PagedCacheValues],
    ) -> tuple[TensorValue, ...]:
        """Runs a ragged batch.

        Args:
            tokens: `[total_seq_len]` int64.
            input_row_offsets: `[batch + 1]` uint32; request `b` owns tokens `offsets[b] … offsets[b + 1] - 1`.
            return_n_logits: `[1]` int64, the trailing positions whose logits a variable-logits graph returns.
            kv_collections: The paged cache of each kind of attention.

        Returns:
            The last tokens' logits, `[batch, vocab_size]` float32; then what `return_logits` and
            `return_hidden_states` add.
        """
        h = self.decode(tokens, input_row_offsets, kv_collections)
        return self.outputs(h, input_row_offsets, return_n_logits)

    def decode(
        self,
        tokens: TensorValue,
        input_row_offsets: TensorValue,
        kv_collections: Mapping[AttentionKind, PagedCacheValues],
    ) -> TensorValue:
        """The last layer's output before the final norm, `[total_seq_len, hidden_size]`; arguments as of `__call__`."""
        layers = self.config.model.layers
        tables = self._rope_tables(tokens, input_row_offsets, kv_collections)
        cache_layers = index_within_cache(layers)

        def inputs_for_layer(index: int, hidden: list[TensorValue]) -> list[Tree[Any]]:
            attention = layers[index].attention
            cache_layer = ops.constant(cache_layers[index], DType.uint32, device=DeviceRef.CPU())
            inputs: list[Tree[Any]] = [
                hidden,
                cache_layer,
                kv_collections[attention.kind],
                input_row_offsets,
                *swiglu_limits(layers[index]),
            ]
            if attention.rope is not None:
                inputs.append(tables[attention.rope])
            return inputs

        stream = forward_sequential_layers(
            list(self.layers),
            inputs_for_layer=inputs_for_layer,
            initial_hidden_states=[self.embed(tokens)],
            subgraph_layer_groups=layers_of_equal_shape(layers) if self.config.use_subgraphs else None,
            # Several graphs may lie in one module, and are then compiled together.
            name_for_subgraph=lambda index: f"{Graph.current.name}_layers_{index}",
            weight_prefix_for_layer=lambda index: f"layers.{index}.",
        )
        return summed(*stream)

    def outputs(
        self, h: TensorValue, input_row_offsets: TensorValue, return_n_logits: TensorValue
    ) -> tuple[TensorValue, ...]:
        """What the graph returns of the last layer's output `h [total_seq_len, hidden_size]`; see `__call__`."""
        return logits_postprocess(
            h,
            input_row_offsets,
            return_n_logits,
            self.norm,
            self.lm_head,
            self.config.return_logits,
            self.config.return_hidden_states,
        )

    def embed(self, tokens: TensorValue) -> TensorValue:
        """The tokens' rows of the embedding, `[total_seq_len, hidden_size]` in the activations' type."""
        rows = self.embed_tokens(tokens)
        return ops.cast(rows, activation_dtype(self.config.dtype, rows.device))

    def _rope_tables(
        self,
        tokens: TensorValue,
        input_row_offsets: TensorValue,
        kv_collections: Mapping[AttentionKind, PagedCacheValues],
    ) -> dict[RopeConfig, TensorValue]:
        # Any cache's lengths do: every kind of layer has seen the same tokens.
        cache_lengths = next(iter(kv_collections.values())).cache_lengths
        return {
            rope: rope_table(rope, tokens, input_row_offsets, cache_lengths)
            for rope in rope_configs(self.config.model.layers)
        }

    def input_tree(self) -> Mapping[str, object]:
        """Names the graph's inputs; the leaves, in order, are the graph's inputs."""
        return ragged_kv_symbolic_input_tree(
            kv_params=self.kv_params, device_refs=list(self.config.devices), include_signal_buffers=False
        )

    @override
    def call_with(self, *inputs: Value[Any]) -> tuple[TensorValue, ...]:
        """Calls the module with the leaves of `input_tree`."""
        tokens, input_row_offsets, return_n_logits, *kv_inputs = inputs
        collections = self.kv_params.unflatten_basic_kv_tree(iter(kv_inputs))
        kinds = [AttentionKind(kind) for kind in self.kv_params.children]
        return self(
            tokens.tensor,
            input_row_offsets.tensor,
            return_n_logits.tensor,
            {kind: collection[0] for kind, collection in zip(kinds, collections, strict=True)},
        )


def index_within_cache(layers: Sequence[LayerConfig]) -> list[int]:
    """Each layer's index among the layers of its own attention kind, which is its index in that kind's cache."""
    seen = dict.fromkeys(AttentionKind, 0)
    indices = []
    for layer in layers:
        indices.append(seen[layer.attention.kind])
        seen[layer.attention.kind] += 1
    return indices


def rope_configs(layers: Sequence[LayerConfig]) -> list[RopeConfig]:
    """The rotary embeddings of the layers, each once, in the order of the layers.

    An order that varied between processes would make other graphs of one model, which MAX's cache of compiled graphs
    would not know again.
    """
    ropes = dict.fromkeys(layer.attention.rope for layer in layers)
    return [rope for rope in ropes if rope is not None]


def layers_of_equal_shape(layers: Sequence[LayerConfig]) -> list[list[int]]:
    """Groups layers whose graphs are the same: each group compiles as one subgraph.

    A layer takes what the one before leaves to be added, which for a dense MLP has another type than for experts.
    """
    groups: dict[tuple[LayerConfig, type | None], list[int]] = {}
    before: type | None = None
    for position, layer in enumerate(layers):
        groups.setdefault((_graph_key(layer), before), []).append(position)
        before = type(layer.mlp)
    return list(groups.values())


def _graph_key(layer: LayerConfig) -> LayerConfig:
    """The layer without what reaches its graph as a value: its index and its clamp limits."""
    mlp = dataclasses.replace(layer.mlp, swiglu_limit=None)
    if isinstance(mlp, MoEConfig):
        mlp = dataclasses.replace(mlp, shared_expert=dataclasses.replace(mlp.shared_expert, swiglu_limit=None))
    return dataclasses.replace(layer, index=0, mlp=mlp)


def swiglu_limits(layer: LayerConfig) -> list[TensorValue]:
    """The clamp limits of the routed experts, and of the shared expert or dense MLP; infinite where there is none."""
    limits = [layer.mlp.swiglu_limit, layer.mlp.swiglu_limit]
    if isinstance(layer.mlp, MoEConfig):
        limits[1] = layer.mlp.shared_expert.swiglu_limit
    return [ops.constant(limit or math.inf, DType.float32, device=DeviceRef.CPU()) for limit in limits]
