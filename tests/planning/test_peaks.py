"""Device names as JAX reports them, against their published peaks."""

import pytest

from jaxllm.planning.peaks import peak_flops


@pytest.mark.parametrize(
    ("device_kind", "teraflops"),
    [
        ("TPU v2", 23),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_known_devices(device_kind, teraflops):
    assert peak_flops(device_kind) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize("device_kind", ["cpu", "", "NVIDIA L400", "TPU v55", "Tesla T4"])
def test_unknown_devices_have_no_peak(device_kind):
    assert peak_flops(device_kind) is None
