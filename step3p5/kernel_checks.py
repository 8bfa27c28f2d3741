"""Looks at MAX's own kernels once a process.

MAX checks every call of a custom op against the libraries that its graph names. It keeps what it found in them for the
next graph, but not where a graph names none, as those of the sampler, which call kernels of MAX's own: there it reads
all of these anew, for a second or more a graph, five graphs a start.
"""

from __future__ import annotations

from typing import Any

from max.graph import KernelLibrary

_NO_LIBRARIES: frozenset[str] = frozenset()


def check_own_kernels_once() -> None:
    """Lets graphs without libraries share what MAX knows of its own kernels, as graphs of equal libraries do."""
    check = KernelLibrary.verify_custom_op

    def verify_custom_op(self: KernelLibrary, custom_op: Any) -> None:
        if self._analysis.library_paths:
            return check(self, custom_op)
        self._analysis = KernelLibrary._analysis_cache.setdefault(_NO_LIBRARIES, self._analysis)
        self._analysis.verify_custom_op(custom_op)

    KernelLibrary.verify_custom_op = verify_custom_op
