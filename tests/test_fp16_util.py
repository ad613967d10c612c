"""Half-precision training: the layout of the masters is upstream's, and its dynamics are known in closed form."""

import math

import pytest
import torch as th
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

from guided_diffusion_vae import fp16_util, logger
from guided_diffusion_vae.dit import LightningDiT
from guided_diffusion_vae.fp16_util import MixedPrecisionTrainer, TrainingDiverged
from guided_diffusion_vae.unet import UNetModel


class Toy(nn.Module):
    """One parameter of each kind; `idle` never gets a gradient."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.conv = nn.Conv1d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 1)
        self.idle = nn.Parameter(th.ones(5))

    def convert_to_fp16(self):
        self.conv.apply(fp16_util.convert_module_to_f16)

    def forward(self, x):
        h = self.conv(x.type(self.conv.weight.dtype)).float()
        return self.head(self.norm(h).mean(-1)) + self.embed(th.tensor([0])).sum()


class Linear(nn.Module):
    """w . x + b: its gradients are its inputs, so every step is known."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(th.zeros(2, 2)), nn.Parameter(th.ones(2))

    def convert_to_fp16(self):
        self.w.data = self.w.data.half()

    def forward(self, x, y=1.0):
        return (self.w.float() * x).sum() + y * self.b.sum()


X = th.tensor([[0.5, -1.0], [2.0, 4.0]])  # powers of two: float16 holds their multiples exactly


def toy(**options):
    th.manual_seed(0)
    return MixedPrecisionTrainer(model=Toy(), **options)


def linear(**options):
    trainer = MixedPrecisionTrainer(model=Linear(), use_fp16=True, **options)
    return trainer, th.optim.SGD(trainer.master_params, lr=0.25)


def step(trainer, opt, *inputs):
    trainer.zero_grad()
    trainer.backward(trainer.model(*inputs))
    return trainer.optimize(opt)


@pytest.fixture(autouse=True)
def row(tmp_path):
    """What was logged."""
    with logger.scoped_configure(str(tmp_path), format_strs=["log"]):
        yield logger.getkvs()


# ---- the masters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conv", [nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv3d(2, 2, 1)])
def test_convolutions_are_halved_and_restored(conv):
    conv.apply(fp16_util.convert_module_to_f16)
    assert {p.dtype for p in conv.parameters()} == {th.float16}
    conv.apply(fp16_util.convert_module_to_f32)
    assert {p.dtype for p in conv.parameters()} == {th.float32}


@pytest.mark.parametrize("other", [nn.Linear(2, 2), nn.GroupNorm(1, 2), nn.Embedding(2, 2)])
def test_other_layers_stay_single(other):
    other.apply(fp16_util.convert_module_to_f16)
    assert {p.dtype for p in other.parameters()} == {th.float32}


def test_the_masters_are_two_flat_tensors_in_upstreams_order():
    """All vectors (N,), all others (1, N), each in the order of named_parameters: AdamW's file has two entries."""
    th.manual_seed(0)
    named = dict(Toy().named_parameters())
    trainer = toy(use_fp16=True)
    vectors, matrices = trainer.master_params
    assert vectors.dtype == matrices.dtype == th.float32
    names = ["idle", "conv.bias", "norm.weight", "norm.bias", "head.bias"]
    assert th.equal(vectors, th.cat([named[name] for name in names]))
    names = ["embed.weight", "conv.weight", "head.weight"]
    assert th.equal(matrices, th.cat([named[name].flatten() for name in names])[None])
    assert trainer.model.conv.weight.dtype == th.float16


def test_the_masters_keep_what_half_precision_loses():
    """masters -> state_dict -> masters is the identity, in float32, under the model's own keys."""
    th.manual_seed(0)
    wanted = Toy().state_dict()
    trainer = toy(use_fp16=True)
    state = trainer.master_params_to_state_dict(trainer.master_params)
    assert list(state) == list(wanted) and all(th.equal(state[key], wanted[key]) for key in wanted)
    assert not th.equal(trainer.model.conv.weight.float(), wanted["conv.weight"])
    back = trainer.state_dict_to_master_params(state)
    assert all(th.equal(a, b) for a, b in zip(back, trainer.master_params, strict=True))
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(back, trainer.master_params, strict=True))


