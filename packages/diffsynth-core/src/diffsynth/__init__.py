"""The engine: contracts, discovery, loading, sampling and pipelines for diffusion models."""
