"""Interpretation of a head: attention, and what its prompts have learnt."""
