"""Shared by methods: the task that one is given, how its features are read, and training with a loss of its own.

Shapes: n or B images, C classes, E embedding.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.head import Head
from dcp_zoo.model.linear_head import LinearHead
from dcp_zoo.model.names import Texts, check_classnames, class_texts, end_positions, mean_of_texts
from dcp_zoo.model.towers.text import shares_prefix
from dcp_zoo.training.loop import build_optimizer, cosine, descend, train
from dcp_zoo.training.sources import ImageSource, Progress, image_source, no_progress
from dcp_zoo.training.state import TrainingState

FINAL_LR = 1e-6  # of CLIP-LoRA and 2SFS
Loss = Callable[[Tensor, Tensor], Tensor]  # inputs and labels of a batch -> its loss


@dataclass
class Task:
    """The input of every method: the same images, budget and seed.

    Attributes:
        clip: the plain CLIP on its device; methods do not change it.
        model: its name in the zoo.
        classnames, template: of the dataset; the template is its zero-shot prompt, or sentences of each class.
        train: the few-shot training images, augmented as in the recipe; None for methods that do not train.
        val: few-shot validation images, the only ones for choosing hyperparameters; None if there are none.
        recipe: the method's hyperparameters.
        seed: of all random numbers.
        precision: of training; logits are computed in float32.
        training: options of `loop.train`, which trains prompts: its state, callbacks, class weights and log.
        reload_clip: returns CLIP with float32 weights again; then CLIP may be stored in half precision while training.
        probe_images: the training images without augmentation, for the text probe, if the method has them in a form
            that its head reads faster.
        probe_weights: of the training images (n,) in the text probe, see `Problem`. Default: all the same.
    """

    clip: FrozenCLIP
    model: str
    classnames: Sequence[str]
    template: Texts
    train: ImageSource | None
    val: ImageSource | None
    recipe: Any  # a `BaseRecipe`, of the kind that the method's `recipe` returns
    seed: int = 1
    precision: str = "float32"
    progress: Progress = no_progress
    training: dict[str, Any] = field(default_factory=dict)
    reload_clip: Callable[[], FrozenCLIP] | None = None
    probe_images: ImageSource | None = None
    probe_weights: Tensor | None = None

    @property
    def text(self) -> Tensor:
        """Zero-shot CLIP's normalised text features (C, E) of the class names."""
        return self.clip.zero_shot_classifier(check_classnames(self.classnames), self.template)

    @property
    def train_images(self) -> ImageSource:
        """The training images, augmented as in the recipe; without augmentation, only view 0."""
        assert self.train is not None
        return self.train.first_view if self.recipe.augment == "none" else self.train

    @cached_property
    def plain_train(self) -> ImageSource:
        """A source of the unaugmented training images; if it has views, view 0 is the unaugmented one."""
        assert self.train is not None
        if self.recipe.augment == "none" or self.train.views is not None:
            return self.train
        train = self.train
        return image_source(train.model, train.items, "none", train.workers, self.progress, precision=train.precision)

    def features(self, source: ImageSource) -> Tensor:
        """Normalised features (n, E) of a source by the plain image tower, in float32 on its device."""
        return source.features(1, self.progress)[0].to(self.clip.device)

    @property
    def train_features(self) -> Tensor:
        """`features` of the unaugmented training images."""
        return self.features(self.plain_train)

    @property
    def train_labels(self) -> Tensor:
        """Labels (n,) of the training images, on the CPU."""
        assert self.train is not None
        return self.train.labels

    def augmented_features(self, passes: int) -> Tensor:
        """Normalised features (V, n, E) of V augmented views of the training images, on the CPU: all views if these can
        be computed in advance, otherwise as many random `passes`."""
        source = self.feature_source
        if source.views is not None:
            return source.views
        return torch.cat([source.features(1, self.progress) for _ in range(passes)])

    @property
    def feature_source(self) -> ImageSource:
        """The training images as features of the plain image tower, unless random crops need that in every step."""
        assert self.train is not None
        if self.train.crops and self.recipe.augment == "crop-flip":
            return self.train
        features = self.train.features(progress=self.progress)
        return replace(self.train, views=features[:1] if self.recipe.augment == "none" else features)

    def linear_head(
        self, weight: Tensor, bias: Tensor, *, clip: FrozenCLIP | None = None, texts: Texts = ""
    ) -> LinearHead:
        """A head with this classifier, weight (C, E) and bias (C,).

        Args:
            clip: a copy of the task's CLIP that the method trained. Default: the task's.
            texts: what CLIP reads of new classes: a template, or sentences. Default: the head is limited to its
                classes.
        """
        own = clip or self.clip
        before = self.clip.clip.state_dict() if clip else {}
        after = own.clip.state_dict()
        changed = [name for name in before if not torch.equal(after[name], before[name])]
        return LinearHead(
            own.clip,
            self.classnames,
            weight,
            bias,
            template=texts,
            changed=[name for name in changed if texts or name.startswith("visual.")],
            original=self.clip if changed else None,
            tokenizer=own.tokenizer,
        )

    def text_head(self, text: Tensor, *, clip: FrozenCLIP | None = None, texts: Texts = "") -> LinearHead:
        """`linear_head` whose logits are exp(logit_scale) times the cosine with normalised text features (C, E)."""
        return self.linear_head(*(clip or self.clip).scaled(text), clip=clip, texts=texts)


