"""Pieces of data that a page holds compressed, and unpacks only when they are looked at."""

import base64
import gzip
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Chunks:
    """JSON values as gzip in base64, which no browser reads as markup or script."""

    texts: list[str] = field(default_factory=list)

    def add(self, content: Any) -> int:
        """Add a JSON value and return its number; equal values give equal bytes."""
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        packed = gzip.compress(text.encode(), compresslevel=6, mtime=0)
        self.texts.append(base64.b64encode(packed).decode("ascii"))
        return len(self.texts) - 1

    @property
    def size(self) -> int:
        """Number of characters that the chunks take in the page."""
        return sum(map(len, self.texts))


def unpack(text: str) -> Any:
    """Return the value of a chunk."""
    return json.loads(gzip.decompress(base64.b64decode(text)))
