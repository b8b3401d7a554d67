"""The base class of all models on a frozen open_clip CLIP."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dcp_zoo.errors import ZooError, check_choice
from dcp_zoo.model import checkpoint, towers
from dcp_zoo.model.classifier import GaussianClassifier, in_distribution_score
from dcp_zoo.model.names import (
    NAME,
    TEMPLATE,
    Texts,
    class_texts,
    default_tokenizer,
    mean_of_texts,
    same_texts,
    tokenize_names,
)


class FrozenCLIP(nn.Module):
    """Holds a CLIP whose weights never change and which is always in eval mode.

    Args:
        clip: an open_clip CLIP, used without changes.
        tokenizer: its open_clip tokenizer. Default: open_clip's BPE tokenizer.

    Attributes:
        classifier: the stage that adds image-side scores to the text logits; None for the text logits alone.
    """

    classifier: GaussianClassifier | None
    classnames: list[str]
    method = "dcp"

    def __init__(self, clip: nn.Module, tokenizer: Callable[..., torch.Tensor] | None = None) -> None:
        super().__init__()
        self.clip: Any = clip.requires_grad_(False)
        self.tokenizer = tokenizer or default_tokenizer()
        self.clip.eval()
        self.register_module("classifier", None)
        # for checkpoints and timm; overwritten by the factory
        self.architecture, self.clip_source = "custom", "custom"
        self.info: dict[str, Any] = {}
        self.pretrained_cfg: dict[str, Any] = {}
        self.default_cfg: dict[str, Any] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        """Another CLIP has other towers."""
        if name == "clip":
            for cached in ("vision_tower", "vision_tower_or_none", "text_tower"):
                self.__dict__.pop(cached, None)
        super().__setattr__(name, value)

    @property
    def visual(self) -> Any:
        return self.clip.visual

    @property
    def text(self) -> Any:
        return towers.text_modules(self.clip)

    @cached_property
    def vision_tower(self) -> towers.VisionTower:
        """The image tower taken apart; ZooError if that is impossible, as for a ResNet."""
        return towers.vision_tower(self.clip)

    @cached_property
    def text_tower(self) -> towers.TextTower:
        """The text tower taken apart; ZooError if that is impossible, as for those of Hugging Face."""
        return towers.text_tower(self.clip)

    @cached_property
    def vision_tower_or_none(self) -> towers.VisionTower | None:
        try:
            return self.vision_tower
        except ZooError:
            return None

    @property
    def stem(self) -> towers.VisionTower | None:
        """The image tower if its patch embedding is a network whose output is worth keeping, as the miniature's."""
        tower = self.vision_tower_or_none
        return tower if tower and tower.has_stem else None

    @property
    def vision_blocks(self) -> Any:
        return self.visual.get_submodule(self.vision_tower.block_path)

    @property
    def text_blocks(self) -> Any:
        return self.text.transformer.resblocks

    @property
    def num_features(self) -> int:
        """E, the width of image and text features."""
        projection, width = getattr(self.text, "text_projection", None), getattr(self.text, "output_dim", None)
        if isinstance(projection, nn.Linear):
            return projection.out_features
        return projection.shape[-1] if projection is not None else width or self.text_tower.width

    @property
    def device(self) -> torch.device:
        return self.clip.logit_scale.device

    def tokenize(self, sentences: Sequence[str]) -> torch.Tensor:
        """Token ids (n, L) of sentences, as long as the text tower reads, on the device of the CLIP."""
        own = hasattr(self.text, "positional_embedding")  # others have room for far more than their tokenizer fills
        return self.tokenizer(list(sentences), **({"context_length": self.text.context_length} if own else {})).to(
            self.device
        )

    def tokenize_names(self, classnames: Sequence[str], n_ctx: int, texts: Texts = NAME) -> Any:
        """The texts of the classes in chunks, to follow `n_ctx` prompts; ZooError if one does not fit. See `names`."""
        return tokenize_names(classnames, self.tokenizer, self.text_tower, n_ctx, texts).to(self.device)

    def logits(self, image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        """image_features (B, E), text_features (C, E), normalised -> exp(logit_scale) * cosine (B, C), after the
        classifier stage if there is one."""
        logits = towers.cosine_logits(self.clip, image_features, text_features)
        stage = self.stage
        return logits if stage is None else stage(logits, image_features, self.classnames)

    @property
    def stage(self) -> GaussianClassifier | None:
        """The classifier stage if it knows all of the present classes, else None: an image's score for one class and
        its text logit for another say nothing about which of the two it shows."""
        stage = self.classifier
        if stage is None or stage.names == self.classnames:  # the usual cases, asked in every forward
            return stage
        return stage if set(self.classnames) <= set(stage.names) else None

    def linear(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits as a linear function of the image features: weight (C, E) and bias (C,).

        Raises:
            ZooError: text features that depend on the images, see `DCP.encode_text`.
        """
        weight, bias = self.text_linear()
        stage = self.stage
        if stage is None:
            return weight, bias
        more, offset = stage.linear(self.classnames)
        return (weight + more) / stage.temperature, (bias + offset) / stage.temperature

    def text_linear(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`linear` without the classifier stage."""
        return self.scaled(self.encode_text())

    def scaled(self, text_features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Text features (C, E) -> exp(logit_scale) times them, and CLIP's bias (C,), zero for most."""
        weight = self.clip.logit_scale.exp() * text_features
        bias = weight.new_zeros(len(weight))
        if getattr(self.clip, "logit_bias", None) is not None:
            bias = bias + self.clip.logit_bias
        return weight, bias

    def encode_text(self) -> torch.Tensor:
        """Normalised text features (C, E) of the class names."""
        raise NotImplementedError

    @torch.no_grad()
    def encode_sentences(self, classnames: Sequence[str], texts: Texts) -> torch.Tensor:
        """Text features (C, E) of a template filled with each name, not normalised; or, with sentences of each class,
        the normalised mean of their normalised features. Texts longer than the text tower reads are cut."""
        sentences, counts = class_texts(classnames, texts)
        ids = self.tokenize(sentences)
        features = torch.cat([self.clip.encode_text(chunk, normalize=False) for chunk in ids.split(100)])
        return features if counts is None else mean_of_texts(F.normalize(features, dim=-1), counts)

    def zero_shot_classifier(self, classnames: Sequence[str], texts: Texts = TEMPLATE) -> torch.Tensor:
        """Normalised text features (C, E) of a template filled with each name; or the mean over sentences of each
        class, as in CuPL (Pratt et al., What does a platypus look like?, ICCV 2023)."""
        return F.normalize(self.encode_sentences(classnames, texts), dim=-1)

    @torch.inference_mode()
    def zero_shot_logits(self, images: torch.Tensor, classifier: torch.Tensor) -> torch.Tensor:
        """images (B, 3, H, W), classifier (C, E) -> logits (B, C) of plain CLIP, without prompts and classifier
        stage."""
        return towers.cosine_logits(self.clip, F.normalize(self.clip.encode_image(images), dim=-1), classifier)

    def encode_prompted(
        self, images: torch.Tensor, prompts: Sequence[torch.Tensor] = (), patches: bool = False
    ) -> torch.Tensor:
        """images (B, 3, H, W), or with `patches` their patch maps -> normalised features (B, E). `prompts` (M, Dv) are
        those that enter the first blocks.

        Raises:
            ZooError: prompts, and an image tower that cannot be taken apart, such as a ResNet.
        """
        if not prompts and self.vision_tower_or_none is None:
            return F.normalize(self.clip.encode_image(images), dim=-1)
        return self.vision_tower.features(self.vision_tower.run(self.vision_tower.embed(images, patches), prompts))

    def save_pretrained(self: Any, directory: str | Path, dtype: torch.dtype = torch.float16, **info: Any) -> Path:
        """Write the head, never CLIP itself, into a checkpoint folder; see `dcp_zoo.model.checkpoint`."""
        return checkpoint.save_pretrained(self, directory, dtype, **info)

    def head_state(self) -> dict[str, torch.Tensor]:
        """What a method trained, by name: the tensors that require gradients."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    @torch.inference_mode()
    def predict(self: Any, images: torch.Tensor, reject: bool = False) -> list[str | None]:
        """The most probable class of each of images (B, 3, H, W), normalised as `create_transform` does.

        With `reject`, None for images that belong to none of the classes, see `dcp_zoo.training.stage`.

        Raises:
            ZooError: `reject`, and no threshold for exactly the present classes; something else than a batch of images.
        """
        threshold = self.rejection_threshold() if reject else None
        logits = self(self._batch(images))
        names = [self.classnames[i] for i in logits.argmax(-1).tolist()]
        if threshold is None:
            return names
        known = (in_distribution_score(logits) >= threshold).tolist()
        return [name if is_known else None for name, is_known in zip(names, known, strict=True)]

    def rejection_threshold(self) -> float:
        """Images with a lower `in_distribution_score` belong to none of the present classes; ZooError without one."""
        stage, problem = self.classifier, self.cannot_reject
        if stage is None or problem:
            raise ZooError(problem)
        return stage.threshold.item()

    def rely_on_texts(self, texts: Texts, before: Texts) -> None:
        """Unset the rejection threshold if the classes that it was fitted for have other texts now."""
        if self.classifier is not None and not same_texts(self.classifier.names, texts, before):
            self.classifier.unset_threshold()

    @property
    def cannot_reject(self) -> str:
        """Why images cannot be rejected among the present classes, and what to do; "" if they can."""
        if self.classifier is None:
            return "This head cannot reject images: it has no classifier stage. Add one with dcp-zoo fit-classifier."
        return self.classifier.cannot_reject(self.classnames)

    def add_class(self: Any, name: str, images: torch.Tensor) -> None:
        """Add a class from a few images, without training; the existing classes keep their scores. The threshold to
        reject images, which held for the classes before, is lost.

        Args:
            name: of the class; a name that the model already has gets new images.
            images: (n, 3, H, W), normalised as `create_transform` does.

        Raises:
            ZooError: the model has no classifier stage, or this knows other classes of the model by no image: then
                classes are their names, see `set_classnames`; no images.
        """
        classifier = self._stage_for(name)
        with torch.no_grad():
            features = self.encode_image(self._batch(images))
        if name not in self.classnames:
            self.set_classnames([*self.classnames, name])
        classifier.add(name, features)

    def remove_class(self: Any, name: str) -> None:
        """Remove a class and its scores, and the threshold to reject images; ZooError if the model does not have the
        class, or no other."""
        check_choice("class", name, self.classnames)
        self.set_classnames([known for known in self.classnames if known != name])
        if self.classifier is not None:
            self.classifier.remove(name)

    def _batch(self, images: Any) -> torch.Tensor:
        """Images (n, 3, H, W) on the model's device; ZooError for anything else."""
        if not isinstance(images, torch.Tensor) or images.ndim != 4 or not len(images):
            found = f"a tensor {tuple(images.shape)}" if isinstance(images, torch.Tensor) else type(images).__name__
            raise ZooError(
                f"Expected images (n, 3, H, W) with n at least 1, stacked from what create_transform returns, not "
                f"{found}. For image files and PIL images: dcp_zoo.predict(model, images)."
            )
        return images.to(self.device)

    def _stage_for(self, name: str) -> GaussianClassifier:
        """The stage, if images of a class would count; else ZooError, see `stage`."""
        if self.classifier is None:
            raise ZooError(
                "This head cannot add a class by its images: it has no classifier stage. Add one with dcp-zoo "
                "fit-classifier, or call model.set_classnames to classify by names."
            )
        unseen = [other for other in self.classnames if other not in (name, *self.classifier.names)]
        if unseen:
            raise ZooError(
                f"Images of {name} would have no effect: the head has none of {', '.join(unseen[:5])}, so it compares "
                "all classes by their names alone. Set its own class names with model.set_classnames, add every new "
                f"class by its images, then set the names you want; or set the names with {name} among them."
            )
        return self.classifier

    def train(self, mode: bool = True) -> Any:
        """Set training mode; CLIP stays in eval mode."""
        super().train(mode)
        self.clip.eval()
        return self
