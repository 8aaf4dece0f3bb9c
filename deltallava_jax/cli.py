"""What the command-line doors share: errors a user can act on are one clear message, without a traceback."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def overrides(rest: list[str], command: str) -> dict[str, str]:
    """{dotted key: text} of --config.KEY=VALUE or --config.KEY VALUE arguments. Raises ConfigError for any other."""
    from deltallava_jax.config import ConfigError

    found, rest = {}, list(rest)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--config."):
            raise ConfigError(f"unknown argument {name!r}; see python {command} --help")
        if not equals:
            if not rest:
                raise ConfigError(f"{name} has no value")
            value = rest.pop(0)
        found[name.removeprefix("--config.")] = value
    return found


def say(line: str) -> None:
    """A line for the person at the screen, apart from what the command prints for programs."""
    print(line, file=sys.stderr, flush=True)


def run(main: Callable[[], None], interrupted: str = "interrupted") -> None:
    """Runs a door's main with JAX's compiled programs kept between runs; exits 1 with a message on a known error,
    on Ctrl-C, and where another process of the run is gone."""
    import jax

    from deltallava_jax.config import ConfigError
    from deltallava_jax.convert.tensors import ConversionError
    from deltallava_jax.data.tokens import TokenizerError
    from deltallava_jax.models.names import WeightMismatch
    from deltallava_jax.parallel import hosts
    from deltallava_jax.training.checkpoints import CheckpointError, SaveFailed
    from deltallava_jax.training.loop import TooManyFaults
    from deltallava_jax.training.metrics import NonFiniteLoss

    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "deltallava_jax" / "xla"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    known = (
        ConfigError, ConversionError, TokenizerError, WeightMismatch, CheckpointError, TooManyFaults, NonFiniteLoss,
    )  # fmt: skip
    try:
        main()
    except known as error:
        # After a save that failed the event files of TensorBoard cannot be closed either.
        hosts.leave(f"error: {error}", at_once=isinstance(error, SaveFailed))
    except KeyboardInterrupt:
        hosts.leave(interrupted)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            hosts.leave(f"error: {error}. Please make room on that disk and start the same command again", at_once=True)
        if not jax.distributed.is_initialized():
            raise
        hosts.leave(hosts.lost(error) or traceback.format_exc())
