"""Our AdamW takes torch's steps, for weights of either layout, whoever began the run."""

import pytest
import torch as th

from guided_diffusion_vae.optimizer import AdamW

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}
LAYOUTS = [th.contiguous_format, th.channels_last]


def weights(layout, shift=0):
    rng = th.Generator().manual_seed(shift)
    shapes = (8, 5, 3, 3), (8,), (4, 8), (6, 8, 1, 1)
    found = [th.randn(shape, generator=rng) for shape in shapes]
    return [w.contiguous(memory_format=layout) if w.ndim == 4 else w for w in found]


def trained(kind, layout, steps, params=None, opt=None, first=0, **settings):
    params = params or [th.nn.Parameter(w) for w in weights(layout)]
    opt = opt or kind(params, **SETTINGS, **settings)
    for step in range(first, first + steps):
        for param, grad in zip(params, weights(layout, 1 + step), strict=True):
            param.grad = grad
        opt.step()
    return params, opt


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert th.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_its_steps_are_those_of_torch(layout):
    ours, opt = trained(AdamW, layout, 4)
    same(ours, trained(th.optim.AdamW, th.contiguous_format, 4, foreach=False)[0])
    assert opt.param_groups[0]["fused"] and ours[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("before", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_goes_on_from_any_state(layout, before):
    """Of a run that was not fused, of another layout: the moments of a weight must lie as it does."""
    wanted, whole = trained(AdamW, layout, 4)
    params, old = trained(th.optim.AdamW, before, 2, foreach=False)
    params = [
        th.nn.Parameter(w.detach().clone().contiguous(memory_format=layout) if w.ndim == 4 else w.detach())
        for w in params
    ]
    opt = AdamW(params, **SETTINGS)
    opt.load_state_dict(old.state_dict())
    same(trained(AdamW, layout, 2, params, opt, first=2)[0], wanted)
    assert opt.state_dict()["param_groups"] == whole.state_dict()["param_groups"]


def test_no_gradient_is_copied():
    _, opt = trained(AdamW, th.channels_last, 1)
    with th.profiler.profile() as seen:
        opt.step()
    assert not [event.name for event in seen.events() if event.name in ("aten::clone", "aten::contiguous")]
