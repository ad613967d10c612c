"""The U-Net of ADM (Dhariwal and Nichol 2021): residual blocks that know the time, attention where it is small.

Going down, every block's output is remembered; going up, every block sees the one of its size beside its input. Keys,
shapes, order and initial draws are those of openai/guided-diffusion, so its checkpoints load strictly.

    emb = MLP(sinusoids(t)) + embedding(y)
    h = conv(SiLU(norm(x)));   scale, shift = linear(SiLU(emb));
    out = skip(x) + conv(dropout(SiLU(norm(h) (1 + scale) + shift)))
"""

from abc import abstractmethod
from functools import partial

import torch as th
import torch.nn as nn
import torch.nn.functional as F

from . import channels_last
from .fp16_util import convert_module_to_f16, convert_module_to_f32
from .nn import (
    avg_pool_nd,
    checkpoint,
    conv_nd,
    drop_labels,
    linear,
    normalization,
    require_null_label,
    timestep_embedding,
    zero_module,
)

ROWS_FROM = 128  # positions from which attention on a CPU is faster with the channels innermost, copies included


class TimestepBlock(nn.Module):
    """A module that also takes the embedding of the time."""

    @abstractmethod
    def forward(self, x, emb):
        """x: (N, C, ...), emb: (N, E)."""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """Layers in a row; those that take the embedding get it."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Upsample(nn.Module):
    """Twice the size (nearest), then a 3x3 convolution if `use_conv`; of three dimensions only the last two grow."""

    def __init__(self, channels, use_conv, dims=2, out_channels=None):
        super().__init__()
        self.channels, self.use_conv, self.dims = channels, use_conv, dims
        self.out_channels = out_channels or channels
        if use_conv:
            self.conv = conv_nd(dims, channels, self.out_channels, 3, padding=1)

    def forward(self, x):
        assert x.shape[1] == self.channels
        if self.use_conv and channels_last.upsampling_pays(x):
            return channels_last.upsample_conv(x, self.conv)
        scale = (1, 2, 2) if self.dims == 3 else 2
        x = F.interpolate(x, scale_factor=scale, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Half the size, by a strided 3x3 convolution or by averaging; of three dimensions only the last two shrink."""

    def __init__(self, channels, use_conv, dims=2, out_channels=None):
        super().__init__()
        self.channels, self.use_conv, self.dims = channels, use_conv, dims
        self.out_channels = out_channels or channels
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, self.out_channels, 3, stride=stride, padding=1)
        else:
            assert self.channels == self.out_channels
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x):
        assert x.shape[1] == self.channels
        return self.op(x)


class ResBlock(TimestepBlock):
    """Two convolutions around the time's embedding, and a skip; may change width, and double or halve the size.

    Args:
        use_conv: a 3x3 instead of a 1x1 convolution where the skip changes width.
        use_scale_shift_norm: the embedding scales and shifts the second norm; else it is added before it.
    """

    def __init__(
        self,
        channels,
        emb_channels,
        dropout,
        out_channels=None,
        use_conv=False,
        use_scale_shift_norm=False,
        dims=2,
        use_checkpoint=False,
        up=False,
        down=False,
    ):
        super().__init__()
        self.channels, self.emb_channels, self.dropout = channels, emb_channels, dropout
        self.out_channels = out = out_channels or channels
        self.use_conv, self.use_scale_shift_norm, self.use_checkpoint = use_conv, use_scale_shift_norm, use_checkpoint
        self.in_layers = nn.Sequential(normalization(channels), nn.SiLU(), conv_nd(dims, channels, out, 3, padding=1))
        self.updown = up or down
        resize = Upsample if up else Downsample
        self.h_upd = resize(channels, False, dims) if self.updown else nn.Identity()
        self.x_upd = resize(channels, False, dims) if self.updown else nn.Identity()
        self.emb_layers = nn.Sequential(nn.SiLU(), linear(emb_channels, 2 * out if use_scale_shift_norm else out))
        self.out_layers = nn.Sequential(
            normalization(out),
            nn.SiLU(),
            nn.Dropout(p=dropout),
            zero_module(conv_nd(dims, out, out, 3, padding=1)),
        )
        if out == channels:
            self.skip_connection = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, out, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, channels, out, 1)

    def forward(self, x, emb):
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x, emb):
        norm, _, conv = self.in_layers
        h = conv(self.h_upd(norm(x, silu=True)))
        x = self.x_upd(x)
        e = self.emb_layers(emb).type(h.dtype)
        e = e.view(*e.shape, *[1] * (h.ndim - 2))
        norm, _, dropout, conv = self.out_layers
        h = norm(h, *e.chunk(2, dim=1), silu=True) if self.use_scale_shift_norm else norm(h + e, silu=True)
        h = conv(dropout(h))
        if channels_last.innermost(x) and not (self.use_conv or isinstance(self.skip_connection, nn.Identity)):
            return channels_last.pointwise(x, self.skip_connection) + h
        return self.skip_connection(x) + h


