"""From images to features, the only place: photographs are decoded once, shown in named views, run
through frozen towers in one loop, and their features are kept from fit to fit.

    photos = Photos(items)                                   decoded when needed, and only once
    extract = FeatureExtractor(clip)                         the loop over a frozen tower
    table = extract(photos, views=(PLAIN, MIRRORED))         a `FeatureTable`
    table.rows(PLAIN, MIRRORED)                              (2, n, F); an error for a view that was not
    computed

Methods on features are fitted to a `FeatureTable` and see no image; methods that train prompts take
shuffled batches of an `ImageLoader`. Only `photos` and `views` are needed without torch.
"""

import lazy_loader

# that read images and compute features
LIBRARIES = ("torch", "torchvision", "timm", "open_clip_torch", "Pillow")
PRECISIONS = ("float32", "bfloat16", "float16")
AUTO = "auto"  # for a precision or a device: what suits the machine
MANY = 2000  # images: of more training images, mirror images are left out, and decoding takes processes

# last, as with EAGER_IMPORT it imports modules that read the names above
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
