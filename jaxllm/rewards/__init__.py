"""Reward functions and verifiers: what a response is worth, by rules and programs."""
