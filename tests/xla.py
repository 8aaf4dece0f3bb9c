"""XLA for tests: programs run once or twice, so they are compiled fast rather than well; programs without loops, in
which XLA counts every operation."""

import contextlib
import functools
from unittest import mock

# Without LLVM's optimizations and without the fusion emitters, which take most of the time of compiling for a CPU.
FAST_COMPILES = "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"


@contextlib.contextmanager
def unrolled():
    """Within it every scan is traced unrolled: jax.lax.scan is replaced."""
    import jax

    with mock.patch.object(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True)):
        yield
