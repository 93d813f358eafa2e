"""The one training loop, its state, optimizers, schedules and metrics."""
