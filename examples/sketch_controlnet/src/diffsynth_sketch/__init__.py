"""ControlNet for sketches, a feature that diffsynth's Z-Image pipelines get."""
