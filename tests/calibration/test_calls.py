"""What pipelines are called with is read off their signatures; none is named in the code."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest

from diffpress.calibration.calls import call_of, check_arguments, check_needs, flag_arguments, output_kind
from diffpress.export.errors import UserError

NEEDED = {
    "StableDiffusionPipeline": {},
    "StableDiffusionImg2ImgPipeline": {"image": "image"},
    "StableDiffusionXLInpaintPipeline": {"image": "image", "mask_image": "mask"},
    "StableDiffusionControlNetPipeline": {"image": "image"},
    "FluxControlNetImg2ImgPipeline": {"image": "image", "control_image": "image"},
    "StableDiffusionInstructPix2PixPipeline": {"image": "image"},
    "StableDiffusionDepth2ImgPipeline": {"image": "image"},
    "StableDiffusionUpscalePipeline": {"image": "image"},
    "StableDiffusionImageVariationPipeline": {"image": "image"},
    "StableVideoDiffusionPipeline": {"image": "image"},
    "WanVideoToVideoPipeline": {"video": "video"},
    "KandinskyV22Pipeline": {"image_embeds": "array", "negative_image_embeds": "array"},
    "CycleDiffusionPipeline": {"source_prompt": None, "image": "image"},
    "StableAudioPipeline": {},
    "FluxKontextPipeline": {},
    "ConsistencyModelPipeline": {},
    "DiTPipeline": {},
}


@pytest.mark.parametrize("name", NEEDED)
def test_what_is_needed(name: str) -> None:
    needs = call_of(getattr(diffusers, name)).needs()
    assert {own.name: own.medium for own in needs} == NEEDED[name]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("FluxImg2ImgPipeline", "image"),
        ("CogVideoXPipeline", "video"),
        ("StableAudioPipeline", "audio"),
        ("KandinskyV22PriorPipeline", "array"),
        ("DDPMPipeline", "image"),
    ],
)
def test_what_comes_back(name: str, kind: str) -> None:
    assert output_kind(getattr(diffusers, name)) == kind


@pytest.mark.parametrize(
    ("name", "lists"),
    [("StableDiffusionPipeline", True), ("StableVideoDiffusionPipeline", False), ("AmusedPipeline", False)],
)
def test_whether_one_call_makes_several(name: str, lists: bool) -> None:
    assert call_of(getattr(diffusers, name)).takes_lists == lists


@pytest.mark.parametrize(
    ("name", "flags", "arguments"),
    [
        ("StableDiffusionControlNetPipeline", {"control": "a.png"}, {"image": "a.png"}),
        ("StableDiffusionControlNetPipeline", {"image": "a.png"}, {"image": "a.png"}),
        ("FluxControlNetImg2ImgPipeline", {"control": "a.png", "image": "b"}, {"control_image": "a.png", "image": "b"}),
        ("StableDiffusionInpaintPipeline", {"mask": "a.png", "height": 64}, {"mask_image": "a.png", "height": 64}),
        ("StableDiffusionPipeline", {"image": "a.png"}, {"ip_adapter_image": "a.png"}),
        ("WanVideoToVideoPipeline", {"image": "a.gif", "width": None}, {"video": "a.gif"}),
        ("WanPipeline", {"frames": 9}, {"num_frames": 9}),
    ],
)
def test_options_of_the_command_line_are_arguments(name: str, flags: dict[str, Any], arguments: dict[str, Any]) -> None:
    assert flag_arguments(call_of(getattr(diffusers, name)), flags) == arguments


@pytest.mark.parametrize("flag", ["frames", "image", "mask", "control"])
def test_an_option_that_a_pipeline_has_no_argument_for_is_refused(flag: str) -> None:
    with pytest.raises(UserError, match=f"--{flag} 9: a PixArtAlphaPipeline takes none. Leave it out"):
        flag_arguments(call_of(diffusers.PixArtAlphaPipeline), {flag: 9})


def test_unknown_arguments_and_those_settled_elsewhere_are_refused() -> None:
    call = call_of(diffusers.StableDiffusionImg2ImgPipeline)
    check_arguments(call, {"strength": 0.5, "image": "a.png"}, "sampling.call")
    with pytest.raises(UserError, match=r"sampling.call.strenth: .* Did you mean strength\? It takes prompt, image"):
        check_arguments(call, {"strenth": 0.5}, "sampling.call")
    with pytest.raises(UserError, match=r"num_inference_steps: sampling.steps \(--steps\) settles it"):
        check_arguments(call, {"num_inference_steps": 5}, "sampling.call")


def test_one_message_names_what_is_missing_and_how_to_give_it() -> None:
    call = call_of(diffusers.StableDiffusionInpaintPipeline)
    check_needs(call, {}, drawn=True)
    check_needs(call, {"image": "", "mask_image": ""}, drawn=False)
    with pytest.raises(
        UserError, match=r"needs mask_image: give --mask mask.png, or in a recipe `sampling: {call: {mask_im"
    ):
        check_needs(call, {"image": ""}, drawn=False)
    with pytest.raises(UserError, match=r"needs source_prompt: give --set sampling.call.source_prompt=VALUE, or"):
        check_needs(call_of(diffusers.CycleDiffusionPipeline), {}, drawn=True)
