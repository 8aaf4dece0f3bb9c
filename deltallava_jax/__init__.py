"""Token-efficient vision-language models in JAX."""

from deltallava_jax.load import load

__all__ = ["load"]
__version__ = "0.1.0"
