"""Networks that two or more families share, registered as the built-in plugin `core`."""
