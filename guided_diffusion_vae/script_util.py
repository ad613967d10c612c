"""The hall where a run is put together: flags in, networks and processes out.

`model_and_diffusion_defaults()`, `create_*`, `args_to_dict` and `add_dict_to_argparser` are upstream's; a default is
written once, in the dataclasses below. New parameters are appended with defaults that leave upstream's callers as they
were. `create_model_and_diffusion_vae` is the latent twin: channels and size come from the autoencoder.
"""

import inspect
from dataclasses import dataclass

from . import gaussian_diffusion as gd
from .config import UserError, add_dict_to_argparser, args_to_dict, field_defaults, refuse_below, str2bool
from .model_flags import load_weights
from .respace import SpacedDiffusion, space_timesteps
from .unet import EncoderUNetModel, SuperResModel, UNetModel

__all__ = ["add_dict_to_argparser", "args_to_dict", "load_weights", "str2bool"]  # upstream's names, and one more

NUM_CLASSES = 1000  # ImageNet's; a run on a folder of users derives its own number

CHANNEL_MULT = {  # relative widths of the levels, by the size of what the U-Net sees
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),  # latents: not in upstream's table
    16: (1, 2, 2),
    8: (1, 2),
}
SUPER_RES_CHANNEL_MULT = {512: (1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4)}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The U-Net."""

    image_size: int = 64  # side of the images in pixels; the latent size follows from the autoencoder
    num_channels: int = 128  # base width; a multiple of 32
    num_res_blocks: int = 2  # residual blocks a level
    num_heads: int = 4  # attention heads, unless num_head_channels is given
    num_heads_upsample: int = -1  # heads in the decoder; -1 = num_heads
    num_head_channels: int = -1  # channels a head; -1 = use num_heads
    attention_resolutions: str = "16,8"  # sizes, of what the U-Net sees, at which it attends
    channel_mult: str = ""  # relative widths of the levels, such as 1,2,4; empty: by size
    dropout: float = 0.0  # probability, in residual blocks
    class_cond: bool = False  # condition on the class: the user
    use_checkpoint: bool = False  # recompute activations in backward to save memory
    use_scale_shift_norm: bool = True  # the embedding scales and shifts the norm
    resblock_updown: bool = False  # resize with residual blocks
    use_fp16: bool = False  # half-precision weights and activations
    use_new_attention_order: bool = False  # split q, k, v before the heads

    def __post_init__(self):
        refuse_below(self, 1, "image_size", "num_channels", "num_res_blocks")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout is {self.dropout}; a probability lies between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The Gaussian process."""

    learn_sigma: bool = False  # learn the variance, too
    diffusion_steps: int = 1000  # T
    noise_schedule: str = "linear"  # linear or cosine
    timestep_respacing: str = ""  # steps kept for sampling: 250, ddim50, 10,10,20; empty: all
    use_kl: bool = False  # train on the variational bound
    predict_xstart: bool = False  # predict x_0 instead of the noise
    rescale_timesteps: bool = False  # give the network t on a scale of 1000
    rescale_learned_sigmas: bool = False  # weight of the variational term times T/1000


@dataclass(frozen=True, kw_only=True)
class LaterDiffusionConfig:
    """What the Gaussian process can that upstream's cannot; all off is upstream's."""

    predict_v: bool = False  # predict v, between noise and x_0, instead of the noise
    zero_terminal_snr: bool = False  # let the last step be pure noise; with --predict_v or --predict_xstart
    min_snr_gamma: float = 0.0  # weight the MSE by time, with gamma of Min-SNR, published 5; 0: no weights

    def __post_init__(self):
        if not 0 <= self.min_snr_gamma < float("inf"):
            raise UserError(f"--min_snr_gamma is {self.min_snr_gamma}; give a positive number such as 5, or 0 for none")


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """The noise-conditioned classifier."""

    image_size: int = 64  # side of the images in pixels
    classifier_use_fp16: bool = False  # half-precision weights and activations
    classifier_width: int = 128  # base width
    classifier_depth: int = 2  # residual blocks a level
    classifier_attention_resolutions: str = "32,16,8"  # sizes at which it attends
    classifier_use_scale_shift_norm: bool = True  # the embedding scales and shifts the norm
    classifier_resblock_updown: bool = True  # resize with residual blocks
    classifier_pool: str = "attention"  # adaptive, attention, spatial or spatial_v2


def diffusion_defaults():
    """Defaults of the process, in flag order."""
    return field_defaults(DiffusionConfig)


def classifier_defaults():
    """Defaults of the classifier, in flag order."""
    return field_defaults(ClassifierConfig)


def model_and_diffusion_defaults():
    """Defaults of network and process, in flag order."""
    return field_defaults(ModelConfig, DiffusionConfig)


