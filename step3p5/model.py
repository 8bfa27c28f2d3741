"""The pipeline model: loads the checkpoint, compiles the graph and runs it step by step."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar, Literal

import numpy as np
from max import tree
from max.driver import Buffer, Device, is_virtual_device_mode
from max.engine import InferenceSession, Model
from max.graph.weights import Weights, WeightsAdapter
from max.nn.kv_cache import KVCacheInputs, KVCacheInputsPerDevice
from max.nn.transformer import ReturnHiddenStates, ReturnLogits
from max.pipelines.architectures.llama3.model import Llama3Inputs, LlamaModelBase
from max.pipelines.context import TextContext
from max.pipelines.lib import KVCacheConfig, PipelineConfig
from max.pipelines.lib.graph_specs import GraphRole, GraphSpec
from max.pipelines.lib.interfaces import ModelInputs, ModelOutputs
from max.pipelines.lib.interfaces.pipeline_model import AlwaysSignalBuffersMixin
from max.pipelines.lib.memory_estimation import MemoryPlan
from typing_extensions import override

from .artifacts import record_or_check
from .batch_processor import Step3p5BatchProcessor
from .cpu_quota import limit_threads
from .greedy_draw import DRAW, draw_spec
from .mailbox_size import most_tokens
from .mailboxes import Mailboxes
from .model_config import Step3p5Config
from .parallel_step3p5 import ParallelStep3p5
from .resident_memory import give_back
from .step3p5 import Step3p5
from .structured_output import restart_grammars_amid_prompts
from .tokenizer import check_token_ids
from .worker_threads import rest_pollers, spread_workers

logger = logging.getLogger("max.pipelines")


_CACHE_FIELDS = tuple(field.name for field in fields(KVCacheInputsPerDevice))


def cache_leaves(node: Any) -> list[Buffer]:
    """What `max.tree.leaves` finds in a step's cache inputs, in a twentieth of the time, which every step pays."""
    if isinstance(node, Buffer):
        return [node]
    if isinstance(node, KVCacheInputsPerDevice):
        children: Iterable[Any] = (getattr(node, name) for name in _CACHE_FIELDS)
    elif isinstance(node, dict):
        children = (node[key] for key in (node if isinstance(node, OrderedDict) else sorted(node)))
    elif isinstance(node, list | tuple):
        children = node
    else:
        return [] if node is None else tree.leaves(node)
    return [leaf for child in children if child is not None for leaf in cache_leaves(child)]


@dataclass
class Step3p5Inputs(Llama3Inputs):
    """Inputs of one step.

    One device takes the tokens, row offsets and cache; tensor parallelism adds the signal buffers, data parallelism
    the host's row offsets and the splits, expert parallelism its communication buffers.
    """

    host_input_row_offsets: Buffer | None = None
    """The row offsets on the host, `[batch + 1]` uint32; data parallelism only."""

    ep_inputs: tuple[Buffer, ...] = ()
    """Expert-parallel communication buffers; empty without expert parallelism."""

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """The graph's inputs, in its order."""
        data_parallel: tuple[Buffer, ...] = ()
        if self.host_input_row_offsets is not None and isinstance(self.data_parallel_splits, Buffer):
            data_parallel = (self.host_input_row_offsets, self.data_parallel_splits)
        return (
            self.tokens,
            self.input_row_offsets,
            self.return_n_logits,
            *data_parallel,
            *self.signal_buffers,
            *cache_leaves(self.kv_cache_inputs),
            *self.ep_inputs,
        )


