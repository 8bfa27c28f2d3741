"""How work is cut into tasks for the worker threads."""

from max.runtime.asyncrt import parallelism_level

comptime TASKS_PER_WORKER = 2
"""More tasks than workers even out what other programs take from one of them."""

comptime TASK_BYTES = 64 * 1024
"""Fewer bytes of weights than this, or as much work of another kind, are not worth a task."""

comptime TOKENS_PER_READ = 8
"""Multiplying so many tokens takes about as long as reading the weights."""


def task_count(pieces: Int, bytes: Int, tokens: Int) -> Int:
    """Number of tasks for work of `pieces` indivisible pieces: `bytes` of weights with `tokens` each.
    """
    var tasks = parallelism_level(None) * TASKS_PER_WORKER
    var work = bytes * (1 + tokens // TOKENS_PER_READ)
    return max(min(tasks, pieces, work // TASK_BYTES), 1)


@always_inline
def share(total: Int, task: Int, tasks: Int) -> Tuple[Int, Int]:
    """First and last + 1 of the items of one task, `total` items in all."""
    return total * task // tasks, total * (task + 1) // tasks
