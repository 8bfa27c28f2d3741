"""A team of threads that goes through the phases of an op together.

One launch on the worker threads costs about as much as ten phases, so an op that does much launches once. Within a
phase, every thread has a run of neighbouring pieces, whose weights it reads as one stream, and takes from the others'
runs when its own is done. A thread waits only for pieces that others have begun: the team gets through with any number
of threads, in any order of their start, and a thread that the system takes away holds up no more than its piece.
"""

from max.algorithm import sync_parallelize
from std.atomic import Atomic, Ordering
from std.ffi import external_call
from std.memory.alloc import unsafe_alloc
from std.sys import CompilationTarget
from std.sys.intrinsics import llvm_intrinsic

from .tasks import share, worker_count

comptime Counters = Pointer[Int64, MutUntrackedOrigin]

comptime COUNTER_STRIDE = 16
"""Distance of counters: two cache lines, which processors fetch in pairs."""

comptime MAX_PHASES = 16

comptime SPINS_BEFORE_YIELD = 1000
"""Waiting this many pauses, some ten microseconds, is cheaper than a call into the system; beyond, another thread may
need the core."""


@always_inline
def pause():
    """Tells the processor that the thread waits."""
    comptime if CompilationTarget.is_x86():
        llvm_intrinsic["llvm.x86.sse2.pause", NoneType, has_side_effect=True]()


@fieldwise_init
struct Team(Copyable):
    """One thread's view of its team."""

    var counters: Counters
    var member: Int
    var size: Int
    var phase: Int

    @always_inline
    def each[Body: def(Int) -> None](mut self, pieces: Int, body: Body):
        """Runs `body(0) … body(pieces - 1)`, each on one thread of the team, and returns when all are done.

        Every thread of the team calls it with the same number.
        """
        var done = self.counters.unsafe_offset(
            self.phase * phase_size(self.size)
        )
        self.phase += 1
        var own = Int64(0)
        for i in range(self.size):
            var member = (self.member + i) % self.size
            var first, end = share(pieces, member, self.size)
            var taken = done.unsafe_offset((1 + member) * COUNTER_STRIDE)
            # Reading first leaves a counter that is used up in the caches of all.
            while (
                first
                + Int(Atomic[Int64].load[ordering=Ordering.RELAXED](taken))
                < end
            ):
                var piece = first + Int(
                    Atomic[Int64].fetch_add[ordering=Ordering.RELAXED](taken, 1)
                )
                if piece >= end:
                    break
                body(piece)
                own += 1
        if own > 0:
            _ = Atomic[Int64].fetch_add[ordering=Ordering.RELEASE](done, own)
        var spins = 0
        while Int(Atomic[Int64].load[ordering=Ordering.ACQUIRE](done)) < pieces:
            spins += 1
            if spins < SPINS_BEFORE_YIELD:
                pause()
            else:
                _ = external_call["sched_yield", Int32]()


@always_inline
def phase_size(team_size: Int) -> Int:
    """Counters of a phase: of the pieces done, and of those that were taken out of every thread's run.
    """
    return (1 + team_size) * COUNTER_STRIDE


def on_team[Work: def(mut Team) -> None](work: Work):
    """Runs `work` on the worker threads; it has at most `MAX_PHASES` phases."""
    var size = worker_count()
    var count = MAX_PHASES * phase_size(size)
    var counters = unsafe_alloc[Int64](count, alignment=128)
    for i in range(count):
        counters[unsafe_offset=i] = 0

    def run(member: Int) {imm}:
        var team = Team(counters, member, size, 0)
        work(team)

    sync_parallelize(run, size)
    counters.unsafe_free()
