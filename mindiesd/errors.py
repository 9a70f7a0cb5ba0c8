"""Errors that mindiesd raises on purpose."""

from __future__ import annotations


class ParametersInvalid(ValueError):
    """An argument was wrong.

    The message names the argument, what was received and what is allowed, so that it can be acted
    upon without reading the source.
    """

    def __init__(self, argument: str, received: object, allowed: str) -> None:
        """Describe one wrong argument.

        Args:
            argument: name of the argument as the caller wrote it, e.g. ``"attn_mask"``.
            received: what came; shown as is when it is text, else by ``repr``.
            allowed: what would have been accepted, as the end of "allowed: …".
        """
        shown = received if isinstance(received, str) else repr(received)
        super().__init__(f"{argument}: received {shown}; allowed: {allowed}")
        self.argument = argument
        self.received = received
        self.allowed = allowed

    def __reduce__(self) -> tuple[type[ParametersInvalid], tuple[str, object, str]]:
        """Pickle by the three parts: worker processes send exceptions back to their parent."""
        return type(self), (self.argument, self.received, self.allowed)


class PatchError(RuntimeError):
    """A patch that was asked for by name, or under ``strict=True``, could not be applied."""
