"""Samples: the manifest's rows, decoded images, varied captions, cached results of frozen units."""
