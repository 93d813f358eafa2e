"""Data: sources, the held-out split, the token store, rows and batches."""
