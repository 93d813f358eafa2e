"""What all tests share: eight simulated devices, and runtime checking of shapes and types."""

import os

# Before JAX is imported. Simulated devices share few cores: without NPROC their rendezvous can
# time out and abort the process.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES = "--xla_force_host_platform_device_count=8"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

from jaxtyping import install_import_hook  # noqa: E402

# Every annotation of jaxllm is checked at run time, array shapes and dtypes included.
install_import_hook("jaxllm", "beartype.beartype")
