"""Packaging of mtrain: the packages, what they need, and the extras. Settings of the tools are in pyproject.toml."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# Recipes are data beside the code; an installed package carries them as mtrain/recipes.
packages = [*find_packages(include=["sparse_kernels*", "mtrain*"]), "mtrain.recipes"]
package_dir = {"mtrain.recipes": "recipes"}

# The evaluation package lives in eval/mtrain_eval, so that no bare module called `eval` can ever be imported.
if (ROOT / "eval" / "mtrain_eval" / "__init__.py").exists():
    packages += find_packages("eval", include=["mtrain_eval*"])
    package_dir["mtrain_eval"] = "eval/mtrain_eval"

extras = {
    # flash-attn needs the installed torch to build, so it cannot be an ordinary dependency. Where it is wanted:
    #   pip install flash-attn --no-build-isolation
    "gpu": ["triton>=3.4; platform_system == 'Linux'"],
    "eval": ["lm-eval>=0.4.13", "wonderwords>=3.0", "nltk>=3.9.1", "rouge-score>=0.1.2", "matplotlib>=3.8"],
    "plot": ["matplotlib>=3.8"],
    # Triton's interpreter and compiler need no GPU: the kernels are tested everywhere.
    "dev": [
        "pytest>=8.2",
        "pytest-xdist>=3.5",
        "ruff>=0.9",
        "mypy>=1.13",
        "types-PyYAML",
        "matplotlib>=3.10",
        "triton>=3.4; platform_system == 'Linux'",
    ],
}

setup(
    name="mtrain",
    version="0.1.0",
    description="Long-context training of Hugging Face language models with dynamic sparse attention over a ring of workers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=packages,
    package_dir=package_dir,
    package_data={"mtrain.recipes": ["*.yaml", "*/*.yaml"], "mtrain": ["py.typed"], "sparse_kernels": ["py.typed"]},
    install_requires=[
        "torch>=2.8",
        # The oldest tested. 5.4 keeps the dynamic RoPE of the longest text seen: an answer depends on earlier questions.
        "transformers>=5.17",
        "accelerate>=1.10",
        "datasets>=4.0",
        "tokenizers>=0.23.1",
        "safetensors>=0.8",
        "numpy>=1.26",
        "PyYAML>=6.0",
        "tqdm>=4.66",
        "tensorboard>=2.16",
    ],
    extras_require=extras,
    entry_points={"console_scripts": ["mtrain = mtrain.cli:main"]},
)
