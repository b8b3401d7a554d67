"""The default rejection rate; without NumPy, for commands that only show it."""

REFUSED = 0.05  # the share of images of the head's classes that are called `NONE`, unless asked otherwise
