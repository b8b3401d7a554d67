"""Training: recipes, image sources, the loop, its saved state, and complete runs; and what methods are made
of.

The public names are in `__init__.pyi` and imported on first use: commands read the table of methods without
torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
