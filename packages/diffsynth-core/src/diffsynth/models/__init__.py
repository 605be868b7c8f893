"""Networks that two or more families use, registered by the built-in plugin `core`."""

from diffsynth.compat.doors import with_doors

__path__ = with_doors(__path__, "models")
