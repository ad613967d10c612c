"""Pictures to read and encode: spectrograms of a few simulated walking persons."""

from pathlib import Path

from PIL import Image

from guided_diffusion_vae.data.microdoppler import SimulationConfig, render


def draw_images(folder: Path, count: int, *, size: int = 64, users: int = 8) -> Path:
    """`count` pictures as FOLDER/user_00/00000.png and so on, in turn; returns the folder."""
    config = SimulationConfig(image_size=size)
    for i in range(count):
        path = folder / f"user_{i % users:02d}" / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render(config, i % users, 0, i // users)[0]).save(path)
    return folder
