"""Class-conditional DDPM on pixels, as a plugin for diffsynth."""
