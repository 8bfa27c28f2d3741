"""The graph for several GPUs exchanges what the plan says, once for every layer; traced, not compiled."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
from gpu_models import model_of, parallel_graph
from max.graph import ops
from test_parallel_plan import MODES, plan_of

from step3p5.parallel_plan import Collective

OPERATIONS = {
    Collective.ALL_REDUCE: ["all-reduce"],
    Collective.ALL_GATHER: ["all-gather"],
    # The other branch is for devices that do not have equally many rows.
    Collective.REDUCE_SCATTER: ["reduce-scatter", "all-reduce"],
}


@pytest.mark.parametrize("num_devices", [2, 8])
@pytest.mark.parametrize("mode", MODES)
def test_the_graph_exchanges_what_the_plan_says(mode: str, num_devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: Counter[str] = Counter()

    def counted(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any, **keywords: Any) -> Any:
            traced[name] += 1
            return operation(*arguments, **keywords)

        return count

    monkeypatch.setattr(ops.allreduce, "sum", counted("all-reduce", ops.allreduce.sum))
    monkeypatch.setattr(ops.reducescatter, "sum", counted("reduce-scatter", ops.reducescatter.sum))
    monkeypatch.setattr(ops, "allgather", counted("all-gather", ops.allgather))
    parallel_graph(mode, num_devices)

    plan = plan_of(model_of(mode, num_devices), mode, num_devices)
    planned = [plan.after_embedding, plan.before_head, plan.after_head]
    planned += [
        of
        for layer in plan.layers[: len(plan.model.layers)]
        for of in (layer.after_attention, layer.before_mlp, layer.after_mlp)
    ]
    assert traced == Counter(chain.from_iterable(OPERATIONS[of] for of in planned if of is not None))


def test_the_shared_expert_waits_for_no_exchange() -> None:
    # What only the shared expert computes may run while the tokens travel to the experts and back.
    graph = parallel_graph("dp-ep", 2)
    (layer,) = [body for body in str(graph.module.mlir_module).split("mo.graph") if "distributed.reducescatter" in body]
    lines = [line.split(" = ", 1) for line in layer.splitlines() if " = " in line]
    after_exchange: set[str] = set()
    shared = 0
    for left, right in lines:
        operands = set(re.findall(r"%\w+", right.split(" : ")[0]))
        waits = "mo.distributed" in right or bool(operands & after_exchange)
        if waits:
            after_exchange |= set(re.findall(r"%\w+", left))
        if '"step3p5_swiglu"' in right:
            shared += 1
            assert not waits
    assert shared == 2
    assert after_exchange
