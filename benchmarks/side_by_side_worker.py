"""Decodes one request on a CPU for as long as it is told, again and again; started by `side_by_side.py`.

    python benchmarks/side_by_side_worker.py MODEL ENCODING

Prints `{}` when the model is loaded. Every line read is a number of seconds; the answer to it is a line of JSON with
the steps decoded in that time and the seconds they took.
"""

from __future__ import annotations

import json
import logging
import sys
import time

CONTEXT = 64
MAX_LENGTH = 1024


def main() -> None:
    from max.pipelines.lib.auto_model import AutoModel

    logging.getLogger("max.pipelines").setLevel(logging.WARNING)
    with AutoModel(
        sys.argv[1],
        devices="cpu",
        custom_architectures=["pipelines_registry"],
        quantization_encoding=sys.argv[2],
        max_batch_size=1,
        max_length=MAX_LENGTH,
    ) as model:
        print(json.dumps({}), flush=True)
        for line in sys.stdin:
            steps, start = 0, time.perf_counter()
            while time.perf_counter() - start < float(line):
                options = dict(max_new_tokens=CONTEXT, temperature=0.0, ignore_eos=True)
                with model.generate_iter([[20] * CONTEXT], **options) as batch:
                    batch.step()  # the prompt's, which counts as a step of the time that it takes
                    steps += 1
                    while not batch.done and time.perf_counter() - start < float(line):
                        batch.step()
                        steps += 1
            print(json.dumps({"steps": steps, "seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
