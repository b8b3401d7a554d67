"""Heads on their way to the Hub: trained in a sweep, checked, published; and checked again by anyone."""
