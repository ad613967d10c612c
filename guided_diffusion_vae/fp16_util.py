"""Half-precision training: float16 weights in the convolutions, float32 masters that are updated, a dynamic loss scale.

In float32 the masters are the parameters themselves. In float16 they are two flat tensors, as upstream keeps them:
all vectors end to end, shape (N,), and all matrices and kernels end to end, shape (1, N).
"""

from collections.abc import Callable, Iterable

import torch as th
import torch.nn as nn

from . import logger

Named = list[tuple[str, th.Tensor]]
GroupsAndShapes = list[tuple[Named, int | tuple[int, ...]]]

INITIAL_LOG_LOSS_SCALE = 20.0
LOWEST_LOG_LOSS_SCALE = -10.0  # below this no gradient is worth scaling: the run has diverged
OVERFLOWS_IN_A_ROW = 50  # from 2^20 to the lowest takes 31 that find nothing finite; a scale that has grown, more


class TrainingDiverged(RuntimeError):
    """The loss is not finite and lowering the loss scale does not help. Exit code 4."""


def convert_module_to_f16(layer: nn.Module) -> None:
    """Halve the weights of a convolution; other layers stay float32."""
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        layer.half()


def convert_module_to_f32(layer: nn.Module) -> None:
    """Undo `convert_module_to_f16`."""
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        layer.float()


def get_param_groups_and_shapes(named_model_params: Iterable[tuple[str, th.Tensor]]) -> GroupsAndShapes:
    """[(named vectors, (-1,)), (named matrices, (1, -1))], in order."""
    named = list(named_model_params)
    vectors = [(name, param) for name, param in named if param.ndim <= 1]
    matrices = [(name, param) for name, param in named if param.ndim > 1]
    return [(vectors, (-1)), (matrices, (1, -1))]


def make_master_params(param_groups_and_shapes: GroupsAndShapes) -> list[nn.Parameter]:
    """The flat float32 masters of both groups."""
    return [
        nn.Parameter(th.cat([param.detach().float().flatten() for _, param in group]).view(shape))
        for group, shape in param_groups_and_shapes
    ]


def model_grads_to_master_grads(param_groups_and_shapes: GroupsAndShapes, master_params: list[nn.Parameter]) -> None:
    """Copy the gradients of the model into those of the masters; a missing one counts as zero."""
    for master, (group, _) in zip(master_params, param_groups_and_shapes, strict=True):
        master.grad = th.zeros_like(master)
        views = unflatten_master_params(group, master.grad)
        pairs = [(view, param.grad) for view, (_, param) in zip(views, group, strict=True) if param.grad is not None]
        _copy_all(pairs)


def master_params_to_model_params(param_groups_and_shapes: GroupsAndShapes, master_params: list[nn.Parameter]) -> None:
    """Copy the masters into the model."""
    for master, (group, _) in zip(master_params, param_groups_and_shapes, strict=True):
        values = unflatten_master_params(group, master.detach())
        _copy_all([(param.detach(), value) for (_, param), value in zip(group, values, strict=True)])


def _copy_all(pairs: list[tuple[th.Tensor, th.Tensor]]) -> None:
    """target <- source, for all pairs in few kernels, whatever their dtypes."""
    if pairs:
        targets, sources = zip(*pairs, strict=True)
        th._foreach_copy_(targets, sources)


def unflatten_master_params(param_group: Named, master_param: th.Tensor) -> list[th.Tensor]:
    """The masters of one group, in the shapes of its parameters: views, not copies."""
    parts = master_param.view(-1).split([param.numel() for _, param in param_group])
    return [part.view(param.shape) for part, (_, param) in zip(parts, param_group, strict=True)]


def master_params_to_state_dict(
    model: nn.Module, param_groups_and_shapes: GroupsAndShapes | None, master_params: list, use_fp16: bool
) -> dict[str, th.Tensor]:
    """A float32 state_dict of the model with the masters' values."""
    state_dict = model.state_dict()
    if use_fp16:
        assert param_groups_and_shapes is not None
        for master, (group, _) in zip(master_params, param_groups_and_shapes, strict=True):
            for (name, _), values in zip(group, unflatten_master_params(group, master.detach()), strict=True):
                state_dict[name] = values
    else:
        for (name, _), param in zip(model.named_parameters(), master_params, strict=True):
            state_dict[name] = param.detach()
    return state_dict


def state_dict_to_master_params(model: nn.Module, state_dict: dict[str, th.Tensor], use_fp16: bool) -> list[th.Tensor]:
    """The masters that a state_dict of the model holds."""
    if use_fp16:
        named = [(name, state_dict[name]) for name, _ in _trained(model)]
        return [*make_master_params(get_param_groups_and_shapes(named))]
    return [state_dict[name] for name, _ in model.named_parameters()]


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are trained: fixed ones, such as a transformer's positions, must not decay with them."""
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


def zero_master_grads(master_params: Iterable[th.Tensor]) -> None:
    """Drop the gradients of the masters."""
    for param in master_params:
        param.grad = None


def zero_grad(model_params: Iterable[th.Tensor]) -> None:
    """Drop the gradients of the model."""
    for param in model_params:
        param.grad = None