class QKVAttentionLegacy(nn.Module):
    """Attention on (N, H * 3 * d, T): heads first, then q, k, v within a head. The layout of most checkpoints."""

    def __init__(self, n_heads):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv):
        return _attend(qkv.unflatten(1, (self.n_heads, 3, -1)), 2)

    def of_rows(self, qkv):
        """The same with channels innermost: (N, T, H * 3 * d) to (N, T, H * d)."""
        return _attend_rows(qkv.unflatten(2, (self.n_heads, 3, -1)).permute(3, 0, 2, 1, 4))

    @staticmethod
    def count_flops(model, _x, y):
        return count_flops_attn(model, _x, y)


class QKVAttention(nn.Module):
    """Attention on (N, 3 * H * d, T): q, k, v first, then heads."""

    def __init__(self, n_heads):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv):
        return _attend(qkv.unflatten(1, (3, self.n_heads, -1)), 1)

    def of_rows(self, qkv):
        """The same with channels innermost: (N, T, 3 * H * d) to (N, T, H * d)."""
        return _attend_rows(qkv.unflatten(2, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4))

    @staticmethod
    def count_flops(model, _x, y):
        return count_flops_attn(model, _x, y)


def _attend(qkv, part):
    """softmax(q k / sqrt(d)) v of q, k, v along dimension `part` of (N, ., ., d, T); returns (N, H * d, T)."""
    if channels_last.on_cpu(qkv) and th.is_grad_enabled() and qkv.shape[-1] < ROWS_FROM:
        return _attend_as_upstream(*qkv.unbind(part))
    rows = qkv.transpose(-1, -2).contiguous()  # fused kernels want d innermost
    return F.scaled_dot_product_attention(*rows.unbind(part)).transpose(-1, -2).flatten(1, 2)


def _attend_as_upstream(q, k, v):
    """The same of q, k, v (N, H, d, T), with the sums in upstream's order: the fastest of so few positions on a CPU."""
    n = len(q)
    q, k, v = (part.flatten(0, 1) for part in (q, k, v))
    scale = q.shape[1] ** -0.25  # on both sides: float16 overflows later
    weights = th.bmm((q * scale).transpose(1, 2), k * scale)
    weights = weights.float().softmax(-1).type(weights.dtype)
    return th.bmm(v, weights.transpose(1, 2)).unflatten(0, (n, -1)).flatten(1, 2)


def _attend_rows(qkv):
    """softmax(q k / sqrt(d)) v of q, k, v (3, N, H, T, d), d innermost; returns (N, T, H * d)."""
    if qkv.shape[3] >= ROWS_FROM or not th.is_grad_enabled():
        return F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).flatten(2)
    q, k, v = qkv.flatten(1, 2).unbind(0)
    found = th.bmm(th.bmm(q * q.shape[2] ** -0.5, k.transpose(1, 2)).softmax(-1), v)
    return found.unflatten(0, qkv.shape[1:3]).transpose(1, 2).flatten(2)


def count_flops_attn(model, _x, y):
    """Add the multiply-adds of one attention to `model.total_ops` (a hook for the thop package)."""
    n, channels, *spatial = y[0].shape
    positions = th.Size(spatial).numel()
    model.total_ops += th.DoubleTensor([2 * n * positions**2 * channels])


