"""The exception tree: everything that lingualinked raises on purpose.

Knows no torch, no sockets and no processes; each message names the value, the cause and the remedy.
"""


class LingualinkedError(Exception):
    """Base of every error that the library raises on purpose."""


class ArgumentError(LingualinkedError, ValueError):
    """A value that the caller passed can't be used."""


class UnsupportedOperationError(LingualinkedError, NotImplementedError):
    """Something transformers can do that a sharded model does not do; the message gives the remedy."""


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
    """A checkpoint is missing, incomplete, damaged, or of a kind that is not supported."""


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
    """The operating system's limits on this process do not suffice: open files, processes and threads, or folders."""


class ClosedError(LingualinkedError):
    """A model, cluster or session was used after it had been closed."""


class ProtocolError(LingualinkedError):
    """A message that crossed a socket is malformed, oversized, of another version, or from an unknown peer."""


class PeerUnknownError(ProtocolError):
    """A message was sent to a peer that this mailbox is not connected to."""


class WorkerError(LingualinkedError):
    """A worker raised while it served a request.

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
    """A device's memory limit would be exceeded; the request was refused and everything else goes on.

    As `KVCapacityError`, it reads as torch's own errors do where memory does not suffice, a `RuntimeError` that says
    "out of memory": what tries smaller batches then (accelerate's ``find_executable_batch_size``) looks for both.
    """

    def __init__(self, device: str, cause: str, remote_traceback: str = "") -> None:
        super().__init__(device, cause, remote_traceback)
        self.args = (f"device {device!r} is out of memory. The {self.args[0]}",)


class KVCapacityError(LingualinkedError, RuntimeError):
    """The KV budget of a model (``max_kv_tokens``) would be exceeded; other sessions go on."""


class WorkerDiedError(LingualinkedError):
    """A worker process is gone; what it served can't go on.

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


class StepTimeoutError(LingualinkedError, TimeoutError):
    """A worker did not answer within the time allowed."""


class OverloadWarning(UserWarning):
    """More requests arrive in a simulation than the pipeline can serve: they queue without bound."""
