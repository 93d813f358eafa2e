"""jaxllm: train language models in JAX, from raw text to an aligned, reasoning assistant."""

__version__ = "0.1.0"
