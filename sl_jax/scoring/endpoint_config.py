"""A judge server as a configuration names it."""

from __future__ import annotations

import dataclasses
import re
from typing import ClassVar
from urllib.parse import SplitResult, urlsplit

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclasses.dataclass(frozen=True)
class EndpointConfig:
    """A server and what it can take.

    Attributes:
      url: base address up to and including the version, as in http://host:8000/v1.
      model: name under which the server knows the model.
      key_env: environment variable that holds the key; empty for a server without one.
      concurrency: requests in flight at most.
      requests_per_minute, tokens_per_minute: its limits; None for none. Where
        processes of one training name the same address, each takes its part of these three.
      name: how it is called in logs and records; empty for host and port.

    Raises:
      ValueError: a field is wrong; the message begins with its name, and repeats nothing that may
        be a secret.
    """

    SHORT: ClassVar[str] = "a URL, or "  # what else a configuration may give, in words

    url: str
    model: str
    key_env: str = ""
    concurrency: int = 8
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    name: str = ""

    def __post_init__(self) -> None:
        parts = _split(self.url)
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                "url: the address of a judge should look like http://host:8000/v1, and does not"
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                f"url: the address of the judge at {parts.hostname} carries more than host and "
                "path: please export its key, and name the variable as key_env"
            )
        if not self.model:
            raise ValueError(
                f"model of {self.url} is empty: please name it (GET {self.url}/models lists it)"
            )
        if self.key_env and not _VARIABLE.fullmatch(self.key_env):
            raise ValueError(
                f"key_env of {self.url} should be the name of an environment variable, such as "
                "JUDGE_KEY, and is none: please export the key, and give the variable's name"
            )
        for field in ("concurrency", "requests_per_minute", "tokens_per_minute"):
            limit = getattr(self, field)
            if limit is not None and limit < 1:
                raise ValueError(f"{field} of {self.url} is {limit}: please choose at least 1")

    @property
    def label(self) -> str:
        """`name`, or host and port."""
        return self.name or urlsplit(self.url).netloc


def _split(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url)
        _ = parts.port  # may be no number
    except ValueError:
        return None
    return parts