def classifier_and_diffusion_defaults():
    """Defaults of classifier and process, in flag order."""
    return field_defaults(ClassifierConfig, DiffusionConfig)


def sr_model_and_diffusion_defaults():
    """Defaults of the super-resolution network and process, in flag order."""
    defaults = {**model_and_diffusion_defaults(), "large_size": 256, "small_size": 64}
    own = inspect.signature(sr_create_model_and_diffusion).parameters
    return {name: value for name, value in defaults.items() if name in own}


def create_model_and_diffusion(
    image_size,
    class_cond,
    learn_sigma,
    num_channels,
    num_res_blocks,
    channel_mult,
    num_heads,
    num_head_channels,
    num_heads_upsample,
    attention_resolutions,
    dropout,
    diffusion_steps,
    noise_schedule,
    timestep_respacing,
    use_kl,
    predict_xstart,
    rescale_timesteps,
    rescale_learned_sigmas,
    use_checkpoint,
    use_scale_shift_norm,
    resblock_updown,
    use_fp16,
    use_new_attention_order,
    in_channels=3,
    num_classes=NUM_CLASSES,
    likelihood="discretized",
):
    """A U-Net and its process from flags; `image_size` is the side of what the U-Net sees."""
    model = create_model(
        image_size,
        num_channels,
        num_res_blocks,
        channel_mult=channel_mult,
        learn_sigma=learn_sigma,
        class_cond=class_cond,
        use_checkpoint=use_checkpoint,
        attention_resolutions=attention_resolutions,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        dropout=dropout,
        resblock_updown=resblock_updown,
        use_fp16=use_fp16,
        use_new_attention_order=use_new_attention_order,
        in_channels=in_channels,
        num_classes=num_classes,
    )
    diffusion = create_gaussian_diffusion(
        steps=diffusion_steps,
        learn_sigma=learn_sigma,
        noise_schedule=noise_schedule,
        use_kl=use_kl,
        predict_xstart=predict_xstart,
        rescale_timesteps=rescale_timesteps,
        rescale_learned_sigmas=rescale_learned_sigmas,
        timestep_respacing=timestep_respacing,
        likelihood=likelihood,
    )
    return model, diffusion


def create_model_and_diffusion_vae(vae, *, num_classes=NUM_CLASSES, **settings):
    """A U-Net on the latents of `vae`, and its Gaussian process; `assembly` makes the other networks and processes.

    Args:
        vae: a `VAEInterface`; says how many channels and how large a latent `image_size` pixels become.
        num_classes: how many users there are, if `class_cond`.
        settings: the fields of `ModelConfig`, `DiffusionConfig` and, if wanted, `LaterDiffusionConfig`; `image_size`
            is in pixels.
    Raises:
        UserError: a size that the autoencoder or the U-Net cannot halve.
    """
    of_process = field_defaults(DiffusionConfig, LaterDiffusionConfig)
    process = {name: value for name, value in settings.items() if name in of_process}
    network = {name: value for name, value in settings.items() if name not in process or name == "learn_sigma"}
    return create_model_vae(vae, num_classes=num_classes, **network), create_diffusion_vae(vae, **process)


def create_model_vae(vae, *, num_classes=NUM_CLASSES, **settings):
    """A U-Net on the latents of `vae`; see `create_model_and_diffusion_vae`."""
    channels, height, _ = vae.latent_shape(settings["image_size"])
    if not settings["channel_mult"] and height not in CHANNEL_MULT:
        raise UserError(
            f"--image_size {settings['image_size']} gives {height} x {height} latents, for which there is no standard"
            f" U-Net: give --channel_mult, such as 1,2,2 ({_halvings(height)} levels at most)"
        )
    return create_model(**{**settings, "image_size": height}, in_channels=channels, num_classes=num_classes)


def create_diffusion_vae(vae, *, diffusion_steps, **settings):
    """The Gaussian process on latents: at its end a density of latents, not of 8-bit pixels."""
    likelihood = "discretized" if vae.is_pixel else "gaussian"
    return create_gaussian_diffusion(steps=diffusion_steps, likelihood=likelihood, **settings)


def _halvings(size: int) -> int:
    """How many levels a U-Net on this size can have: one more than the times it can be halved."""
    return (size & -size).bit_length()


