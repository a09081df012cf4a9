"""The floors of the zoo, measured: `python bench/zoo.py --digits mnist.npz --emoji noto_emoji_72px.npz --json`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from diffpress.export.artifact import open_pipeline
from diffpress.models import resolve
from diffpress.zoo.classifier import accuracy, load_classifier
from diffpress.zoo.data import load_digits, load_emoji
from diffpress.zoo.floors import caption_retrieval, class_accuracy

sys.path.insert(0, str(Path(__file__).parent))
from machine import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--digits", type=Path, help="MNIST as npz, for the accuracy of the classifier")
    parser.add_argument("--emoji", type=Path, help="Noto emoji as npz, for the retrieval of captions")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    classifier = load_classifier()
    rows: dict[str, float] = {"digits_class_accuracy": class_accuracy(open_pipeline(resolve("zoo:digits")), classifier)}
    if arguments.digits:
        rows["classifier_test_accuracy"] = accuracy(classifier, load_digits(arguments.digits, "test"))
    if arguments.emoji:
        emoji = load_emoji(arguments.emoji)
        rows["emoji_caption_retrieval"] = caption_retrieval(open_pipeline(resolve("zoo:emoji")), emoji)
    if arguments.json:
        print(json.dumps({"machine": machine(), **rows}, indent=1))
    else:
        for name, value in rows.items():
            print(f"{name:28} {value:.3f}")


if __name__ == "__main__":
    main()
