"""What a trained head must pass before it is published.

Accuracy is compared with zero-shot CLIP's in the same sweep; there is no range per dataset, as no figures of DCP's
paper were found to take it from.
"""

import math
from collections.abc import Mapping
from typing import Any

from dcp_zoo.release.card import CARD_INFO
from dcp_zoo.release.publish import Release

BELOW_ZERO_SHOT = 2.0  # points that a head may lose against zero-shot CLIP, besides chance
STATS_APART = 1.0  # points between stored and batch statistics, besides chance


def refusals(result: Mapping[str, Any], zero_shot: Mapping[str, Any], release: Release, split_note: str) -> list[str]:
    """Why a head must not be published; [] if it may.

    Args:
        result: the result file of its trial.
        zero_shot: that of zero-shot CLIP on the same images.
        release: its checkpoint, which has loaded back, and its card.
        split_note: what is wrong with the dataset's split, or "".
    """
    found = [_loss(result["info"])]
    if release.sha256 != result["head_sha256"]:
        found.append("the checkpoint is not the one that was measured")
    images, (plain,) = result["results"][0]["images"], zero_shot["results"]
    if (result["split_sha256"], images) != (zero_shot["split_sha256"], plain["images"]):
        found.append("it and zero-shot CLIP were tested on other images")
    missing = [name for name in CARD_INFO if name != "converted_from" and not release.info.get(name)]
    if missing:
        found.append(f"its card lacks {', '.join(missing)}")
    top1 = {entry["stats"]: entry["top1"] for entry in result["results"]}
    if {"stored", "batch"} <= top1.keys():
        found += _accuracy(top1["stored"], top1["batch"], plain["top1"], images)
    else:
        found.append("its accuracy was not measured with both kinds of statistics")
    return [reason for reason in (*found, split_note) if reason]


def _loss(info: Mapping[str, Any]) -> str:
    first, last = info.get("first_loss"), info.get("last_loss")
    if first is None or last is None or not (math.isfinite(first) and math.isfinite(last)):
        return "its losses are missing or not finite"
    return f"its loss rose from {first:.3f} to {last:.3f}" if last > first else ""


def _accuracy(stored: float, batch: float, plain: float, images: int) -> list[str]:
    """What is wrong with a head's two accuracies, next to zero-shot CLIP's; all in percent."""
    found, below, apart = [], BELOW_ZERO_SHOT + chance(plain, images), STATS_APART + chance(batch, images)
    if stored < plain - below:
        found.append(f"top-1 {stored:.2f} is more than {below:.1f} points below zero-shot CLIP's {plain:.2f}")
    if abs(stored - batch) > apart:
        found.append(f"stored {stored:.2f} and batch statistics {batch:.2f} are more than {apart:.1f} points apart")
    return found


def chance(percent: float, images: int) -> float:
    """Two standard errors, in points, of an accuracy measured on that many images."""
    share = min(max(percent / 100, 0.5 / images), 1 - 0.5 / images)  # at least half an image away from 0 and 1
    return 200 * math.sqrt(share * (1 - share) / images)