def create_model(
    image_size,
    num_channels,
    num_res_blocks,
    channel_mult="",
    learn_sigma=False,
    class_cond=False,
    use_checkpoint=False,
    attention_resolutions="16",
    num_heads=1,
    num_head_channels=-1,
    num_heads_upsample=-1,
    use_scale_shift_norm=False,
    dropout=0,
    resblock_updown=False,
    use_fp16=False,
    use_new_attention_order=False,
    in_channels=3,
    num_classes=NUM_CLASSES,
    class_dropout_prob=0.0,
):
    """A U-Net from flags; it has twice as many outputs as inputs if it learns the variance."""
    levels = parse_channel_mult(channel_mult) or _from_table(CHANNEL_MULT, image_size, "unsupported image size")
    if _halvings(image_size) < len(levels):
        raise UserError(
            f"the U-Net sees {image_size} x {image_size} and cannot halve that {len(levels) - 1} times:"
            f" --channel_mult may have {_halvings(image_size)} entries at most, or choose another --image_size"
        )
    return UNetModel(
        image_size=image_size,
        in_channels=in_channels,
        model_channels=num_channels,
        out_channels=in_channels * (2 if learn_sigma else 1),
        num_res_blocks=num_res_blocks,
        attention_resolutions=downsample_factors(attention_resolutions, image_size),
        dropout=dropout,
        channel_mult=levels,
        num_classes=num_classes if class_cond else None,
        use_checkpoint=use_checkpoint,
        use_fp16=use_fp16,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        use_new_attention_order=use_new_attention_order,
        class_dropout_prob=class_dropout_prob,
    )


def parse_channel_mult(text: str) -> tuple[float, ...]:
    """`1,2,4` or `0.5,1` as numbers; empty stays empty.

    Raises:
        UserError: an entry is no positive number.
    """
    try:
        levels = tuple(float(word) if "." in word else int(word) for word in str(text).split(",") if word.strip())
    except ValueError as error:
        raise UserError(f"--channel_mult is {text!r}; it must be numbers such as 1,2,4") from error
    if any(level <= 0 for level in levels):
        raise UserError(f"--channel_mult is {text!r}; every entry must be above 0")
    return levels


def _from_table(table, size, what):
    if size not in table:
        raise UserError(f"{what}: {size}; known are {', '.join(map(str, table))}, or give --channel_mult")
    return table[size]


def downsample_factors(attention_resolutions: str, image_size: int) -> tuple[int, ...]:
    """Sizes at which to attend, `32,16,8`, as factors of `image_size`; larger sizes are left out, as upstream does."""
    try:
        return tuple(image_size // int(size) for size in str(attention_resolutions).split(",") if size.strip())
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"--attention_resolutions is {attention_resolutions!r}; it must be sizes such as 16,8"
        ) from error


def create_classifier_and_diffusion(
    image_size,
    classifier_use_fp16,
    classifier_width,
    classifier_depth,
    classifier_attention_resolutions,
    classifier_use_scale_shift_norm,
    classifier_resblock_updown,
    classifier_pool,
    learn_sigma,
    diffusion_steps,
    noise_schedule,
    timestep_respacing,
    use_kl,
    predict_xstart,
    rescale_timesteps,
    rescale_learned_sigmas,
):
    """A noise-conditioned classifier and its process from flags."""
    classifier = create_classifier(
        image_size,
        classifier_use_fp16,
        classifier_width,
        classifier_depth,
        classifier_attention_resolutions,
        classifier_use_scale_shift_norm,
        classifier_resblock_updown,
        classifier_pool,
    )
    diffusion = create_gaussian_diffusion(
        steps=diffusion_steps,
        learn_sigma=learn_sigma,
        noise_schedule=noise_schedule,
        use_kl=use_kl,
        predict_xstart=predict_xstart,
        rescale_timesteps=rescale_timesteps,
        rescale_learned_sigmas=rescale_learned_sigmas,
        timestep_respacing=timestep_respacing,
    )
    return classifier, diffusion


def create_classifier(
    image_size,
    classifier_use_fp16,
    classifier_width,
    classifier_depth,
    classifier_attention_resolutions,
    classifier_use_scale_shift_norm,
    classifier_resblock_updown,
    classifier_pool,
    in_channels=3,
    num_classes=NUM_CLASSES,
    channel_mult="",
):
    """An `EncoderUNetModel` from flags, with 64 channels a head."""
    return EncoderUNetModel(
        image_size=image_size,
        in_channels=in_channels,
        model_channels=classifier_width,
        out_channels=num_classes,
        num_res_blocks=classifier_depth,
        attention_resolutions=downsample_factors(classifier_attention_resolutions, image_size),
        channel_mult=parse_channel_mult(channel_mult)
        or _from_table(CHANNEL_MULT, image_size, "unsupported image size"),
        use_fp16=classifier_use_fp16,
        num_head_channels=64,
        use_scale_shift_norm=classifier_use_scale_shift_norm,
        resblock_updown=classifier_resblock_updown,
        pool=classifier_pool,
    )


