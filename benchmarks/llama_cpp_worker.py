"""Runs forward passes in llama.cpp as `cpu_peer.py` asks for them: a JSON object a line in, one a line out.

Started by `cpu_peer.py` with the Python of the peer's environment, which has `llama_cpp` and not this project.

    python llama_cpp_worker.py FILE.gguf THREADS TOKENS_PER_REQUEST MAX_BATCH
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Sequence

import llama_cpp as llama


class Context:
    """A model with room for `requests` of `length` tokens each, at the library's default settings otherwise."""

    def __init__(self, path: str, threads: int, length: int, requests: int) -> None:
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
        settings = llama.llama_context_default_params()
        settings.n_ctx = requests * length
        settings.n_batch = settings.n_ubatch = 512
        settings.n_seq_max = requests
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama.llama_init_from_model(self.model, settings)
        if not self.model or not self.context:
            raise SystemExit(f"{path}: llama.cpp could not load it")
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.batch = llama.llama_batch_init(requests * length, 0, 1)

    def clear(self) -> None:
        """Forgets all requests."""
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)

    def forward(self, tokens: Sequence[Sequence[int]], position: int) -> tuple[float, list[int]]:
        """Reads each request's tokens, the first at `position`.

        Returns:
            The seconds that it took, and each request's likeliest next token, whose choice is not counted.
        """
        last = []
        count = 0
        for request, new in enumerate(tokens):
            for offset, token in enumerate(new):
                self.batch.token[count] = token
                self.batch.pos[count] = position + offset
                self.batch.n_seq_id[count] = 1
                self.batch.seq_id[count][0] = request
                self.batch.logits[count] = offset == len(new) - 1
                count += 1
            last.append(count - 1)
        self.batch.n_tokens = count
        start = time.perf_counter()
        if llama.llama_decode(self.context, self.batch):
            raise SystemExit("llama_decode failed")
        llama.llama_synchronize(self.context)
        return time.perf_counter() - start, [self._argmax(index) for index in last]

    def _argmax(self, index: int) -> int:
        logits = llama.llama_get_logits_ith(self.context, index)
        values = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * self.vocabulary)).contents
        return max(range(self.vocabulary), key=values.__getitem__)


def run(context: Context, prompts: Sequence[Sequence[int]], steps: int) -> dict[str, list[float] | list[int]]:
    """Reads the prompts and decodes `steps` tokens: the seconds of each pass and the first new tokens."""
    context.clear()
    second, first = context.forward(prompts, 0)
    seconds, chosen = [second], first
    for step in range(steps):
        second, chosen = context.forward([[token] for token in chosen], len(prompts[0]) + step)
        seconds.append(second)
    return {"seconds": seconds, "first_tokens": first}


def resident_bytes() -> int:
    """Memory that the process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    path, threads, length, requests = sys.argv[1], *map(int, sys.argv[2:5])
    start = time.perf_counter()
    context = Context(path, threads, length, requests)
    print(json.dumps({"load_seconds": time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        result = run(context, request["prompts"], request["steps"])
        print(json.dumps(result | {"resident_bytes": resident_bytes()}), flush=True)


if __name__ == "__main__":
    main()
