"""Heads on the Hub: uploaded with a model card."""
