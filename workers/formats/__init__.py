"""File formats as app/core/formats describes them: weights to tensors, and back."""
