"""Errors a caller of `fed` may want to catch apart from other `ValueError`s."""


class PartitionError(ValueError):
    """A division of data among clients that cannot be made; the message says how to mend it."""


class ClientError(RuntimeError):
    """A client's own function failed; the message names the client and the step."""


class SegmentError(ValueError):
    """A coded message that cannot be trusted: damaged, out of order, or of another stream."""
