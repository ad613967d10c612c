"""LightningDiT (Yao, Yang and Wang 2025): the diffusion transformer of Peebles and Xie 2023 with a modern language
model's parts, each of them a choice: SwiGLU, rotary positions, RMS norms, normed queries and keys.

A latent is cut into G x G patches, one token each. Time and label are summed into one vector c, which shifts, scales
and gates every branch of every block; the gates start at zero, so that each block starts as the identity.

    c = MLP(sinusoids(t)) + embedding(y);    shift, scale, gate = linear(SiLU(c)), for each branch
    x = x + gate Attention(norm(x) (1 + scale) + shift)
    x = x + gate MLP(norm(x) (1 + scale) + shift)

Keys, shapes and initial draws are those of hustvl/LightningDiT, so its checkpoints load strictly; with every option
off they are DiT's and SiT's. Time is t in [0, 1] as it comes, not multiplied by 1000.
"""

from dataclasses import dataclass
from typing import Any

import torch as th
import torch.nn as nn
import torch.nn.functional as F

from .config import UserError
from .linear import Linear
from .nn import SiLU, checkpoint, drop_labels, require_null_label, timestep_embedding

TIME_FREQUENCIES = 256  # channels of the sinusoids of t
UPSTREAM_GUIDED_CHANNELS = 3  # DiT's, kept by LightningDiT whatever the latent's channels


def modulate(x: th.Tensor, shift: th.Tensor | int, scale: th.Tensor) -> th.Tensor:
    """x (1 + scale) + shift; x: (N, L, d), the others (N, 1, d)."""
    return x * (1 + scale) + shift


