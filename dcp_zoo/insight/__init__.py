"""Interpretation of a head: attention, what its prompts have learnt, and zero-shot CLIP for comparison."""
