"""The pipeline model of speculation: the target, and one graph a drafting depth, on one embedding."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
from max import tree
from max.driver import Buffer, is_virtual_device_mode
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph.weights import WeightData
from max.nn.kv_cache import KVCacheInputs, KVCacheInputsPerDevice, KVCacheParams
from max.pipelines.context import TextContext
from max.pipelines.lib.graph_specs import GraphRole, GraphSpec
from typing_extensions import override

from ..artifacts import record_or_check
from ..byte_account import cycle_bytes
from ..checkpoint_tensors import CheckpointDtype
from ..config_fields import ConfigError
from ..greedy_draw import DRAW, draw_spec
from ..model import Step3p5Model, cache_leaves
from ..model_config import Step3p5Config
from ..mtp import HEAD_WEIGHT, MTPDepth, PartialHead, SharedHead, depth_weights, swiglu_limit
from ..precision import activation_dtype
from ..step3p5 import index_within_cache
from ..tokenizer import check_token_ids
from ..weight_adapters import host_buffer
from .captured import CapturedGraph
from .cycle_graphs import Acceptance, Handover
from .draft_heads import DraftHeads
from .draft_vocabulary import draft_vocabulary_size
from .drafted import Drafted, DraftReader
from .graphs import RowSelection, TokenSelection, VerifyingStep3p5
from .host_rows import host_dtype, rows_from_host, rows_to_host
from .kept_rows import DeviceRows, KeptRows, Rows, common_source, concatenated, split_rows
from .rows import DraftRows
from .steady_cycle import CycleGraphs, DepthInputs
from .transfers import OneCopy
from .verified_tokens import tokens_to_verify

logger = logging.getLogger("max.pipelines")

SELECTION, TOKENS = "mtp_rows", "mtp_tokens"
"""Roles of the graphs that select the drafts' rows and the tokens to verify."""

ACCEPTANCE, HANDOVER = "mtp_acceptance", "mtp_handover"
"""Roles of graphs of a `SteadyCycle`; with a single depth there is none."""

TYPICAL_CONTEXT = 1024
"""Tokens of a request that the byte account assumes; where contexts are longer, measured times tell."""


def depth_role(depth: int) -> str:
    """Role of the graph of MTP depth `depth`, counted from 0."""
    return f"mtp_{depth}"


