"""The engine: tensors in, tensors out; no queue, no network, no files."""
