"""GPUs to compile for: what XLA asks of a device, and what a roofline needs."""

from dataclasses import dataclass

GIB = 1024**3
# What a good kernel reaches of a data sheet's figure. Matrix products: 798 of 989
# TFLOP/s measured on an H100 at this model's shapes; device memory: 85 to 93 % of the
# data sheet in large streaming kernels; attention at head_dim 64: 25 to 40 % of peak.
MATMUL_SHARE, MEMORY_SHARE, ATTENTION_SHARE = 0.807, 0.88, 0.33
# Left free on the card for the CUDA context, cuDNN's and NCCL's own buffers.
RESERVED_BYTES = 1.5e9


@dataclass(frozen=True)
class Target:
    """A GPU's hardware facts, from its vendor's data sheet and CUDA's tables."""

    device: str
    capability: tuple[int, int]
    cores: int
    """Streaming multiprocessors."""
    clock_ghz: float
    memory_bytes: int
    bandwidth: float
    """Bytes a second of device memory."""
    l2_bytes: int
    peak_flops: float
    """Dense bfloat16 products with float32 accumulation, a second."""
    link: float
    """Bytes a second in one direction between two GPUs of a node."""
    source: str

    @property
    def description(self) -> str:
        """The device as XLA's GpuTargetConfigProto, in text form."""
        major, minor = self.capability
        # Per capability: threads and shared memory of a multiprocessor, the most
        # shared memory a block may opt into, float32 units. CUDA C++ Programming
        # Guide, "Compute capabilities".
        threads, shared, optin, units = {
            (8, 0): (2048, 167936, 166912, 64),
            (8, 6): (1536, 102400, 101376, 128),
            (8, 9): (1536, 102400, 101376, 128),
            (9, 0): (2048, 233472, 232448, 128),
        }[self.capability]
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  threads_per_core_limit: {threads} shared_memory_per_block: 49152
  shared_memory_per_block_optin: {optin} shared_memory_per_core: {shared}
  core_count: {self.cores} fpus_per_core: {units}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(self.bandwidth)} l2_cache_size: {self.l2_bytes}
  clock_rate_ghz: {self.clock_ghz} device_memory_size: {self.memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 28 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{self.device}"
"""


# device_memory_size is what CUDA reports, a little less than the name says.
TARGETS = {
    "h100": Target(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 84929347584, 3.352e12,
        50 * 1024**2, 989.4e12, 450e9, "NVIDIA H100 data sheet, SXM5",
    ),
    "h200": Target(
        "NVIDIA H200", (9, 0), 132, 1.98, 150_000_000_000, 4.8e12,
        50 * 1024**2, 989.4e12, 450e9, "NVIDIA H200 data sheet, SXM5",
    ),
    "a100-80": Target(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 85_000_000_000, 2.039e12,
        40 * 1024**2, 311.9e12, 300e9, "NVIDIA A100 data sheet, SXM4 80 GB",
    ),
    "a10": Target(
        "NVIDIA A10", (8, 6), 72, 1.695, 24_000_000_000, 0.6e12,
        6 * 1024**2, 125e12, 32e9, "NVIDIA A10 data sheet",
    ),
    "l4": Target(
        "NVIDIA L4", (8, 9), 58, 2.04, 23_600_000_000, 0.3e12,
        48 * 1024**2, 121e12, 32e9, "NVIDIA L4 data sheet, without sparsity",
    ),
    "rtx4090": Target(
        "NVIDIA GeForce RTX 4090", (8, 9), 128, 2.52, 25_250_000_000, 1.008e12,
        72 * 1024**2, 165.2e12, 32e9, "NVIDIA Ada architecture paper, appendix A",
    ),
}  # fmt: skip
