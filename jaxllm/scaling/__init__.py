"""Scaling laws: how loss falls with parameters, tokens and FLOPs."""
