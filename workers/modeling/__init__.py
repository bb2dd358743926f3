"""Checkpoints, and models that are loaded one decoder layer at a time."""
