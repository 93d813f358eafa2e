"""Objectives: pure functions from parameters and a batch to sums and their weights."""
