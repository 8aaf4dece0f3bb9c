"""Token-efficient vision-language models in JAX. Submodules are imported where they are used."""

__version__ = "0.1.0"
