"""Learn from galaxy images without labels. Importing this loads nothing heavy."""

__version__ = "0.1.0"
