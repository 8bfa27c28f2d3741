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

    `graph_seconds` is the model's graph from call to logits, `rest_seconds` what is left of `step_seconds`: inputs,
    choice of the token, cache bookkeeping, the pipeline's own Python.
    """

    step_seconds: float
    graph_seconds: float
    rest_seconds: float

    @classmethod
    def measure(cls, model: AutoModel, context: int, decode_steps: int) -> Self:
        """Decodes a request of `context` tokens a few times, with a clock around the graph."""
        pipeline_model: Any = model.pipeline._pipeline_model
        graph = TimedGraph(pipeline_model.model)
        pipeline_model.model = graph
        steps, of_steps = list[float](), list[float]()
        try:
            prompt = [20 + index % 50 for index in range(context)]
            for _ in range(REPETITIONS):
                options = dict(max_new_tokens=decode_steps + 1, temperature=0.0, ignore_eos=True)
                with model.generate_iter([prompt], **options) as batch:
                    batch.step()  # the prompt's
                    graph.seconds.clear()
                    while not batch.done:
                        start = time.perf_counter()
                        batch.step()
                        steps.append(time.perf_counter() - start)
                of_steps += graph.seconds
        finally:
            pipeline_model.model = graph.timed
        step, graph_seconds = statistics.median(steps), statistics.median(of_steps)
        return cls(step, graph_seconds, step - graph_seconds)

    def text(self) -> str:
        """The same for people."""
        parts = {"model graph": self.graph_seconds, "inputs, choice of the token, cache, pipeline": self.rest_seconds}
        shares = ", ".join(
            f"{name} {1e3 * value:.2f} ms ({100 * value / self.step_seconds:.0f} %)" for name, value in parts.items()
        )
        return f"a decode step of {1e3 * self.step_seconds:.2f} ms: {shares}"


class TimedGraph:
    """A compiled model with a clock around its execution; `seconds` are those of each."""

    def __init__(self, timed: Any) -> None:
        self.timed, self.seconds = timed, list[float]()

    def execute(self, *inputs: Any) -> Any:
        """Runs the model and waits for its first output: the graph may still run when the call returns."""
        start = time.perf_counter()
        outputs = self.timed.execute(*inputs)
        outputs[0].to_numpy()
        self.seconds.append(time.perf_counter() - start)
        return outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.timed, name)
