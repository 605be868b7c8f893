"""Tensors from files: in blocks on several threads, or mapped. `source` is what others use."""
