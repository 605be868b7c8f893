"""Training data: manifest rows, decoded images, random captions, cached results of frozen units."""
