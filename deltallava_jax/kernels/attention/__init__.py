"""Dense attention: every query with every key its mask allows, the one call site of tower, projectors and decoder.

XLA's form is the contract; splash.py (TPU) and cudnn.py (NVIDIA) wrap the libraries' kernels, which keep no scores
in memory, and dispatch.py chooses among them."""

from deltallava_jax.kernels.attention.dispatch import (
    SKIPPING,
    TRIANGLE,
    AttentionMask,
    attention,
    causal,
    kernel_outputs_saveable,
)

__all__ = ["SKIPPING", "TRIANGLE", "AttentionMask", "attention", "causal", "kernel_outputs_saveable"]
