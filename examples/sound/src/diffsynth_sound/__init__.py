"""A small model that generates sound, as a plugin for diffsynth."""
