"""How a graph comes to call the Mojo kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from max.dtype import DType
from max.graph import BufferValue, DeviceRef, Graph, TensorType, TensorValue, ops

from .kernel_package import compiled_package, kernels_path

_compiled: list[Path] = []
"""The compiled kernels, once they were asked for."""


def compiled_kernels() -> tuple[Path, ...]:
    """`mojo_kernels` as a compiled Mojo package, the same one throughout a process."""
    if not _compiled:
        use_kernels(compiled_package(kernels_path()))
    return tuple(_compiled)


def use_kernels(package: Path) -> None:
    """Makes graphs from now on call the kernels of a compiled package."""
    _compiled[:] = [package]


def custom_op(
    name: str,
    device: DeviceRef,
    values: Sequence[TensorValue | BufferValue],
    out_types: Sequence[TensorType],
    parameters: Mapping[str, bool | int | str | DType] | None = None,
) -> list[TensorValue]:
    """Adds a call of one of this project's kernels to the current graph; it may write to buffers among `values`.

    The kernels come with the call, because a subgraph does not see the libraries of the graph that holds it.
    """
    graph = Graph.current
    if not set(compiled_kernels()) <= set(graph.kernel_libraries_paths):
        graph._import_kernels(compiled_kernels())
    # A buffer operand is written: its reads and writes keep their order in the graph.
    call = ops.inplace_custom if any(isinstance(value, BufferValue) for value in values) else ops.custom
    results = call(name, device, list(values), list(out_types), parameters=dict(parameters or {}) or None)
    return [result.tensor for result in results]
