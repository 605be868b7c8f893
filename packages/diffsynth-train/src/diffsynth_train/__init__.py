"""Training for diffsynth: recipes, manifests, objectives, the loop and its checkpoints."""
