from setuptools import find_packages, setup

setup(
    name="guided_diffusion_vae",
    version="0.1.0",
    description="guided-diffusion on VAE latents, for micro-Doppler spectrograms of walking people",
    license="MIT",
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
        "dev": ["pytest", "pytest-xdist", "hypothesis", "ruff", "pyright", "transformers>=5", "torchdiffeq"],
    },
)
