"""A head of another method than DCP: CLIP's image tower, with what the method changed in it, and a linear classifier.

With images x (B, 3, H, W), prompts p (K, M, Dv) that the method learned for the first K vision blocks, if any, and
features f (B, E):

    logits = f weight^T + bias                                           (B, C)

followed by the classifier stage if the head has one, see `dcp_zoo.model.classifier`. No text is encoded, except for the
names of new classes.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.errors import ZooError, check_choice
from dcp_zoo.model import checkpoint
from dcp_zoo.model.classifier import PREFIX
from dcp_zoo.model.config import HeadConfig, read_config
from dcp_zoo.model.dcp import Step
from dcp_zoo.model.head import Head
from dcp_zoo.model.names import Descriptions, Texts, check_classnames, sentences_of
from dcp_zoo.model.towers.vision import append_prompts

TOWER = "visual."  # prefix of the tensors of the image tower that a method trained


class LinearHead(Head):
    """See the module; nothing in it requires gradients. `tensors` are `weight` (C, E), `bias` (C,), optionally
    `prompts` (K, M, Dv) as they enter the blocks, and tensors of the image tower as `visual.NAME`, which `clip` takes.
    `method` made it; `template` is for the names of new classes, or sentences of each class; "" if it reads no names.
    ZooError for tensors that are missing, unknown or of another shape."""

    weight: Tensor
    bias: Tensor
    prompts: Tensor | None

    def __init__(
        self,
        clip: nn.Module,
        classnames: Sequence[str],
        tensors: Mapping[str, Tensor],
        *,
        method: str,
        template: Texts = "",
        tokenizer: Any = None,
    ) -> None:
        super().__init__(clip, tokenizer)
        self.classnames, self.method, self.template = check_classnames(classnames), method, template
        self.num_classes = len(self.classnames)
        own = self._check(tensors)
        for name in ("weight", "bias", "prompts"):
            self.register_buffer(name, own.get(name))
        self.n_ctx = 0 if self.prompts is None else self.prompts.shape[1]
        self.changed = [name for name in own if name.startswith(TOWER)]
        self.visual.load_state_dict({name.removeprefix(TOWER): own[name] for name in self.changed}, strict=False)
        self.eval()

    def _check(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, detached; ZooError unless they fit the image tower and the classes."""
        shapes = {f"{TOWER}{name}": tuple(t.shape) for name, t in self.visual.state_dict().items()}
        shapes |= {"weight": (self.num_classes, self.num_features), "bias": (self.num_classes,)}
        if "prompts" in tensors:
            shapes["prompts"] = (*tensors["prompts"].shape[:2], self.vision_tower.width)
        wrong = [name for name, t in tensors.items() if shapes.get(name) != tuple(t.shape)]
        wrong += [name for name in ("weight", "bias") if name not in tensors]
        if wrong:
            raise ZooError(f"The head does not fit this CLIP and its classes: {', '.join(sorted(wrong)[:4])}.")
        return {name: t.detach() for name, t in tensors.items()}

    def trained_state(self) -> dict[str, Tensor]:
        """The `tensors` from which this head can be built again."""
        visual = self.visual.state_dict()
        state = {"weight": self.weight, "bias": self.bias}
        if self.prompts is not None:
            state["prompts"] = self.prompts
        return state | {name: visual[name.removeprefix(TOWER)] for name in self.changed}

    def method_config(self) -> tuple[dict[str, Any], dict[str, Any]]:
        texts: Any = self.template
        described = bool(texts) and not isinstance(texts, str)
        return {}, {"method": self.method, "template": sentences_of(self.classnames, texts) if described else texts}

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype = torch.float32, **info: Any) -> Path:
        """See `Head.save_pretrained`; in float32, as all of it is classifier."""
        return super().save_pretrained(directory, dtype, **info)

    def forward(self, images: Tensor, patches: bool = False) -> Tensor:
        """images (B, 3, H, W), or with `patches` their patch maps -> logits (B, C), without classes features."""
        return self.forward_head(self.encode_image(images, patches))

    def encode_image(self, images: Tensor, patches: bool = False) -> Tensor:
        """images (B, 3, H, W), or with `patches` their patch maps -> normalised features (B, E)."""
        return self.encode_prompted(images, self.image_prompts(), patches)

    def image_prompts(self) -> list[Tensor]:
        """The prompts (M, Dv) that enter the first vision blocks."""
        return [] if self.prompts is None else list(self.prompts)

    def text_linear(self) -> tuple[Tensor, Tensor]:
        """`weight` and `bias`."""
        return self.weight, self.bias

    @property
    def like_zero_shot(self) -> bool:
        """Whether zero-shot CLIP can stand for it on its training images: logits are cosines of the same tower."""
        scale = self.clip.logit_scale.exp()
        return not self.changed and torch.allclose(self.weight.norm(dim=-1), scale.to(self.weight), rtol=0.01)

    def walk(self, images: Tensor) -> Iterator[tuple[Step, Tensor, Tensor]]:
        """Each vision block, and the tokens that enter and leave it, the prompts last; see `DCP.walk`."""
        x, prompts = self.vision_tower.embed(images), self.image_prompts()
        n = x.shape[1]
        for i in range(len(self.vision_tower.blocks)):
            x = append_prompts(x[:, :n], prompts[i]) if i < len(prompts) else x
            entering = x
            x = self.vision_tower.block(i, x)
            yield Step(i), entering, x

    @property
    def stats(self) -> str:
        """Always "stored": logits do not depend on the batch."""
        return "stored"

    @stats.setter
    def stats(self, stats: str | None) -> None:
        if stats is not None:
            check_choice("stats", stats, ("stored",))

    def set_classnames(self, classnames: Sequence[str], descriptions: Descriptions | None = None) -> None:
        """Classify into these classes from now on; new ones by their names, or with `descriptions` all by these
        sentences of each. ZooError for names that the head does not know, if the method reads none; a class without
        sentences."""
        names = check_classnames(classnames)
        if names == self.classnames and not descriptions:
            return  # as they are, although two may share a name
        known = {} if descriptions else {name: i for i, name in enumerate(self.classnames)}
        new = [name for name in dict.fromkeys(names) if name not in known]
        old = 0 if descriptions else len(self.weight)
        weight, bias, template = self.weight[:old], self.bias[:old], descriptions or self.template
        if new:
            if not self.template:
                raise self._limited("reads no descriptions" if descriptions else f"does not know {', '.join(new[:5])}")
            text, offset = self.scaled(F.normalize(self.encode_sentences(new, template), dim=-1))
            weight, bias = torch.cat([weight, text]), torch.cat([bias, offset])
        index = known | {name: old + i for i, name in enumerate(new)}
        rows = [index[name] for name in names]
        self.rely_on_texts(template, self.template)
        self.weight, self.bias, self.template = weight[rows], bias[rows], template
        self.classnames, self.num_classes = names, len(names)

    def keep_texts(self, name: str, new: str) -> None:
        if not isinstance(self.template, str):
            self.template = {new if known == name else known: texts for known, texts in self.template.items()}

    def add_class(self, name: str, images: Tensor, known: int = 0) -> None:
        """See `Head.add_class`; ZooError also for a new class if the method does not read names."""
        if name not in self.classnames and not self.template:
            raise self._limited(f"does not know {name}")
        super().add_class(name, images, known)

    def _limited(self, limit: str) -> ZooError:
        return ZooError(
            f"A head of {self.method} is limited to its classes, and {limit}. For other classes use a head of a method "
            "that reads their names: dcp or zero-shot."
        )


def load_linear_head(
    clip: nn.Module, directory: str | Path, tokenizer: Any = None, config: HeadConfig | None = None
) -> LinearHead:
    """The head in a checkpoint folder; ZooError if a file is missing or damaged, or does not fit this CLIP."""
    config = config or read_config(directory)
    size = sum(t.numel() for t in checkpoint.tensor_shapes(directory).values())
    if size > 2 * sum(p.numel() for p in clip.parameters()):  # not read before it is known to fit
        raise ZooError(f"The head in {directory} is larger than the CLIP it belongs to: this package did not write it.")
    state = checkpoint.read_tensors(directory)
    stage = {name: state.pop(name) for name in list(state) if name.startswith(PREFIX)}
    names, block = config["label_names"], config["dcp"]
    template = block.get("template", "")
    head = LinearHead(clip, names, state, method=block["method"], template=template, tokenizer=tokenizer)
    head.classifier = head.empty_stage(stage, config)
    if head.classifier is not None:
        head.check_fits(stage, head.classifier.tensors(), directory)
        head.classifier.load_state_dict({name.removeprefix(PREFIX): t for name, t in stage.items()})
    return head
