"""Prefill and decode times of llama.cpp on one GGUF file, for comparison with `forward.py` on the same machine.

`python benchmarks/llama_cpp_peer.py FILE.gguf [--prefill 64,512] [--context 64] [--steps 8] [--rounds 5]`, in an
environment with `llama-cpp-python` built for the machine (`CMAKE_ARGS=-DGGML_NATIVE=ON`).
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time

from llama_cpp import Llama

FIRST_TOKEN, LAST_TOKEN = 16, 8000


def prompt(length: int) -> list[int]:
    """Random token ids."""
    return [random.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(length)]


def timed(model: Llama, tokens: list[int]) -> float:
    """Seconds that `model` takes to read `tokens` after what it has read."""
    start = time.perf_counter()
    model.eval(tokens)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", metavar="FILE.gguf")
    parser.add_argument("--prefill", default="64,512", help="prompt lengths")
    parser.add_argument("--context", type=int, default=64, help="tokens before the first decode step")
    parser.add_argument("--steps", type=int, default=8, help="decode steps a round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    threads = len(os.sched_getaffinity(0))
    model = Llama(
        options.gguf, n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, n_gpu_layers=0, verbose=False
    )
    times: dict[str, list[float]] = {}
    for round_ in range(options.rounds + 1):  # the first warms up
        for length in map(int, options.prefill.split(",")):
            model.reset()
            seconds = timed(model, prompt(length))
            if round_:
                times.setdefault(f"prefill {length}", []).append(seconds)
        model.reset()
        model.eval(prompt(options.context))
        for token in prompt(options.steps):
            seconds = timed(model, [token])
            if round_:
                times.setdefault("decode 1", []).append(seconds)
    for name, values in times.items():
        tokens = int(name.split()[1])
        median = statistics.median(values)
        print(f"{name:12} {1e3 * median:9.2f} ms median, best {1e3 * min(values):9.2f}, {tokens / median:8.1f} tok/s")


if __name__ == "__main__":
    main()