def test_copying_the_masters_into_the_model_rounds_them_once():
    trainer = toy(use_fp16=True)
    with th.no_grad():
        for master in trainer.master_params:
            master.add_(0.1)
    fp16_util.master_params_to_model_params(trainer.param_groups_and_shapes, trainer.master_params)
    state = trainer.master_params_to_state_dict(trainer.master_params)
    for name, param in trainer.model.named_parameters():
        assert th.equal(param, state[name].to(param.dtype)), name


def test_masters_do_not_depend_on_the_memory_format():
    masters = []
    for memory in (th.contiguous_format, th.channels_last):
        th.manual_seed(0)
        conv = nn.Conv2d(3, 4, 3).to(memory_format=memory)
        groups = fp16_util.get_param_groups_and_shapes(conv.named_parameters())
        masters.append(fp16_util.make_master_params(groups))
        conv.weight.data.zero_()
        fp16_util.master_params_to_model_params(groups, masters[-1])
        assert th.equal(conv.weight.flatten(), masters[-1][1][0])
    assert all(th.equal(a, b) for a, b in zip(*masters, strict=True))


def test_in_single_precision_the_masters_are_the_parameters():
    trainer = toy()
    assert all(a is b for a, b in zip(trainer.master_params, trainer.model.parameters(), strict=True))
    state = trainer.master_params_to_state_dict(trainer.master_params)
    back = trainer.state_dict_to_master_params(state)
    assert all(th.equal(a, b) for a, b in zip(back, trainer.master_params, strict=True))
    assert {type(value) for value in state.values()} == {th.Tensor}  # upstream stores Parameters; both load


def test_gradients_are_copied_and_missing_ones_are_zero():
    trainer = toy(use_fp16=True, initial_lg_loss_scale=0.0)
    trainer.backward(trainer.model(th.ones(1, 2, 6)).sum())
    groups = trainer.param_groups_and_shapes
    fp16_util.model_grads_to_master_grads(groups, trainer.master_params)
    for master, (group, _) in zip(trainer.master_params, groups, strict=True):
        assert master.grad.dtype == th.float32
        for (_, param), grad in zip(group, fp16_util.unflatten_master_params(group, master.grad), strict=True):
            assert th.equal(grad, fp16_util.param_grad_or_zeros(param).float())
    assert trainer.model.idle.grad is None and trainer.master_params[0].grad[:5].eq(0).all()


# ---- the loss scale --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 5.0, 10.0])
def test_a_step_does_not_depend_on_the_loss_scale(scale):
    """Every group of masters is unscaled; upstream before #52 forgot the matrices."""
    trainer, opt = linear(initial_lg_loss_scale=scale)
    assert step(trainer, opt, X)
    assert th.equal(trainer.model.w.float(), -0.25 * X) and th.equal(trainer.model.b, th.full((2,), 0.75))


def test_the_scale_grows_by_a_constant_after_every_good_step(row):
    trainer, opt = linear(initial_lg_loss_scale=8.0, fp16_scale_growth=0.5)
    assert all(step(trainer, opt, X) for _ in range(3))
    assert trainer.lg_loss_scale == 9.5
    assert row["lg_loss_scale"] == pytest.approx((8 + 8.5 + 9) / 3)  # as it was in each step


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("part", ["matrix", "vector"])
def test_an_overflow_halves_the_scale_and_skips_the_step(bad, part, row):
    trainer, opt = linear(initial_lg_loss_scale=8.0)
    before = [param.detach().clone() for param in trainer.master_params]
    assert step(trainer, opt, *((bad * X,) if part == "matrix" else (X, bad))) is False
    assert trainer.lg_loss_scale == 7.0
    assert all(th.equal(a, b) for a, b in zip(before, trainer.master_params, strict=True))
    assert all(master.grad is None for master in trainer.master_params)
    assert set(row) == {"lg_loss_scale"}


def test_an_overflow_is_logged_in_upstreams_words(tmp_path):
    trainer, opt = linear()
    step(trainer, opt, X * float("nan"))
    assert (tmp_path / "log.txt").read_text().splitlines()[-1] == "Found NaN, decreased lg_loss_scale to 19.0"


def test_a_scale_that_is_too_high_comes_down_until_float16_holds_it():
    """X's 4 times 2^lg overflows float16 from 2^14 on: down from 2^20 in 7 steps, and the eighth is taken."""
    trainer, opt = linear()
    assert [step(trainer, opt, X) for _ in range(8)] == [False] * 7 + [True]
    assert trainer.lg_loss_scale == pytest.approx(13 + 1e-3)


