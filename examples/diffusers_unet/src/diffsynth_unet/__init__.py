"""A UNet of diffusers, as a plugin for diffsynth."""
