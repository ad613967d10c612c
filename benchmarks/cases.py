"""The networks that are trained and sampled in the benchmarks: what one would take on two CPU cores."""

import rivals
from contenders import Case, unet

from guided_diffusion_vae.dit import SIZES


def unets(tiny: bool) -> list[Case]:
    """Latents of 64 and 128 pixels, and pixels: the official shapes of the comparisons."""
    if tiny:
        least = {"channels": 32, "mult": "1,2", "blocks": 1}
        return [
            Case("latents 4x16x16, 32 channels", 2, unet(**least)),
            Case("pixels 3x16x16, 32 channels", 2, unet(vae_path="pixel", image_size=16, attention=8, **least)),
        ]
    return [
        Case("latents 4x16x16, 64 channels", 16, unet()),
        Case("latents 4x32x32, 128 channels", 8, unet(image_size=128, channels=128, attention=16)),
        Case("pixels 3x64x64, 64 channels", 4, unet(vae_path="pixel", attention=16)),
    ]


def transformer(tiny: bool) -> Case:
    """Our smallest LightningDiT with 256 tokens (tiny: 64), told the user, predicting noise."""
    patch = 2 if tiny else 1
    flags = {"network": "dit", "model_type": f"LightningDiT-S/{patch}", "class_cond": True, "image_size": 64}
    return Case(f"LightningDiT-S/{patch} on latents 4x16x16", 2 if tiny else 16, flags)


def diffusers_twin(case: Case):
    """Diffusers' transformer of the same width, depth and patches as the case's."""
    size = SIZES[case.run.model_type]
    return rivals.diffusers_dit(
        size=case.shape[-1],
        channels=case.shape[1],
        patch=size["patch_size"],
        depth=size["depth"],
        width=size["hidden_size"],
        heads=size["num_heads"],
    )


DIFFUSERS = {"UNet2DModel": rivals.diffusers_unet, "DiTTransformer2DModel": diffusers_twin}  # of a case's size
