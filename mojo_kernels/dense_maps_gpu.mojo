"""The tensor maps by which a dense kernel's blocks copy weights."""

from layout import Coord, TileTensor
from layout.tma_async import SharedMemBarrier, TMATensorTile
from max.gpu.memory import CacheEviction
from std.builtin.device_passable import DevicePassable, DeviceTypeEncoder

comptime BF16 = DType.bfloat16


@fieldwise_init
struct NoMap(DevicePassable, TrivialRegisterPassable):
    """What a kernel is given instead of a map that it does not need."""

    comptime device_type: AnyType = Self

    def _to_device_type(
        self, mut encoder: Some[DeviceTypeEncoder], target: MutOpaquePointer[_]
    ):
        encoder.encode(self, target)

    @staticmethod
    def get_type_name() -> String:
        return "NoMap"


struct WeightMaps[TENSORS: Int, shape: Coord, desc: Coord](
    TrivialRegisterPassable
):
    """The maps of one to three weight tensors `[M, K]`, where they lie among the kernel's parameters: copies of them are
    of no use.
    """

    comptime Map = TMATensorTile[BF16, Self.shape, Self.desc]

    var first: Pointer[Self.Map, ImmUntrackedOrigin]
    var second: Pointer[Self.Map, ImmUntrackedOrigin]
    var third: Pointer[Self.Map, ImmUntrackedOrigin]

    @always_inline
    def __init__[
        Second: AnyType, Third: AnyType
    ](out self, first: Self.Map, second: Second, third: Third):
        """The kernel's parameters, of which the first `TENSORS` are maps."""
        self.first = Pointer(to=first).unsafe_origin_cast[ImmUntrackedOrigin]()
        self.second = (
            Pointer(to=second)
            .unsafe_bitcast[Self.Map]()
            .unsafe_origin_cast[ImmUntrackedOrigin]()
        )
        self.third = (
            Pointer(to=third)
            .unsafe_bitcast[Self.Map]()
            .unsafe_origin_cast[ImmUntrackedOrigin]()
        )

    @always_inline
    def copy[
        EVICTION: CacheEviction
    ](
        self,
        tensor: Int,
        to: TileTensor[mut=True, BF16, address_space=AddressSpace.SHARED, ...],
        ref[AddressSpace.SHARED] full: SharedMemBarrier,
        at: Tuple[Int, Int],
    ):
        """The calling thread starts a copy of weights.

        Args:
            tensor: Index of the tensor.
            to: Where the weights go.
            full: The barrier that is told of their bytes.
            at: First column and first row; what lies behind the last of them becomes zero.
        """
        if Self.TENSORS == 1 or tensor == 0:
            self.first[].async_copy[eviction_policy=EVICTION](to, full, at)
        elif Self.TENSORS == 2 or tensor == 1:
            self.second[].async_copy[eviction_policy=EVICTION](to, full, at)
        else:
            self.third[].async_copy[eviction_policy=EVICTION](to, full, at)
