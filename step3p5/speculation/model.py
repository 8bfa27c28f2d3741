"""The pipeline model of speculation: the target, and one graph a drafting depth, on one embedding."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
from max import tree
from max.driver import Buffer
from max.engine import InferenceSession, Model
from max.nn.kv_cache import KVCacheInputs, KVCacheInputsPerDevice, KVCacheParams
from max.pipelines.context import TextContext
from max.pipelines.lib.graph_specs import GraphRole, GraphSpec
from typing_extensions import override

from ..artifacts import record_or_check
from ..byte_account import cycle_bytes
from ..checkpoint_tensors import CheckpointDtype
from ..config_fields import ConfigError
from ..model import Step3p5Model
from ..model_config import Step3p5Config
from ..mtp import MTPDepth, depth_weights, swiglu_limit
from ..precision import activation_dtype
from ..step3p5 import index_within_cache
from ..tokenizer import check_token_ids
from .graphs import RowSelection, VerifyingStep3p5
from .host_rows import rows_from_host, rows_to_host
from .rows import DraftRows

logger = logging.getLogger("max.pipelines")

SELECTION = "mtp_rows"
"""Role of the graph that selects the drafts' rows."""


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
        return cycle_bytes(config.model, batch_size, depth, TYPICAL_CONTEXT, weights, cache)

    @override
    def load_graphs(self, session: InferenceSession) -> dict[str, Model]:
        """Compiles and initializes the target, the depths and the row selection."""
        models = super().load_graphs(session)
        config = self.arch_config_as(Step3p5Config)
        self.drafts = [models[depth_role(depth)] for depth in range(len(config.drafting_layers))]
        self._selection = models.get(SELECTION)
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
        for depth, layer in enumerate(drafting):
            cache = model_config.kv_params.child(layer.attention.kind, KVCacheParams)
            module = MTPDepth(layer, model_config.model, cache, model_config.dtype, device)
            module.load_state_dict(depth_weights(self.state_dict, layer), weight_alignment=1, strict=True)
            # One name for all depths: depths of one shape are one graph, compiled once and taken from the cache then.
            specs[depth_role(depth)] = GraphSpec(
                module, "step3p5_mtp", module.input_types(), weights=module.state_dict()
            )
        hidden_dtype = activation_dtype(model_config.dtype, device)
        selection = RowSelection(model_config.model.hidden_size, hidden_dtype, device)
        specs[SELECTION] = GraphSpec(selection, "step3p5_mtp_rows", selection.input_types(), weights={})
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
            check_token_ids(context.tokens.active, vocab_size)
        lengths = [context.tokens.active_length + len(d) for context, d in zip(contexts, drafts, strict=True)]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        tokens = np.concatenate(
            [*chain.from_iterable((context.tokens.active, d) for context, d in zip(contexts, drafts, strict=True))]
        )
        ends = zip(offsets[1:], drafts, strict=True)
        logit_rows = np.concatenate([np.arange(end - 1 - len(d), end) for end, d in ends])
        logits, hidden = self.model.execute(
            self._on_device(tokens.astype(np.int64)),
            self._on_device(offsets.astype(np.uint32)),
            self._on_device(logit_rows.astype(np.int64)),
            *tree.leaves(kv_cache_inputs),
        )
        return logits, hidden

    def draft(
        self,
        plan: DraftRows,
        hidden: Buffer,
        kept: npt.NDArray[Any],
        kv_cache_inputs: KVCacheInputs[Buffer, Buffer],
        drafting: Sequence[int],
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
        """Drafts one token of each drafting request with each depth that `plan` names.

        Args:
            plan: The rows to read.
            hidden: The target's hidden states of this step.
            kept: Hidden states kept from earlier steps, `[kept, hidden_size]`, as `rows_to_host` gives them.
            kv_cache_inputs: The cache as given to `verify`.
            drafting: The drafting requests' places in the batch that was verified.

        Returns:
            The drafted tokens `[len(drafting), depths]`, and the hidden states to keep `[len(plan.keep), hidden_size]`.
        """
        if not drafting and 2 * len(plan.keep) >= hidden.shape[0]:
            # While drafting rests, a step costs no graph more than plain decoding.
            return np.empty((0, 0), dtype=np.int64), rows_to_host(hidden)[plan.keep]
        assert self._selection is not None
        config = self.arch_config_as(Step3p5Config)
        kept_on_device = rows_from_host(kept, hidden.dtype, self.devices[0])
        previous, keep = self._selection.execute(
            hidden, kept_on_device, self._on_device(plan.rows), self._on_device(plan.keep)
        )
        if not drafting:
            return np.empty((0, 0), dtype=np.int64), rows_to_host(keep)
        tokens, following = self._on_device(plan.tokens), self._on_device(plan.following)
        row_offsets = self._on_device(plan.input_row_offsets)
        cache_layers = index_within_cache((*config.model.layers, *config.drafting_layers))[len(config.model.layers) :]
        kinds = {str(layer.attention.kind) for layer in config.drafting_layers[: len(plan.known)]}
        caches = {kind: self._draft_cache(kind, kv_cache_inputs[kind][0], plan, drafting) for kind in kinds}
        drafted = []
        for depth, known in enumerate(plan.known):
            layer = config.drafting_layers[depth]
            previous, tokens, chosen, _ = self.drafts[depth].execute(
                previous,
                tokens,
                following,
                self._on_device(known),
                row_offsets,
                Buffer.from_numpy(np.array(cache_layers[depth], dtype=np.uint32)),
                Buffer.from_numpy(np.array(swiglu_limit(layer), dtype=np.float32)),
                *tree.leaves(caches[str(layer.attention.kind)]),
            )
            drafted.append(chosen)
        return np.stack([chosen.to_numpy() for chosen in drafted], axis=1), rows_to_host(keep)

    def _draft_cache(
        self, kind: str, cache: KVCacheInputsPerDevice[Buffer, Buffer], plan: DraftRows, drafting: Sequence[int]
    ) -> KVCacheInputsPerDevice[Buffer, Buffer]:
        """The cache of `kind` as the depths see it: of the drafting requests, at the positions that they read."""
        pages, metadata = cache.lookup_table, cache.attention_dispatch_metadata
        if len(drafting) < pages.shape[0]:
            pages = self._on_device(pages.to_numpy()[list(drafting)])
        if metadata is not None:
            params = self.arch_config_as(Step3p5Config).kv_params.child(kind, KVCacheParams)
            key = params.resolve_attn_key(len(drafting), plan.max_prompt_length, plan.max_length)
            metadata = key.pack_into_buffer(self.devices[0], plan.max_length)
        return dataclasses.replace(
            cache,
            lookup_table=pages,
            cache_lengths=self._on_device(plan.cache_lengths),
            max_prompt_length=Buffer.from_numpy(np.array([plan.max_prompt_length], dtype=np.uint32)),
            attention_dispatch_metadata=metadata,
        )

    def _on_device(self, array: npt.NDArray[Any]) -> Buffer:
        return Buffer.from_numpy(np.ascontiguousarray(array)).to(self.devices[0])
