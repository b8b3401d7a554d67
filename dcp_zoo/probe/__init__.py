"""The text probe of a head: a linear classifier on its image features that starts at the method's own logits, usually
the text logits, and moves away from them only as far as the training images justify. This project's own.

Image features are normalised parts f_1, .., f_P, the first CLIP's embedding; others know no text: what CLIP's image
tower has before it, and other encoders'. With the method's logits z (B, C) it is the mean of several candidates. Each
starts at so much of the text, s in `TEXTS`, and reads f, which is parts joined, see `Head`: all but those from inside
an image tower, or each of these alone but the embedding, or one from inside with that before it. For each of
`PENALTIES` there is softmax regression from the text:

    logits = s a z + f D^T                                               (B, C)

a        scale of the method's logits, see `fit`
D (C, F) minimises sum_i w_i cross-entropy_i + penalty / 2 |D|^2 over the training images and their mirror images, among
         the classes that have images: one convex problem; w_i gives each of them the same weight

And for each of `STRENGTHS` t, Gaussian classes with means m (C, F), about the mean of m:

    logits = s a z + t r (f (m_c - m)^T - (m_c - m) (m_c + m)^T / 2)     (B, C)

with r such that for t = 1 both parts are equally spread over the training images. None is chosen: each is weighted by
its evidence on images that were left out. A class without images is its text alone: the images of the others would only
push it away.

A head whose method changed the image features reads both its own embedding and the frozen tower's: the probe is the
mean of two, each on one of these and all other parts, and z the mean of both logits. Distances are measured in what no
method changed.
"""

from dcp_zoo.probe.fit import ReadingFeatures, fit_on_features
from dcp_zoo.probe.model import TextProbe

__all__ = ["ReadingFeatures", "TextProbe", "fit_on_features"]
