"""Finds the groups of an unknown decoder by tracing a tiny model of its class with random weights."""
