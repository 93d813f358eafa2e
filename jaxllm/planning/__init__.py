"""Accounting before paying: parameters, memory, FLOPs, and the peaks they are measured against."""
