"""Backends of optional libraries. A library is imported at the first call that it serves."""
