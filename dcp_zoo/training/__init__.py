"""Training: recipes, image sources, the loop, its saved state, and complete runs."""
