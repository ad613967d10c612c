"""A compiled network gives what it gave, for every size of batch, and runs as before where it cannot be compiled."""

import pytest
import torch as th
from helpers import fill_by_name

from guided_diffusion_vae import compiling
from guided_diffusion_vae.compiling import compile_network, compile_training
from guided_diffusion_vae.unet import UNetModel


def network():
    model = UNetModel(
        image_size=8,
        in_channels=4,
        model_channels=32,
        out_channels=4,
        num_res_blocks=1,
        attention_resolutions=(),
        channel_mult=(1,),
        num_classes=5,
    )
    fill_by_name(model, 0)
    return model.eval()


def batch(n):
    rng = th.Generator().manual_seed(n)
    return th.randn(n, 4, 8, 8, generator=rng), th.arange(n) * 10, {"y": th.arange(n) % 5}


@pytest.fixture
def sizes(monkeypatch):
    """The numbers of images that the compiled function was called with."""
    seen = []

    def compile(function, **how):
        assert how["dynamic"] is False

        def called(x, t, **cond):
            seen.append(len(x))
            assert len(t) == len(cond["y"]) == len(x)
            return function(x, t, **cond)

        return called

    monkeypatch.setattr(th, "compile", compile)
    return seen


def test_smaller_batches_are_filled_up(sizes):
    """Six images, as at the start of a job, twelve as under guidance, and then whatever is left."""
    model, plain = network(), network()
    assert compile_network(model, print, backend="any")
    with th.no_grad():
        for n in (6, 12, 6, 5, 1, 7):
            x, t, cond = batch(n)
            assert th.allclose(model(x, t, **cond), plain(x, t, **cond), atol=1e-6)
    assert sizes == [6, 12, 6, 6, 6, 12]


def test_what_the_network_knows_stays(sizes):
    model = network()
    compile_network(model, print, backend="any")
    assert (
        model.num_classes == 5
        and isinstance(model, UNetModel)
        and len(model.state_dict()) == len(network().state_dict())
    )


@pytest.mark.slow
def test_the_real_compiler_gives_the_same_numbers():
    model, plain = network(), network()
    assert compile_network(model, print, backend="aot_eager")
    with th.no_grad():
        for n in (4, 3):
            x, t, cond = batch(n)
            assert th.allclose(model(x, t, **cond), plain(x, t, **cond), atol=1e-5)


def test_without_a_compiler_it_runs_as_before(monkeypatch):
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    said, model = [], network()
    forward = model.forward
    assert not compile_network(model, said.append) and model.forward == forward
    assert said == ["--compile True needs a C++ compiler, and g++ is not on the PATH: sampling without"]


def test_what_fails_to_compile_runs_as_before():
    def broken(graph, inputs):
        raise RuntimeError("no such instruction")

    model, plain = network(), network()
    compile_network(model, print, backend=broken)
    x, t, cond = batch(2)
    with th.no_grad():
        assert th.allclose(model(x, t, **cond), plain(x, t, **cond), atol=1e-6)


# ---- training


def gradients(model, called):
    model.zero_grad()
    x, t, cond = batch(3)
    called(x, t, **cond).square().mean().backward()
    return th.cat([param.grad.flatten() for param in model.parameters()])


@pytest.mark.slow
def test_what_is_compiled_for_training_has_the_gradients_and_the_weights_of_what_it_was():
    model = network().train()
    plain = gradients(model, model)
    compiled = compile_training(model, print, backend="aot_eager")
    assert compiled is not model
    assert th.allclose(gradients(model, compiled), plain, atol=1e-6 * plain.abs().max())
    with th.no_grad():
        next(model.parameters()).add_(1)
    assert th.allclose(gradients(model, compiled), gradients(model, model), atol=1e-6 * plain.abs().max())


def test_training_without_a_compiler_goes_on_as_before(monkeypatch):
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    said, model = [], network()
    assert compile_training(model, said.append) is model
    assert said == ["--compile True needs a C++ compiler, and g++ is not on the PATH: training without"]