def sr_create_model_and_diffusion(
    large_size,
    small_size,
    class_cond,
    learn_sigma,
    num_channels,
    num_res_blocks,
    num_heads,
    num_head_channels,
    num_heads_upsample,
    attention_resolutions,
    dropout,
    diffusion_steps,
    noise_schedule,
    timestep_respacing,
    use_kl,
    predict_xstart,
    rescale_timesteps,
    rescale_learned_sigmas,
    use_checkpoint,
    use_scale_shift_norm,
    resblock_updown,
    use_fp16,
):
    """A super-resolution U-Net and its process from flags."""
    model = sr_create_model(
        large_size,
        small_size,
        num_channels,
        num_res_blocks,
        learn_sigma=learn_sigma,
        class_cond=class_cond,
        use_checkpoint=use_checkpoint,
        attention_resolutions=attention_resolutions,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        dropout=dropout,
        resblock_updown=resblock_updown,
        use_fp16=use_fp16,
    )
    diffusion = create_gaussian_diffusion(
        steps=diffusion_steps,
        learn_sigma=learn_sigma,
        noise_schedule=noise_schedule,
        use_kl=use_kl,
        predict_xstart=predict_xstart,
        rescale_timesteps=rescale_timesteps,
        rescale_learned_sigmas=rescale_learned_sigmas,
        timestep_respacing=timestep_respacing,
    )
    return model, diffusion


def sr_create_model(
    large_size,
    small_size,
    num_channels,
    num_res_blocks,
    learn_sigma,
    class_cond,
    use_checkpoint,
    attention_resolutions,
    num_heads,
    num_head_channels,
    num_heads_upsample,
    use_scale_shift_norm,
    dropout,
    resblock_updown,
    use_fp16,
):
    """A `SuperResModel` from flags; `small_size` is the size of its second input."""
    return SuperResModel(
        image_size=large_size,
        in_channels=3,
        model_channels=num_channels,
        out_channels=6 if learn_sigma else 3,
        num_res_blocks=num_res_blocks,
        attention_resolutions=downsample_factors(attention_resolutions, large_size),
        dropout=dropout,
        channel_mult=_from_table(SUPER_RES_CHANNEL_MULT, large_size, "unsupported large size"),
        num_classes=NUM_CLASSES if class_cond else None,
        use_checkpoint=use_checkpoint,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        use_fp16=use_fp16,
    )


def create_gaussian_diffusion(
    *,
    steps=1000,
    learn_sigma=False,
    sigma_small=False,
    noise_schedule="linear",
    use_kl=False,
    predict_xstart=False,
    rescale_timesteps=False,
    rescale_learned_sigmas=False,
    timestep_respacing="",
    likelihood="discretized",
    predict_v=False,
    zero_terminal_snr=False,
    min_snr_gamma=0.0,
):
    """The Gaussian process of these flags, respaced if asked.

    Raises:
        UserError: flags of `LaterDiffusionConfig` that do not go with the others.
    """
    LaterDiffusionConfig(predict_v=predict_v, zero_terminal_snr=zero_terminal_snr, min_snr_gamma=min_snr_gamma)
    if predict_v and predict_xstart:
        raise UserError("--predict_v True and --predict_xstart True: a network predicts one of them, leave one out")
    if zero_terminal_snr and not (predict_v or predict_xstart):
        raise UserError(
            "--zero_terminal_snr True: x_0 does not follow from the noise where nothing else is left:"
            " add --predict_v True or --predict_xstart True"
        )
    if min_snr_gamma and use_kl:
        raise UserError(f"--min_snr_gamma {min_snr_gamma} weights the MSE, which --use_kl True has not: leave one out")
    kept = space_timesteps(steps, timestep_respacing or [steps])
    betas = gd.get_named_beta_schedule(noise_schedule, steps)
    if zero_terminal_snr:
        betas = gd.end_in_pure_noise(betas)
        if kept and max(kept) != steps - 1:
            raise UserError(
                f"--timestep_respacing {timestep_respacing} begins at step {max(kept)}, but the pure noise of"
                f" --zero_terminal_snr True is step {steps - 1}: give {max(len(kept), 2)}, which keeps it"
            )
    mean = gd.ModelMeanType.START_X if predict_xstart else gd.ModelMeanType.EPSILON
    variance = gd.ModelVarType.FIXED_SMALL if sigma_small else gd.ModelVarType.FIXED_LARGE
    mse = gd.LossType.RESCALED_MSE if rescale_learned_sigmas else gd.LossType.MSE
    return SpacedDiffusion(
        use_timesteps=kept,
        betas=betas,
        model_mean_type=gd.ModelMeanType.V if predict_v else mean,
        model_var_type=gd.ModelVarType.LEARNED_RANGE if learn_sigma else variance,
        loss_type=gd.LossType.RESCALED_KL if use_kl else mse,
        rescale_timesteps=rescale_timesteps,
        likelihood=likelihood,
        min_snr_gamma=min_snr_gamma,
    )
