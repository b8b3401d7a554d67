"""Names whose vectors real CLIP computed, and a map that predicts the vectors of other names."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor
from torch.nn import functional as F

CLASSES = "clip_lt_v2"  # the source with ImageNet's classes in their order, as "a photo of a {}"
SAME_CLASSES = "clip_lt_v1"  # the same in the template of all other sources, "a {}"
HELD_OUT = 5  # every fifth of the other names is kept out of training
RIDGE = 0.3
BLOCK = 4096  # phrases predicted at a time


@dataclass
class ClipNames:
    """Names with CLIP's vectors, unit length, as of "a photo of a {}"."""

    names: list[str]
    vectors: Tensor  # (N, embed)
    held_out: list[str]
    held_out_vectors: Tensor  # (H, embed), never used in training
    classes: list[str]  # the teacher's, in its order; two may share a name


def read_clip_names(path: Path) -> ClipNames:
    """From an .npz file with `name` (N,), `source` (N,) and `vector` (N, embed).

    Vectors of "a {}" are moved by the mean difference between the two templates. Held out is every fifth, in
    alphabetical order, of the names that are not the teacher's classes.
    """
    data = np.load(path)
    names = np.char.lower(data["name"])
    source = data["source"]
    vectors = F.normalize(torch.from_numpy(data["vector"].astype(np.float32)), dim=1)
    classes = vectors[source == CLASSES]
    plain = vectors[source == SAME_CLASSES]
    moved = F.normalize(vectors + (classes - plain).mean(0), dim=1)
    known = dict(zip(names[source == CLASSES].tolist(), classes, strict=True))
    others: dict[str, Tensor] = {}
    for name, vector in zip(names.tolist(), moved, strict=True):
        if name not in known:
            others.setdefault(name, vector)
    held_out = sorted(others)[::HELD_OUT]
    known |= {name: vector for name, vector in others.items() if name not in set(held_out)}
    return ClipNames(
        list(known), torch.stack(list(known.values())),
        held_out, torch.stack([others[name] for name in held_out]),
        names[source == CLASSES].tolist(),
    )  # fmt: skip


def predict_vectors(texts: list[str], names: Tensor, meanings: Tensor, known: Tensor, vectors: Tensor) -> Tensor:
    """CLIP's vectors (N, embed) of texts, unit length, by kernel ridge regression on the rows `known`.

    The kernel compares the embeddings of names (N, E), those of meanings (N, E), and spelling.
    """
    tfidf = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
    tfidf.fit([texts[i] for i in known.tolist()])
    spelling = tfidf.transform(texts)

    def kernel(rows: Tensor) -> Tensor:
        same = torch.from_numpy((spelling[rows.numpy()] @ spelling[known.numpy()].T).toarray()).float()
        return (names[rows] @ names[known].T - 1).exp() + (meanings[rows] @ meanings[known].T - 1).exp() + same

    mean = vectors.mean(0)
    weights = torch.linalg.solve(kernel(known) + RIDGE * torch.eye(len(known)), vectors - mean)
    blocks = torch.arange(len(texts)).split(BLOCK)
    return F.normalize(torch.cat([mean + kernel(rows) @ weights for rows in blocks]), dim=1)


def agreement(vectors: Tensor, clip: ClipNames) -> dict[str, float]:
    """How close vectors (H, embed) of the held-out names are to CLIP's, and how often CLIP's is the nearest
    of all."""
    every = torch.cat([clip.held_out_vectors, clip.vectors])
    mean = every.mean(0)
    own = F.normalize(vectors, dim=1)
    cosine = F.cosine_similarity(own, clip.held_out_vectors)
    shape = F.cosine_similarity(own - mean, clip.held_out_vectors - mean)
    answers = torch.arange(len(vectors))
    nearest = (own @ every.T).argmax(1) == answers
    nearest_centred = (F.normalize(own - mean, dim=1) @ F.normalize(every - mean, dim=1).T).argmax(1) == answers
    rows = {"cosine": cosine, "cosine, centred": shape, "nearest": nearest, "nearest, centred": nearest_centred}
    return {name: value.float().mean().item() for name, value in rows.items()}
