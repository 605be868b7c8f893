"""FLUX.1 and FLUX.2 for diffsynth. Installed and listed by `diffsynth plugins`, but empty so far."""
