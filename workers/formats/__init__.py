"""File formats: canonical quantized weights to the tensors that loaders read, and back."""
