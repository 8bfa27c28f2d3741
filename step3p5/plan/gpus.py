"""The GPUs that a plan can be made for, by their data sheets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """One GPU of a node of up to eight, dense rates without sparsity.

    `link` is what a GPU can send to all others together, in one direction; `links_a_peer` is false where a switch gives
    all of it to any peer, true where every peer has a seventh of it to itself.
    """

    name: str
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes a second from memory."""
    bf16_flops: float
    fp8_flops: float
    link: float
    """Bytes a second."""
    links_a_peer: bool
    source: str

    def link_bandwidth(self, num_devices: int) -> float:
        """Bytes a second that a GPU can send when `num_devices` of the node exchange data."""
        return self.link * (num_devices - 1) / 7 if self.links_a_peer else self.link


GPUS: Mapping[str, GPU] = {
    "h100": GPU(
        name="H100 SXM 80 GB",
        memory=80e9,
        bandwidth=3.35e12,
        bf16_flops=989e12,
        fp8_flops=1979e12,
        link=450e9,
        links_a_peer=False,
        source="NVIDIA H100 Tensor Core GPU datasheet (SXM5; tensor rates are half of those with sparsity)",
    ),
    "h200": GPU(
        name="H200 SXM 141 GB",
        memory=141e9,
        bandwidth=4.8e12,
        bf16_flops=989e12,
        fp8_flops=1979e12,
        link=450e9,
        links_a_peer=False,
        source="NVIDIA H200 Tensor Core GPU datasheet (SXM; tensor rates are half of those with sparsity)",
    ),
    "b200": GPU(
        name="B200 SXM 180 GB",
        memory=180e9,
        bandwidth=7.7e12,
        bf16_flops=2250e12,
        fp8_flops=4500e12,
        link=900e9,
        links_a_peer=False,
        source="NVIDIA HGX/DGX B200 datasheets, an eighth of the system (1.44 TB, 62 TB/s)",
    ),
    "mi300x": GPU(
        name="MI300X 192 GB",
        memory=192e9,
        bandwidth=5.3e12,
        bf16_flops=1307.4e12,
        fp8_flops=2614.9e12,
        link=448e9,
        links_a_peer=True,
        source="AMD Instinct MI300X data sheet (seven Infinity Fabric links of 64 GB/s in each direction)",
    ),
}
"""The GPUs by the name that `--gpu` takes. Measured rates are lower: an H100 copies at 3.0 TB/s."""
