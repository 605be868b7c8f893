"""Door: SES, a search for the noise that suits a prompt."""

from __future__ import annotations

from diffsynth.compat.doors import door, later

__getattr__ = door(__name__, absent={"ses_search": later("searches of the initial noise")})