class AttentionBlock(nn.Module):
    """Every position attends to every other; x + attention(norm(x))."""

    def __init__(
        self, channels, num_heads=1, num_head_channels=-1, use_checkpoint=False, use_new_attention_order=False
    ):
        super().__init__()
        self.channels, self.use_checkpoint = channels, use_checkpoint
        self.num_heads = num_heads if num_head_channels == -1 else channels // num_head_channels
        wanted = f"--num_heads {num_heads}" if num_head_channels == -1 else f"--num_head_channels {num_head_channels}"
        if (
            not self.num_heads
            or channels % self.num_heads
            or (num_head_channels != -1 and channels % num_head_channels)
        ):
            raise ValueError(f"{wanted} does not divide the {channels} channels of a level that attends")
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, channels * 3, 1)
        self.attention = (QKVAttention if use_new_attention_order else QKVAttentionLegacy)(self.num_heads)
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x):
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x):
        if channels_last.innermost(x):
            return x + self._of_rows(self.norm(x))
        flat = x.flatten(2)
        if x.ndim == 4 and channels_last.on_cpu(x) and flat.shape[2] >= ROWS_FROM:
            return x + self._of_rows(self.norm(x).contiguous(memory_format=th.channels_last)).contiguous()
        return (flat + self.proj_out(self.attention(self.qkv(self.norm(flat))))).view(x.shape)

    def _of_rows(self, x):
        """The attention of x (N, C, H, W), channels innermost."""
        qkv = channels_last.pointwise(x, self.qkv)
        out = self.attention.of_rows(channels_last.rows(qkv))
        return channels_last.pointwise(channels_last.as_image(out, x), self.proj_out)


class AttentionPool2d(nn.Module):
    """One vector from an image: the answer that its mean, as a query, gets from all positions (CLIP's pooling).

    Args:
        spacial_dim: side of the image (upstream's spelling); embed_dim: its channels.
    """

    def __init__(self, spacial_dim, embed_dim, num_heads_channels, output_dim=None):
        super().__init__()
        self.positional_embedding = nn.Parameter(th.randn(embed_dim, spacial_dim**2 + 1) / embed_dim**0.5)
        self.qkv_proj = conv_nd(1, embed_dim, 3 * embed_dim, 1)
        self.c_proj = conv_nd(1, embed_dim, output_dim or embed_dim, 1)
        self.num_heads = embed_dim // num_heads_channels
        self.attention = QKVAttention(self.num_heads)

    def forward(self, x):
        """x: (N, C, H, W) of the side it was made for. Raises ValueError for another."""
        if x[0, 0].numel() != self.positional_embedding.shape[1] - 1:
            raise ValueError(
                f"attention pooling was made for {self.positional_embedding.shape[1] - 1} positions and sees"
                f" {' x '.join(map(str, x.shape[2:]))}: --image_size must be that of its training,"
                " or take --classifier_pool adaptive"
            )
        x = x.flatten(2)
        x = th.cat([x.mean(dim=-1, keepdim=True), x], dim=-1)
        x = x + self.positional_embedding[None].to(x.dtype)
        return self.c_proj(self.attention(self.qkv_proj(x)))[:, :, 0]


class _Backbone(nn.Module):
    """What U-Net and encoder share: the embedding of the time, the way down, and the middle."""

    model_channels: int

    def _build_down(
        self,
        *,
        in_channels,
        model_channels,
        num_res_blocks,
        attention_resolutions,
        channel_mult,
        num_classes=None,
        class_dropout_prob=0.0,
        dropout,
        conv_resample,
        dims,
        use_checkpoint,
        use_fp16,
        num_heads,
        num_head_channels,
        use_scale_shift_norm,
        resblock_updown,
        use_new_attention_order,
    ):
        """Make the modules in upstream's order; returns (residual block, attention) makers and the skip widths."""
        self.dtype = th.float16 if use_fp16 else th.float32
        self.num_res_blocks, self.channel_mult = num_res_blocks, channel_mult
        emb = 4 * model_channels
        self.time_embed = nn.Sequential(linear(model_channels, emb), nn.SiLU(), linear(emb, emb))
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes + (class_dropout_prob > 0), emb)
        block = partial(
            ResBlock,
            emb_channels=emb,
            dropout=dropout,
            dims=dims,
            use_checkpoint=use_checkpoint,
            use_scale_shift_norm=use_scale_shift_norm,
        )
        attend = partial(
            AttentionBlock,
            num_head_channels=num_head_channels,
            use_checkpoint=use_checkpoint,
            use_new_attention_order=use_new_attention_order,
        )

        ch = int(channel_mult[0] * model_channels)
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(conv_nd(dims, in_channels, ch, 3, padding=1))])
        widths, factor = [ch], 1
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [block(ch, out_channels=int(mult * model_channels))]
                ch = int(mult * model_channels)
                if factor in attention_resolutions:
                    layers.append(attend(ch, num_heads=num_heads))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                widths.append(ch)
            if level < len(channel_mult) - 1:
                down = block(ch, out_channels=ch, down=True) if resblock_updown else Downsample(ch, conv_resample, dims)
                self.input_blocks.append(TimestepEmbedSequential(down))
                widths.append(ch)
                factor *= 2
        self.middle_block = TimestepEmbedSequential(block(ch), attend(ch, num_heads=num_heads), block(ch))
        return block, attend, widths

    def _embed(self, timesteps, y=None):
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        return emb if y is None else emb + self.label_emb(y)

    def _check_size(self, x):
        step = 2 ** (len(self.channel_mult) - 1)
        if any(side % step for side in x.shape[-min(2, x.ndim - 2) :]):
            size = " x ".join(map(str, x.shape[2:]))
            raise ValueError(
                f"the U-Net sees {size}, which cannot be halved {len(self.channel_mult) - 1} times:"
                f" choose --image_size so that it is a multiple of {step}, or a shorter --channel_mult"
            )

    def _torso(self):
        return [self.input_blocks, self.middle_block]

    def convert_to_fp16(self):
        """Halve the convolutions of the torso."""
        for part in self._torso():
            part.apply(convert_module_to_f16)

    def convert_to_fp32(self):
        """Undo `convert_to_fp16`."""
        for part in self._torso():
            part.apply(convert_module_to_f32)


