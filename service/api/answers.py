"""How the API answers when it answers well: lists as OpenAI lists them, numbers that JSON has."""

from __future__ import annotations

import math
from typing import Any

from fastapi.responses import JSONResponse


class FiniteJson(JSONResponse):
    """JSON, with null for what JSON has no number for: a bound at infinity, a mean of nothing."""

    def render(self, content: Any) -> bytes:
        """Encode; the rare content with such a number is walked."""
        try:
            return super().render(content)
        except ValueError:
            return super().render(_finite(content))


def listing(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows as OpenAI lists them."""
    return {"object": "list", "data": rows}


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
