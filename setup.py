"""Package of dspark-megatron; `make quickstart` and `make test` install it with pinned versions."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
INIT = (HERE / "dspark_megatron" / "__init__.py").read_text(encoding="utf-8")
(VERSION,) = re.findall(r'(?m)^__version__ = "(.+)"$', INIT)  # imports nothing: it may need torch

setup(
    name="dspark-megatron",
    version=VERSION,
    description="Train DSpark speculative-decoding drafters tensor-parallel with Megatron-Core",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["dspark_megatron", "dspark_megatron.*"]),
    entry_points={"console_scripts": ["dspark = dspark_megatron.cli.main:main"]},
    package_data={"dspark_megatron": ["py.typed", "**/*.jinja", "data/prompts/sets/*.jsonl"]},
    install_requires=[
        "torch>=2.11",
        "megatron-core>=0.16,<0.20",
        "transformers>=5.17",  # newer ones split targets in more ways: docs/architecture.md
        "numpy",
        "safetensors>=0.8",
        "pyyaml",
        "tensorboard",
        "tqdm",
        "matplotlib",
        "jinja2",  # chat templates
        "psutil",  # megatron-core's distributed checkpoints import it
        "setuptools",  # megatron-core imports it through torch.utils.cpp_extension
    ],
    extras_require={
        "transformer-engine": ["transformer-engine[pytorch]"],
        "modelopt": ["nvidia-modelopt>=0.47", "requests"],  # weights of more GPTModels
        "data": ["datasets>=4", "pyarrow>=21"],  # Parquet, Zstandard, data sets of the Hub
        "quickstart": ["gguf", "accelerate"],  # reading the GGUF target
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material", "mkdocstrings[python]"],
        "dev": [
            *("pytest", "pytest-xdist", "hypothesis", "markdown-it-py"),
            *("ruff", "mypy", "types-PyYAML", "pre-commit", "build"),
        ],
    },
)
