"""All exceptions that lingualinked raises on purpose; each message names the value, the cause and the remedy.

::

    LingualinkedError
    ├── ArgumentError (ValueError)
    ├── UnsupportedOperationError (NotImplementedError)
    ├── UncuttableModelError
    ├── CheckpointError
    ├── InfeasiblePlanError
    ├── KVCapacityError (RuntimeError)
    ├── ResourceError
    ├── ClosedError
    ├── ProtocolError
    │   └── PeerUnknownError
    ├── WorkerError
    │   └── DeviceMemoryError (RuntimeError)
    ├── WorkerDiedError
    ├── DaemonError
    ├── UnreachableError (ConnectionError)
    └── StepTimeoutError (TimeoutError)
    OverloadWarning (UserWarning)
    StaleKVWarning (UserWarning)

Knows no torch, no sockets and no processes.
"""

from __future__ import annotations

from collections.abc import Callable


class LingualinkedError(Exception):
    """Base of every error that the library raises on purpose."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return _remade, (
            type(self),
            self.args,
            self.__dict__,
        )  # as a process pool and Ray send it; `args` is the text alone


def _remade(kind: type[LingualinkedError], args: tuple[object, ...], fields: dict[str, object]) -> LingualinkedError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(fields)
    return error


class ArgumentError(LingualinkedError, ValueError):
    """A value that the caller passed can't be used."""


class UnsupportedOperationError(LingualinkedError, NotImplementedError):
    """An operation of transformers that a sharded model does not support; the message gives the remedy."""


class UncuttableModelError(LingualinkedError):
    """An architecture that can't be cut into stages.

    Parameters
    ----------
    name : str
        The architecture, e.g. ``"ReformerModelWithLMHead"``.
    reason : str
        Why it can't be cut, and what to do instead.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} can't be cut into stages: {reason}")
        self.name = name
        self.reason = reason


class CheckpointError(LingualinkedError):
    """A checkpoint is missing, incomplete, damaged, or of an unsupported kind."""


class InfeasiblePlanError(LingualinkedError):
    """No assignment of layers to devices satisfies the limits.

    Parameters
    ----------
    message : str
        What does not fit, and what would make it fit.
    missing_bytes : int
        Memory that is missing on the tightest device, or over all devices; 0 where memory is not the cause.
    """

    def __init__(self, message: str, *, missing_bytes: int = 0) -> None:
        super().__init__(message)
        self.missing_bytes = missing_bytes


class ResourceError(LingualinkedError):
    """A limit of the operating system is too low or used up: open files, processes and threads, or folders."""


class ClosedError(LingualinkedError):
    """A model, cluster or session was used after it had been closed."""


class ProtocolError(LingualinkedError):
    """A message that crossed a socket is malformed, oversized, of another version, or from an unknown peer."""


class PeerUnknownError(ProtocolError):
    """A message was sent to a peer that this mailbox is not connected to."""


class WorkerError(LingualinkedError):
    """A worker raised an exception while it served a request.

    Parameters
    ----------
    device : str
        Name of the device whose worker raised.
    cause : str
        Type and message of the remote exception.
    remote_traceback : str
        The remote traceback as text; empty where there is none.
    """

    def __init__(self, device: str, cause: str, remote_traceback: str = "") -> None:
        text = f"worker on device {device!r} raised {cause}"
        if remote_traceback:
            text += f"\n\nRemote traceback (device {device!r}):\n{remote_traceback.rstrip()}"
        super().__init__(text)
        self.device = device
        self.cause = cause
        self.remote_traceback = remote_traceback


class DeviceMemoryError(WorkerError, RuntimeError):
    """A request would have exceeded a device's memory limit and was refused; everything else goes on.

    Like `KVCapacityError` and torch's own out-of-memory errors, it is a `RuntimeError` that says "out of memory": tools
    that then try a smaller batch (accelerate's ``find_executable_batch_size``) look for both.
    """

    def __init__(self, device: str, cause: str, remote_traceback: str = "") -> None:
        super().__init__(device, cause, remote_traceback)
        self.args = (f"device {device!r} is out of memory. The {self.args[0]}",)


class KVCapacityError(LingualinkedError, RuntimeError):
    """A request would have exceeded the KV budget of its model (``max_kv_tokens``); other sessions go on."""


class WorkerDiedError(LingualinkedError):
    """A worker process has died; what it served can't go on.

    Parameters
    ----------
    device : str
        Name of the device whose worker died.
    how : str
        Exit status or signal, if known.
    """

    def __init__(self, device: str, how: str) -> None:
        super().__init__(
            f"the worker on device {device!r} died ({how}); models with layers there can't go on: "
            "close them and load again on a new cluster"
        )
        self.device = device
        self.how = how


class DaemonError(LingualinkedError):
    """The daemon of a device on another host can't be reached, is not the expected one, or refuses what it is asked for.

    Parameters
    ----------
    device : str
        Name of the device.
    address : str
        Where its daemon listens.
    cause : str
        What went wrong, and what to do.
    """

    def __init__(self, device: str, address: str, cause: str) -> None:
        super().__init__(f"the daemon of device {device!r} at {address}: {cause}")
        self.device = device
        self.address = address
        self.cause = cause


class UnreachableError(LingualinkedError, ConnectionError):
    """A party of a cluster can't connect to another one, over a network.

    Parameters
    ----------
    source, target : str
        Names of devices, or ``"caller"``.
    address : str
        Where the target was to be reached.
    cause : str
        Why it was not, in a few words.
    """

    def __init__(self, source: str, target: str, address: str, cause: str) -> None:
        one, other = ("the caller" if name == "caller" else f"device {name!r}" for name in (source, target))
        where = "Cluster(advertise=...)" if target == "caller" else "Device(advertise=...) or the daemon's --advertise"
        port = address.rpartition(":")[2]
        super().__init__(
            f"{one} can't connect to {other} at {address} ({cause}): see that firewalls let TCP port {port} through, say by "
            f"{where} where {other} is reached, or lead these messages through a third device by "
            f"links={{({source!r}, {target!r}): ll.Link(relay=...)}}"
        )
        self.source = source
        self.target = target
        self.address = address
        self.cause = cause


class StepTimeoutError(LingualinkedError, TimeoutError):
    """A worker did not answer within the time allowed."""


class OverloadWarning(UserWarning):
    """More requests arrive in a simulation than the pipeline can serve, so that they queue without bound."""


class StaleKVWarning(UserWarning):
    """A step uses KV that was made before the model was changed, by an edit of its weights or by skipping layers."""
