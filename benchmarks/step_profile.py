"""Where the time of a decode step goes, seen from Python."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any, Self

from max.pipelines.lib.auto_model import AutoModel

REPETITIONS = 4


@dataclass(frozen=True)
class StepProfile:
    """Medians over the steps of one request, in seconds.

    `graph_seconds` is the model's graph from call to logits, `prepare_seconds` the making of its inputs, and
    `rest_seconds` what is left of `step_seconds`: sampling, cache bookkeeping, the pipeline's own Python.
    """

    step_seconds: float
    graph_seconds: float
    prepare_seconds: float
    rest_seconds: float

    @classmethod
    def measure(cls, model: AutoModel, context: int, decode_steps: int) -> Self:
        """Decodes a request of `context` tokens a few times, with a clock around the pipeline's parts."""
        parts: dict[str, list[float]] = {"execute": [], "prepare_initial_token_inputs": []}
        pipeline_model = model.pipeline._pipeline_model
        for name, seconds in parts.items():
            setattr(pipeline_model, name, _timed(getattr(pipeline_model, name), seconds))
        steps = []
        try:
            prompt = [20 + index % 50 for index in range(context)]
            for _ in range(REPETITIONS):
                options = dict(max_new_tokens=decode_steps + 1, temperature=0.0, ignore_eos=True)
                with model.generate_iter([prompt], **options) as batch:
                    batch.step()  # the prompt's
                    del parts["execute"][-1], parts["prepare_initial_token_inputs"][-1]
                    while not batch.done:
                        start = time.perf_counter()
                        batch.step()
                        steps.append(time.perf_counter() - start)
        finally:
            for name in parts:
                delattr(pipeline_model, name)
        step, graph, prepare = (
            statistics.median(seconds) for seconds in (steps, parts["execute"], parts["prepare_initial_token_inputs"])
        )
        return cls(step, graph, prepare, step - graph - prepare)

    def text(self) -> str:
        """The same for people."""
        parts = {
            "model graph": self.graph_seconds,
            "inputs of the graph": self.prepare_seconds,
            "sampling, cache, pipeline": self.rest_seconds,
        }
        shares = ", ".join(
            f"{name} {1e3 * value:.2f} ms ({100 * value / self.step_seconds:.0f} %)" for name, value in parts.items()
        )
        return f"a decode step of {1e3 * self.step_seconds:.2f} ms: {shares}"


def _timed(call: Any, seconds: list[float]) -> Any:
    def timed(*arguments: Any, **keywords: Any) -> Any:
        start = time.perf_counter()
        result = call(*arguments, **keywords)
        logits = getattr(result, "logits", None)
        if logits is not None:
            logits.to_numpy()  # the graph may still run when the call returns
        seconds.append(time.perf_counter() - start)
        return result

    return timed
