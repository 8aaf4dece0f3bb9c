"""What the annotations of shapes take for an array."""

from __future__ import annotations

import jax
import numpy as np

# jax's, traced or not; numpy's on the host; a shape alone, also as a compiled program tells what it takes
Array = jax.Array | np.ndarray | jax.ShapeDtypeStruct | jax.stages.ArgInfo
