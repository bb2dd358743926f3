"""Operators on packed weights: a leaf that imports nothing of ours."""
