"""FLUX.1 and FLUX.2 for diffsynth: no models yet; the package is listed by `diffsynth plugins`."""
