"""Before any test imports jax: eight fake CPU devices, and full-precision matrix products."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
