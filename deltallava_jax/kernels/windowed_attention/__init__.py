"""Windowed attention: every window of queries attends to the keys of its own region of the patch grid.

reference.py is the contract, in plain XLA; tpu.py and gpu.py are the kernels, vjp.py their derivative, and dispatch.py
chooses among them."""

from deltallava_jax.kernels.windowed_attention.dispatch import local_attention, windowed_attention

__all__ = ["local_attention", "windowed_attention"]
