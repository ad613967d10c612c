"""Steps per second against the official code, side by side in one run, on the same network, weights and data.

    pip install guided-diffusion-sdk      # the official code as packaged in 2022; here only run, never read
    python benchmarks/bench_adm.py

Prints the ratio of training steps and of sampling steps per second, ours over theirs: the median over alternating
rounds, so that a machine that speeds up or slows down favours neither.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time

import torch as th

NETWORK = {
    "image_size": 16,
    "in_channels": 4,
    "model_channels": 64,
    "out_channels": 4,
    "num_res_blocks": 2,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2, 2),
    "num_heads": 4,
    "use_scale_shift_norm": True,
}


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    if th.cuda.is_available():
        th.cuda.synchronize()
    return time.perf_counter() - start


def contender(package: str, batch, device):
    """(one training step, one sampling step) of a package that has upstream's modules."""
    from importlib import import_module

    unet, respace, gd, fp16, nn = (
        import_module(f"{package}.{name}") for name in ("unet", "respace", "gaussian_diffusion", "fp16_util", "nn")
    )
    th.manual_seed(0)
    model = unet.UNetModel(**NETWORK).to(device)
    diffusion = respace.SpacedDiffusion(
        use_timesteps=respace.space_timesteps(1000, [1000]),
        betas=gd.get_named_beta_schedule("linear", 1000),
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.FIXED_LARGE,
        loss_type=gd.LossType.MSE,
    )
    trainer = fp16.MixedPrecisionTrainer(model=model)
    opt = th.optim.AdamW(trainer.master_params, lr=1e-4)
    ema = [p.detach().clone() for p in trainer.master_params]
    t = th.randint(0, 1000, (len(batch),), device=device)

    def train_step():
        trainer.zero_grad()
        trainer.backward(diffusion.training_losses(model, batch, t)["loss"].mean())
        trainer.optimize(opt)
        nn.update_ema(ema, trainer.master_params, rate=0.999)

    def sample_step():
        with th.no_grad():
            diffusion.p_sample(model, batch, t, clip_denoised=False)

    return train_step, sample_step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rival", default="guided_diffusion", help="a package with upstream's modules")
    args = parser.parse_args()
    os.environ.setdefault("OPENAI_LOGDIR", tempfile.mkdtemp())
    device = th.device("cuda" if th.cuda.is_available() else "cpu")
    batch = th.randn(args.batch_size, 4, 16, 16, device=device)
    with contextlib.redirect_stdout(None):
        ours, theirs = (contender(name, batch, device) for name in ("guided_diffusion_vae", args.rival))
    print(f"{device}, {th.get_num_threads()} threads, torch {th.__version__}, batch {args.batch_size}")
    for what, mine, other in zip(("training", "sampling"), ours, theirs, strict=True):
        mine(), other()  # warm up
        rounds = [(seconds(mine), seconds(other)) for _ in range(args.rounds)]
        ratio = statistics.median(b / a for a, b in rounds)
        ms = [1000 * statistics.median(column) for column in zip(*rounds, strict=True)]
        print(f"{what}: {ratio:.2f} times the official steps per second ({ms[0]:.1f} ms against {ms[1]:.1f} ms a step)")


if __name__ == "__main__":
    main()
