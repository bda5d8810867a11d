"""The credit ledger; every function here runs in the caller's transaction (design, section 4)."""

from kino_refunds.ledger.accounts import VIOLATION, AccountStatus, set_account_status
from kino_refunds.ledger.charges import Charge, ChargeRequest, Ending, end_charges, open_charge, open_charges
from kino_refunds.ledger.lots import (
    Grant,
    Lot,
    LotClass,
    LotState,
    expire_lots,
    freeze_purchase,
    grant_lots,
    unfreeze_purchase,
    void_purchase,
)
from kino_refunds.ledger.statement import Balance, StatementLine, balance, later_lines_exist, statement

__all__ = [
    "VIOLATION",
    "AccountStatus",
    "Balance",
    "Charge",
    "ChargeRequest",
    "Ending",
    "Grant",
    "Lot",
    "LotClass",
    "LotState",
    "StatementLine",
    "balance",
    "end_charges",
    "expire_lots",
    "freeze_purchase",
    "grant_lots",
    "later_lines_exist",
    "open_charge",
    "open_charges",
    "set_account_status",
    "statement",
    "unfreeze_purchase",
    "void_purchase",
]
