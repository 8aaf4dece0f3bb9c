"""Windowed attention: every window of queries attends to the keys of its own region of the patch grid."""

from deltallava_jax.kernels.windowed_attention.reference import windowed_attention

__all__ = ["windowed_attention"]
