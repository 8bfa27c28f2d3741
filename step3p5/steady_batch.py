"""MAX's plain pipeline on a CPU, with less to do between two steps of the same requests.

A tenth of a small model's step is Python that prepares anew what the step before had, and starts a graph to find the
greatest of each request's logits. Where the same requests go on decoding, only their last tokens and their lengths in
the cache are new.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from max.driver import Buffer
from max.pipelines.context import TextContext, TextGenerationOutput
from max.pipelines.lib.pipeline_variants.text_generation import TextGenerationPipeline
from max.pipelines.lib.pipeline_variants.utils import update_context_and_prepare_responses
from max.pipelines.modeling.types import PipelineOutputsDict, TextGenerationInputs
from max.support.algorithm import flatten2d
from typing_extensions import override

from .model import Step3p5Inputs, Step3p5Model


def in_same_order(before: Sequence[TextContext], now: Sequence[TextContext]) -> bool:
    """Whether the batch has the same requests in the same order."""
    return len(before) == len(now) and all(map(operator.is_, before, now))


def is_constrained(context: TextContext) -> bool:
    """Whether a grammar may forbid tokens."""
    return context.matcher is not None or context.json_schema is not None or context.grammar is not None


def same_requests(before: Sequence[TextContext], now: Sequence[TextContext]) -> bool:
    """Whether the batch has the same requests in the same order, none of them bound by a grammar since."""
    return in_same_order(before, now) and not any(map(is_constrained, now))


def takes_the_best(context: TextContext) -> bool:
    """Whether the request's next token is that of the greatest logit, as the model has it."""
    parameters = context.sampling_params
    return (
        parameters.top_k == 1
        and not parameters.logits_processors
        and not parameters.needs_penalties
        and context.min_tokens == 0
    )


@dataclass(frozen=True)
class SteadyStep:
    """A step's inputs in the host's memory, and where in it the next step of the same requests differs."""

    batch: list[TextContext]
    inputs: Step3p5Inputs
    buffers: tuple[Buffer, ...]
    """The inputs as the graph takes them."""

    tokens: npt.NDArray[np.int64]
    """`[total_seq_len]`."""

    cache_lengths: list[npt.NDArray[np.uint32]]
    """`[batch]`, for each kind of attention. The greatest length goes unread: a CPU's attention goes by these."""

    @classmethod
    def of(cls, batch: Sequence[TextContext], inputs: Step3p5Inputs) -> SteadyStep:
        """The step that MAX prepared."""
        assert isinstance(inputs.kv_cache_inputs, dict)
        caches = [cache for kind in inputs.kv_cache_inputs.values() for cache in kind]
        lengths = [cache.cache_lengths.to_numpy() for cache in caches]
        return cls(list(batch), inputs, inputs.buffers, inputs.tokens.to_numpy(), lengths)

    def goes_on_in(self, batch: Sequence[TextContext], page_size: int) -> bool:
        """Whether a step of `batch` reads the same pages of the cache for the same requests, one token of each."""
        return (
            len(self.tokens) == len(batch)
            and same_requests(self.batch, batch)
            and all(one.tokens.active_length == 1 and one.tokens.processed_length % page_size for one in batch)
        )

    def advance(self) -> None:
        """Makes the inputs those of the next step."""
        self.tokens[:] = [context.tokens.active[0] for context in self.batch]
        for lengths in self.cache_lengths:
            lengths[:] = [context.tokens.processed_length for context in self.batch]


class SteadyPipeline(TextGenerationPipeline[TextContext]):
    """MAX's plain pipeline on a CPU, with a short way from a step to the next of the same requests."""

    _pipeline_model: Step3p5Model
    _last: SteadyStep | None = None

    @override
    def prepare_batch(
        self, batches: list[list[TextContext]]
    ) -> tuple[Any, npt.NDArray[np.int32] | None, list[TextContext]]:
        """A step's inputs: the last one's, advanced, where that is all; else MAX's."""
        batch = flatten2d(batches)
        if (last := self._goes_on_in(batch)) is not None:
            last.advance()
            return last.inputs, None, batch
        self._last = None  # MAX may prepare the next step in the same memory
        inputs, bitmask, batch = super().prepare_batch(batches)
        if bitmask is None and batch:
            self._last = SteadyStep.of(batch, inputs)
        return inputs, bitmask, batch

    @override
    def _execute(self, inputs: TextGenerationInputs[TextContext]) -> PipelineOutputsDict[TextGenerationOutput]:
        batch = inputs.flat_batch
        last = None if inputs.enable_log_probs else self._goes_on_in(batch)
        if last is None or not all(map(takes_the_best, batch)):
            return super()._execute(inputs)
        last.advance()
        next_token_logits, *_ = self._pipeline_model.model.execute(*last.buffers)
        known = next_token_logits.to_numpy()[:, : self.vocab_size]  # the tokenizer has no words for the rest
        answers = update_context_and_prepare_responses(known.argmax(axis=-1, keepdims=True), batch)
        for context in batch:
            self._kv_manager.step(context)
        return answers

    def _goes_on_in(self, batch: Sequence[TextContext]) -> SteadyStep | None:
        """The last step, if `batch` goes on with it."""
        last = self._last
        return last if last is not None and last.goes_on_in(batch, self._kv_manager.params.page_size) else None
