"""On-policy batches: what a policy writes, what it is worth, and what is to be learnt from it."""
