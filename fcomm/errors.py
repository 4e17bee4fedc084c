"""One type for each kind of failure. All are FcommErrors, and also the corresponding built-in exception, if any."""

from collections.abc import Iterable


class FcommError(RuntimeError):
    """The base of all errors here. Raised as itself, it is a local mistake: nothing was sent, the group stays usable.

    Raised as itself by fcomm.run, it means that a rank failed, and has that rank's traceback.

    op, group, rank: the collective, the name of its group, and this process's rank in it, if the error concerns one.
    culprits: the ranks within the group that caused it, if this rank can know them.
    """

    def __init__(
        self, text: str = "", *, op: str = "", group: str = "", rank: int | None = None, culprits: Iterable[int] = ()
    ) -> None:
        super().__init__(text)
        self.op = op
        self.group = group
        self.rank = rank
        self.culprits = tuple(culprits)


class ArgumentError(FcommError, ValueError):
    """An argument has a value that the function cannot take; nothing was sent."""


class RendezvousError(FcommError):
    """The ranks of a group did not find each other, or disagree on who they are."""


class CollectiveTimeoutError(FcommError, TimeoutError):
    """A collective passed its group's deadline; the text names the ranks that did not arrive."""


class PeerDiedError(FcommError, ConnectionError):
    """A rank of the group ended during, or before, a collective; the text names it."""


class MismatchError(FcommError):
    """The ranks called different collectives, or one collective with different shapes, dtypes or options."""


class GroupClosedError(FcommError):
    """The group was closed, or belongs to the process that this one was forked from."""


class GroupPoisonedError(FcommError):
    """An earlier error made the group unusable; the text repeats that error."""


class BackendUnavailableError(FcommError, ImportError):
    """A backend's library is missing, too old, or refused; the text lists what was tried."""


class BackendError(FcommError):
    """A backend's library returned an error status.

    code: the status as the library numbers it.  code_name: the library's name for it.
    """

    def __init__(
        self,
        text: str = "",
        *,
        code: int = -1,
        code_name: str = "",
        op: str = "",
        group: str = "",
        rank: int | None = None,
        culprits: Iterable[int] = (),
    ) -> None:
        super().__init__(text, op=op, group=group, rank=rank, culprits=culprits)
        self.code = code
        self.code_name = code_name


class BackendTimeoutError(BackendError, CollectiveTimeoutError):
    """The library's own deadline passed: a status such as ncclTimeout or HCCL_E_TIMEOUT."""


class BackendPeerError(BackendError, PeerDiedError):
    """The library lost a rank: a status such as ncclRemoteError or HCCL_E_REMOTE."""


def printable(text: str) -> str:
    """Text from a library or another process, made fit for an error: one line, no control characters, not too long."""
    return "".join(c if c.isprintable() else "?" for c in text[:500])
