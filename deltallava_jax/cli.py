"""What the command-line doors share: errors a user can act on are one clear message, without a traceback."""

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

# What opening or making a file raises where its path is wrong.
PATHS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


def overrides(rest: list[str], command: str) -> dict[str, str]:
    """{dotted key: text} of --config.KEY=VALUE or --config.KEY VALUE arguments. Raises ConfigError for any other,
    with the command whose --help tells the rest."""
    found, rest = {}, list(rest)
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
    """How the commands are called where this one was."""
    return "deltallava" if Path(sys.argv[0]).name == "deltallava" else "python -m deltallava_jax"


def invocation(name: str) -> str:
    """How a command is called from where this one was: "python train.py" beside the files, else "deltallava train"."""
    beside = Path(f"{name}.py").is_file() and program() != "deltallava"
    return f"python {name}.py" if beside else f"deltallava {name}"


def log(line: str) -> None:
    """A line for the person at the screen, apart from what the command prints for programs."""
    print(line, file=sys.stderr, flush=True)


def libtpu_is_idle() -> bool:
    """Whether libtpu is installed, as ``plan`` needs it, where there is neither a TPU nor another accelerator's plugin.

    JAX would start it all the same, and it would fill the screen with errors before the CPU is taken."""
    if os.environ.get("JAX_PLATFORMS") or importlib.util.find_spec("libtpu") is None:
        return False
    if importlib.util.find_spec("jax_plugins") or importlib.metadata.entry_points(group="jax_plugins"):
        return False
    return not (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*") or "TPU_NAME" in os.environ)


def run(main: Callable[[], None], interrupted: str = "interrupted") -> None:
    """Runs a command's main with JAX's compiled programs kept between runs.

    A UserError, a path of the user's that cannot be used, or a disk that is full, is one line on stderr and exit code
    2; Ctrl-C exits with 130; where another process of the run is gone that is said, with exit code 1."""
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
        # After a save that failed the event files of TensorBoard cannot be closed either.
        hosts.leave(f"error: {error}", 2, at_once=isinstance(error, SaveFailed))
    except KeyboardInterrupt:
        hosts.leave(interrupted, 130)
    except Exception as error:
        if isinstance(error, PATHS) and _is_the_users(error.filename):
            hosts.leave(f"error: {error.filename}: {error.strerror}", 2)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            hosts.leave(
                f"error: {error}. Please make room on that disk and start the same command again", 2, at_once=True
            )
        if not jax.distributed.is_initialized():
            raise
        hosts.leave(hosts.lost(error) or traceback.format_exc(), 1)


def _is_the_users(path) -> bool:
    """Whether a path is no file of this package, whose absence is our mistake."""
    return path is not None and not Path(os.fsdecode(path)).resolve().is_relative_to(Path(__file__).parent)
