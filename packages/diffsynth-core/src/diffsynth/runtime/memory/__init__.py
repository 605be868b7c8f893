"""How a pipeline's components share a device: policies, stages, plans."""