class UNetModel(_Backbone):
    """(x_t, t, y) -> prediction.

    Args:
        image_size: side of x; stored only.
        model_channels: base width; channel_mult: width of each level, relative to it.
        attention_resolutions: downsampling factors (1, 2, 4, ...) at which it attends.
        num_classes: condition on one of so many classes; None for none.
        num_head_channels: width of a head; -1 takes `num_heads` (`num_heads_upsample` on the way up) instead.
        use_new_attention_order: see `QKVAttention`; a checkpoint loads under either, but only one is right.
        class_dropout_prob: how often training sees the null label instead of the sample's; 0 makes no null label.
    """

    def __init__(
        self,
        image_size,
        in_channels,
        model_channels,
        out_channels,
        num_res_blocks,
        attention_resolutions,
        dropout=0,
        channel_mult=(1, 2, 4, 8),
        conv_resample=True,
        dims=2,
        num_classes=None,
        use_checkpoint=False,
        use_fp16=False,
        num_heads=1,
        num_head_channels=-1,
        num_heads_upsample=-1,
        use_scale_shift_norm=False,
        resblock_updown=False,
        use_new_attention_order=False,
        class_dropout_prob=0.0,
    ):
        super().__init__()
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.model_channels, self.num_classes = model_channels, num_classes
        self.class_dropout_prob = class_dropout_prob
        block, attend, widths = self._build_down(
            in_channels=in_channels,
            model_channels=model_channels,
            num_res_blocks=num_res_blocks,
            attention_resolutions=attention_resolutions,
            channel_mult=channel_mult,
            num_classes=num_classes,
            class_dropout_prob=class_dropout_prob,
            dropout=dropout,
            conv_resample=conv_resample,
            dims=dims,
            use_checkpoint=use_checkpoint,
            use_fp16=use_fp16,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            use_new_attention_order=use_new_attention_order,
        )
        heads_up = num_heads if num_heads_upsample == -1 else num_heads_upsample
        ch = widths[-1]
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                layers: list[nn.Module] = [block(ch + widths.pop(), out_channels=int(mult * model_channels))]
                ch = int(mult * model_channels)
                if 2**level in attention_resolutions:
                    layers.append(attend(ch, num_heads=heads_up))
                if level and i == num_res_blocks:
                    up = block(ch, out_channels=ch, up=True) if resblock_updown else Upsample(ch, conv_resample, dims)
                    layers.append(up)
                self.output_blocks.append(TimestepEmbedSequential(*layers))
        self.out = nn.Sequential(
            normalization(ch), nn.SiLU(), zero_module(conv_nd(dims, ch, out_channels, 3, padding=1))
        )

    def _torso(self):
        return [*super()._torso(), self.output_blocks]

    @property
    def null_label(self) -> int:
        """The label that stands for none: one past the last class; see `require_null_label`."""
        return require_null_label(self.num_classes, self.class_dropout_prob)

    def forward(self, x, timesteps, y=None, drop=None) -> th.Tensor:
        """Predict from x (N, C, ...), timesteps (N,) and, if class-conditional, labels y (N,).

        Args:
            drop: (N,) bool, labels to replace by the null label; None draws them while training.
        """
        assert (y is not None) == (self.num_classes is not None), (
            "must specify y if and only if the model is class-conditional"
        )
        assert y is None or y.shape == (x.shape[0],)
        self._check_size(x)
        y = drop_labels(y, drop, self.num_classes, self.class_dropout_prob, self.training)
        emb = self._embed(timesteps, y)
        h, skips = x.type(self.dtype), []
        for module in self.input_blocks:
            h = module(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for module in self.output_blocks:
            h = module(th.cat([h, skips.pop()], dim=1), emb)
        norm, _, conv = self.out
        return conv(norm(h.type(x.dtype), silu=True))


class SuperResModel(UNetModel):
    """A U-Net that also sees the image at low resolution, scaled up and beside x on the channels."""

    def __init__(self, image_size, in_channels, *args, **kwargs):
        super().__init__(image_size, in_channels * 2, *args, **kwargs)

    def forward(self, x: th.Tensor, timesteps: th.Tensor, low_res: th.Tensor | None = None, **kwargs) -> th.Tensor:
        """low_res: (N, C, h, w)."""
        assert low_res is not None
        upsampled = F.interpolate(low_res, x.shape[-2:], mode="bilinear")
        return super().forward(th.cat([x, upsampled], dim=1), timesteps, **kwargs)


class EncoderUNetModel(_Backbone):
    """The way down only, and a pool: (x_t, t) -> (N, out_channels), for classifiers.

    Args:
        pool: "adaptive" (mean), "attention" (needs `num_head_channels`; tied to `image_size`), "spatial" or
            "spatial_v2" (an MLP on the means of all blocks). Others as `UNetModel`.
    """

    def __init__(
        self,
        image_size,
        in_channels,
        model_channels,
        out_channels,
        num_res_blocks,
        attention_resolutions,
        dropout=0,
        channel_mult=(1, 2, 4, 8),
        conv_resample=True,
        dims=2,
        use_checkpoint=False,
        use_fp16=False,
        num_heads=1,
        num_head_channels=-1,
        num_heads_upsample=-1,
        use_scale_shift_norm=False,
        resblock_updown=False,
        use_new_attention_order=False,
        pool="adaptive",
    ):
        super().__init__()
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.model_channels, self.pool = model_channels, pool
        _, _, widths = self._build_down(
            in_channels=in_channels,
            model_channels=model_channels,
            num_res_blocks=num_res_blocks,
            attention_resolutions=attention_resolutions,
            channel_mult=channel_mult,
            dropout=dropout,
            conv_resample=conv_resample,
            dims=dims,
            use_checkpoint=use_checkpoint,
            use_fp16=use_fp16,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            use_new_attention_order=use_new_attention_order,
        )
        ch, every = widths[-1], sum(widths) + widths[-1]
        if pool == "adaptive":
            squeeze = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1]
            head = zero_module(conv_nd(dims, ch, out_channels, 1))
            self.out = nn.Sequential(normalization(ch), nn.SiLU(), squeeze(1), head, nn.Flatten())
        elif pool == "attention":
            assert num_head_channels != -1, "attention pooling needs num_head_channels"
            side = image_size // 2 ** (len(channel_mult) - 1)
            attention = AttentionPool2d(side, ch, num_head_channels, out_channels)
            self.out = nn.Sequential(normalization(ch), nn.SiLU(), attention)
        elif pool == "spatial":
            self.out = nn.Sequential(nn.Linear(every, 2048), nn.ReLU(), nn.Linear(2048, out_channels))
        elif pool == "spatial_v2":
            layers = nn.Linear(every, 2048), normalization(2048), nn.SiLU(), nn.Linear(2048, out_channels)
            self.out = nn.Sequential(*layers)
        else:
            raise UnknownPool(
                f"Unexpected {pool} pooling; --classifier_pool is adaptive, attention, spatial, spatial_v2"
            )

    def forward(self, x: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        """Logits (N, out_channels) of x (N, C, ...) at timesteps (N,)."""
        self._check_size(x)
        emb = self._embed(timesteps)
        h, means = x.type(self.dtype), []
        for module in [*self.input_blocks, self.middle_block]:
            h = module(h, emb)
            if self.pool.startswith("spatial"):
                means.append(h.type(x.dtype).flatten(2).mean(dim=2))
        return self.out(th.cat(means, dim=-1) if means else h.type(x.dtype))


class UnknownPool(NotImplementedError, ValueError):
    """A pooling that is not in the table: upstream's NotImplementedError, and the user's mistake."""