def param_grad_or_zeros(param: th.Tensor) -> th.Tensor:
    """A parameter's gradient, or zeros if it has none."""
    return th.zeros_like(param) if param.grad is None else param.grad.detach()


def check_overflow(value: float) -> bool:
    """Whether a number is infinite or not a number."""
    return value in (float("inf"), -float("inf")) or value != value


def norm_of(tensors: list[th.Tensor]) -> th.Tensor:
    """The 2-norm of all numbers in the tensors, float32, (); it stays on the device."""
    return th.stack([norm.float() for norm in th._foreach_norm(tensors)]).norm()


class MixedPrecisionTrainer:
    """Owns the masters, the loss scale and the step of the optimizer.

    Args:
        model: converted to float16 here if `use_fp16`.
        fp16_scale_growth: added to log2 of the loss scale after every good step.
        grad_clip: largest norm of the (unscaled) gradient; 0 = no limit. The norm that is logged is that before.
        norm: of a list of tensors; other than `norm_of` where a process holds shares of them only.
    """

    def __init__(
        self,
        *,
        model,
        use_fp16=False,
        fp16_scale_growth=1e-3,
        initial_lg_loss_scale=INITIAL_LOG_LOSS_SCALE,
        grad_clip=0.0,
        norm: Callable[[list[th.Tensor]], th.Tensor] = norm_of,
    ):
        self.model, self.use_fp16, self.fp16_scale_growth = model, use_fp16, fp16_scale_growth
        self.grad_clip, self.norm = grad_clip, norm
        self.lg_loss_scale, self.overflows = initial_lg_loss_scale, 0
        self.model_params = self.master_params = list(model.parameters())
        self.param_groups_and_shapes = None
        if use_fp16:
            self.param_groups_and_shapes = get_param_groups_and_shapes(_trained(model))
            self.master_params = make_master_params(self.param_groups_and_shapes)
            model.convert_to_fp16()

    def zero_grad(self):
        """Drop the gradients of the model."""
        zero_grad(self.model_params)

    def backward(self, loss: th.Tensor) -> None:
        """Backward through the (scaled) loss."""
        (loss * 2**self.lg_loss_scale if self.use_fp16 else loss).backward()

    def optimize(self, opt: th.optim.Optimizer) -> bool:
        """Take the optimizer's step unless gradients overflowed; whether it was taken.

        Raises:
            TrainingDiverged: no step without overflow down to the lowest loss scale.
        """
        return self._optimize_fp16(opt) if self.use_fp16 else self._optimize_normal(opt)

    def _optimize_fp16(self, opt):
        assert self.param_groups_and_shapes is not None
        logger.logkv_mean("lg_loss_scale", self.lg_loss_scale)
        model_grads_to_master_grads(self.param_groups_and_shapes, self.master_params)
        grad_norm, param_norm = self._compute_norms(grad_scale=2**self.lg_loss_scale)
        if check_overflow(grad_norm.item()):  # the one wait for the device
            self._back_off()
            return False
        self.overflows = 0
        logger.logkv_mean("grad_norm", grad_norm)
        logger.logkv_mean("param_norm", param_norm)
        gradients = [param.grad for param in self.master_params if param.grad is not None]
        th._foreach_mul_(gradients, 1.0 / 2**self.lg_loss_scale)
        self._clip(grad_norm)
        opt.step()
        zero_master_grads(self.master_params)
        master_params_to_model_params(self.param_groups_and_shapes, self.master_params)
        self.lg_loss_scale += self.fp16_scale_growth
        return True

    def _back_off(self):
        self.lg_loss_scale -= 1
        self.overflows += 1
        logger.log(f"Found NaN, decreased lg_loss_scale to {self.lg_loss_scale}")
        zero_master_grads(self.master_params)
        if self.lg_loss_scale < LOWEST_LOG_LOSS_SCALE or self.overflows >= OVERFLOWS_IN_A_ROW:
            raise TrainingDiverged(
                f"gradients overflow even at a loss scale of 2^{self.lg_loss_scale:g}: the run has diverged;"
                " go on from an earlier checkpoint with a lower --lr, or --use_fp16 False"
            )

    def _optimize_normal(self, opt):
        grad_norm, param_norm = self._compute_norms()
        logger.logkv_mean("grad_norm", grad_norm)  # 0-d tensors: read only when the row is written
        logger.logkv_mean("param_norm", param_norm)
        self._clip(grad_norm)
        opt.step()
        return True

    def _clip(self, grad_norm):
        if self.grad_clip:
            th.nn.utils.clip_grads_with_norm_(self.master_params, self.grad_clip, grad_norm, foreach=True)

    def _compute_norms(self, grad_scale=1.0):
        grads = [param.grad for param in self.master_params if param.grad is not None]
        return self.norm(grads) / grad_scale, self.norm([param.detach() for param in self.master_params])

    def master_params_to_state_dict(self, master_params):
        """See the function of this name."""
        return master_params_to_state_dict(self.model, self.param_groups_and_shapes, master_params, self.use_fp16)

    def state_dict_to_master_params(self, state_dict):
        """See the function of this name."""
        return state_dict_to_master_params(self.model, state_dict, self.use_fp16)
