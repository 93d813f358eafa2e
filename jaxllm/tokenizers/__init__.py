"""Tokenizers: train, load, save, encode, decode."""
