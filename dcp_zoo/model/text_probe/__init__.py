"""The text probe of a head: a linear classifier on its image features that starts at the method's own logits, usually
the text logits, and moves away from them only as far as the training images justify. This project's own.

With normalised image features f (B, E) and the method's logits z (B, C), it is the mean of several candidates. For each
of `PENALTIES`, softmax regression from the text:

    logits = a z + f M D^T                                               (B, C)

a        scale of the method's logits, see `fit`
D (C, E) minimises sum_i w_i cross-entropy_i + penalty / 2 |D|^2 over the training images and their mirror images, among
         the classes that have images: one convex problem; w_i gives each of them the same weight
M (E, E) P^(1/4), with the precision P within classes, see `shared_precision`: where images of one class hardly differ,
         moving costs less. Scaled so that features about their mean keep their length.

And for each of `STRENGTHS` s, Gaussian classes with means m (C, E) and shared precision G = M^4, about the mean of m:

    logits = a z + s r (f G (m_c - m)^T - (m_c - m) G (m_c + m)^T / 2)   (B, C)

with r such that for s = 1 both parts are equally spread over the training images. None is chosen: each is weighted by
its evidence on images that were left out. A class without images is its text alone: the images of the others would only
push it away. A new class is fitted alone, by softmax regression against the mean features of the others.

A head whose method changed the image features reads both them and those of the frozen tower: f is [f_own, f_frozen] /
sqrt(2), z the mean of both logits, and the probe the mean of two, each fitted on its own features. New classes and
distances take the frozen tower's M.
"""

from dcp_zoo.model.text_probe.candidates import Candidates
from dcp_zoo.model.text_probe.fit import fit_on_features
from dcp_zoo.model.text_probe.probe import TextProbe

__all__ = ["Candidates", "TextProbe", "fit_on_features"]
