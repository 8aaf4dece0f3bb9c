"""What the annotations of shapes take for an array."""

from __future__ import annotations

import jax
import numpy as np

Array = jax.Array | np.ndarray | jax.ShapeDtypeStruct  # jax's, traced or not; numpy's on the host; a shape alone
