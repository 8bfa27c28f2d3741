"""How work is cut into pieces for the threads of a team."""

from max.runtime.asyncrt import parallelism_level
from std.os import getenv

comptime THREADS_VARIABLE = "STEP3P5_CPU_THREADS"
"""Environment variable with the most threads to use: MAX's workers are as many as cores, whatever quota the process has.
"""

comptime PIECES_PER_WORKER = 16
"""More pieces than workers even out what other programs take from one of them."""

comptime PIECE_BYTES = 64 * 1024
"""Fewer bytes of weights than this, or as much work of another kind, are not worth a piece."""

comptime TOKENS_PER_READ = 8
"""Multiplying so many tokens takes about as long as reading the weights."""


def worker_count() -> Int:
    """Number of worker threads that ops use."""
    var workers = parallelism_level(None)
    var wanted = getenv(THREADS_VARIABLE)
    if wanted:
        try:
            return max(min(Int(wanted), workers), 1)
        except:
            pass
    return workers


def piece_count(most: Int, bytes: Int, tokens: Int) -> Int:
    """Number of pieces, `most` at the utmost, for multiplying `bytes` of weights with `tokens` each.
    """
    var pieces = worker_count() * PIECES_PER_WORKER
    var work = bytes * (1 + tokens // TOKENS_PER_READ)
    return max(min(pieces, most, work // PIECE_BYTES), 1)


@always_inline
def share(total: Int, piece: Int, pieces: Int) -> Tuple[Int, Int]:
    """First and last + 1 of the items of one piece, `total` items in all."""
    return total * piece // pieces, total * (piece + 1) // pieces
