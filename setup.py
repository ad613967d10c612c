import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "guided_diffusion_vae/__init__.py").read_text("utf-8"), re.M)

setup(
    name="guided_diffusion_vae",
    version=VERSION[1],
    description="guided-diffusion on VAE latents, for micro-Doppler spectrograms of walking people",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    keywords="diffusion flow-matching vae latent-diffusion dit radar micro-doppler spectrogram gait",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    # scripts/ and configs/ stay where they are; in a wheel they lie within the package, where `gdvae` finds them.
    packages=find_packages(include=["guided_diffusion_vae*", "evaluations*"])
    + ["guided_diffusion_vae.scripts", "guided_diffusion_vae.configs"],
    package_dir={"guided_diffusion_vae.scripts": "scripts", "guided_diffusion_vae.configs": "configs"},
    package_data={"guided_diffusion_vae": ["assets/*"], "guided_diffusion_vae.configs": ["*.yaml"]},
    entry_points={"console_scripts": ["gdvae=guided_diffusion_vae.cli:main"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        "numpy>=1.26",
        "scipy>=1.11",
        "pillow>=10.0",
        "tqdm",
        "blobfile>=2.0",
        "mpi4py>=4.0",
        "diffusers>=0.42.1",
        "safetensors>=0.4",
        "PyYAML>=6.0",
    ],
    extras_require={
        "mpi": ["mpich"],
        "tb": ["tensorboard"],
        "wandb": ["wandb"],
        "vf": ["transformers>=5"],
        "ode": ["torchdiffeq"],
        "plots": ["matplotlib"],
        "docs": ["mkdocs-material", "mkdocstrings-python"],
        "dev": [
            *("pytest", "pytest-xdist", "hypothesis", "ruff", "pyright"),
            *("transformers>=5", "torchdiffeq", "matplotlib"),  # what is tested and checked of the other extras
        ],
    },
)
