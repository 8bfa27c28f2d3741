"""Graphs of single ops on the CPU, compiled together: any compilation takes MAX half a minute of a core before it comes
to what is in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from max.driver import CPU, Buffer
from max.engine import InferenceSession, Model
from max.graph import BufferType, Graph, Module, TensorType, TensorValue

Array = npt.NDArray[Any]

BuildGraph = Callable[[str, Module], Graph]
"""Adds a graph of a name to a module."""


def graph_of(build: Callable[..., Iterable[TensorValue]], types: Sequence[TensorType | BufferType]) -> BuildGraph:
    """The graph of a function of values of these types, tensors and buffers as such."""

    def add(name: str, module: Module) -> Graph:
        with Graph(name, input_types=types, module=module) as graph:
            values: list[Any] = [
                value.buffer if isinstance(of_input, BufferType) else value.tensor
                for value, of_input in zip(graph.inputs, types, strict=True)
            ]
            graph.output(*build(*values))
        return graph

    return add


def load_together(graphs: Mapping[str, BuildGraph]) -> dict[str, Model]:
    """The graphs by their names, compiled."""
    module = Module()
    libraries: dict[Path, None] = {}
    for name, build in graphs.items():
        libraries |= dict.fromkeys(build(name, module).kernel_libraries_paths)
    return InferenceSession(devices=[CPU()]).load_all(module, custom_extensions=list(libraries))


class Ops:
    """Those of the graphs whose names begin with a prefix, called by what follows it."""

    def __init__(self, models: Mapping[str, Model], prefix: str) -> None:
        self._models, self._prefix = models, prefix

    def execute(self, part: str, *operands: Array | Buffer) -> list[Array]:
        """The results of a graph."""
        buffers = [v if isinstance(v, Buffer) else Buffer.from_numpy(v) for v in operands]
        return [output.to_numpy() for output in self._models[f"{self._prefix}_{part}"].execute(*buffers)]

    def run(self, part: str, *operands: Array | Buffer) -> list[Array]:
        """The results on freed memory full of NaN: operands of float32 are NaN in a run before."""
        nan = [np.full_like(v, np.nan) if isinstance(v, np.ndarray) and v.dtype == np.float32 else v for v in operands]
        self.execute(part, *nan)
        return self.execute(part, *operands)
