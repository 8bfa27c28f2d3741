"""The graph of Step-3.5-Flash on several devices, as its `ParallelPlan` says."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from max.dtype import DType
from max.graph import BufferValue, DeviceRef, Graph, TensorValue, Value, ops
from max.nn.data_parallelism import split_batch_replicated
from max.nn.embedding import Embedding
from max.nn.kv_cache import KVCacheParams, PagedCacheValues
from max.nn.layer import LayerList
from max.nn.transformer import ReturnLogits
from max.nn.transformer.distributed_transformer import distributed_logits_postprocess
from max.nn.transformer.transformer import forward_sequential_layers
from max.pipelines.lib.interfaces.batch_processor import ragged_batch_inputs, signal_inputs
from max.tree import Tree
from typing_extensions import override

from .layer_config import AttentionKind, RopeConfig
from .layers.exchange import Exchange
from .layers.linear import Linear
from .layers.norm import RMSNorm, summed
from .layers.parallel_decoder import ParallelDecoderLayer
from .layers.placement import place_weights
from .layers.rope import rope_table
from .layers.vocabulary import embed_part
from .mailboxes import mailbox_types
from .model_config import Step3p5Config
from .parallel_plan import ParallelPlanError
from .step3p5 import index_within_cache, layers_of_equal_shape, rope_configs, swiglu_limits
from .traced_module import TracedModule

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


class ParallelStep3p5(TracedModule):
    """Step-3.5-Flash on several devices.

    Module and weight names are those of `Step3p5`. The whole modules load the checkpoint's tensors on the host; every
    device computes with its parts of them.

    Raises:
        ParallelPlanError: If devices with requests of their own are to return more than the last tokens' logits.
    """

    def __init__(self, config: Step3p5Config) -> None:
        super().__init__()
        model, dtype, plan, host = config.model, config.dtype, config.plan, DeviceRef.CPU()
        if plan.own_requests and config.return_logits is not ReturnLogits.LAST_TOKEN:
            raise ParallelPlanError(
                f"--data-parallel-degree: found {plan.num_devices} with logits of more than the last token (echo, "
                "speculation), expected 1. Leave the flag out."
            )
        self.config = config
        self.plan = plan
        self.devices = list(config.devices)
        self.kv_params = config.kv_params
        self.embed_tokens = Embedding(model.vocab_size, model.hidden_size, dtype, host)
        self.layers = LayerList(
            [
                ParallelDecoderLayer(
                    layer, plan, self.kv_params.child(layer.attention.kind, KVCacheParams), dtype, self.devices
                )
                for layer in model.layers
            ]
        )
        self.norm = RMSNorm(model.hidden_size, model, dtype)
        self.lm_head = Linear(model.hidden_size, model.vocab_size, dtype, host)

        def parts(make: Any) -> list[Any]:
            return [make(device) for device in self.devices]

        self.embed_parts = parts(lambda device: Embedding(model.vocab_size, model.hidden_size, dtype, device))
        self.norm_parts = parts(lambda device: RMSNorm(model.hidden_size, model, dtype))
        self.head_parts = parts(lambda device: Linear(model.hidden_size, model.vocab_size, dtype, device))
        placements = plan.placements
        place_weights(self.embed_tokens, self.embed_parts, {"weight": placements[EMBEDDING]}, self.devices)
        place_weights(self.norm, self.norm_parts, {"weight": placements[NORM]}, self.devices)
        if model.tie_word_embeddings:
            self.lm_head.set_shared_weight("weight", self.embed_tokens.weight)
            for head, embedding in zip(self.head_parts, self.embed_parts, strict=True):
                head.weight = embedding.weight
        else:
            place_weights(self.lm_head, self.head_parts, {"weight": placements[HEAD]}, self.devices)

    def __call__(
        self,
        tokens: TensorValue,
        input_row_offsets: TensorValue,
        return_n_logits: TensorValue,
        requests: Sequence[TensorValue],
        signals: Sequence[BufferValue],
        kv_collections: Mapping[AttentionKind, Sequence[PagedCacheValues]],
        mailboxes: Sequence[BufferValue] = (),
        addresses: Sequence[TensorValue] = (),
    ) -> tuple[TensorValue, ...]:
        """Runs a ragged batch.

        Args:
            tokens: See `Step3p5`; on the first device.
            input_row_offsets: See `Step3p5`; on the first device.
            return_n_logits: See `Step3p5`.
            requests: Where devices have requests of their own, the row offsets on the host and
                `[devices + 1]` int64, where every device's requests begin; else nothing.
            signals: See `Exchange`.
            kv_collections: The devices' paged caches of each kind of attention.
            mailboxes: Every GPU's where they have requests of their own, else nothing; see `MailboxDispatch`.
            addresses: Where the mailboxes lie, or nothing.

        Returns:
            See `Step3p5`; on the first device.
        """
        layers = self.config.model.layers
        exchange = Exchange(signals)
        all_tokens = exchange.broadcast(tokens, self.devices)
        offsets = exchange.broadcast(input_row_offsets, self.devices)
        h = [
            embed_part(all_tokens[i], part.weight, self.plan.placements[EMBEDDING], i)
            for i, part in enumerate(self.embed_parts)
        ]
        h = exchange(self.plan.after_embedding, h)
        row_bounds: list[TensorValue] = []
        if self.plan.own_requests:
            host_offsets, splits = requests[0].cast(DType.int64), requests[1]
            h, offsets = split_batch_replicated(self.devices, h, offsets, host_offsets, splits)
            row_bounds = [ops.gather(host_offsets, splits, axis=0)]
        tables = self._rope_tables(h, offsets, kv_collections)
        cache_layers = index_within_cache(layers)

        def inputs_for_layer(index: int, hidden: list[TensorValue]) -> list[Tree[Any]]:
            attention = layers[index].attention
            return [
                hidden,
                ops.constant(cache_layers[index], DType.uint32, device=DeviceRef.CPU()),
                list(kv_collections[attention.kind]),
                list(offsets),
                *swiglu_limits(layers[index]),
                list(signals),
                row_bounds,
                list(mailboxes),
                list(addresses),
                tables[attention.rope] if attention.rope is not None else [],
            ]

        stream = forward_sequential_layers(
            list(self.layers),
            inputs_for_layer=inputs_for_layer,
            initial_hidden_states=h,
            subgraph_layer_groups=layers_of_equal_shape(layers) if self.config.use_subgraphs else None,
            # Several graphs may lie in one module, and are then compiled together.
            name_for_subgraph=lambda index: f"{Graph.current.name}_layers_{index}",
            weight_prefix_for_layer=lambda index: f"layers.{index}.",
        )
        h = [summed(*stream[index :: len(self.devices)]) for index in range(len(self.devices))]
        return distributed_logits_postprocess(
            h,
            offsets,
            return_n_logits,
            self._head,
            signals,
            self.config.return_logits,
            self.devices[0],
            self.norm_parts,
            self.config.return_hidden_states,
        )

    def _head(self, x: list[TensorValue], signals: Sequence[BufferValue]) -> list[TensorValue]:
        exchange = Exchange(signals)
        x = exchange(self.plan.before_head, x)
        # In the type of `x`, not in float32 as a `Head` gives them: half the bytes to join. They are cast behind.
        logits = [part(x[i]) for i, part in enumerate(self.head_parts)]
        return exchange.join_columns(self.plan.after_head, logits)

    def _rope_tables(
        self,
        h: Sequence[TensorValue],
        offsets: Sequence[TensorValue],
        kv_collections: Mapping[AttentionKind, Sequence[PagedCacheValues]],
    ) -> dict[RopeConfig, list[TensorValue]]:
        # Any cache's lengths do: every kind of layer has seen the same tokens.
        caches = next(iter(kv_collections.values()))
        return {
            rope: [rope_table(rope, h[i], offsets[i], cache.cache_lengths) for i, cache in enumerate(caches)]
            for rope in rope_configs(self.config.model.layers)
        }

    @property
    def _accelerators(self) -> list[DeviceRef]:
        return [device for device in self.devices if not device.is_cpu()]

    def input_tree(self) -> Mapping[str, object]:
        """Names the graph's inputs; the leaves, in order, are the graph's inputs."""
        fields = ["tokens", "row_offsets", "return_n_logits"]
        if self.plan.own_requests:
            fields += ["host_row_offsets", "data_parallel_splits"]
        tree: OrderedDict[str, object] = OrderedDict(
            batch=ragged_batch_inputs(self.devices[0], fields, data_parallel_degree=len(self.devices)),
            signals=signal_inputs(self._accelerators),
            kv=self.kv_params.get_symbolic_inputs(),
        )
        if self.plan.own_requests and self._accelerators:
            tree["mailboxes"] = mailbox_types(self.devices)
        return tree

    @override
    def call_with(self, *inputs: Value[Any]) -> tuple[TensorValue, ...]:
        """Calls the module with the leaves of `input_tree`."""
        tokens, input_row_offsets, return_n_logits, *rest = inputs
        num_requests = 2 * self.plan.own_requests
        num_others = num_requests + len(self._accelerators)
        others = iter(rest[num_others:])
        collections = self.kv_params.unflatten_basic_kv_tree(others)
        *mailboxes, addresses = list(others) or [None]
        kinds = [AttentionKind(kind) for kind in self.kv_params.children]
        return self(
            tokens.tensor,
            input_row_offsets.tensor,
            return_n_logits.tensor,
            [value.tensor for value in rest[:num_requests]],
            [value.buffer for value in rest[num_requests:num_others]],
            dict(zip(kinds, collections, strict=True)),
            [mailbox.buffer for mailbox in mailboxes],
            [] if addresses is None else [addresses.tensor],
        )
