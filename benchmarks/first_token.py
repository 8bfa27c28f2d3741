"""Loads a checkpoint on a CPU in a new process, generates one token and prints what that took, as JSON.

    python benchmarks/first_token.py MODEL ENCODING

Started by `cpu_peer.py` and `starts.py`; seconds count from the start of the process's own code. Resident bytes are
those with the model still loaded, and the most at any time; weights that are mapped from files count once they were
read. Of the resident bytes, those of mapped weights, of shared libraries' files (as far as they were not written to)
and of the process's own memory are named, in which weights that were cast lie.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import TYPE_CHECKING

from report import peak_memory_bytes

if TYPE_CHECKING:
    from step3p5.memory_maps import Mapping

START = time.perf_counter()


def by_kind(maps: list[Mapping]) -> dict[str, int]:
    """Resident bytes of mapped weights, of shared libraries' files and of memory that no file holds."""
    from step3p5.memory_maps import shared_libraries

    libraries = shared_libraries(maps)
    return {
        "mapped_weights_bytes": sum(
            mapping.resident - mapping.own for mapping in maps if mapping.path.endswith(".safetensors")
        ),
        "libraries_bytes": sum(mapping.resident - mapping.own for mapping in maps if mapping.path in libraries),
        "own_bytes": sum(mapping.own if mapping.is_file else mapping.resident for mapping in maps),
    }


def main() -> None:
    from max.pipelines.lib.auto_model import AutoModel

    logging.getLogger("max.pipelines").setLevel(logging.WARNING)
    imported = time.perf_counter()
    with AutoModel(
        sys.argv[1],
        devices="cpu",
        custom_architectures=["pipelines_registry"],
        quantization_encoding=sys.argv[2],
        max_batch_size=1,
        max_length=512,
    ) as model:
        loaded = time.perf_counter()
        with model.generate_iter([[20] * 16], max_new_tokens=16, temperature=0.0, ignore_eos=True) as batch:
            batch.step()
            first = time.perf_counter()
            while not batch.done:
                batch.step()
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        peak = peak_memory_bytes()
        from step3p5.memory_maps import memory_maps

        kinds = by_kind(memory_maps())
    print(
        json.dumps(
            {
                "import_seconds": imported - START,
                "load_seconds": loaded - imported,
                "first_token_seconds": first - START,
                "resident_bytes": resident,
                "peak_bytes": peak,
                **kinds,
            }
        )
    )


if __name__ == "__main__":
    main()
