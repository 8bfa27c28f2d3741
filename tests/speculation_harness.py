"""What the speculation tests use: models that draft, driven step by step with all that they draft recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from harness import FIRST_TEXT_TOKEN, NEAR_TIE, Prompt, assert_close, clear_prompt
from max.pipelines.context import EOSTracker, SamplingParams, TextContext, TokenBuffer
from max.pipelines.lib.auto_model import AutoModel
from max.pipelines.lib.generate import GenerateIterator
from max.pipelines.modeling.types import RequestID
from reference import Reference

from step3p5.model_config import Step3p5Config

GREEDY = SamplingParams(temperature=0.0, top_k=1, ignore_eos=True)


def load(folder: Path, depth: int, max_batch_size: int = 8, **options: Any) -> AutoModel:
    """A model that drafts `depth` deep, on the CPU if not told otherwise; `depth` 0 is the plain pipeline."""
    always = {"custom_architectures": ["pipelines_registry"], "max_length": 1024, "devices": "cpu"}
    settings: dict[str, Any] = always | options
    if depth:
        schedule = [{"batch_start": 1, "batch_end": 1024, "num_tokens": depth}]
        settings |= {
            "speculative_method": "mtp",
            "num_speculative_tokens": depth,
            "num_speculative_tokens_per_batch_size": schedule,
        } | options
    return AutoModel(str(folder), max_batch_size=max_batch_size, **settings)


def prompts_of(rng: np.random.Generator, *lengths: int) -> list[Prompt]:
    """Random prompts of text tokens."""
    return [rng.integers(FIRST_TEXT_TOKEN, 500, size=length).tolist() for length in lengths]


def request(prompt: Prompt, new_tokens: int, sampling: SamplingParams = GREEDY, eos: Sequence[int] = ()) -> TextContext:
    """A request for `new_tokens` tokens, which ends early only with a token of `eos`."""
    return TextContext(
        request_id=RequestID(),
        max_length=len(prompt) + new_tokens,
        tokens=TokenBuffer(np.asarray(prompt, dtype=np.int64)),
        eos_tracker=EOSTracker(eos_token_ids=set(eos)),
        sampling_params=sampling,
    )


def generate(model: AutoModel, contexts: Sequence[TextContext], chunk: int | None = None) -> list[Prompt]:
    """Each request's new tokens; all run in one batch, prompts in pieces of at most `chunk` tokens."""
    generated: list[Prompt] = [[] for _ in contexts]
    with GenerateIterator.from_contexts(model.pipeline, contexts) as batch:
        while not batch.done:
            for context in contexts:
                if chunk is not None and context.tokens.active_length > chunk:
                    context.tokens.chunk(chunk)
            for row, tokens in batch.step().items():
                generated[row] += tokens
    return generated


def clear_prompts(
    plain: AutoModel, reference: Reference, rng: np.random.Generator, lengths: Sequence[int], new_tokens: int
) -> list[Prompt]:
    """Random prompts of text tokens on which, answers included, no router choice of the target is a near tie: what
    drafting computes along them can be held to the reference."""

    def answer(prompt: Prompt) -> Prompt:
        return generate(plain, [request(prompt, new_tokens)])[0]

    return [clear_prompt(reference, rng, length, answer) for length in lengths]


@dataclass
class Recorder:
    """Keeps the logits that the target verifies with and the drafts are chosen from, while it is attached.

    All steps are then of the kind that has the host between verifying and drafting; `test_steady_cycle.py` holds the
    drafts of cycles to theirs.

    Args:
        model: A model that drafts.
    """

    model: AutoModel
    verified: list[tuple[Prompt, npt.NDArray[np.float32]]] = field(default_factory=list)
    """A request's tokens with its drafts, and the logits of the rows from the last token on."""
    drafted: list[tuple[Prompt, Prompt, list[npt.NDArray[np.float32]], npt.NDArray[np.int64]]] = field(
        default_factory=list
    )
    """A request's tokens, its new drafts, the logits of each, and the tokens that these are for."""

    def __enter__(self) -> Recorder:
        pipeline: Any = self.model.pipeline
        self._cycles, pipeline.cycles = pipeline.cycles, None
        self._target = pipeline._pipeline_model
        self._originals = self._target.verify, self._target.draft, list(self._target.drafts)
        self._depth_logits: list[npt.NDArray[np.float32]] = []
        self._target.verify, self._target.draft = self._verify, self._draft
        self._target.drafts = [_Recorded(draft, self._depth_logits) for draft in self._target.drafts]
        return self

    def __exit__(self, *_: object) -> None:
        pipeline: Any = self.model.pipeline
        pipeline.cycles = self._cycles
        del self._target.verify, self._target.draft
        self._target.drafts = self._originals[2]

    def _verify(self, contexts: Sequence[TextContext], drafts: Sequence[Prompt], kv_cache_inputs: Any) -> Any:
        logits, hidden = self._originals[0](contexts, drafts, kv_cache_inputs)
        self._contexts, rows, start = contexts, np.array(logits.to_numpy()), 0
        for context, own in zip(contexts, drafts, strict=True):
            end = start + len(own) + 1
            processed = context.tokens.processed_length + context.tokens.active_length
            self.verified.append(([*context.tokens.all[:processed].tolist(), *own], rows[start:end]))
            start = end
        return logits, hidden

    def _draft(self, *arguments: Any) -> Any:
        self._depth_logits.clear()
        drafted, keep = self._originals[1](*arguments)
        drafts, heads = drafted.read(), self._target.heads
        vocab_size = self._target.arch_config_as(Step3p5Config).model.vocab_size
        ids = np.arange(vocab_size) if heads is None else heads.vocabulary.ids.copy()
        for place, index in enumerate(arguments[-1]):
            context = self._contexts[index]
            # A prompt still read in chunks drafts nothing that will be verified.
            if context.tokens.processed_length + 1 == len(context.tokens):
                logits = [depth[place] for depth in self._depth_logits]
                self.drafted.append((context.tokens.all.tolist(), drafts[:, place].tolist(), logits, ids))
        return drafted, keep

    def check(self, reference: Reference) -> None:
        """Holds the recorded logits to the float64 reference, but for sequences with a router choice near a tie."""
        clear = 0
        for tokens, logits in self.verified:
            reference.router_margin = np.inf
            want = reference.logits(tokens)[-len(logits) :]
            if reference.router_margin > NEAR_TIE:
                assert_close(logits, want)
                clear += 1
        assert clear > len(self.verified) / 2, "near ties in most sequences: take `clear_prompts`"
        for tokens, drafts, depths, ids in self.drafted:
            reference.router_margin = np.inf
            want_depths = reference.mtp_logits(tokens + drafts[:-1], len(drafts))
            if reference.router_margin > NEAR_TIE:
                for depth, logits in enumerate(depths):
                    row = want_depths[depth][len(tokens) - 2][ids]
                    assert_close(logits, row)
                    assert drafts[depth] == ids[row.argmax()]


class _Recorded:
    """A depth's compiled graph that keeps a copy of its logits."""

    def __init__(self, graph: Any, logits: list[npt.NDArray[np.float32]]) -> None:
        self._graph, self._logits = graph, logits

    def execute(self, *inputs: Any) -> Any:
        outputs = self._graph.execute(*inputs)
        self._logits.append(np.array(outputs[3].to_numpy()))
        return outputs
