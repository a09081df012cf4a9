"""What a model of the zoo must be able to do before it is shipped."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffpress.calibration.conditions import Condition
from diffpress.calibration.sampling import Sampling, sample

from .classifier import DigitClassifier
from .data import Emoji

STEPS = 25
DIGITS_GUIDANCE = 3.0
EMOJI_GUIDANCE = 3.0
BATCH = 50
FUNCTION_WORDS = frozenset({"a", "an", "and", "at", "by", "for", "from", "in", "of", "on", "or", "the", "to", "with"})


@torch.no_grad()
def class_accuracy(pipeline: Any, classifier: DigitClassifier, per_class: int = 100) -> float:
    """Share of generated digits that the classifier gives the class they were asked for."""
    wanted = [Condition(str(index // per_class), index) for index in range(10 * per_class)]
    right = 0
    for start in range(0, len(wanted), BATCH):
        group = wanted[start : start + BATCH]
        images = sample(pipeline, group, Sampling(STEPS, DIGITS_GUIDANCE)).images * 2 - 1
        labels = torch.tensor([int(condition.text) for condition in group])
        right += int((classifier(images).argmax(1) == labels).sum())
    return right / len(wanted)


def caption_retrieval(pipeline: Any, emoji: Emoji, count: int = 200, seed: int = 0) -> float:
    """Share of `count` training captions whose generated image is nearest to a training image of that meaning.

    Nearest in L2 at 16x16. The meaning is the same where the neighbour's caption has every word of the prompt, function words
    aside, which is stricter than all its nouns.
    """
    chosen = torch.randperm(len(emoji.captions), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    known = _thumbnails(emoji.images)
    right = 0
    for start in range(0, count, BATCH):
        part = chosen[start : start + BATCH]
        wanted = [Condition(emoji.captions[index], start + i) for i, index in enumerate(part)]
        images = _thumbnails(sample(pipeline, wanted, Sampling(STEPS, EMOJI_GUIDANCE)).images * 2 - 1)
        nearest = torch.cdist(images, known).argmin(1).tolist()
        right += sum(_means(emoji.captions[a], emoji.captions[b]) for a, b in zip(part, nearest, strict=True))
    return right / count


def _thumbnails(images: Tensor) -> Tensor:
    """Images [N, C, H, W] at 16x16, as rows."""
    return F.adaptive_avg_pool2d(images, 16).flatten(1)


def _means(prompt: str, found: str) -> bool:
    return set(prompt.split()) - FUNCTION_WORDS <= set(found.split())
