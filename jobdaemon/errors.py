"""
Every error this package raises on purpose.

    JobdaemonError
      SettingsError               wrong or contradictory settings; exit code 2, never a retry
      DatabaseUnavailableError    Postgres cannot be reached or refuses the login; exit code 3
        RowsLockedError           somebody holds what a statement needs; the connection is as good as before
      SchemaVersionError          the schema is too old or too new for this program; exit code 3
      LeaseLostError              another worker owns the job; drop the result
        OrderEndedError           nobody works on its order any more
      RefusedError                the door said no: full, unknown plan, bad source; exit code 4
      RetryableError              may work later; carries retry_after when the other side gave one
        ProviderUnavailableError
          AnswerLostError         it may have done what was asked: nobody knows
          UnreachableError        no connection: it never heard of the request
          BackendAwayError        what beautifies is away, and has not seen the photo: costs no attempt
        PutOffError               not now, and nobody's fault: costs no attempt
        RateLimitedError          a capacity signal: costs no attempt
        KeyRefusedError           the key rests and the job goes on with another: costs no attempt
        KeyMissingError           another daemon has the key that a call was made with: costs no attempt
        DeviceMemoryError
        DeviceFailedError         the process that drives the device died or hung, of this work as far as one can tell
        StoreUnavailableError
        SourceUnavailableError    one order's photo or link; says nothing about anybody else's
        NothingRetouchedError     a prewarm whose faces all came back as they were
      PermanentError              straight to dead letter, whatever attempts remain
        InvalidOrderError
          DownloadRefusedError    a server will not give what a link names
        UnsupportedImageError
        ProviderRefusedError
          PhotoRefusedError       it could not fetch, or read, the photo
        UnsupportedFeatureError
        ArtifactMissingError
        StoreRefusedError         wrong key, bucket or rights: an operator has to act

Messages are whole sentences for people and never contain a key or a signed URL.
"""

from __future__ import annotations

from datetime import timedelta


class JobdaemonError(Exception):
    """Base of every error raised on purpose."""


class SettingsError(JobdaemonError):
    """A setting is wrong, unknown or contradicts another one."""


class DatabaseUnavailableError(JobdaemonError):
    """Postgres cannot be reached, or refuses the login."""


class RowsLockedError(DatabaseUnavailableError):
    """Somebody has held what a statement needs for longer than it waits."""


class SchemaVersionError(JobdaemonError):
    """The database's schema does not fit this program; the message says what to run."""


class LeaseLostError(JobdaemonError):
    """The attempt's token no longer holds: its result must be dropped."""


class OrderEndedError(LeaseLostError):
    """The order was cancelled, expired or ended: nobody goes on with what the attempt has bought."""


class RefusedError(JobdaemonError):
    """
    The database refused a request at the door.

    Attributes:
        sqlstate: ``JD001`` … ``JD006``, as in docs/sql.md.
    """

    def __init__(self, message: str, *, sqlstate: str) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


class RetryableError(JobdaemonError):
    """
    The attempt may work later.

    Attributes:
        retry_after: how long the other side asked us to wait, when it did.
    """

    def __init__(self, message: str, *, retry_after: timedelta | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ProviderUnavailableError(RetryableError):
    """A provider did not answer, or answered with a server error."""


class AnswerLostError(ProviderUnavailableError):
    """A request was sent and no whole answer came: the provider may have done, and charged for, what was asked."""


class UnreachableError(ProviderUnavailableError):
    """No connection could be made: not a byte of the request was sent."""


class BackendAwayError(ProviderUnavailableError):
    """
    What beautifies elsewhere is away, and found to be so before it was given the photo. Retried without spending an attempt.

    An outage of the queue all the same: its circuit opens.
    """


class PutOffError(RetryableError):
    """Somebody else is at it, or something has to be done first. Put off without spending an attempt, and no sign of trouble."""


class RateLimitedError(RetryableError):
    """A provider said it is at capacity. Retried without spending an attempt."""


class KeyRefusedError(RetryableError):
    """
    The provider refused this key, or its account is out of money.

    The key rests, and the job waits for another one without spending an attempt; where the provider's keys are none of the
    engine's (the job has no key) it is retried as after any other error, so that it ends.

    Attributes:
        is_out_of_money: the key itself is fine, its account or its quota is empty.
    """

    def __init__(self, message: str, *, is_out_of_money: bool = False, retry_after: timedelta | None = None) -> None:
        super().__init__(message, retry_after=retry_after)
        self.is_out_of_money = is_out_of_money


class KeyMissingError(RetryableError):
    """What is to be asked for was bought with a key that this daemon does not have. The job is for one that has it."""


class DeviceMemoryError(RetryableError):
    """The compute device could not hold the work."""


class DeviceFailedError(RetryableError):
    """The process that drives a compute device died or hung, each time with nothing but this work in it."""


class StoreUnavailableError(RetryableError):
    """The artifact store did not answer, is full, or answered with a server error."""


class SourceUnavailableError(RetryableError):
    """
    The host of one order's photo, or of one image's link, did not give it.

    Not a ProviderUnavailableError: customers name these hosts, and a few dead ones must not open the circuit of a queue.
    """


class NothingRetouchedError(RetryableError):
    """Not one of a photo's faces was retouched, so that there is nothing to keep; an order would have gone on with it."""


class PermanentError(JobdaemonError):
    """Trying again cannot help."""


class InvalidOrderError(PermanentError):
    """The order itself cannot be carried out."""


class DownloadRefusedError(InvalidOrderError):
    """
    The server will not give the file (4xx): gone, forbidden, or its signed URL expired.

    Attributes:
        status: the HTTP status.
    """

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class UnsupportedImageError(PermanentError):
    """The bytes are no image we accept; the message says why."""


class ProviderRefusedError(PermanentError):
    """A provider will not make this image (content policy, bad parameters)."""


class PhotoRefusedError(ProviderRefusedError):
    """A provider could not fetch the photo by its link, or read it."""


class UnsupportedFeatureError(PermanentError):
    """The chosen provider, backend or store cannot express what was asked."""


class ArtifactMissingError(PermanentError):
    """The store has no object under the key."""


class StoreRefusedError(PermanentError):
    """The store refused us (credentials, bucket, rights); trying again cannot help."""
