"""Networks that two or more families use, registered by the built-in plugin `core`."""
