"""What a GPU and its links can do, and what share of it real costs get: the stated numbers of predicted times.

Peaks are the vendor's, per GPU and direction, dense bf16. The shares are assumptions about training costs at
long sequences that no measurement of this project backs yet, so read predicted times as orders of magnitude and
comparisons between layouts as the product. Every field can be replaced: `plan --rate gemm_share=0.6`.

    source of peaks    NVIDIA H100, H200 and A100 GPU datasheets (SXM); NDR and HDR InfiniBand, one port a GPU
    gemm_share         cuBLAS bf16 at training shapes; one 8192^3 product alone reached 0.81 of an H100's peak
    fp8_gain           of a peak twice as high; casts of inputs, weights and gradients take the rest
    attention shares   cuDNN and FlashAttention, causal, head size 128, long documents: forward, backward
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_v2pe.core.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One GPU of a cluster. Bandwidths in GB/s (10^9), one direction.

    Attributes:
        name: what it is called.
        memory_gib: device memory that `nvidia-smi` shows.
        reserved_gib: kept out of the sum: CUDA context, NCCL buffers, cuBLAS and cuDNN workspaces.
        fragmentation_share: share of the activations that the caching allocator loses between blocks.
        peak_tflops: dense bf16.
        memory_gb_s: device memory.
        gpus_per_node: GPUs that NVLink connects.
        nvlink_gb_s: to the GPUs of the node.
        network_gb_s: to other nodes, per GPU.
        host_gb_s: to host memory (PCIe).
        gemm_share: of the peak, in linear layers.
        fp8_gain: linears in FP8 over linears in bfloat16, their casts included; 0 without FP8.
        attention_forward_share: of the peak, in the attention core, forward.
        attention_backward_share: the same, backward.
        tower_attention_share: of the peak, in the vision tower's attention (1025 tokens, head size 64 or 128).
        memory_share: of the memory bandwidth, in element-wise costs.
        link_share: of a link's bandwidth, in collectives and ring hops.
        launch_us: time of a collective or kernel hop that does not depend on its size, microseconds.
    """

    name: str
    memory_gib: float
    reserved_gib: float = 3.0
    fragmentation_share: float = 0.05
    peak_tflops: float
    memory_gb_s: float
    gpus_per_node: int = 8
    nvlink_gb_s: float
    network_gb_s: float
    host_gb_s: float
    gemm_share: float = 0.65
    fp8_gain: float = 1.5
    attention_forward_share: float = 0.55
    attention_backward_share: float = 0.45
    tower_attention_share: float = 0.30
    memory_share: float = 0.80
    link_share: float = 0.80
    launch_us: float = 20.0


H100 = Hardware(
    name="H100 SXM 80 GB",
    memory_gib=79.6,
    peak_tflops=989.4,
    memory_gb_s=3350.0,
    nvlink_gb_s=450.0,
    network_gb_s=50.0,
    host_gb_s=50.0,
)
H200 = dataclasses.replace(H100, name="H200 SXM 141 GB", memory_gib=140.4, memory_gb_s=4800.0)
A100 = dataclasses.replace(
    H100,
    name="A100 SXM 80 GB",
    memory_gib=79.3,
    peak_tflops=312.0,
    memory_gb_s=2039.0,
    nvlink_gb_s=300.0,
    network_gb_s=25.0,
    host_gb_s=25.0,
    gemm_share=0.75,
    fp8_gain=0.0,
    attention_forward_share=0.62,
    attention_backward_share=0.52,
    tower_attention_share=0.45,
)
GPUS = {"h100": H100, "h200": H200, "a100": A100}


def known_peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of a device by the name that its driver gives, None for one that is not in `GPUS`.

    Names of PCIe and NVL boards hold the same letters, but their clocks and peaks are lower.
    """
    name = device_name.lower()
    if "pcie" in name or "nvl" in name:
        return None
    return next((gpu.peak_tflops for key, gpu in GPUS.items() if key in name), None)


def with_rates(hardware: Hardware, rates: Sequence[str]) -> Hardware:
    """Replace fields by `name=value` texts.

    Raises:
        ConfigError: no such field, or a value that is not a positive number.
    """
    known = {field.name for field in dataclasses.fields(Hardware)} - {"name"}
    values: dict[str, float] = {}
    for text in rates:
        name, _, value = text.partition("=")
        if name not in known:
            raise ConfigError(f"--rate {text}: no rate is called {name!r}; known: {', '.join(sorted(known))}")
        values[name] = _positive(text, value)
    if "gpus_per_node" in values:
        values["gpus_per_node"] = int(values["gpus_per_node"])
    return dataclasses.replace(hardware, **values)  # type: ignore[arg-type]


def _positive(text: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise ConfigError(f"--rate {text}: {value!r} must be a positive number, as in gemm_share=0.6")
    return number


def group_gb_s(hardware: Hardware, *, size: int, stride: int) -> float:
    """Bandwidth that a rank of a group gets, GB/s: the group has `size` ranks, `stride` apart.

    A group inside a node has NVLink. One that leaves it is bound by the network, of which a ring over the group can
    use one port for each of its ranks on a node, up to NVLink.
    """
    if size * stride <= hardware.gpus_per_node:
        return hardware.nvlink_gb_s * hardware.link_share
    per_node = max(1, hardware.gpus_per_node // stride)
    return min(hardware.nvlink_gb_s, hardware.network_gb_s * per_node) * hardware.link_share


def hop_gb_s(hardware: Hardware, *, size: int, stride: int) -> float:
    """Bandwidth of the slowest hop of a ring of single sends, GB/s: one network port where it leaves a node."""
    is_inside = size * stride <= hardware.gpus_per_node
    return (hardware.nvlink_gb_s if is_inside else hardware.network_gb_s) * hardware.link_share
