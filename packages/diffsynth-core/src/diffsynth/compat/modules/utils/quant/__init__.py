"""Doors: quantized files."""
