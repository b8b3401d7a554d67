"""Any method as a head: what it learned as a `LinearHead`, which is saved, loaded, fused and exported like a DCP."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.errors import ZooError
from dcp_zoo.methods.base import PlainCLIP, Task
from dcp_zoo.methods.table import METHODS
from dcp_zoo.model.linear_head import TOWER, LinearHead
from dcp_zoo.training.stage import fit_stage

ZERO_SHOT, GDA = "zero-shot", "gda"
TOLERANCE = 1e-4  # of the largest logit


def fit_head(method: str, task: Task) -> Any:
    """Train a method on a task -> a DCP or a `LinearHead` with its weights.

    GDA becomes zero-shot CLIP with a classifier stage, whose two weights are fitted as those of DCP's: see
    `dcp_zoo.training.stage`.

    Raises:
        ZooError: a method that is not linear in the image features, such as Tip-Adapter, or an error of the method.
    """
    if method == GDA:
        assert task.train is not None
        head = fit_head(ZERO_SHOT, task)
        head.method, head.template = GDA, task.template
        head.info = {"classifier": fit_stage(task.train_images.for_model(head), task.val, task.progress)}
        return head
    classifier: Any = METHODS[method].fit(task)
    if method == "dcp":
        return classifier.model
    clip = getattr(classifier, "plain", None) or classifier.clip
    tensors = linear_part(classifier, clip, method) | changed_tower(clip, task.clip)
    prompts: list[Tensor] = classifier.image_prompts() if hasattr(classifier, "image_prompts") else []
    if prompts:
        tensors["prompts"] = torch.stack(clip.entering(prompts))
    template = task.template if method == ZERO_SHOT else ""
    head = LinearHead(
        copy.deepcopy(task.clip.clip),
        task.classnames,
        tensors,
        method=method,
        template=template,
        tokenizer=clip.tokenizer,
    )
    head.pretrained_cfg, head.info = task.clip.pretrained_cfg, dict(classifier.info)
    return head.to(task.clip.device)


@torch.no_grad()
def linear_part(classifier: Any, clip: PlainCLIP, method: str) -> dict[str, Tensor]:
    """`weight` (C, E) and `bias` (C,) of a classifier whose logits are a linear function of the image features, at least
    after subtracting their mean over the classes, which changes no probability."""
    classify = classifier.forward if hasattr(classifier, "forward") else classifier.classify
    width = clip.num_features
    probes = torch.cat([torch.eye(width), torch.zeros(1, width), F.normalize(torch.randn(8, width), dim=-1)])
    exact = classify(probes.to(clip.device)).float()
    for logits in (exact, exact - exact.mean(-1, keepdim=True)):
        bias = logits[width]
        weight = (logits[:width] - bias).T
        off = logits - probes.to(weight) @ weight.T - bias
        if off.abs().max() <= TOLERANCE * logits.abs().max():
            return {"weight": weight.contiguous(), "bias": bias}
    raise ZooError(
        f"{METHODS[method].title} cannot become a head: its logits are not a linear function of the image features. "
        "Choose another method, such as gda, which also learns from the features alone."
    )


def changed_tower(clip: PlainCLIP, original: PlainCLIP) -> dict[str, Tensor]:
    """The tensors of the image tower that a method changed."""
    before = original.visual.state_dict()
    after = {} if clip is original else clip.visual.state_dict()
    return {f"{TOWER}{name}": t for name, t in after.items() if not torch.equal(t, before[name])}
