"""Everything but the name, description and version comes from settings.ini."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
settings = ConfigParser(delimiters=["="])
settings.read(root / "settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]

setup(
    author=cfg["author"],
    license=cfg["license"],
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Astronomy",
    ],
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["galaxy_ssl", "galaxy_ssl.*"]),
    install_requires=cfg["requirements"].split(),
    extras_require={key.removesuffix("_requirements"): cfg[key].split() for key in cfg if key.endswith("_requirements")},
    entry_points={
        "console_scripts": cfg["console_scripts"].split("\n"),
        "nbdev": ["galaxy_ssl=galaxy_ssl._modidx:d"],
    },
)
