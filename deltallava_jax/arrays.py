"""The array type of the shape annotations."""

from __future__ import annotations

import jax
import numpy as np

Array = jax.Array | np.ndarray | jax.ShapeDtypeStruct  # on the device or traced; on the host; a shape without data
