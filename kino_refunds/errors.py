"""Every error that this package raises on purpose, each with one sentence."""

from __future__ import annotations


class KinoError(Exception):
    """The root of the errors that this package raises on purpose."""


class MalformedMessage(KinoError):
    """A message on a queue cannot be understood; it is kept as a dead letter with the reason `code`.

    `cause` is what messages with the same mistake have in common, such as the path of the wrong field. Letters are
    grouped by it, and never by values, which differ from message to message.
    """

    def __init__(self, code: str, text: str, *, cause: str = "") -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.cause = cause


class GrantConflict(KinoError):
    """The reference of this grant already names a grant on other terms."""


class ChargeConflict(KinoError):
    """The job already has a charge for another account or another number of credits."""


class ChargeAlreadySettled(KinoError):
    """The job's charge is settled, so it cannot be opened again."""


class InsufficientCredits(KinoError):
    """The account's spendable credits do not cover the charges."""


class AccountNotActive(KinoError):
    """The account is suspended, terminated or unknown, so it cannot be charged."""


class TooManyLots(KinoError):
    """A charge would take from more than 32,767 lots, because its account's credits are in too many small lots."""


class LedgerBusy(KinoError):
    """Another session holds what this call needs; nothing was done, try again."""


class RefusedInput(KinoError, ValueError):
    """A ledger function refuses a value that it was sent; the text names the item."""


class ChargeNotCaptured(KinoError):
    """Only a captured charge can be refunded by a reversal."""


class InstantNotFinal(KinoError):
    """The balance at this instant may still change; the text names the latest instant that can be asked for."""


class UnfitSession(KinoError):
    """The caller's database session is in autocommit, or in an encoding that cannot carry every id."""


class LedgerInconsistent(KinoError):
    """The ledger's own rows contradict each other; no credits are moved until a person has looked."""


class SettledElsewhere(KinoError):
    """Another session decided one of these events after they were read; nothing was written, read them again."""


class WrongKeyType(KinoError):
    """A Redis key of our own name has a value of another type; nothing was moved."""


class TransferNotFound(KinoError):
    """The account has no transfer with this id to go on behind."""


class DeadLetterNotFound(KinoError):
    """No dead letter has this number."""


class DeadLetterClosed(KinoError):
    """This dead letter is closed, or another person works on it; nothing was done to it."""


class BreakNotFound(KinoError):
    """No open break has this number."""


class BadWindow(KinoError):
    """This window cannot be compared; the text says which one can."""


class CheckBusy(KinoError):
    """Another process runs this check at this moment."""


class CannotRepair(KinoError):
    """A break of this kind, or in this state, has no repair; the text says what there is instead."""


class SourceUnavailable(KinoError):
    """The job source did not answer; an error is not an answer."""


class SourceUnreachable(SourceUnavailable):
    """The job source can answer for no job at all, so an ask for fewer jobs would fail as well."""


class SourceTimeout(SourceUnavailable, TimeoutError):
    """The job source received the ask and did not answer in time."""


class SourceBroken(KinoError):
    """The job source's answer for a job breaks the contract, so it is no answer."""


class ForeignAnswer(SourceBroken):
    """The job source's answer cannot be matched to the jobs that it was asked for, so none of it is an answer."""


class DependencyAway(KinoError):
    """Postgres, Redis or the job source cannot be reached (exit code 3)."""


class WrongEncoding(DependencyAway):
    """The database is not encoded in UTF8, so it cannot keep every id unchanged."""


class BadSettings(KinoError):
    """A setting is missing or has a wrong value."""


class InvalidPolicy(KinoError):
    """A policy document is not valid; the text names the file and the fields."""


class BadCopy(KinoError):
    """A copy of a seal cannot be read; the text says what a seal looks like."""


class BadTrace(KinoError):
    """A trace cannot be read; the text names the file and the line."""


class ServerFailed(KinoError):
    """An embedded server or a process of it did not start, or ended; the text has its last log lines."""


class LetterProtects(KinoError):
    """This dead letter withholds the presumed timeouts of open charges that were not named; nothing was done."""


class RelayNotReady(KinoError):
    """The relay has no cursor yet, or a round holds it; nothing was moved."""
