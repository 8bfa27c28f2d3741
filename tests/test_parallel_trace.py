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

from step3p5.custom_ops import custom_op
from step3p5.layers import dispatch
from step3p5.parallel_plan import Collective

OPERATIONS = {
    Collective.ALL_REDUCE: ["all-reduce"],
    Collective.ALL_GATHER: ["all-gather"],
}
"""Of all devices together."""

OPS = {
    Collective.DISPATCH: ["step3p5_dispatch_send", "step3p5_dispatch_receive"],
    Collective.COMBINE: ["step3p5_combine_send", "step3p5_combine_receive"],
}
"""Of every device."""


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
    monkeypatch.setattr(
        dispatch, "custom_op", lambda name, *rest, **keywords: counted(name, custom_op)(name, *rest, **keywords)
    )
    monkeypatch.setattr(ops, "allgather", counted("all-gather", ops.allgather))
    parallel_graph(mode, num_devices)

    plan = plan_of(model_of(mode, num_devices), mode, num_devices)
    planned = [plan.after_embedding, plan.before_head, plan.after_head]
    planned += [
        of
        for layer in plan.layers[: len(plan.model.layers)]
        for of in (layer.after_attention, layer.before_mlp, layer.after_mlp)
    ]
    collectives = [of for of in planned if of is not None]
    assert traced == Counter(chain.from_iterable(OPERATIONS.get(of) or OPS[of] * num_devices for of in collectives))


def test_the_shared_expert_stands_between_sending_and_receiving() -> None:
    # So it runs while the tokens come, and needs nothing of what comes.
    graph = parallel_graph("dp-ep", 2)
    (layer,) = [body for body in str(graph.module.mlir_module).split("mo.graph") if "step3p5_dispatch_send" in body]
    called = [
        name
        for name in re.findall(r'"step3p5_(\w+)"', layer)
        if name.startswith(("dispatch", "combine")) or name == "swiglu"
    ]
    assert called == [
        *2 * ["dispatch_send"],
        *2 * ["swiglu"],
        *2 * ["dispatch_receive"],
        *2 * ["combine_send"],
        *2 * ["combine_receive"],
    ]
