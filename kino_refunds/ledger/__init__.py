"""The credit ledger: grants, charges, settlements, reversals, holds and balances (design, section 4).

Every function runs in the caller's transaction and commits nothing. The caller's rows and the movement of credits are
committed together, or neither is.
"""

from kino_refunds.ledger.accounts import VIOLATION, AccountStatus, set_account_status
from kino_refunds.ledger.charges import open_charge, open_charges
from kino_refunds.ledger.endings import settle_charges
from kino_refunds.ledger.grants import expire_lots, grant_lots
from kino_refunds.ledger.purchase_lots import hold_purchase, release_purchase, unvoid_purchase, void_purchase
from kino_refunds.ledger.reversals import reverse_charges
from kino_refunds.ledger.statement import Balance, StatementLine, balance, later_lines_exist, statement
from kino_refunds.ledger.values import (
    CauseKind,
    Charge,
    ChargeRequest,
    Grant,
    Lot,
    LotClass,
    LotState,
    Reversal,
    Settlement,
)

__all__ = [
    "VIOLATION",
    "AccountStatus",
    "Balance",
    "CauseKind",
    "Charge",
    "ChargeRequest",
    "Grant",
    "Lot",
    "LotClass",
    "LotState",
    "Reversal",
    "Settlement",
    "StatementLine",
    "balance",
    "expire_lots",
    "grant_lots",
    "hold_purchase",
    "later_lines_exist",
    "open_charge",
    "open_charges",
    "release_purchase",
    "reverse_charges",
    "set_account_status",
    "settle_charges",
    "statement",
    "unvoid_purchase",
    "void_purchase",
]
