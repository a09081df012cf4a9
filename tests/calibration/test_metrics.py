"""Metrics of images of any size."""

from __future__ import annotations

import pytest
import torch

from diffpress.calibration.metrics import WINDOW, psnr_db, ssim


@pytest.mark.parametrize("side", [1, 4, WINDOW - 1, WINDOW, WINDOW + 5])
def test_equal_images_are_alike_and_others_are_not(side: int) -> None:
    generator = torch.Generator().manual_seed(side)
    images, others = torch.rand(2, 4, 3, side, side, generator=generator)
    assert ssim(images, images) == pytest.approx(1)
    assert ssim(images, others) < 0.95


def test_psnr_of_a_known_error() -> None:
    images = torch.zeros(2, 1, 4, 4)
    assert psnr_db(images + 0.1, images).tolist() == pytest.approx([20, 20], abs=1e-4)
