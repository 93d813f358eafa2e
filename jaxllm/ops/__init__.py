"""Functions of arrays: attention, rotary positions, vocabulary log-probabilities, sampling."""
