"""The packages of the wheel: bigmac_jax, and configs/ inside it, so that --config=tiny works from anywhere."""

from setuptools import find_namespace_packages, find_packages, setup

inner = find_namespace_packages("configs", exclude=["*__pycache__*"])
setup(
    packages=[
        *find_packages(include=["bigmac_jax*"]),
        "bigmac_jax.configs",
        *(f"bigmac_jax.configs.{name}" for name in inner),
    ],
    package_dir={"bigmac_jax.configs": "configs"},
)
