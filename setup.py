"""What pyproject.toml cannot say: launch/ of the clone is megatron_v2pe/launch/ in a wheel; all else is there."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["megatron_v2pe*"]), "megatron_v2pe.launch"],
    package_dir={"megatron_v2pe.launch": "launch"},
    package_data={
        "megatron_v2pe": ["py.typed"],
        "megatron_v2pe.launch": ["*.sbatch", "*.sh", "clusters/*.yaml", "recipes/*", "containers/*"],
    },
)
