"""Peak FLOP/s of devices, against which MFU is stated: dense bfloat16, float32 accumulation.

The key is the beginning of `jax.Device.device_kind`; the longest that fits decides. Figures are
per JAX device: on TPU v2, v3 and 7x a device is one of a chip's two TensorCores, so half a chip;
from v4 to v6e it is the chip. Figures of NVIDIA are those of the data sheets without sparsity,
at the stated boost clock and full power; a device that is capped lower never reaches them.
"""

TERA = 1e12

_PEAK_TERAFLOPS = {
    # https://docs.cloud.google.com/tpu/docs, one page a generation: "Peak compute per chip".
    "TPU v2": 46 / 2,
    "TPU v3": 123 / 2,
    "TPU v4": 275,
    "TPU v4 lite": 137,  # v4i, for inference: Jouppi et al. 2021, "Ten Lessons", table 1
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5": 459,  # what a v5p calls itself
    "TPU v5p": 459,
    "TPU v6 lite": 918,
    "TPU v6e": 918,
    "TPU7": 2307 / 2,
    # NVIDIA data sheets, BFLOAT16 Tensor Core; those given with sparsity are halved.
    "NVIDIA A10": 125,
    "NVIDIA A10G": 70,
    "NVIDIA A30": 165,
    "NVIDIA A40": 149.7,
    "NVIDIA A100": 312,  # SXM and PCIe, 40 and 80 GB
    "NVIDIA A800": 312,
    "NVIDIA L4": 121,
    "NVIDIA L40": 181,
    "NVIDIA L40S": 362,
    "NVIDIA H100": 989,  # SXM ("NVIDIA H100 80GB HBM3")
    "NVIDIA H100 NVL": 835,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H800": 989,
    "NVIDIA H20": 148,
    "NVIDIA H200": 989,
    "NVIDIA H200 NVL": 835,
    "NVIDIA GH200": 989,
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500,
    # NVIDIA architecture white papers (Ampere GA102, Ada, Blackwell), FP32 accumulate.
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA RTX 6000 Ada": 364.2,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 4080": 97.5,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5090": 209.5,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 peak of one device in FLOP/s; None for a CPU or a device not listed.

    Args:
        device_kind: `jax.Device.device_kind`, such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3".
    """
    # A name must end where the listed one ends, or go on with a separator: an "NVIDIA L40S" is
    # no L4, an "NVIDIA A100-SXM4-80GB" is an A100. TPU7 has its variants ("TPU7x") glued on.
    fitting = [
        name
        for name in _PEAK_TERAFLOPS
        if device_kind == name
        or device_kind.startswith((f"{name} ", f"{name}-"))
        or (name == "TPU7" and device_kind == "TPU7x")
    ]
    return _PEAK_TERAFLOPS[max(fitting, key=len)] * TERA if fitting else None
