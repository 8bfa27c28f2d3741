"""Root-mean-square norm of rows on a CPU."""

from std.math import rsqrt

from .dot_tile import LANES, Lanes, load_row, load_tail
from .operands import Floats
from .tasks import piece_count, share
from .team import Team


@fieldwise_init
struct Norm(ImplicitlyCopyable):
    """`x * rsqrt(mean(x^2) + eps) * (offset + weight)`; `offset` is 1 where weights are zero-centred, else 0.
    """

    var weight: Floats
    var width: Int
    var eps: Float32
    var offset: Float32

    @always_inline
    def apply(self, to: Floats, x: Floats):
        """Norms one row, in place where `to` is `x`."""
        var vectors = self.width // LANES
        var left = self.width - vectors * LANES
        var squares = Lanes(0)
        for c in range(vectors):
            var values = load_row(x.unsafe_offset(c * LANES))
            squares += values * values
        var tail = Lanes(0)
        if left > 0:
            tail = load_tail(x.unsafe_offset(vectors * LANES), left)
            squares += tail * tail
        var scale = rsqrt(squares.reduce_add() / Float32(self.width) + self.eps)
        for c in range(vectors):
            var at = c * LANES
            var weight = load_row(self.weight.unsafe_offset(at)) + self.offset
            to.unsafe_offset(at).unsafe_store(
                load_row(x.unsafe_offset(at)) * scale * weight
            )
        for i in range(left):
            var at = vectors * LANES + i
            to[unsafe_offset=at] = (
                tail[i] * scale * (self.weight[unsafe_offset=at] + self.offset)
            )


@always_inline
def norm_phase(mut team: Team, norm: Norm, to: Floats, x: Floats, tokens: Int):
    """Norms `tokens` rows that lie behind one another."""
    var pieces = piece_count(tokens, 4 * norm.width * tokens, 0)

    def piece(index: Int) {imm}:
        var first, last = share(tokens, index, pieces)
        for t in range(first, last):
            var at = t * norm.width
            norm.apply(to.unsafe_offset(at), x.unsafe_offset(at))

    team.each(pieces, piece)
