"""Loads a checkpoint on a CPU in a new process, generates one token and prints what that took, as JSON.

    python benchmarks/first_token.py MODEL ENCODING

Started by `cpu_peer.py`; seconds count from the start of the process's own code. Resident bytes are those with the
model still loaded, and the most at any time; weights that are mapped from files count once they were read.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time

from report import peak_memory_bytes

START = time.perf_counter()


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
    print(
        json.dumps(
            {
                "import_seconds": imported - START,
                "load_seconds": loaded - imported,
                "first_token_seconds": first - START,
                "resident_bytes": resident,
                "peak_bytes": peak,
            }
        )
    )


if __name__ == "__main__":
    main()
