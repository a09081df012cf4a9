"""A small digit classifier: the evaluate of `zoo:digits` and its offline feature extractor."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from diffpress.export.tensor_files import save_tensors

from .data import Digits, load_digits
from .trainer import Schedule, train_

FEATURES = 128
BATCH = 128
SCHEDULE = Schedule(steps=3000, rate=2e-3)


class DigitClassifier(nn.Module):
    """Images [N, 1, 32, 32] in -1..1 to class scores [N, 10]; `features` gives what comes before the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(48, 96, 3, stride=2, padding=1),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(96 * 16, FEATURES),
            nn.GELU(),
        )
        self.head = nn.Linear(FEATURES, 10)

    def features(self, images: Tensor) -> Tensor:
        """Feature vectors [N, 128]."""
        return self.trunk(images)  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))  # type: ignore[no-any-return]


def load_classifier() -> DigitClassifier:
    """The classifier shipped with the zoo, in float32."""
    model = DigitClassifier()
    path = files("diffpress.zoo") / "models" / "digits-classifier" / "model.safetensors"
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(str(path)).items()})
    return model.eval()


def train(data: Path, out: Path, work: Path, seed: int, steps: int | None = None) -> None:
    """Train on shifted MNIST and write `out/model.safetensors` in float16."""
    torch.manual_seed(seed)
    digits, model = load_digits(data, "train"), DigitClassifier()

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(digits.images), (BATCH,), generator=generator)
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        images = digits.images[chosen].roll(shift, (2, 3))
        return F.cross_entropy(model(images), digits.labels[chosen], label_smoothing=0.05)

    train_(model, loss, Schedule(steps or SCHEDULE.steps, SCHEDULE.rate), work / "classifier.safetensors", seed)
    save_tensors({name: tensor.half() for name, tensor in model.state_dict().items()}, out / "model.safetensors")


@torch.no_grad()
def accuracy(model: DigitClassifier, digits: Digits) -> float:
    """Share of images given their label."""
    guesses = torch.cat([model(part).argmax(1) for part in digits.images.split(1000)])
    return float((guesses == digits.labels).float().mean())
