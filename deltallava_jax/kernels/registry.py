"""The kernels of an operation and the choice among them: one rule for dense and windowed attention."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

from deltallava_jax.kernels import devices


@dataclass(frozen=True)
class Operation:
    """An operation that XLA can always compute and that has kernels for some platforms.

    name: in log lines. package: where the modules of the kernels are; ``refusal(*arguments)`` of a module is why its
    kernel cannot run on such arrays, None where it can. kernels: implementation -> platform -> module. refusal_of_all:
    the same for every kernel. automatic: device kind or platform -> the kernel that was measured to be faster than XLA
    there (benchmarks/measure/kernels.py), and for which arguments."""

    name: str
    package: str
    kernels: dict[str, dict[str, str]]
    refusal_of_all: Callable[..., str | None]
    automatic: dict[str, tuple[str, Callable[..., bool]]] = field(default_factory=dict)

    @property
    def implementations(self) -> tuple[str, ...]:
        return "xla", *self.kernels

    def kernel(self, name: str) -> ModuleType:
        """The module of a kernel for the target platform."""
        return importlib.import_module(f"{self.package}.{self.kernels[name][devices.device()[0]]}")

    def refusal(self, name: str, *arguments) -> str | None:
        """Why a kernel cannot run on the target device or on such arrays; None where it can."""
        platform = devices.device()[0]
        if platform not in self.kernels[name]:
            return f"runs on {' or '.join(self.kernels[name])}, not on {platform}"
        return self.refusal_of_all(*arguments) or self.kernel(name).refusal(*arguments)

    def choose(self, *arguments) -> str:
        """The automatic choice for arrays of these shapes and dtypes; logs once why it is not a kernel."""
        platform, kind = devices.device()
        if not any(platform in modules for modules in self.kernels.values()):
            return "xla"
        measured = self.automatic.get(kind) or self.automatic.get(platform)
        if measured is None:
            reason = f"no kernel has been measured on {kind} (benchmarks/measure/kernels.py)"
        else:
            name, is_faster = measured
            if not is_faster(*arguments):
                return "xla"
            reason = self.refusal(name, *arguments)
            if reason is None:
                return name
            reason = f"{name} {reason}"
        devices.log_once(f"{self.name} runs in XLA: {reason}")
        return "xla"

    def select(self, implementation: str | None, *arguments) -> str:
        """The implementation by its name, or the automatic choice for None. Raises ValueError where it cannot run."""
        if implementation is None:
            return self.choose(*arguments)
        if implementation not in self.implementations:
            raise ValueError(f"implementation={implementation!r}; expected {', '.join(self.implementations)} or None")
        if implementation != "xla" and (reason := self.refusal(implementation, *arguments)):
            raise ValueError(f'implementation="{implementation}": {reason}')
        return implementation