def test_a_run_that_has_diverged_ends():
    """Upstream's went on for ever, at 2^-16200."""
    trainer, opt = linear()
    with pytest.raises(TrainingDiverged) as error:
        for _ in range(100):
            assert not step(trainer, opt, X * float("nan"))
    message = str(error.value)
    assert trainer.lg_loss_scale == -11 and "2^-11" in message and "--lr" in message and "\n" not in message


def test_a_run_that_has_diverged_from_a_high_scale_ends_too():
    trainer, opt = linear(initial_lg_loss_scale=100.0)
    with pytest.raises(TrainingDiverged):
        for _ in range(fp16_util.OVERFLOWS_IN_A_ROW):
            assert not step(trainer, opt, X * float("nan"))
    assert trainer.lg_loss_scale == 100 - fp16_util.OVERFLOWS_IN_A_ROW


def test_a_good_step_forgives_the_overflows_before_it():
    trainer, opt = linear(initial_lg_loss_scale=10.0, fp16_scale_growth=1.0)
    for _ in range(2 * fp16_util.OVERFLOWS_IN_A_ROW):
        assert not step(trainer, opt, X * float("nan"))
        assert step(trainer, opt, X)
    assert trainer.lg_loss_scale == 10.0


@pytest.mark.parametrize(
    "value, over", [(math.inf, True), (-math.inf, True), (math.nan, True), (6e4, False), (0, False)]
)
def test_overflow_is_infinite_or_not_a_number(value, over):
    assert fp16_util.check_overflow(value) == over


# ---- clipping --------------------------------------------------------------------------------------------------------


def clipped_step(use_fp16, grad_clip, row):
    """One step of SGD at rate 1: the move (w flat, then b) is minus the clipped gradient, and what was logged."""
    trainer = MixedPrecisionTrainer(model=Linear(), use_fp16=use_fp16, initial_lg_loss_scale=8.0, grad_clip=grad_clip)
    names = [name for name, _ in trainer.model.named_parameters()]
    before = trainer.master_params_to_state_dict([p.detach().clone() for p in trainer.master_params])
    assert step(trainer, th.optim.SGD(trainer.master_params, lr=1.0), X)
    after = trainer.master_params_to_state_dict(trainer.master_params)
    return th.cat([(before[name] - after[name]).flatten() for name in names]), float(row["grad_norm"])


GRADIENT = th.tensor([0.5, -1.0, 2.0, 4.0, 1.0, 1.0])  # X, and ones for b: the squares add up to 23.25


@pytest.mark.parametrize("use_fp16", [False, True])
@pytest.mark.parametrize("limit", [0.5, 3.0])
def test_a_long_gradient_is_cut_to_the_limit_and_keeps_its_direction(use_fp16, limit, row):
    """In half precision, too, the limit is of the gradient without the loss scale; the log has the norm before."""
    moved, logged = clipped_step(use_fp16, limit, row)
    assert moved.norm().item() == pytest.approx(limit, rel=1e-5)
    assert th.allclose(moved / limit, GRADIENT / 23.25**0.5, atol=1e-5)
    assert logged == pytest.approx(23.25**0.5, rel=1e-6)


@pytest.mark.parametrize("use_fp16", [False, True])
@pytest.mark.parametrize("limit", [0.0, 5.0])
def test_a_short_gradient_and_a_limit_of_0_change_no_bit(use_fp16, limit, row):
    moved, _ = clipped_step(use_fp16, limit, row)
    assert th.equal(moved, GRADIENT)


@pytest.mark.parametrize("use_fp16, waits", [(False, 0), (True, 1)])
def test_clipping_does_not_wait_for_the_device(use_fp16, waits):
    trainer = toy(use_fp16=use_fp16, initial_lg_loss_scale=10.0, grad_clip=0.1)
    opt = th.optim.SGD(trainer.master_params, lr=0.1)
    with Waits() as seen:
        assert step(trainer, opt, th.ones(1, 2, 6))
    assert seen.count == waits


# ---- what is logged, and what it costs -------------------------------------------------------------------------------


