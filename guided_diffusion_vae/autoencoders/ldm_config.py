"""Upstream's way to write a training down, ldm-style YAML (`model: params: ddconfig: lossconfig:`), as our settings.

In such a file `target:` names a Python class to import and `params:` its arguments. Here a target is looked up in a
table and never imported: a configuration is text, not a program. A key that is neither translated nor known to be
harmless is an error, for upstream drops many without a word.
"""

from typing import Any

from ..config import UserError

TARGETS = {
    "model": ("ldm.models.autoencoder.AutoencoderKL",),
    "loss": (
        "ldm.modules.losses.LPIPSWithDiscriminator",
        "ldm.modules.losses.contperceptual.LPIPSWithDiscriminator",
    ),
    "data": ("main.DataModuleFromConfig",),
}
LOSS_NAMES = (
    *("kl_weight", "perceptual_weight", "pp_style", "disc_factor", "disc_weight", "disc_loss", "disc_num_layers"),
    *("vf_weight", "adaptive_vf", "cos_margin", "distmat_margin", "cos_weight", "distmat_weight"),
)
LOSS_DEFAULTS = {"kl_weight": 1.0, "perceptual_weight": 1.0, "disc_factor": 1.0, "disc_weight": 1.0} | {
    "vf_weight": 100.0,
    "adaptive_vf": False,
}  # where upstream's differ from ours
LAUNCH = ("accelerator", "devices", "num_nodes", "strategy")  # said with mpiexec or torchrun here
NOMINAL = 256  # the size that our --attn_resolutions counts from


def is_ldm(loaded: dict[str, Any]) -> bool:
    """Whether a YAML file is written upstream's way."""
    return isinstance(loaded.get("model"), dict)


class Block:
    """A mapping of the file, whose keys are taken one by one; what is left at the end is an error."""

    def __init__(self, values: Any, path: str):
        if not isinstance(values, dict):
            raise UserError(f"--config: {path} must be a block of 'key: value' lines, it is {values!r}")
        self.values, self.path = dict(values), path

    def take(self, name: str, default: Any = None) -> Any:
        value = self.values.pop(name, default)
        return default if value is None else value

    def block(self, name: str) -> "Block":
        return Block(self.values.pop(name, None) or {}, f"{self.path}.{name}".lstrip("."))

    def target(self, kind: str) -> None:
        """Check the class that the file names against the table."""
        found = self.take("target", TARGETS[kind][0])
        if found not in TARGETS[kind]:
            raise UserError(
                f"--config: {self.path}.target is {found!r}; known are {', '.join(TARGETS[kind])}"
                " (a target is looked up, never imported)"
            )

    def finish(self) -> None:
        for name in self.values:
            raise UserError(f"--config: {self.path}.{name} has no meaning here (upstream ignores it): remove the line")


def settings_from_ldm(loaded: dict[str, Any]) -> dict[str, Any]:
    """Our settings (flag: value) for an ldm-style file.

    Steps: upstream's `disc_start` counts the two optimisers apart, two a batch; ours counts batches.

    Raises:
        UserError: a target that is not in the table, or a key that would be ignored.
    """
    top = Block(loaded, "")
    if "weight_init" in top.values:
        raise UserError(
            "--config: weight_init is ignored by upstream, which reads init_weight: rename it, or the training"
            " starts from nothing"
        )
    start = top.take("init_weight") or top.take("ckpt_path")
    settings = {"model": "kl", **({"ckpt": str(start)} if start else {})}
    settings |= _of_model(top.block("model")) | _of_data(top.block("data")) | _of_lightning(top.block("lightning"))
    top.take("ckpt_path")
    top.finish()
    return settings


