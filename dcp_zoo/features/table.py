"""Features of labelled images, by view: what methods on features are fitted to, and what heads classify."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from dcp_zoo.data import Item, group_ids
from dcp_zoo.errors import ZooError
from dcp_zoo.features.views import PLAIN, View


class LabelledItems:
    """Base class of what is known of labelled images: features, predictions, loaders."""

    items: Sequence[Item]

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def labels(self) -> Tensor:
        """(n,)."""
        return torch.tensor([item.label for item in self.items], dtype=torch.long)

    @cached_property
    def groups(self) -> Tensor:
        """Of images that were taken together (n,), see `group_ids`."""
        return group_ids([item.group for item in self.items])

    @property
    def num_classes(self) -> int:
        """Classes that have images here."""
        return len({item.label for item in self.items})


@dataclass(frozen=True)
class FeatureTable(LabelledItems):
    """Features of n images, in float32 on the CPU.

    Attributes:
        items: the images, with labels and groups.
        views: the features (n, W) of each view: the normalised parts of each reading, one after the other.
        widths: of the parts of each reading, see `dcp_zoo.backbone.clip.Reading`.
        facts: of the images (n, 2051), see `Facts`; None if they were not computed.
        errors: why an image cannot be read, by its position; its features and facts are NaN.
    """

    items: Sequence[Item]
    views: Mapping[View, Tensor]
    widths: Sequence[tuple[int, ...]]
    facts: Tensor | None = None
    errors: Mapping[int, ZooError] = field(default_factory=dict)

    def rows(self, *views: View) -> Tensor:
        """The features of some views (V, n, W), by default of the plain one. ZooError for a view that
        was not computed."""
        views = views or (PLAIN,)
        for view in views:
            if view not in self.views:
                known = ", ".join(other.name for other in self.views)
                raise ZooError(f"Features of the view {view.name} were not computed, only of {known}.")
        return torch.stack([self.views[view] for view in views])

    def reading(self, index: int) -> "FeatureTable":
        """Only the columns of one reading."""
        start = sum(sum(widths) for widths in self.widths[:index])
        return self._columns(start, self.widths[index])

    @property
    def embeddings(self) -> "FeatureTable":
        """Only the first part of the first reading: CLIP's embedding."""
        return self._columns(0, self.widths[0][:1])

    def _columns(self, start: int, widths: tuple[int, ...]) -> "FeatureTable":
        views = {view: rows[:, start : start + sum(widths)] for view, rows in self.views.items()}
        return replace(self, views=views, widths=[widths])

    def of(self, positions: Sequence[int] | Tensor) -> "FeatureTable":
        """The images at these positions, in this order."""
        index = torch.as_tensor(positions, dtype=torch.long)
        chosen = index.tolist()
        return replace(
            self,
            items=[self.items[i] for i in chosen],
            views={view: rows[index] for view, rows in self.views.items()},
            facts=None if self.facts is None else self.facts[index],
            errors={new: self.errors[i] for new, i in enumerate(chosen) if i in self.errors},
        )

    @property
    def joined(self) -> Tensor:
        """All parts of the plain view, normalised as a whole: f (n, W), as a head's classifier reads
        them."""
        count = sum(map(len, self.widths))  # of parts, which are normalised
        return self.views[PLAIN] / math.sqrt(count) if count > 1 else self.views[PLAIN]

    @property
    def readable(self) -> list[int]:
        """The positions of the images that can be read."""
        return [i for i in range(len(self.items)) if i not in self.errors]
