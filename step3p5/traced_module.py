"""How modules become graphs whose inputs are not the arguments of their call."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from max.graph import Graph, TensorValue, Type, Value
from max.graph import Module as GraphModule
from max.nn.layer import Module
from typing_extensions import override


class TracedModule(Module):
    """A module whose call takes in groups, caches among them, what its graph takes one by one."""

    @abstractmethod
    def call_with(self, *inputs: Value[Any]) -> tuple[TensorValue, ...]:
        """Calls the module with the graph's inputs."""

    @override
    def trace(
        self,
        *input_types: Type[Any],
        name: str | None = None,
        module: GraphModule | None = None,
        custom_extensions: Iterable[Path] = (),
        is_device_graph: bool = False,
    ) -> Graph:
        """Traces the graph over inputs of these types, in the order of `call_with`; see `max.nn.Module.trace`."""
        return Graph(
            name or type(self).__name__,
            self.call_with,
            input_types=input_types,
            custom_extensions=list(custom_extensions),
            module=module,
            is_device_graph=is_device_graph,
        )
