"""Training: recipes, image sources, the loop, its saved state, and a run from its name to a measured checkpoint."""
