"""Seals: digests over closed ranges of transactions, each chained to the one before, so that a changed row is found.

Who may change the ledger's tables past their triggers (a superuser) may also write seals anew. Against that only a copy
outside of this database proves anything: `seal_text` writes it, `compare_with_copy` compares it.
"""

from kino_refunds.reconciliation.seals.append import append_seal
from kino_refunds.reconciliation.seals.check import again, pages
from kino_refunds.reconciliation.seals.copies import CopyComparison, CopyState, compare_with_copy
from kino_refunds.reconciliation.seals.stored import Seal, newest_seal, seal_text
from kino_refunds.reconciliation.seals.verify import Verified, verify_seals

__all__ = [
    "CopyComparison",
    "CopyState",
    "Seal",
    "Verified",
    "again",
    "append_seal",
    "compare_with_copy",
    "newest_seal",
    "pages",
    "seal_text",
    "verify_seals",
]
