"""The inference server: an artifact, an engine that batches requests, and OpenAI's routes."""
