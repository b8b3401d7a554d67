"""The text probe of a head: a linear classifier on its image features that starts at the method's own
logits, usually the text logits, and moves away from them only as far as the training images justify. This
project's own.

Image features f are normalised groups, the first CLIP's embedding; others know no text: what CLIP's image
tower has before it, intermediate features of the tower, and features of other encoders. With the method's
logits z (B, C),

    logits = t z + f R^T + b          t, R (C, F), b (C,): weighted means over many candidates; to b is added
                                      what classes of fewer images lack

- `candidates`: softmax regressions and Gaussian classes that read some of the groups and start at a share of
  the text.
- `folds`, `stacking`: none is chosen. Each is weighted by its losses on held-out images of the training set.
- `fit`: all steps in order. `threshold`: which images are of none of the classes, by scores of held-out
  images.
- `model`: what a head carries, and its gate: what is far from all training images is left to the text.

A class without images is its text alone: the images of the others would only push it away. A head whose
method changed the image features reads both its own embedding and the frozen tower's: the probe is the mean
of two, each on one of these and all other groups, and z the mean of both logits. Distances are measured in
what no method changed.
"""

from dcp_zoo.probe.fit import ReadingFeatures, fit_on_features
from dcp_zoo.probe.model import TextProbe

__all__ = ["ReadingFeatures", "TextProbe", "fit_on_features"]
