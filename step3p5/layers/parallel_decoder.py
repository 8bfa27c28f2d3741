"""One decoder layer on several devices."""

from __future__ import annotations

from collections.abc import Sequence

from max.dtype import DType
from max.graph import BufferValue, DeviceRef, TensorValue, ops
from max.nn.kv_cache import KVCacheParams, PagedCacheValues

from ..layer_config import LayerConfig, MoEConfig
from ..parallel_plan import Collective, ParallelPlan
from .decoder import DecoderLayer
from .dispatch import Dispatch, HostDispatch, MailboxDispatch
from .exchange import Exchange
from .placement import place_weights


class ParallelDecoderLayer(DecoderLayer):
    """A decoder layer whose devices each compute their part, and exchange what the plan says.

    As a module it is the whole layer, whose tensors load by name; `parts` are the devices' own.

    Args:
        config: The whole layer.
        plan: Where its tensors lie, and what is exchanged.
        kv_params: The cache that holds this kind of layer.
        dtype: Storage type of the weights.
        devices: The plan's devices.
    """

    def __init__(
        self,
        config: LayerConfig,
        plan: ParallelPlan,
        kv_params: KVCacheParams,
        dtype: DType,
        devices: Sequence[DeviceRef],
    ) -> None:
        super().__init__(config, plan.model, kv_params, dtype, DeviceRef.CPU())
        prefix = f"model.layers.{config.index}."
        self.plan = plan.layers[config.index]
        self.parts = [
            DecoderLayer(
                plan.part_of(config),
                plan.model,
                kv_params,
                dtype,
                device,
                experts=plan.experts(config.mlp, index) if isinstance(config.mlp, MoEConfig) else None,
            )
            for index, device in enumerate(devices)
        ]
        placements = {
            name.removeprefix(prefix): placement
            for name, placement in plan.placements.items()
            if name.startswith(prefix)
        }
        place_weights(self, self.parts, placements, devices)

    def __call__(  # type: ignore[override]  # a list a device, where the whole layer has one value
        self,
        stream: list[TensorValue],
        cache_layer: TensorValue,
        kv_collections: list[PagedCacheValues],
        input_row_offsets: list[TensorValue],
        routed_limit: TensorValue,
        shared_limit: TensorValue,
        signals: list[BufferValue],
        row_bounds: list[TensorValue],
        mailboxes: list[BufferValue],
        addresses: list[TensorValue],
        rope_tables: list[TensorValue],
    ) -> list[TensorValue]:
        """Runs the layer on lists of one value a device; see `DecoderLayer`.

        Args:
            stream: Hidden states of every device's tokens, `[tokens, hidden_size]`, and behind all of them what is yet
                to be added to each, if anything.
            cache_layer: See `Attention`.
            kv_collections: Every device's cache.
            input_row_offsets: Of every device's requests.
            routed_limit: See `DecoderLayer`.
            shared_limit: See `DecoderLayer`.
            signals: See `Exchange`.
            row_bounds: See `HostDispatch`; empty where all devices have all tokens.
            mailboxes: See `MailboxDispatch`; empty on the host or where all devices have all tokens.
            addresses: As `mailboxes`.
            rope_tables: Every device's table; empty where the layer does not rotate.

        Returns:
            The same of the next layer.
        """
        exchange = Exchange(signals)
        tables = rope_tables or [None] * len(self.parts)
        num_devices = len(self.parts)
        sums = [part.input_layernorm.of_sum(*stream[i::num_devices]) for i, part in enumerate(self.parts)]
        h, x = (list(of) for of in zip(*sums, strict=True))
        y = [
            part.self_attn(x[i], cache_layer, kv_collections[i], tables[i], input_row_offsets[i])
            for i, part in enumerate(self.parts)
        ]
        y = exchange(self.plan.after_attention, y)
        sums = [part.post_attention_layernorm.of_sum(h[i], y[i]) for i, part in enumerate(self.parts)]
        h, x = (list(of) for of in zip(*sums, strict=True))
        if not isinstance(self.config.mlp, MoEConfig):
            y = [part.mlp(x[i], shared_limit) for i, part in enumerate(self.parts)]
            return [*h, *exchange(self.plan.after_mlp, y)]
        if self.plan.before_mlp is Collective.DISPATCH:
            experts = [part.moe.experts for part in self.parts]
            dispatch: Dispatch = (
                MailboxDispatch(experts, row_bounds[0], mailboxes, addresses[0])
                if mailboxes
                else HostDispatch(experts, row_bounds[0])
            )
            return [*h, *self._dispatched(x, routed_limit, shared_limit, dispatch)]
        shared = [part.share_expert(x[i], shared_limit) for i, part in enumerate(self.parts)]
        y = [part.moe(x[i], routed_limit) for i, part in enumerate(self.parts)]
        if self.plan.shared_expert_is_partial:
            # In the experts' float32; what is exchanged has the type of the hidden states.
            y = _add(y, shared)
        y = exchange(self.plan.after_mlp, [ops.cast(of, x[i].dtype) for i, of in enumerate(y)])
        return [*h, *(y if self.plan.shared_expert_is_partial else _add(y, shared))]

    def _dispatched(
        self, x: list[TensorValue], routed_limit: TensorValue, shared_limit: TensorValue, dispatch: Dispatch
    ) -> list[TensorValue]:
        """The experts and the shared expert, where every device has tokens of its own."""
        own = [part.moe.route(x[i]) for i, part in enumerate(self.parts)]
        dispatch.send(own)
        # Enqueued here, it runs while the others' tokens come.
        shared = [part.share_expert(x[i], shared_limit) for i, part in enumerate(self.parts)]
        received = dispatch.receive(own)
        sums = [part.moe.of_routed(received[i], routed_limit) for i, part in enumerate(self.parts)]
        return _add(dispatch.combine(sums, received, own), shared)


def _add(left: Sequence[TensorValue], right: Sequence[TensorValue]) -> list[TensorValue]:
    return [a + b for a, b in zip(left, right, strict=True)]
