"""What makes two ways of beautifying a photo the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def backend_key(version: str, settings: Mapping[str, Any]) -> str:
    """
    What a prewarmed photo is kept under, beside the photo's own digest: 64 hex digits, others for whatever may change a pixel.

    Args:
        version: of this program: what a backend makes may change with it.
        settings: all that shape a beautified photo, the backend's name and its model among them, as JSON has them. A file that
            they name counts by its name.
    """
    asked = {"version": version, "settings": dict(settings)}
    return hashlib.sha256(json.dumps(asked, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
