"""Every error this package raises on purpose, each one sentence, and nothing else."""

from __future__ import annotations


class KinoError(Exception):
    """Root of the errors that this package raises on purpose."""


class MalformedMessage(KinoError):
    """A message on a queue that cannot be understood; it is kept as a dead letter under `code`.

    `cause` is what messages with the same mistake have in common, such as the wrong field's path: letters are grouped
    by it, and never by values that differ from message to message.
    """

    def __init__(self, code: str, text: str, *, cause: str = "") -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.cause = cause


class GrantConflict(KinoError):
    """The reference of this grant already names a grant with other terms."""


class ChargeConflict(KinoError):
    """The job already has a charge for another account or another number of credits."""


class ChargeAlreadySettled(KinoError):
    """The job's charge is settled, so it cannot be opened again."""


class InsufficientCredits(KinoError):
    """The account's spendable credits do not cover the charges."""


class AccountNotActive(KinoError):
    """The account is suspended, terminated or unknown, so it cannot be charged."""


class TooManyLots(KinoError):
    """A charge would take from more lots than one can; its account's credits lie in too many small lots."""


class LedgerBusy(KinoError):
    """Another session holds what this call needs; nothing was done, try again."""


class RefusedInput(KinoError, ValueError):
    """A ledger function does not take what it was sent; the text names the item."""


class ChargeNotCaptured(KinoError):
    """Only a captured charge can be refunded by a reversal."""


class InstantNotFinal(KinoError):
    """What was at this instant may still change; the text names the latest instant that can be asked for."""


class UnfitSession(KinoError):
    """The caller's database session is in autocommit, or in an encoding that cannot carry every id."""


class LedgerInconsistent(KinoError):
    """The ledger's own rows contradict each other; nothing is moved until a person has looked."""


class SettledElsewhere(KinoError):
    """Another session decided one of these events between our read and our write; read again."""


class WrongKeyType(KinoError):
    """A Redis key of our own name holds a value that is not ours; nothing was moved."""


class TransferNotFound(KinoError):
    """The account has no transfer with this id to go on behind."""


class DeadLetterNotFound(KinoError):
    """No dead letter has this number."""


class DeadLetterClosed(KinoError):
    """Somebody has closed this dead letter, or has it in hand; nothing was done to it."""


class BreakNotFound(KinoError):
    """No open break has this number."""


class SourceUnavailable(KinoError):
    """The job source did not answer; an error is not an answer."""


class SourceUnreachable(SourceUnavailable):
    """The job source can answer for no job at all, so a smaller question would fail as well."""


class SourceTimeout(SourceUnavailable, TimeoutError):
    """The job source took the question and did not answer in time."""


class SourceBroken(KinoError):
    """The job source's answer for a job breaks the contract, so it is no answer."""


class ForeignAnswer(SourceBroken):
    """The job source's answer cannot be matched to the jobs that it was asked for, so none of it is an answer."""


class DependencyAway(KinoError):
    """Postgres, Redis or the job source cannot be reached (exit code 3)."""


class WrongEncoding(DependencyAway):
    """The database is not encoded in UTF8, so that it cannot keep every id as it came."""


class BadSettings(KinoError):
    """A setting is missing or cannot be what it says."""


class InvalidPolicy(KinoError):
    """A policy document does not say what it must."""


class BadTrace(KinoError):
    """A trace cannot be read; the text names the file and the line."""


class ServerFailed(KinoError):
    """An embedded server did not start; its last log lines are in the text."""


class LetterProtects(KinoError):
    """This dead letter keeps open charges from a presumed timeout, and they were not named; nothing was done."""


class RelayNotReady(KinoError):
    """The relay has no cursor yet, or a round has it in hand; nothing was moved."""
