"""The KL autoencoder of latent diffusion (Rombach et al. 2022), which Stable Diffusion and VA-VAE share.

An encoder halves an image L - 1 times and ends in mean and log-variance of z; a decoder mirrors it. Configuration names
and state_dict keys are those of LDM's `ddconfig`: LDM and VA-VAE checkpoints load strictly; others see `layouts`.
"""

from dataclasses import asdict, dataclass

import torch as th
import torch.nn as nn
import torch.nn.functional as F

from .. import channels_last
from ..channels_last import Conv2d
from ..nn import checkpoint
from .base import Posterior


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """`ddconfig` and `embed_dim`, and two settings for small networks."""

    ch: int = 128  # base width
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)  # width of each level, relative to it
    num_res_blocks: int = 2  # residual blocks a level of the encoder; the decoder has one more
    attn_resolutions: tuple[int, ...] = ()  # nominal sizes at which it attends
    resolution: int = 256  # the nominal size of level 0; level i has resolution / 2^i
    in_channels: int = 3
    out_ch: int = 3
    z_channels: int = 4
    embed_dim: int = 4
    dropout: float = 0.0
    mid_attn: bool = True  # attend in the middle
    norm_groups: int = 32
    quant_convs: bool = True  # 1x1 convolutions around z; LDM always has them

    @property
    def downsample(self) -> int:
        return 2 ** (len(self.ch_mult) - 1)

    def attends(self, level: int) -> bool:
        return self.resolution // 2**level in self.attn_resolutions


def norm(channels: int, config: KLConfig) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with a 1x1 shortcut where the width changes."""

    use_checkpoint = False  # see KLAutoencoder.recompute

    def __init__(self, c_in: int, c_out: int, config: KLConfig):
        super().__init__()
        self.norm1 = norm(c_in, config)
        self.conv1 = Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = norm(c_out, config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        return checkpoint(self._forward, (x,), (), self.use_checkpoint)

    def _forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head attention over all positions, with a residual."""

    use_checkpoint = False  # see KLAutoencoder.recompute

    def __init__(self, channels: int, config: KLConfig):
        super().__init__()
        self.norm = norm(channels, config)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        return checkpoint(self._forward, (x,), (), self.use_checkpoint)

    def _forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(h.transpose(1, 2).view(x.shape))


class Downsample(nn.Module):
    """Half the size: padded right and below only, then a strided 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size (nearest), then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        if channels_last.upsampling_pays(x):
            return channels_last.upsample_conv(x, self.conv)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution; `downsample` or `upsample` is added by its owner."""

    def __init__(self, c_in: int, c_out: int, blocks: int, attends: bool, config: KLConfig):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out, config) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out, config) for _ in range(blocks if attends else 0))

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if self.attn else x
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, config: KLConfig):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, config)
        self.attn_1 = AttnBlock(channels, config) if config.mid_attn else nn.Identity()
        self.block_2 = ResnetBlock(channels, channels, config)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Image -> 2 z_channels."""

    def __init__(self, config: KLConfig):
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        self.conv_in = Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([config.ch, *widths], widths, strict=False)):
            level = Level(c_in, c_out, config.num_res_blocks, config.attends(i), config)
            if i < len(widths) - 1:
                level.downsample = Downsample(c_out)
            self.down.append(level)
        self.mid = Middle(widths[-1], config)
        self.norm_out = norm(widths[-1], config)
        self.conv_out = Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
            downsample = getattr(level, "downsample", None)  # all but the last have it
            h = downsample(h) if downsample else h
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """z_channels -> image; `up.i` is the level of size i, so the last in the list runs first."""

    def __init__(self, config: KLConfig):
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        self.conv_in = Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config)
        self.up = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            level = Level(c_in, c_out, config.num_res_blocks + 1, config.attends(i), config)
            if i > 0:
                level.upsample = Upsample(c_out)
            self.up.append(level)
        self.norm_out = norm(widths[0], config)
        self.conv_out = Conv2d(widths[0], config.out_ch, 3, padding=1)

    def forward(self, z):
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
            upsample = getattr(level, "upsample", None)
            h = upsample(h) if upsample else h
        return self.conv_out(F.silu(self.norm_out(h)))


class KLAutoencoder(nn.Module):
    """x (N, 3, H, W) in [-1, 1] <-> z (N, embed_dim, H / f, W / f), not scaled."""

    origin: dict[str, th.Tensor] | None = None  # if only the decoder was tuned: the weights it was tuned from

    def __init__(self, config: KLConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        if config.quant_convs:
            self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.embed_dim, 1)
            self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        else:
            self.quant_conv, self.post_quant_conv = nn.Identity(), nn.Identity()

    def encode(self, x: th.Tensor) -> Posterior:
        """The posterior of z given x."""
        return Posterior(self.quant_conv(self.encoder(x)))

    def decode(self, z: th.Tensor) -> th.Tensor:
        """The image of z; not clamped."""
        return self.decoder(self.post_quant_conv(z))

    def decoding(self) -> dict[str, nn.Parameter]:
        """The parameters that take part in decoding only: all others make the latents."""
        return {name: p for name, p in self.named_parameters() if name.startswith(("decoder.", "post_quant_conv."))}

    def recompute(self, flag: bool = True) -> None:
        """Recompute the blocks' activations in backward instead of keeping them: slower, in less memory."""
        for module in self.modules():
            if isinstance(module, (ResnetBlock, AttnBlock)):
                module.use_checkpoint = flag

    def config_dict(self) -> dict:
        """The configuration as plain values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.config).items()}
