"""Text from a model: the key-value cache and the sampler."""
