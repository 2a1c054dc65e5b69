"""What an inspection can be asked for, known before anything is imported: the command's help names it."""

from __future__ import annotations

import os
from typing import Literal, get_args

Part = Literal["attention", "importance", "fusion", "meta_tokens", "alignment", "cost"]
PARTS: tuple[Part, ...] = get_args(Part)
DOCUMENTS = 32
"""Which are read by default"""
MAX_LENGTH = 1024
"""Of a document, in tokens, by default"""
DOMAIN_NAME = r"^[A-Za-z0-9][\w-]*$"
TEXT_SUFFIX = ".txt"


def is_text_file(path: str) -> bool:
    """Whether a path names a file of plain text here, which is one document."""
    return path.lower().endswith(TEXT_SUFFIX) and os.path.isfile(os.path.expanduser(path))
