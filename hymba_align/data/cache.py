"""Prepared data kept on disk under a key of everything that it depends on.

Nothing is ever looked up by name or date: a key holds digests of the content (rows, converter, tokenizer, template, this
package's code) and every setting, so a cache entry that is found is the one that would be made.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_align.data.template import backend
from hymba_align.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = "hymba_align"


def cached(key: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
    """The folder that `build` filled for an equal key, now or earlier; it appears whole or not at all.

    It lies in the cache of `datasets` (HF_DATASETS_CACHE).
    Raises: DataError when it cannot be written there; whatever `build` raises.
    """
    folder = cache_folder(key)
    root = folder.parent
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name[:16]}.", dir=root, ignore_cleanup_errors=True) as built:
            build(Path(built))
            os.rename(built, folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was faster, with the same result
            raise DataError(
                f"prepared data cannot be written to {root} ({error.strerror or error}); set HF_DATASETS_CACHE to a folder "
                "with room"
            ) from error
    return folder


def cache_folder(key: Mapping[str, Any]) -> Path:
    """Where `cached` keeps what belongs to the key; it need not be there."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / FOLDER / digest(key)


def digest(value: Any) -> str:
    """A name for plain values: equal for equal ones."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def code_digest() -> str:
    """Changes with this package's data code and template, and with the libraries that tokenize."""
    import tokenizers
    import transformers

    content = hashlib.sha256(f"{transformers.__version__} {tokenizers.__version__}".encode())
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in (".py", ".jinja"):
            content.update(path.read_bytes())
    return content.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes with the vocabulary, the special tokens and the chat template."""
    parts = [backend(tokenizer).to_str(), tokenizer.special_tokens_map, tokenizer.chat_template]
    return digest([str(part) for part in parts])