def sincos_2d(dim: int, grid: int) -> th.Tensor:
    """Fixed positions: the token in row i, column j is [sin(j w), cos(j w), sin(i w), cos(i w)], w_k = 10000^(-4k / d).

    Returns:
        (G^2, d), row by row.
    """
    omega = 10000 ** (-th.arange(dim // 4, dtype=th.float64) / (dim // 4))
    angles = th.arange(grid, dtype=th.float64)[:, None] * omega  # (G, d / 4)
    waves = th.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = waves.repeat(grid, 1), waves.repeat_interleave(grid, dim=0)
    return th.cat([columns, rows], dim=1).float()


def unpatchify(tokens: th.Tensor, patch_size: int, grid: int) -> th.Tensor:
    """Lay patches side by side: (N, G^2, p^2 C), a token being (row, column, channel), -> (N, C, G p, G p)."""
    patches = tokens.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, (grid, grid))  # (N, i, j, p, q, C)
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class RMSNorm(nn.Module):
    """weight x / rms(x), the division in float32."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(th.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type(x.dtype) * self.weight


class RotaryEmbedding2D(nn.Module):
    """Turn pairs of channels by an angle that grows with the row (first half of a head) or the column (second half).

    Products of queries and keys then depend on the distance of their tokens only. Source: Su et al. 2021, equation 34.
    """

    freqs_cos: th.Tensor
    freqs_sin: th.Tensor

    def __init__(self, head_dim, grid):
        super().__init__()
        half = head_dim // 2
        frequencies = 10000.0 ** (-th.arange(0, half, 2).float() / half)
        angles = (th.arange(grid).float()[:, None] * frequencies).repeat_interleave(2, dim=1)  # (G, half): pairs
        rows, columns = angles.repeat_interleave(grid, dim=0), angles.repeat(grid, 1)
        angles = th.cat([rows, columns], dim=1)  # (G^2, head_dim)
        self.register_buffer("freqs_cos", angles.cos())  # persistent, as upstream's
        self.register_buffer("freqs_sin", angles.sin())

    def forward(self, x):
        """x: (N, heads, L, head_dim)."""
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * self.freqs_cos + th.stack([-b, a], dim=-1).flatten(-2) * self.freqs_sin


class PatchEmbed(nn.Module):
    """(N, C, h, w) -> (N, L, d): one linear map of every patch, row by row."""

    def __init__(self, in_channels, hidden_size, patch_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """(N,) -> (N, d)."""

    def __init__(self, hidden_size):
        super().__init__()
        self.mlp = nn.Sequential(Linear(TIME_FREQUENCIES, hidden_size), SiLU(), Linear(hidden_size, hidden_size))

    def forward(self, t):
        first: Any = self.mlp[0]
        return self.mlp(timestep_embedding(t, TIME_FREQUENCIES).type(first.weight.dtype))


class LabelEmbedder(nn.Module):
    """A vector per class and, if labels are ever dropped, one more for "no label": (N,) -> (N, d)."""

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, y, drop=None):
        """drop: (N,) bool, the labels to drop; None draws them while training and keeps all otherwise."""
        return self.embedding_table(drop_labels(y, drop, self.num_classes, self.dropout_prob, self.training))


class Attention(nn.Module):
    """Every token attends to every token, in `num_heads` heads."""

    def __init__(self, dim, num_heads, use_qknorm, use_rmsnorm):
        super().__init__()
        self.num_heads, head_dim = num_heads, dim // num_heads
        norm = (RMSNorm if use_rmsnorm else nn.LayerNorm) if use_qknorm else nn.Identity
        self.qkv = Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = norm(head_dim), norm(head_dim)
        self.proj = Linear(dim, dim)

    def forward(self, x, rope):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (N, heads, L, head_dim)
        q, k = rope(self.q_norm(q)).type(v.dtype), rope(self.k_norm(k)).type(v.dtype)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = Linear(dim, hidden), Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """w3(SiLU(a) b), [a, b] = w12(x); two thirds as wide as an `Mlp`, which makes the weights as many."""

    def __init__(self, dim, mlp_hidden):
        super().__init__()
        hidden = 2 * mlp_hidden // 3
        self.w12, self.w3 = Linear(dim, 2 * hidden), Linear(hidden, dim)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


def _norm_of(dim, use_rmsnorm):
    return RMSNorm(dim) if use_rmsnorm else nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


class LightningDiTBlock(nn.Module):
    """Attention, then an MLP, each shifted (unless `wo_shift`), scaled and gated by c."""

    def __init__(self, dim, num_heads, mlp_ratio, *, use_qknorm, use_swiglu, use_rmsnorm, wo_shift):
        super().__init__()
        self.wo_shift = wo_shift
        self.norm1, self.norm2 = _norm_of(dim, use_rmsnorm), _norm_of(dim, use_rmsnorm)
        self.attn = Attention(dim, num_heads, use_qknorm, use_rmsnorm)
        self.mlp = (SwiGLU if use_swiglu else Mlp)(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(SiLU(), Linear(dim, (4 if wo_shift else 6) * dim))

    def forward(self, x, c, rope):
        """x: (N, L, d), c: (N, d)."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self._modulation(c)
        x = x + gate_msa * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), rope)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))

    def _modulation(self, c) -> tuple[Any, ...]:
        parts = self.adaLN_modulation(c)[:, None].chunk(4 if self.wo_shift else 6, dim=-1)  # (N, 1, d) each
        return (0, *parts[:2], 0, *parts[2:]) if self.wo_shift else parts