@pytest.mark.parametrize("use_fp16", [False, True])
def test_the_logged_norms_are_those_of_unscaled_gradients_and_of_weights(use_fp16, row):
    trainer = toy(use_fp16=use_fp16, initial_lg_loss_scale=10.0)
    opt = th.optim.SGD(trainer.master_params, lr=0.1)
    weights = th.cat([param.detach().flatten() for param in trainer.master_params])
    single = toy()
    single.backward(single.model(th.ones(1, 2, 6)).sum())
    grads = th.cat([fp16_util.param_grad_or_zeros(param).flatten() for param in single.model_params])
    assert step(trainer, opt, th.ones(1, 2, 6))
    assert float(row["grad_norm"]) == pytest.approx(grads.norm().item(), rel=1e-2 if use_fp16 else 1e-6)
    assert float(row["param_norm"]) == pytest.approx(weights.norm().item(), rel=1e-6)


class Waits(TorchDispatchMode):
    """Counts the reads of a number from the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is th.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("use_fp16, waits", [(False, 0), (True, 1)])
def test_a_step_does_not_wait_for_the_device(use_fp16, waits, row):
    """Norms are logged as 0-d tensors; only the check for overflow must be read at once."""
    trainer = toy(use_fp16=use_fp16, initial_lg_loss_scale=10.0)
    opt = th.optim.SGD(trainer.master_params, lr=0.1)
    with Waits() as seen:
        for _ in range(3):
            assert step(trainer, opt, th.ones(1, 2, 6))
    assert seen.count == 3 * waits
    assert isinstance(row["grad_norm"], th.Tensor) and isinstance(logger.dumpkvs()["grad_norm"], float)


# ---- a real network --------------------------------------------------------------------------------------------------


def test_a_unet_trains_in_half_precision_as_in_single():
    """The same steps of SGD from the same weights: updates agree to the precision of float16."""
    moved = []
    for use_fp16 in (False, True):
        th.manual_seed(0)
        model = UNetModel(8, 4, 32, 4, 1, (2,), channel_mult=(1, 2), num_heads=2, use_fp16=use_fp16)
        for param in model.parameters():
            param.data.add_(0.02 * th.randn_like(param))
        start = th.cat([p.detach().flatten() for p in model.parameters()])
        trainer = MixedPrecisionTrainer(model=model, use_fp16=use_fp16, initial_lg_loss_scale=10.0)
        opt = th.optim.SGD(trainer.master_params, lr=0.1)
        x, t, noise = th.randn(2, 4, 8, 8), th.tensor([3, 500]), th.randn(2, 4, 8, 8)
        for _ in range(3):
            trainer.zero_grad()
            trainer.backward((model(x, t) - noise).square().mean())
            assert trainer.optimize(opt)
        state = trainer.master_params_to_state_dict(trainer.master_params)
        moved.append(th.cat([state[name].detach().flatten() for name, _ in model.named_parameters()]) - start)
    assert (moved[1] - moved[0]).norm() < 0.02 * moved[0].norm()


def test_a_transformer_trains_in_half_precision_and_keeps_its_positions():
    """Three steps of fp16 and of fp32 agree to half precision; weight decay leaves what is not trained alone."""
    batch = th.randn(4, 4, 8, 8, generator=th.Generator().manual_seed(0))
    trained = []
    for half in (False, True):
        th.manual_seed(1)
        model = LightningDiT(8, 2, 4, 64, 2, 4, num_classes=3, class_dropout_prob=0, use_rmsnorm=True, use_rope=True)
        fixed = model.pos_embed.clone()
        trainer = fp16_util.MixedPrecisionTrainer(model=model, use_fp16=half, initial_lg_loss_scale=10)
        opt = th.optim.AdamW(trainer.master_params, lr=1e-3, weight_decay=0.5, eps=1e-4)
        for _ in range(3):
            trainer.zero_grad()
            out = model(batch, th.full((4,), 0.5), th.tensor([0, 1, 2, 0]))
            trainer.backward(((out - batch) ** 2).mean())
            assert trainer.optimize(opt)
        assert model.blocks[0].attn.qkv.weight.dtype == (th.float16 if half else th.float32)
        assert th.equal(model.pos_embed, fixed)
        state = trainer.master_params_to_state_dict(trainer.master_params)
        assert th.equal(state["pos_embed"], fixed) and state["blocks.0.attn.qkv.weight"].dtype == th.float32
        trained.append(state)
    for key, value in trained[0].items():
        assert (value - trained[1][key]).abs().max() < 3e-4, key
