"""What a run may spend on its judge."""

from __future__ import annotations

from typing import Protocol

from sl_jax.scoring.types import BudgetError


class Ledger(Protocol):
    """Remembers what was spent over restarts."""

    def spent(self) -> tuple[int, int]:
        """Requests and tokens so far."""
        ...

    def spend(self, requests: int, tokens: int) -> None:
        """Adds to them."""
        ...


class Budget:
    """Counts requests and tokens, and says when they are spent.

    Args:
      max_requests, max_tokens: limits over the whole run, restarts included; None for none. Tokens
        are known when an answer has come, so those in flight may exceed the limit.
      ledger: where the counts outlive the process; None forgets them.
    """

    def __init__(
        self,
        max_requests: int | None = None,
        max_tokens: int | None = None,
        ledger: Ledger | None = None,
    ):
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self._ledger = ledger
        self.requests, self.tokens = ledger.spent() if ledger else (0, 0)

    def request(self) -> None:
        """Counts one request that is about to be sent.

        Raises:
          BudgetError: nothing is left for it.
        """
        for name, spent, limit in (
            ("max_requests", self.requests, self.max_requests),
            ("max_tokens", self.tokens, self.max_tokens),
        ):
            if limit is not None and spent >= limit:
                raise BudgetError(
                    f"the judge's budget is spent: {spent} of {name} = {limit}; please raise it "
                    "to go on"
                )
        self.requests += 1
        if self._ledger:
            self._ledger.spend(1, 0)

    def answered(self, tokens: int) -> None:
        """Counts the tokens of an answer, good or not."""
        self.tokens += tokens
        if self._ledger and tokens:
            self._ledger.spend(0, tokens)
