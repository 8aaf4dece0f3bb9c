"""Before any test imports jax: eight fake CPU devices, and full-precision matrix products."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # the latter: faster compiles
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
