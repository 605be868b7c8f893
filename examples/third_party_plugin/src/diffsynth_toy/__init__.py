"""Toy for diffsynth: a small network that draws coloured discs."""
