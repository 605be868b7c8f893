"""Units, the pipeline base class, and loading a model by name."""
