"""Before any test imports jax: eight fake CPU devices, full-precision matrix products, one cache of compiled programs.

The cache lies beside pytest's own and is shared by the tests of a run, its worker processes and later runs."""

import gc
import os
from importlib.util import find_spec
from pathlib import Path

from tests.xla import FAST_COMPILES

os.environ["JAX_PLATFORMS"] = "cpu"
flags = f"--xla_force_host_platform_device_count=8 {FAST_COMPILES}"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parent.parent / ".pytest_cache" / "xla")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Shapes and dtypes that functions of these packages state are checked at every call, where requirements-dev.txt is
# installed.
CHECKED = ["deltallava_jax.sequence", "deltallava_jax.models", "deltallava_jax.kernels"]
if find_spec("beartype"):
    import tests.shapes  # noqa: F401 (the hook finds it by name)

    install_import_hook(CHECKED, "tests.shapes.checked")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """A worker process runs hundreds of tests: kept, their programs take gigabytes and exhaust its memory mappings."""
    yield
    jax.clear_caches()
    gc.collect()
