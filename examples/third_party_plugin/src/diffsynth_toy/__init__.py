"""Toy for diffsynth: a small network that generates coloured discs."""
