"""Where the Mojo kernels are, and how a graph comes to call them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from max.dtype import DType
from max.graph import BufferValue, DeviceRef, Graph, KernelLibrary, TensorType, TensorValue, ops

_PACKAGE = Path(__file__).resolve().parent
_PLACES = (_PACKAGE / "mojo_kernels", _PACKAGE.parent / "mojo_kernels")
"""In an installation the kernels lie inside this package, in a checkout beside it."""


@cache
def kernels_path() -> Path:
    """The folder of the Mojo package `mojo_kernels`.

    Raises:
        FileNotFoundError: If the package was installed without its kernels.
    """
    for place in _PLACES:
        if (place / "__init__.mojo").is_file():
            return place
    raise FileNotFoundError(
        f"mojo_kernels: found no __init__.mojo in {' or '.join(map(str, _PLACES))}; reinstall the package"
    )


@cache
def compiled_kernels() -> tuple[Path, ...]:
    """`mojo_kernels` as a compiled Mojo package, built once a process."""
    library = KernelLibrary()
    library.load_paths([kernels_path()])
    return tuple(library.library_paths())


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
