"""DCP itself: the model, what it is built of, its slow reference, its folded form, and the file that holds a head."""