class FinalLayer(nn.Module):
    """Tokens to patches: (N, L, d) -> (N, L, p^2 C)."""

    def __init__(self, dim, patch_channels, use_rmsnorm):
        super().__init__()
        self.norm_final = _norm_of(dim, use_rmsnorm)
        self.linear = Linear(dim, patch_channels)
        self.adaLN_modulation = nn.Sequential(SiLU(), Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class LightningDiT(nn.Module):
    """(x_t, t, y) -> a prediction of the shape of x_t; exactly zero before training.

    Args:
        input_size: height and width of the latents; a trained network takes no other.
        class_dropout_prob: how often training sees the null label instead of the sample's; 0 makes no null label.
        learn_sigma: the last layer has twice the channels; the second half is dropped (LightningDiT's) unless
            `keep_sigma` (DiT's, for a Gaussian process that learns its variance).
        wo_shift: blocks are scaled and gated only, which saves a ninth of the weights.
        use_checkpoint: keep no activations of the blocks; compute them again in backward.
    Raises:
        UserError: a width or size that cannot be divided as asked.
    Source: https://arxiv.org/abs/2501.01423; https://arxiv.org/abs/2212.09748, section 3.2.
    """

    def __init__(
        self,
        input_size=32,
        patch_size=2,
        in_channels=32,
        hidden_size=1152,
        depth=28,
        num_heads=16,
        mlp_ratio=4.0,
        class_dropout_prob=0.1,
        num_classes=1000,
        learn_sigma=False,
        use_qknorm=False,
        use_swiglu=False,
        use_rope=False,
        use_rmsnorm=False,
        wo_shift=False,
        use_checkpoint=False,
        keep_sigma=False,
    ):
        super().__init__()
        _check_sizes(input_size, patch_size, hidden_size, num_heads, use_rope)
        self.in_channels, self.input_size, self.patch_size = in_channels, input_size, patch_size
        self.learn_sigma, self.use_checkpoint, self.grid = learn_sigma, use_checkpoint, input_size // patch_size
        self.keep_sigma = keep_sigma
        self.x_embedder = PatchEmbed(in_channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(sincos_2d(hidden_size, self.grid)[None], requires_grad=False)
        self.feat_rope = RotaryEmbedding2D(hidden_size // num_heads, self.grid) if use_rope else nn.Identity()
        options = dict(use_qknorm=use_qknorm, use_swiglu=use_swiglu, use_rmsnorm=use_rmsnorm, wo_shift=wo_shift)
        self.blocks = nn.ModuleList(
            LightningDiTBlock(hidden_size, num_heads, mlp_ratio, **options) for _ in range(depth)
        )
        out_channels = (2 if learn_sigma else 1) * in_channels
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * out_channels, use_rmsnorm)
        self.initialize_weights()

    def initialize_weights(self):
        """Xavier for linear maps, 0.02 for the embeddings, zero for modulations and the last layer."""
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(layer.weight.view(len(layer.weight), -1))  # a patch is one vector
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
        embeddings: list[Any] = [self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]]
        for layer in embeddings:
            nn.init.normal_(layer.weight, std=0.02)
        modulated: list[Any] = [*self.blocks, self.final_layer]
        for layer in (*(part.adaLN_modulation[1] for part in modulated), self.final_layer.linear):
            nn.init.zeros_(layer.weight)

    @property
    def class_dropout_prob(self) -> float:
        """How often training drops a label."""
        return self.y_embedder.dropout_prob

    @property
    def null_label(self) -> int:
        """The label that stands for none: one past the last class; see `require_null_label`."""
        return require_null_label(self.y_embedder.num_classes, self.class_dropout_prob)

    def convert_to_fp16(self):
        """Halve the blocks; embeddings and the last layer stay in float32."""
        self.blocks.half()

    def convert_to_fp32(self):
        """Undo `convert_to_fp16`."""
        self.blocks.float()

    def forward(self, x, t, y=None, drop=None) -> th.Tensor:
        """Predict.

        Args:
            x: (N, C, h, w), the noisy latents.
            t: (N,), in [0, 1].
            y: (N,) int64, classes or `null_label`; None is the null label for all.
            drop: (N,) bool, labels to replace by the null label; None draws them while training.
        Returns:
            (N, C, h, w), or (N, 2C, h, w) with `keep_sigma`.
        Raises:
            ValueError: latents of another shape.
        """
        made_for = (self.in_channels, self.input_size, self.input_size)
        if x.shape[1:] != made_for:
            raise ValueError(
                f"latents are {tuple(x.shape[1:])}, this network was made for {made_for}: "
                "do --image_size and the autoencoder fit its checkpoint?"
            )
        y = th.full_like(t, self.null_label, dtype=th.long) if y is None else y
        c = self.t_embedder(t) + self.y_embedder(y, drop)  # (N, d)
        tokens = self.x_embedder(x) + self.pos_embed  # (N, L, d)
        first: Any = self.blocks[0]
        dtype = first.attn.qkv.weight.dtype  # a half after convert_to_fp16
        h, condition = tokens.type(dtype), c.type(dtype)
        for block in self.blocks:
            h = checkpoint(block, (h, condition, self.feat_rope), block.parameters(), self.use_checkpoint)
        out = unpatchify(self.final_layer(h.type(tokens.dtype), c), self.patch_size, self.grid)
        return out if self.keep_sigma else out[:, : self.in_channels]

    def forward_with_cfg(self, x, t, y, cfg_scale, cfg_interval=None, cfg_interval_start=None):
        """Upstream's classifier-free guidance, kept for its published numbers: it guides three channels only.

        The others keep their own half's output. `guidance.py` guides all channels: prefer it.

        Args:
            x, t, y: (2N, ...), the labels being [y, null]; the second half of x is not read.
            cfg_scale: null + cfg_scale (conditional - null); 1 is no guidance.
            cfg_interval: whether to guide only from the time `cfg_interval_start` on (the first sample's t decides).
        Returns:
            (2N, C, h, w): the guided channels are alike in both halves.
        """
        half = x.chunk(2)[0]
        out = self(th.cat([half, half]), t, y)
        cond, null = out[:, :UPSTREAM_GUIDED_CHANNELS].chunk(2)
        outside = cfg_interval and t[0] < cfg_interval_start
        guided = cond if outside else null + cfg_scale * (cond - null)
        return th.cat([th.cat([guided, guided]), out[:, UPSTREAM_GUIDED_CHANNELS:]], dim=1)


def _check_sizes(input_size, patch_size, hidden_size, num_heads, use_rope):
    if input_size % patch_size:
        raise UserError(
            f"--patch_size is {patch_size}, which does not divide latents of {input_size} x {input_size}; "
            "choose another --model_type (its patch is after the slash) or --image_size"
        )
    if hidden_size % 4:
        raise UserError(f"--hidden_size is {hidden_size}; it must be a multiple of 4 to hold positions")
    if hidden_size % num_heads:
        raise UserError(f"--num_heads is {num_heads}, which does not divide --hidden_size {hidden_size}")
    if use_rope and hidden_size // num_heads % 4:
        raise UserError(
            f"--num_heads is {num_heads}, which makes heads of {hidden_size // num_heads} channels; "
            "--use_rope True needs a multiple of 4"
        )


SIZES = {
    # ours, for two CPU cores: 4 M weights; the S of DiT is twice as deep and as wide
    "LightningDiT-S/1": dict(depth=6, hidden_size=192, num_heads=3, patch_size=1),
    "LightningDiT-S/2": dict(depth=6, hidden_size=192, num_heads=3, patch_size=2),
    "LightningDiT-B/1": dict(depth=12, hidden_size=768, num_heads=12, patch_size=1),
    "LightningDiT-B/2": dict(depth=12, hidden_size=768, num_heads=12, patch_size=2),
    "LightningDiT-L/2": dict(depth=24, hidden_size=1024, num_heads=16, patch_size=2),
    "LightningDiT-XL/1": dict(depth=28, hidden_size=1152, num_heads=16, patch_size=1),
    "LightningDiT-XL/2": dict(depth=28, hidden_size=1152, num_heads=16, patch_size=2),
    "LightningDiT-1p0B/1": dict(depth=24, hidden_size=1536, num_heads=24, patch_size=1),
    "LightningDiT-1p0B/2": dict(depth=24, hidden_size=1536, num_heads=24, patch_size=2),
    "LightningDiT-1p6B/1": dict(depth=28, hidden_size=1792, num_heads=28, patch_size=1),
    "LightningDiT-1p6B/2": dict(depth=28, hidden_size=1792, num_heads=28, patch_size=2),
}


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """The transformer, with LightningDiT's choices; all False is a plain DiT."""

    model_type: str = "LightningDiT-B/1"  # size / patch; LightningDiT-S/1 is made for two CPU cores
    use_qknorm: bool = False  # norm queries and keys: steadier, and slightly worse where training is steady anyway
    use_swiglu: bool = True  # gated MLPs
    use_rope: bool = True  # rotary positions
    use_rmsnorm: bool = True  # RMS norms
    wo_shift: bool = False  # scale and gate the blocks only: a ninth fewer weights

    def __post_init__(self):
        if self.model_type not in SIZES:
            raise UserError(f"--model_type is {self.model_type!r}; choose one of {', '.join(SIZES)}")


def create_dit(name: str, **kwargs) -> LightningDiT:
    """A network of a named size; `kwargs` are the other arguments of `LightningDiT`.

    Raises:
        UserError: no such name.
    """
    DiTConfig(model_type=name)
    return LightningDiT(**SIZES[name], **kwargs)
