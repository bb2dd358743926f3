"""The inner steps of the search for scales and ranges, as operators `torch.ops.nibble.*`."""