class Step3p5Model(AlwaysSignalBuffersMixin, LlamaModelBase):
    """Step-3.5-Flash pipeline model."""

    model_config_cls: ClassVar[type[Any]] = Step3p5Config
    """The class of this model's configuration."""

    batch_processor_cls = Step3p5BatchProcessor  # a sibling of Llama's, not a subclass

    model: Model
    """Compiled and initialized model ready for inference."""

    norm_method: Literal["rms_norm", "layer_norm"] = "rms_norm"
    """Normalization layer."""

    attention_bias: bool = False
    """Whether to use attention bias."""

    state_dict: dict[str, Any]
    """Weights to load into the model."""

    draw: Model | None = None
    """`GreedyDraw`, compiled."""

    ep_comm_initializer: Mailboxes | None = None
    """The GPUs' mailboxes, where they have requests of their own; MAX asks for them by this name once the graphs are
    loaded, and every step takes them as its `ep_inputs`."""

    _is_first_step: bool = True

    def __init__(
        self,
        pipeline_config: PipelineConfig,
        session: InferenceSession,
        devices: list[Device],
        kv_cache_config: KVCacheConfig,
        weights: Weights,
        adapter: WeightsAdapter | None = None,
        return_logits: ReturnLogits = ReturnLogits.LAST_TOKEN,
        return_hidden_states: ReturnHiddenStates = ReturnHiddenStates.NONE,
        *,
        memory_plan: MemoryPlan,
        max_batch_size: int = 1,
    ) -> None:
        super().__init__(
            pipeline_config,
            session,
            devices,
            kv_cache_config,
            weights,
            adapter=adapter,
            return_logits=return_logits,
            return_hidden_states=return_hidden_states,
            memory_plan=memory_plan,
            max_batch_size=max_batch_size,
        )

    @cached_property
    @override
    def signal_buffers(self) -> list[Buffer]:
        """Device buffers that collectives synchronise through; none on one device, which has no collective."""
        if len(self.devices) == 1:
            return []
        return AlwaysSignalBuffersMixin.signal_buffers.func(self)

    @override
    def _init_distributed_runtime(self, session: InferenceSession, model_config: Any) -> None:
        assert isinstance(model_config, Step3p5Config)
        if not model_config.plan.own_requests or is_virtual_device_mode():
            return
        limits = self.batch_processor.runtime
        whole_prompt = 0 if limits.enable_chunked_prefill else limits.max_seq_len
        tokens = most_tokens(limits.max_batch_input_tokens, limits.max_batch_size, whole_prompt)
        self.ep_comm_initializer = Mailboxes(model_config.plan, self.devices, tokens, model_config.dtype.size_in_bytes)

    @override
    def load_model(self, session: InferenceSession) -> Model:
        """Reads the weights, compiles the graph and binds them.

        Args:
            session: Compiles and initializes the graph.

        Returns:
            The model, ready to execute.

        Raises:
            CheckpointError: If the checkpoint's tensors are not those of its configuration.
            ArtifactError: If `--precompiled-mefs` names artifacts of other settings.
        """
        limit_threads()
        models = self.load_graphs(session)
        if self.devices[0].is_host:
            spread_workers()
        return models[GraphRole.DECODER]

    @override
    def load_graphs(self, session: InferenceSession) -> dict[str, Model]:
        """Compiles and initializes the graphs."""
        models: dict[str, Model] = super().load_graphs(session)
        self.draw = models.get(DRAW)
        return models

    def known_tokens(self, words: int | None) -> Buffer:
        """How many tokens can be drawn, the first ones, `[1]` int64 on the first device.

        Args:
            words: Tokens that the tokenizer knows; `None` for all.
        """
        vocab_size = self.arch_config_as(Step3p5Config).model.vocab_size
        return Buffer.from_numpy(np.array([min(words or vocab_size, vocab_size)])).to(self.devices[0])

    @override
    def prepare_initial_token_inputs(
        self,
        replica_batches: Sequence[Sequence[TextContext]],
        kv_cache_inputs: KVCacheInputs[Buffer, Buffer] | None = None,
        return_n_logits: int = 1,
    ) -> Step3p5Inputs:
        """Prepares the inputs of a step; see `Step3p5BatchProcessor.prepare_initial_token_inputs`.

        Raises:
            InputError: A token has no row in the embedding; `AutoModel.generate` passes tokens that no tokenizer saw.
        """
        vocab_size = self.arch_config_as(Step3p5Config).model.vocab_size
        for context in chain.from_iterable(replica_batches):
            if context.tokens.generated_length == 0:  # what was sampled needs no check
                check_token_ids(context.tokens.active, vocab_size)
        if not self.pipeline_config.runtime.enable_overlap_scheduler:
            restart_grammars_amid_prompts(chain.from_iterable(replica_batches))
        inputs = super().prepare_initial_token_inputs(replica_batches, kv_cache_inputs, return_n_logits)
        assert isinstance(inputs, Step3p5Inputs)
        return inputs

    @override
    def execute(self, model_inputs: ModelInputs) -> ModelOutputs:
        """Runs a step."""
        self.await_inputs()
        outputs = super().execute(model_inputs)
        self.after_step()
        return outputs

    def await_inputs(self) -> None:
        """Waits until a step's inputs are where the graph reads them.

        MAX copies them there behind the call's back, and on a CPU a graph does not wait for that: beside other work a
        step would now and then read those of the step before.
        """
        if self.devices[0].is_host:
            self.devices[0].synchronize()

    def after_step(self) -> None:
        """What follows the first step that the model runs."""
        if self._is_first_step and self.devices[0].is_host:
            rest_pollers()
            give_back()
        self._is_first_step = False

    @override
    def _create_model_config(self, state_dict: dict[str, Any]) -> Step3p5Config:
        config = self.arch_config_as(Step3p5Config)
        config.set_outputs(self.return_logits, self.return_hidden_states)
        return config

    @override
    def graph_specs(self, model_config: Any) -> dict[str, GraphSpec]:
        """The decoder's graph, with its weights, and on a GPU that of greedy draws."""
        assert isinstance(model_config, Step3p5Config)
        record_or_check(self.pipeline_config, model_config)
        module = ParallelStep3p5(model_config) if len(model_config.devices) > 1 else Step3p5(model_config)
        # Safetensors promises no alignment beyond the header's.
        module.load_state_dict(self.state_dict, weight_alignment=1, strict=True)
        inputs, device = self._bind_graph_inputs(module.input_tree()), model_config.devices[0]
        specs: dict[str, GraphSpec] = {
            GraphRole.DECODER: GraphSpec(module, "step3p5", inputs, weights=module.state_dict())
        }
        if device.is_gpu():
            specs[DRAW] = draw_spec(model_config.model.vocab_size, device)
        return specs
