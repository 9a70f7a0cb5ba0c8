"""The one switch between kernels and traces: kernels report here, and only while it is on."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Listener(Protocol):
    """What a trace takes from the kernels."""

    def on_launch(self, name: str, inputs: Any, outputs: Any) -> None:
        """One kernel was launched."""

    def on_copy(self, name: str, source: Tensor, target: Tensor | None) -> None:
        """Memory was copied, converted, or moved between host and device."""


active = False
_listeners: list[Listener] = []


def add(listener: Listener) -> None:
    """Let ``listener`` hear of every kernel from now on."""
    global active
    _listeners.append(listener)
    active = True


def remove(listener: Listener) -> None:
    """Stop telling ``listener``."""
    global active
    _listeners.remove(listener)
    active = bool(_listeners)


def launch(name: str, inputs: Any, outputs: Any) -> None:
    """Report one kernel: its operator, what it read and what it wrote."""
    for listener in tuple(_listeners):
        listener.on_launch(name, inputs, outputs)


def copy(name: str, source: Tensor, target: Tensor | None) -> None:
    """Report one copy; ``target`` is None when a single number went to the host."""
    for listener in tuple(_listeners):
        listener.on_copy(name, source, target)
