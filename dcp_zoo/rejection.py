"""The default rejection rate; without NumPy, for commands that only show it. The threshold for it is computed
from held-out images in `probe.threshold`, looked up by `Head.rejection_threshold`, and applied in `answers`."""

REFUSED = 0.05  # the share of images of the head's classes that are called `NONE`, unless asked otherwise