class SpeculativeStep3p5Model(Step3p5Model):
    """Step-3.5-Flash with the MTP layers that draft for it.

    Without a layer that could draft it is `Step3p5Model`.
    """

    drafts: list[Model]
    """The compiled depths, first to last."""

    stays_on_device: bool
    """Whether drafts and kept rows go from one step to the next without passing through the host."""

    heads: DraftHeads | None
    """The rows of the heads that the depths use; `None` where they use all."""

    @property
    def depth(self) -> int:
        """How many tokens can be drafted."""
        return len(self.drafts)

    @property
    def rows_to_go_on(self) -> int:
        """Positions whose hidden states let every depth go on after a rest as if there had been none.

        Depth `k`'s keys reach as far back as its window, and each was made by depth `k - 1` with a window of its own.
        """
        config = self.arch_config_as(Step3p5Config)
        windows = [layer.attention.sliding_window or self.max_seq_len for layer in config.drafting_layers]
        return min(sum(windows), self.max_seq_len)

    def cycle_bytes(self, batch_size: int, depth: int) -> float:
        """Bytes that drafting `depth` tokens of each of `batch_size` requests and verifying them reads."""
        config = self.arch_config_as(Step3p5Config)
        weights = CheckpointDtype(config.dtype.name)
        cache = CheckpointDtype(activation_dtype(config.dtype, config.devices[0]).name)
        size = draft_vocabulary_size(config.model)
        return cycle_bytes(config.model, batch_size, depth, TYPICAL_CONTEXT, weights, cache, size)

    @override
    def load_graphs(self, session: InferenceSession) -> dict[str, Model]:
        """Compiles and initializes the target, the depths and the row selection."""
        models = super().load_graphs(session)
        config = self.arch_config_as(Step3p5Config)
        self.drafts = [models[depth_role(depth)] for depth in range(len(config.drafting_layers))]
        self._selection, self._tokens = models.get(SELECTION), models.get(TOKENS)
        self._acceptance, self._handover = models.get(ACCEPTANCE), models.get(HANDOVER)
        device = self.devices[0]
        # Each waits for its own last copy alone.
        self._to_verify, self._to_draft, self._drafts = OneCopy(device), OneCopy(device), DraftReader(device)
        self.stays_on_device = not device.is_host
        self.heads = None
        if self._whole_heads and not is_virtual_device_mode():
            whole = [host_buffer(head) for head in self._whole_heads]
            self.heads = DraftHeads(whole, draft_vocabulary_size(config.model), device)
        asked = self.pipeline_config.speculative.num_speculative_tokens if self.pipeline_config.speculative else 0
        if self.depth < (asked or 0):
            logger.warning(
                "--num-speculative-tokens: found %d, but the checkpoint has %d MTP layers that could draft. %s",
                asked,
                self.depth,
                f"Drafting {self.depth} deep." if self.depth else "Running without speculation.",
            )
        return models

    @override
    def graph_specs(self, model_config: Any) -> dict[str, GraphSpec]:
        """The target's graph, each depth's and the row selection, with their weights."""
        assert isinstance(model_config, Step3p5Config)
        drafting, device = model_config.drafting_layers, model_config.devices[0]
        self._whole_heads: list[WeightData] = []
        if not drafting:
            return super().graph_specs(model_config)
        record_or_check(self.pipeline_config, model_config)
        if len(model_config.devices) > 1:
            raise ConfigError(
                f"--devices: found {len(model_config.devices)}, expected 1 with --speculative-method mtp."
            )
        if self.pipeline_config.model.enable_echo:
            raise ConfigError(
                "--enable-echo: found with --speculative-method mtp, expected one of them. Remove either."
            )
        prefixes = tuple(f"layers.{layer.index}." for layer in drafting)
        decoder = {name: data for name, data in self.state_dict.items() if not name.startswith(prefixes)}
        target = VerifyingStep3p5(model_config)
        target.load_state_dict(decoder, weight_alignment=1, strict=True)
        specs = {
            GraphRole.DECODER.value: GraphSpec(
                target, "step3p5_target", tuple(tree.leaves(target.input_tree())), weights=target.state_dict()
            )
        }
        size, vocab_size = draft_vocabulary_size(model_config.model), model_config.model.vocab_size
        for depth, layer in enumerate(drafting):
            cache = model_config.kv_params.child(layer.attention.kind, KVCacheParams)
            weights = depth_weights(self.state_dict, layer)
            head: SharedHead | PartialHead = SharedHead(model_config.model, model_config.dtype, device)
            if size < vocab_size:
                head = PartialHead(size, model_config.model, model_config.dtype, device)
                self._whole_heads.append(weights.pop(HEAD_WEIGHT))
            module = MTPDepth(layer, model_config.model, cache, head, model_config.dtype, device)
            module.load_state_dict(weights, weight_alignment=1, strict=True)
            # One name for all depths: depths of one shape are one graph, compiled once and taken from the cache then.
            specs[depth_role(depth)] = GraphSpec(
                module, "step3p5_mtp", module.input_types(), weights=module.state_dict()
            )
        hidden_dtype = activation_dtype(model_config.dtype, device)
        selection = RowSelection(model_config.model.hidden_size, hidden_dtype, device)
        specs[SELECTION] = GraphSpec(selection, "step3p5_mtp_rows", selection.input_types(), weights={})
        tokens = TokenSelection(len(drafting), device)
        specs[TOKENS] = GraphSpec(tokens, "step3p5_mtp_tokens", tokens.input_types(), weights={})
        if len(drafting) > 1:
            specs[DRAW] = draw_spec(vocab_size, device)
            accept = Acceptance(len(drafting), model_config.model.hidden_size, hidden_dtype, device)
            specs[ACCEPTANCE] = GraphSpec(accept, "step3p5_mtp_acceptance", accept.input_types(), weights={})
            handover = Handover(len(drafting), device)
            specs[HANDOVER] = GraphSpec(handover, "step3p5_mtp_handover", handover.input_types(), weights={})
        return specs

    def verify(
        self,
        contexts: Sequence[TextContext],
        drafts: Sequence[Sequence[int]],
        kv_cache_inputs: KVCacheInputs[Buffer, Buffer],
    ) -> tuple[Buffer, Buffer]:
        """Runs the target over every request's active tokens followed by its drafts.

        Args:
            contexts: The requests.
            drafts: Drafted tokens of each.
            kv_cache_inputs: The cache, with room for the drafts.

        Returns:
            Logits `[sum(1 + len(drafts)), vocab_size]` float32, of each request's last active token and its drafts; and
            the hidden states of all tokens, `[total_seq_len, hidden_size]`.

        Raises:
            InputError: A token has no row in the embedding.
        """
        vocab_size = self.arch_config_as(Step3p5Config).model.vocab_size
        for context in contexts:
            if context.tokens.generated_length == 0:  # what was sampled needs no check
                check_token_ids(context.tokens.active, vocab_size)
        rows = tokens_to_verify([context.tokens.active for context in contexts], drafts, self.stays_on_device)
        known, places, offsets, logit_rows = self._to_verify.send(
            rows.known, rows.places, rows.input_row_offsets, rows.logit_rows
        )
        tokens = known
        if rows.made is not None:
            assert self._tokens is not None
            rest = [Buffer(DType.int64, [0], self.devices[0])] * (self.depth - len(rows.made.by_depth))
            (tokens,) = self._tokens.execute(known, places, *rows.made.by_depth, *rest)
        self.await_inputs()
        logits, hidden = self.model.execute(tokens, offsets, logit_rows, *cache_leaves(kv_cache_inputs))
        self.after_step()
        return logits, hidden

    def draft(
        self,
        plan: DraftRows,
        hidden: Buffer,
        kept: Sequence[Rows],
        kv_cache_inputs: KVCacheInputs[Buffer, Buffer],
        drafting: Sequence[int],
    ) -> tuple[Drafted, list[Rows]]:
        """Drafts one token of each drafting request with each depth that `plan` names.

        Args:
            plan: The rows to read.
            hidden: The target's hidden states of this step.
            kept: Hidden states kept from earlier steps, in the order of `plan`.
            kv_cache_inputs: The cache as given to `verify`.
            drafting: The drafting requests' places in the batch that was verified.

        Returns:
            The drafts of the requests `drafting`, and the hidden states to keep of each request in `plan`.
        """
        if not drafting and 2 * len(plan.keep) >= hidden.shape[0]:
            # While drafting rests, a step costs no graph more than plain decoding.
            return self._drafts.start([]), split_rows(rows_to_host(hidden)[plan.keep], plan.keep_counts)
        assert self._selection is not None
        config = self.arch_config_as(Step3p5Config)
        source = common_source(kept) if self.stays_on_device else None
        if source is None:
            on_host = concatenated(kept, config.model.hidden_size, host_dtype(hidden.dtype))
            kept_rows = rows_from_host(on_host, hidden.dtype, self.devices[0])
        else:
            kept_rows, plan = source[0].on_device, plan.with_kept_at(source[1], int(hidden.shape[0]))
        rows, keep, tokens, following, last_rows, row_offsets, cache_lengths, *known = self._to_draft.send(
            plan.rows,
            plan.keep,
            plan.tokens,
            plan.following,
            plan.last_rows,
            plan.input_row_offsets,
            plan.cache_lengths,
            *plan.known,
        )
        previous, kept_now = self._selection.execute(hidden, kept_rows, rows, keep)
        to_keep: Rows
        if self.stays_on_device and plan.keeps_all:
            to_keep = DeviceRows(0, len(plan.keep), KeptRows(kept_now))
        else:
            to_keep = rows_to_host(kept_now)
        if not drafting:
            return self._drafts.start([]), split_rows(to_keep, plan.keep_counts)
        kinds = {str(layer.attention.kind) for layer in config.drafting_layers[: len(known)]}
        caches = {
            kind: cache_leaves(self._draft_cache(kind, kv_cache_inputs[kind][0], plan, cache_lengths, drafting))
            for kind in kinds
        }
        if self.heads is not None:
            self.heads.refresh()
        drafted = []
        for depth, after in enumerate(known):
            layer = config.drafting_layers[depth]
            previous, tokens, chosen, _ = self.drafts[depth].execute(
                previous,
                tokens,
                following,
                last_rows,
                after,
                row_offsets,
                *self._depth_scalars[depth],
                *(self.heads.inputs(depth) if self.heads is not None else ()),
                *caches[str(layer.attention.kind)],
            )
            drafted.append(chosen)
        return self._drafts.start(drafted), split_rows(to_keep, plan.keep_counts)

    def cycle_graphs(self, words: int | None, longest: int, captures: bool) -> CycleGraphs | None:
        """What a `SteadyCycle` runs; `None` with less than two depths.

        Args:
            words: See `known_tokens`.
            longest: The most positions that a query of a cycle sees.
            captures: Whether the graphs are captured.
        """
        if self.draw is None or self._acceptance is None or self._handover is None:
            return None
        config = self.arch_config_as(Step3p5Config)

        def refresh_heads() -> None:
            if self.heads is not None:
                self.heads.refresh()

        def head_inputs(depth: int) -> tuple[Buffer, ...]:
            return self.heads.inputs(depth) if self.heads is not None else ()

        return CycleGraphs(
            verify=CapturedGraph(self.model, "verification", captures),
            draw=CapturedGraph(self.draw, "greedy draws", captures),
            accept=CapturedGraph(self._acceptance, "acceptance", captures),
            depths=[CapturedGraph(draft, f"MTP depth {depth}", captures) for depth, draft in enumerate(self.drafts)],
            hand_over=CapturedGraph(self._handover, "the next tokens", captures),
            depth_inputs=[
                DepthInputs(str(layer.attention.kind), scalars, partial(head_inputs, depth))
                for depth, (layer, scalars) in enumerate(zip(config.drafting_layers, self._depth_scalars, strict=True))
            ],
            refresh_heads=refresh_heads,
            known_tokens=self.known_tokens(words),
            hidden_size=config.model.hidden_size,
            hidden_dtype=activation_dtype(config.dtype, config.devices[0]),
            device=self.devices[0],
            longest=longest,
        )

    @cached_property
    def _depth_scalars(self) -> list[tuple[Buffer, Buffer]]:
        """Each depth's index within its cache and the clamp limit of its MLP, on the host."""
        config = self.arch_config_as(Step3p5Config)
        layers = (*config.model.layers, *config.drafting_layers)
        indices = index_within_cache(layers)[len(config.model.layers) :]
        return [
            (
                Buffer.from_numpy(np.array(index, dtype=np.uint32)),
                Buffer.from_numpy(np.array(swiglu_limit(layer), dtype=np.float32)),
            )
            for index, layer in zip(indices, config.drafting_layers, strict=True)
        ]

    def _draft_cache(
        self,
        kind: str,
        cache: KVCacheInputsPerDevice[Buffer, Buffer],
        plan: DraftRows,
        cache_lengths: Buffer,
        drafting: Sequence[int],
    ) -> KVCacheInputsPerDevice[Buffer, Buffer]:
        """The cache of `kind` as the depths see it: of the drafting requests, at the positions that they read."""
        pages, metadata = cache.lookup_table, cache.attention_dispatch_metadata
        if len(drafting) < pages.shape[0]:
            pages = Buffer.from_numpy(pages.to_numpy()[list(drafting)]).to(self.devices[0])
        if metadata is not None:
            params = self.arch_config_as(Step3p5Config).kv_params.child(kind, KVCacheParams)
            key = params.resolve_attn_key(len(drafting), plan.max_prompt_length, plan.max_length)
            metadata = key.pack_into_buffer(self.devices[0], plan.max_length)
        return dataclasses.replace(
            cache,
            lookup_table=pages,
            cache_lengths=cache_lengths,
            max_prompt_length=Buffer.from_numpy(np.array([plan.max_prompt_length], dtype=np.uint32)),
            attention_dispatch_metadata=metadata,
        )
