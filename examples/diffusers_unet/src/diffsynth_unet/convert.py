"""Keys of the files that diffusers writes. Imports no torch."""

from diffsynth.core.loader.convert import Rename

RULES = (Rename("{*}", "unet.{*}"),)
