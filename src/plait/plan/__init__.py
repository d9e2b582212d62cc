"""Which plans are legal on a model and a cluster, which one is best, and why."""
