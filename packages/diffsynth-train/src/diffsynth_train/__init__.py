"""Training for diffsynth: recipes, objectives, adapters."""
