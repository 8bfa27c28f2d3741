"""The graph for several GPUs exchanges what the plan says, once for every layer; traced, not compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
from gpu_parallel import CONFIG, parallel_graph
from max.graph import ops
from test_parallel_plan import MODES, plan_of

from step3p5.config_parser import parse_model_config
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

    plan = plan_of(parse_model_config(CONFIG), mode, num_devices)
    planned = [plan.after_embedding, plan.before_head, plan.after_head]
    planned += [of for layer in plan.layers for of in (layer.after_attention, layer.before_mlp, layer.after_mlp)]
    assert traced == Counter(chain.from_iterable(OPERATIONS[of] for of in planned if of is not None))
