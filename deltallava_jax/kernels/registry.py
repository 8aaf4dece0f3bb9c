"""The kernels of an operation and the choice among them: one rule for dense and windowed attention.

The choice for a call is, in this order: what the configuration forces (``forced``), what was measured on this kind of
device (``use``, made by tuning.py), the library's kernel that others have proven there, XLA."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import jax

from deltallava_jax.config import ModelConfig
from deltallava_jax.errors import ConfigError
from deltallava_jax.kernels import devices


class Call(NamedTuple):
    """What one device computes in a call of an operation: the key of a measured choice.

    shapes: of queries and keys, their rows cut to those that are measured. kind: what else its time depends on."""

    operation: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: str
    kind: str

    def __str__(self) -> str:
        queries, keys = ("x".join(map(str, shape)) for shape in self.shapes)
        keys = "" if keys == queries else f", keys {keys}"
        return f"{self.operation} {queries}{keys} {self.dtype}, {self.kind}"


class Trial(NamedTuple):
    """A call with random data. arguments: as ``Operation.refusal`` takes them; arrays: float32, on which the result
    depends smoothly; run(implementation, *arrays)."""

    arguments: tuple
    arrays: tuple[jax.Array, ...]
    run: Callable[..., jax.Array]


@dataclass(frozen=True)
class Operation:
    """An operation that XLA can always compute and that has kernels for some platforms.

    name: in log lines. setting: of the model's configuration, which forces one; also the name in a ``Call``.
    package: where the modules of the kernels are; ``refusal(*arguments)`` of a module is why its kernel cannot run on
    such arrays, None where it can. kernels: implementation -> platform -> module, relative to the package.
    refusal_of_all: the same for every kernel. is_forced: whether a forced name holds for such arrays. default: platform
    -> the kernel that is taken unmeasured, by the arguments; None: XLA. settled: platforms on which runs need not
    measure, as the default is known to be the fastest. call, trial: the ``Call`` of arguments, and a ``Trial`` of
    it."""

    name: str
    setting: str
    package: str
    kernels: dict[str, dict[str, str]]
    refusal_of_all: Callable[..., str | None]
    is_forced: Callable[..., bool]
    default: Callable[..., str | None]
    call: Callable[..., Call]
    trial: Callable[[Call], Trial]
    settled: set[str] = field(default_factory=set)

    @property
    def implementations(self) -> tuple[str, ...]:
        return "xla", *self.kernels

    def candidates(self, *arguments) -> list[str]:
        """The implementations that can run on such arrays, XLA first."""
        return ["xla", *(name for name in self.kernels if self.refusal(name, *arguments) is None)]

    def kernel(self, name: str) -> ModuleType:
        """The module of a kernel for the target platform."""
        return importlib.import_module(self.kernels[name][devices.device()[0]], self.package)

    def refusal(self, name: str, *arguments) -> str | None:
        """Why a kernel cannot run on the target device or on such arrays; None where it can."""
        platform = devices.device()[0]
        if platform not in self.kernels[name]:
            return f"runs on {' or '.join(self.kernels[name])}, not on {platform}"
        return self.refusal_of_all(*arguments) or self.kernel(name).refusal(*arguments)

    def choose(self, *arguments) -> str:
        """The choice for arrays of these shapes and dtypes; logs once why it is not the kernel for this platform.

        Raises ConfigError where the configuration orders a kernel that cannot run."""
        name, ordered = _forced.value.get(self.setting)
        if name != "auto" and self.is_forced(*arguments):
            reason = self.refusal(name, *arguments) if name != "xla" else None
            if reason is None:
                return name
            if ordered:
                raise ConfigError(f"model.{self.setting}={name}: {reason}")
        if name == "auto" and _recording.value is not None:
            _recording.value.add(self, arguments)
        name = _choice(self, arguments)
        if name == "xla" or (name and self.refusal(name, *arguments) is None):
            return name
        name = self.default(devices.device()[0], *arguments)
        if name is None:
            return "xla"
        reason = self.refusal(name, *arguments)
        if reason is None:
            return name
        devices.log_once(f"{self.name} runs in XLA: {name} {reason}")
        return "xla"

    def select(self, implementation: str | None, *arguments) -> str:
        """The implementation by its name, or the choice for None. Raises ValueError where it cannot run."""
        if implementation is None:
            return self.choose(*arguments)
        if implementation not in self.implementations:
            raise ValueError(f"implementation={implementation!r}; expected {', '.join(self.implementations)} or None")
        if implementation != "xla" and (reason := self.refusal(implementation, *arguments)):
            raise ValueError(f'implementation="{implementation}": {reason}')
        return implementation


# ---------------------------------------------------------------- forced by the configuration


class _Forced(NamedTuple):
    """ordered: whether a kernel that cannot run is an error."""

    attention: str = "auto"
    windowed_attention: str = "auto"
    ordered: bool = False

    def get(self, setting: str) -> tuple[str, bool]:
        return getattr(self, setting), self.ordered


# Contexts that are part of the keys of jax's caches of traced functions.
_forced = jax.make_user_context(default_value=_Forced())
_recording = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def forced(cfg: ModelConfig, *, ordered: bool = False) -> Iterator[None]:
    """Within it, ``cfg.attention`` and ``cfg.windowed_attention`` choose; the outermost one counts.

    ordered: what cannot run is a ConfigError, as in training; else the choice is automatic there, as in inference,
    whose configuration may come from another machine."""
    if _forced.value != _Forced():
        yield
        return
    with _forced(_Forced(cfg.attention, cfg.windowed_attention, ordered)):
        yield


def as_configured(function: Callable) -> Callable:
    """``function(params, cfg, ...)`` within ``forced(cfg)``, for a ModelConfig."""

    @functools.wraps(function)
    def within(params, cfg: ModelConfig, *arguments, **options):
        with forced(cfg):
            return function(params, cfg, *arguments, **options)

    return within


# ---------------------------------------------------------------- measured


_measured: tuple[str, dict[str, str]] | None = None  # (kind of device, choices)


def use(kind: str, choices: Mapping[str, str], *, first: bool = False) -> None:
    """From now on programs for this kind of device take these implementations: str(Call) -> its name. first: only if
    there are none in use yet. Programs that are already traced stay as they are."""
    global _measured
    if not first or _measured is None:
        _measured = kind, dict(choices)


def _choice(operation: Operation, arguments: tuple) -> str | None:
    """The measured choice, if there is one."""
    kind, choices = _measured or ("", {})
    if not choices or devices.device()[1] != kind:
        return None
    name = choices.get(str(operation.call(*arguments)))
    return name if name in operation.implementations else None


class Recording:
    """The calls, under automatic choice, of the programs that are traced: Call -> its operation."""

    def __init__(self):
        self.calls: dict[Call, Operation] = {}

    def add(self, operation: Operation, arguments: tuple[Any, ...]) -> None:
        """Adds the call, if there is anything to choose."""
        if len(operation.candidates(*arguments)) > 1:
            self.calls.setdefault(operation.call(*arguments), operation)


@contextlib.contextmanager
def recording() -> Iterator[Recording]:
    """Records what is traced within it, whether or not it has been traced before."""
    found = Recording()
    with _recording(found):
        yield found
