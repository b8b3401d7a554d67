"""What a trained head must pass before it is published.

Accuracy is compared with zero-shot CLIP's in the same sweep; there is no range per dataset, as no figures of DCP's
paper were found to take it from.
"""

import math
from collections.abc import Mapping
from typing import Any

from dcp_zoo.release.publish import CARD_INFO, Release

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
    top1 = {entry["stats"]: entry["top1"] for entry in result["results"]}
    (plain,), images = zero_shot["results"], result["results"][0]["images"]
    stored, batch = top1.get("stored"), top1.get("batch")
    found = [
        _loss(result["info"]),
        "the checkpoint is not the one that was measured" if release.sha256 != result["head_sha256"] else "",
        "its accuracy was not measured with both kinds of statistics" if stored is None or batch is None else "",
        "it and zero-shot CLIP were tested on other images" if _images(result) != _images(zero_shot) else "",
        _card(release),
        split_note,
    ]
    if stored is not None and batch is not None:
        found.append(_below(stored, plain["top1"], images))
        found.append(_apart(stored, batch, images))
    return [reason for reason in found if reason]


def chance(percent: float, images: int) -> float:
    """Two standard errors, in points, of an accuracy measured on that many images."""
    share = min(max(percent / 100, 0.5 / images), 1 - 0.5 / images)  # at least half an image away from 0 and 1
    return 200 * math.sqrt(share * (1 - share) / images)


def _images(result: Mapping[str, Any]) -> tuple[str, int]:
    return result["split_sha256"], result["results"][0]["images"]


def _loss(info: Mapping[str, Any]) -> str:
    first, last = info.get("first_loss"), info.get("last_loss")
    if first is None or last is None or not (math.isfinite(first) and math.isfinite(last)):
        return "its losses are missing or not finite"
    return f"its loss rose from {first:.3f} to {last:.3f}" if last > first else ""


def _below(stored: float, plain: float, images: int) -> str:
    allowed = BELOW_ZERO_SHOT + chance(plain, images)
    if stored >= plain - allowed:
        return ""
    return f"top-1 {stored:.2f} is more than {allowed:.1f} points below zero-shot CLIP's {plain:.2f}"


def _apart(stored: float, batch: float, images: int) -> str:
    allowed = STATS_APART + chance(batch, images)
    if abs(stored - batch) <= allowed:
        return ""
    return f"stored {stored:.2f} and batch statistics {batch:.2f} are more than {allowed:.1f} points apart"


def _card(release: Release) -> str:
    info = release.info
    missing = [name for name in CARD_INFO if name != "converted_from" and not info.get(name)]
    return f"its card lacks {', '.join(missing)}" if missing else ""
