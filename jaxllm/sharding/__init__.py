"""Meshes, and rules by path that lay arrays out over them."""
