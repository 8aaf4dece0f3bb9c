"""Shared by the command-line entry points: an error that the user can fix is one message, without a traceback."""

from __future__ import annotations

import errno
import glob
import importlib.metadata
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from deltallava_jax.errors import ConfigError, SaveFailed, UserError

# Raised when a file is opened or created at a wrong path.
PATHS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


def overrides(rest: list[str], command: str) -> dict[str, str]:
    """{dotted key: text} of --config.KEY=VALUE or --config.KEY VALUE arguments. Raises ConfigError for any other
    argument, naming the command whose --help lists them."""
    found = {}
    rest = list(rest)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--config."):
            raise ConfigError(f"unknown argument {name!r}; see {command} --help")
        if not equals:
            if not rest:
                raise ConfigError(f"{name} has no value")
            value = rest.pop(0)
        found[name.removeprefix("--config.")] = value
    return found


def program() -> str:
    """How to invoke the commands: as this process was invoked."""
    return "deltallava" if Path(sys.argv[0]).name == "deltallava" else "python -m deltallava_jax"


def invocation(name: str) -> str:
    """How to invoke a command here: "python train.py" in a folder with the file, else "deltallava train"."""
    beside = Path(f"{name}.py").is_file() and program() != "deltallava"
    return f"python {name}.py" if beside else f"deltallava {name}"


def log(line: str) -> None:
    """Prints a line for the user, on stderr; stdout is for a command's results."""
    print(line, file=sys.stderr, flush=True)


def libtpu_is_idle() -> bool:
    """Whether libtpu is installed, as ``plan`` needs it, where there is neither a TPU nor another accelerator's plugin.

    JAX would initialize it anyway and print many errors before falling back to the CPU."""
    if os.environ.get("JAX_PLATFORMS") or importlib.util.find_spec("libtpu") is None:
        return False
    if importlib.util.find_spec("jax_plugins") or importlib.metadata.entry_points(group="jax_plugins"):
        return False
    return not (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*") or "TPU_NAME" in os.environ)


def run(main: Callable[[], None], interrupted: str = "interrupted") -> None:
    """Runs a command's main with a persistent cache of JAX's compiled programs.

    A UserError, an unusable path given by the user, or a full disk is one line on stderr and exit code 2; Ctrl-C exits
    with 130; the loss of another process of the run is reported with exit code 1."""
    import jax

    from deltallava_jax.parallel import hosts

    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "deltallava_jax" / "xla"))
    if libtpu_is_idle():
        jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    try:
        main()
    except UserError as error:
        # After a failed save TensorBoard's event files cannot be closed either.
        hosts.leave(f"error: {error}", 2, at_once=isinstance(error, SaveFailed))
    except KeyboardInterrupt:
        hosts.leave(interrupted, 130)
    except Exception as error:
        if isinstance(error, PATHS) and _is_user_path(error.filename):
            hosts.leave(f"error: {error.filename}: {error.strerror}", 2)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            hosts.leave(f"error: {error}. Free space on that disk and start the same command again", 2, at_once=True)
        if not jax.distributed.is_initialized():
            raise
        hosts.leave(hosts.lost(error) or traceback.format_exc(), 1)


def _is_user_path(path) -> bool:
    """Whether a path is the user's, not one of this package, whose absence would be a bug."""
    return path is not None and not Path(os.fsdecode(path)).resolve().is_relative_to(Path(__file__).parent)
