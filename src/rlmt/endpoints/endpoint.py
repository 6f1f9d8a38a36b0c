"""Options of an endpoint."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from rlmt.endpoints.connections import require_client_libraries
from rlmt.errors import UserError
from rlmt.options import NonNegativeFloat, PositiveFloat, PositiveInt, check_ranges


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible endpoint, or another HTTP service that answers JSON with JSON.

    Args:
        base_url: URL before the path of a request, such as https://api.openai.com/v1 or http://127.0.0.1:8000/v1.
        model: Name of the model; empty for services without models.
        api_key_variable: Name of the environment variable with the API key; null sends no key.
        max_in_flight: Maximum number of outstanding requests.
        timeout: Seconds that one attempt of a request may take.
        max_attempts: Attempts of a request that meets status 408, 409, 429 or 5xx, a timeout, a lost connection or an
            answer that is not JSON or no completion; waits between them double from half a second to a minute.
        input_price: US dollars per million prompt tokens; null if unknown.
        output_price: US dollars per million completion tokens, hidden thinking included; null if unknown.
        max_cost: US dollars that all requests together may cost, with those of earlier starts that the ledger has.
        options: Further fields of every chat request; null removes a field.

    Raises:
        UserError: An option is out of range, or may contain a key.
    """

    base_url: str
    model: str = ""
    api_key_variable: str | None = None
    max_in_flight: PositiveInt = 64
    timeout: PositiveFloat = 300.0
    max_attempts: PositiveInt = 8
    input_price: NonNegativeFloat | None = None
    output_price: NonNegativeFloat | None = None
    max_cost: PositiveFloat | None = None
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_ranges(Endpoint, {**vars(self), "self": self})
        self._check_base_url()
        if self.api_key_variable is not None and not re.fullmatch("[A-Z_][A-Z0-9_]*", self.api_key_variable):
            raise UserError(
                "api_key_variable is not the name of an environment variable (capital letters, digits and _); give the "
                "name of the variable, such as OPENAI_API_KEY, never the key."
            )

    def _check_base_url(self) -> None:
        """Raises a UserError if the URL is invalid, or may contain a key."""
        url = urlsplit(self.base_url)
        if url.username is not None or url.query:  # these messages must not repeat what may be a key
            raise UserError(
                "base_url contains a user name or a query, which may be a key; remove it, and name the environment "
                "variable of the key in api_key_variable."
            )
        if url.scheme not in ("http", "https") or not url.hostname:
            raise UserError(f"base_url is {self.base_url!r}: give a URL such as http://127.0.0.1:8000/v1.")

    def check(self, option: str) -> None:
        """Checks that requests can be sent.

        Args:
            option: Option of the endpoint, for messages, such as --teacher.

        Raises:
            UserError: The client libraries or the API key are missing, or a cost limit has no prices.
        """
        require_client_libraries(option)
        if self.api_key_variable is not None and not self.key:
            raise UserError(
                f"{option}.api_key_variable: the environment variable {self.api_key_variable} is not set; "
                f"set it to the API key of {self.base_url}."
            )
        if self.max_cost is not None and (self.input_price is None or self.output_price is None):
            raise UserError(
                f"{option}.max_cost needs prices; set {option}.input_price and {option}.output_price (US dollars per "
                "million tokens)."
            )

    @property
    def key(self) -> str | None:
        """The API key in the environment."""
        return os.environ.get(self.api_key_variable) if self.api_key_variable is not None else None
