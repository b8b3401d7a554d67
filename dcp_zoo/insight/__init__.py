"""Looking into a head: attention, what its prompts have learnt, and zero-shot CLIP next to it."""
