"""Run directories and Orbax checkpoints."""