def most_accurate(candidates: Iterable[tuple[Any, Tensor]], labels: Tensor) -> Any:
    """The value of the pair (value, logits (n, C)) that classifies the most images correctly, the first on a tie."""
    hits = [(int((logits.argmax(-1).cpu() == labels).sum()), value) for value, logits in candidates]
    return max(hits, key=lambda pair: pair[0])[1]


def own_clip(clip: FrozenCLIP) -> FrozenCLIP:
    """A copy of a CLIP that a method may train; the shared one is never changed."""
    return FrozenCLIP(copy.deepcopy(clip.clip), clip.tokenizer, clip.pretrained_cfg)


def sentence_ids(clip: FrozenCLIP, classnames: Sequence[str], template: Texts) -> tuple[Tensor, Sequence[int] | None]:
    """Token ids (S, L) of the template filled with each name, or of the sentences of each class, and how many each has,
    see `class_texts`; in a causal tower cut after the longest, as tokens after an end token have no effect there."""
    sentences, counts = class_texts(classnames, template)
    ids = clip.tokenize(sentences)
    return (ids[:, : int(end_positions(clip.text, ids).max()) + 1] if shares_prefix(clip.text) else ids), counts


def sentence_features(clip: FrozenCLIP, ids: Tensor) -> Tensor:
    """ids (S, L) -> text features (S, E), not normalised; gradients reach all weights that require them."""
    if not shares_prefix(clip.text):
        return clip.clip.encode_text(ids, normalize=False)
    text = clip.text
    y = text.token_embedding(ids) + text.positional_embedding[: ids.shape[1]]
    for block in clip.text_tower.blocks:
        y = block(y, causal=True)
    return clip.text_tower.project(y[torch.arange(len(y), device=y.device), end_positions(text, ids)])


def shuffled(source: ImageSource, batch_size: int, seed: int, drop_last: bool = True) -> Iterator[Any]:
    """An endless stream of (inputs, labels) batches, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from source.batches(batch_size, generator, drop_last=drop_last)


def zero_shot_loss(task: Task, clip: FrozenCLIP) -> Loss:
    """Cross-entropy of zero-shot classification by a copy of CLIP, which encodes images and sentences in every step."""
    ids, counts = sentence_ids(task.clip, check_classnames(task.classnames), task.template)
    patches = task.train_images.patches

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        text = mean_of_texts(F.normalize(sentence_features(clip, ids), dim=-1), counts)
        logits = task.clip.logits(clip.encode_image(images, patches), text)
        return F.cross_entropy(logits.float(), labels)

    return loss


def train_prompts(task: Task, head: Head, source: ImageSource, **options: Any) -> list[float]:
    """Train what requires gradients in a head on a source by `loop.train`, with the task's options and these; returns
    the loss of every step."""
    shared: dict[str, Any] = {"seed": task.seed, "precision": task.precision, "progress": task.progress}
    return train(source.for_model(head), task.recipe, validation=task.val, **shared, **task.training, **options)


def train_steps(task: Task, trained: Iterable[Tensor], loss: Loss, source: ImageSource, steps: int) -> list[float]:
    """AdamW with a cosine from the recipe's learning rate to `FINAL_LR`; returns the loss of every step."""
    recipe = task.recipe
    optimizer = torch.optim.AdamW(trained, recipe.lr, weight_decay=recipe.weight_decay)
    state, batches = TrainingState().begin(optimizer, task.precision), shuffled(source, recipe.batch_size, task.seed)
    return descend(state, loss, batches, cosine(recipe.lr, steps, FINAL_LR), steps, task.progress)


def train_epochs(
    task: Task, trained: Iterable[Tensor], loss: Loss, batches: Iterable[Any], per_epoch: int
) -> list[float]:
    """A `TrainingRecipe`'s optimizer and schedule by epochs of so many batches."""
    recipe = task.recipe
    state = TrainingState().begin(build_optimizer(recipe, trained), task.precision)
    steps = recipe.num_epochs * per_epoch
    return descend(state, loss, batches, lambda step: recipe.lr_at(step // per_epoch), steps, task.progress)
