"""Dense attention: every query with every key that it sees, the one call site of tower, projectors and decoder.

XLA's form is the contract; splash.py (TPU) and cudnn.py (NVIDIA) wrap the libraries' kernels, which never hold the
scores, and dispatch.py chooses among them."""

from deltallava_jax.kernels.attention.dispatch import Seen, attention, causal

__all__ = ["Seen", "attention", "causal"]
