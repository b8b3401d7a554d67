"""Deployment: exported files, and a classifier that needs neither torch nor CLIP."""
