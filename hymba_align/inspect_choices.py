"""What an inspection can be asked for, known before anything is imported: the command's help names it."""

from __future__ import annotations

from typing import Literal, get_args

Part = Literal["attention", "importance", "fusion", "meta_tokens", "alignment", "cost"]
PARTS: tuple[Part, ...] = get_args(Part)
DOCUMENTS = 32
"""Which are read by default"""
MAX_LENGTH = 1024
"""Of a document, in tokens, by default"""
DOMAIN_NAME = r"^[A-Za-z0-9][\w-]*$"
