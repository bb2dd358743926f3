"""Each file format described once: what it holds, its tensors, its entry of config.json. No torch here."""
