"""Heads on the Hub: uploaded with a model card, whose claims anyone can measure again."""
