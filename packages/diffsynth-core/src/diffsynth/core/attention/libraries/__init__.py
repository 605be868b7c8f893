"""Attention of libraries that are not among our requirements. None is imported before the first call that it serves."""
