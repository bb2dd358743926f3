"""The workers: a supervisor that takes jobs from the queue, and the engine that its child runs."""