def _of_model(model: Block) -> dict[str, Any]:
    model.target("model")
    settings = {"lr": model.take("base_learning_rate", 1e-4), "lr_schedule": "constant"}
    params = model.block("params")
    for name in ("monitor", "image_key", "colorize_nlabels"):
        params.take(name)
    if params.values.get("ckpt_path"):
        settings["ckpt"] = str(params.take("ckpt_path"))
    settings["use_vf"] = params.take("use_vf", "none")
    settings["reverse_proj"] = params.take("reverse_proj", False)
    settings["proj_fix"] = params.take("proj_fix", False)
    embed_dim = params.take("embed_dim")
    settings |= _of_network(params.block("ddconfig"), embed_dim) | _of_loss(params.block("lossconfig"))
    params.finish()
    model.finish()
    return settings


def _of_network(network: Block, embed_dim: int | None) -> dict[str, Any]:
    size, mult = network.take("resolution", NOMINAL), network.take("ch_mult", [1, 2, 4, 8])
    attends = [level for level in range(len(mult)) if size // 2**level in network.values.get("attn_resolutions", [])]
    network.take("attn_resolutions")
    settings = {name: network.take(name, default) for name, default in (("ch", 128), ("num_res_blocks", 2))}
    settings |= {"z_channels": network.take("z_channels", 4), "in_channels": network.take("in_channels", 3)}
    settings |= {"dropout": network.take("dropout", 0.0), "mid_attn": True, "norm_groups": 32}
    settings["ch_mult"] = ",".join(map(str, mult))
    settings["attn_resolutions"] = ",".join(str(NOMINAL // 2**level) for level in attends)
    if embed_dim not in (None, settings["z_channels"]):
        raise UserError(
            f"--config: embed_dim {embed_dim} is not ddconfig.z_channels {settings['z_channels']}: make them equal"
        )
    if network.take("out_ch", settings["in_channels"]) != settings["in_channels"]:
        raise UserError(f"--config: ddconfig.out_ch is not ddconfig.in_channels ({settings['in_channels']})")
    if not network.take("double_z", True):
        raise UserError("--config: ddconfig.double_z is False; a KL autoencoder has a mean and a variance: set it True")
    network.finish()
    return settings


def _of_loss(loss: Block) -> dict[str, Any]:
    loss.target("loss")
    params = loss.block("params")
    settings = {name: params.take(name, LOSS_DEFAULTS.get(name)) for name in LOSS_NAMES}
    settings["disc_start"] = (params.take("disc_start", 0) + 1) // 2
    for name, only in (("logvar_init", 0.0), ("use_actnorm", False), ("disc_conditional", False)):
        if params.take(name, only) != only:
            raise UserError(f"--config: {params.path}.{name} can only be {only} here")
    for name in ("pixelloss_weight", "disc_in_channels"):
        params.take(name)  # the first is never used upstream, the second follows from the image
    params.finish()
    loss.finish()
    return {name: value for name, value in settings.items() if value is not None}


def _of_data(data: Block) -> dict[str, Any]:
    data.target("data")
    params = data.block("params")
    settings = {"batch_size": params.take("batch_size")}
    for name in ("wrap", "num_workers", "validation"):
        params.take(name)
    train = params.block("train")
    train.take("target")
    images = train.block("params")
    settings |= {"data_root": images.take("data_root"), "image_size": images.take("size")}
    for part in (images, train, params, data):
        part.finish()
    return {name: value for name, value in settings.items() if value is not None}


def _of_lightning(lightning: Block) -> dict[str, Any]:
    trainer = lightning.block("trainer")
    for name in LAUNCH:
        trainer.take(name)
    settings = {"epochs": trainer.take("max_epochs")}
    precision = str(trainer.take("precision", "32"))
    if precision not in ("32", "32-true", "bf16", "bf16-mixed"):
        raise UserError(f"--config: {trainer.path}.precision is {precision}; 32 and bf16-mixed are supported")
    settings["amp"] = "bf16" if precision.startswith("bf16") else "none"
    trainer.finish()
    lightning.values.pop("modelcheckpoint", None)
    lightning.finish()
    return {name: value for name, value in settings.items() if value is not None}
