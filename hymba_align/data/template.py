"""Tokenizers with their chat template."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_align.errors import TokenizerError
from hymba_align.files import checked_file
from hymba_align.recipe import is_local_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_FILE = Path(__file__).with_name("hymba.jinja")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def load_tokenizer(path: str, *, revision: str | None = None, chat_template: str = "hymba") -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub repository, with a chat template set.

    `chat_template`: "hymba" for this package's own, "released" for the one the tokenizer carries, "own" for that or, where
    it carries none, this package's; else a .jinja file.
    Raises: CheckpointError.
    """
    tokenizer = _open(path, revision)
    for name in ("pad_token", "eos_token"):
        if getattr(tokenizer, name) is None:
            raise TokenizerError(f"{path}: the tokenizer has no {name}; set it in tokenizer_config.json")
    if not tokenizer.is_fast:
        raise TokenizerError(
            f"{path}: the tokenizer is not one of the Rust library's; name a folder with tokenizer.json"
        )
    tokenizer.init_kwargs.pop("auto_map", None)  # code that was not followed is not handed on either
    keep_prefix_rule(tokenizer)
    if chat_template == "own":
        chat_template = "released" if tokenizer.chat_template is not None else "hymba"
    if chat_template != "released":
        tokenizer.chat_template = _read_template(chat_template)
    elif tokenizer.chat_template is None:
        raise TokenizerError(f"{path}: chat_template is 'released', but the tokenizer carries none; use 'hymba'")
    elif not isinstance(tokenizer.chat_template, str):
        raise TokenizerError(f"{path}: the tokenizer carries several chat templates; name one of them as a .jinja file")
    return tokenizer


def _open(path: str, revision: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer as transformers reads it, none of whose code is followed."""
    from transformers import AutoTokenizer, PreTrainedConfig

    local = is_local_path(path)
    if local:
        _check_folder(path)
    try:
        # An empty config: the released config.json names remote code, about which transformers would ask on stdin.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, revision=revision or "main", config=PreTrainedConfig(), trust_remote_code=False
        )
        return tokenizer
    except Exception as error:  # the hub, the JSON reader and the Rust library each raise their own kinds
        reason = str(error).strip().split("\n")[0]
        if not local:
            # What transformers says of a hub that is out of reach is about the files that it has not got.
            why = "" if "backend tokenizer" in reason else f" ({reason})"
            raise TokenizerError(
                f"'{path}' is neither a tokenizer folder here nor one that the Hugging Face hub gives out{why}; name a "
                "folder with tokenizer.json, or a hub id while the hub can be reached"
            ) from error
        raise TokenizerError(
            f"{path}: no tokenizer can be loaded from here ({reason}); name a folder with tokenizer.json or a hub id"
        ) from error


def _check_folder(path: str) -> None:
    """Refuses what is no folder, and folders without a vocabulary, for which transformers makes up one."""
    if not os.path.isdir(path):
        raise TokenizerError(f"{path}: no such tokenizer folder; name a folder with tokenizer.json or a hub id")
    if not any(os.path.isfile(os.path.join(path, name)) for name in ("tokenizer.json", "tokenizer.model")):
        raise TokenizerError(f"{path}: the folder has no tokenizer.json; name one that has, or a hub id")
    for name in TOKENIZER_FILES:
        checked_file(Path(path), name, path)


def keep_prefix_rule(tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes `save_pretrained` write `legacy`, without which a Llama tokenizer comes back tokenizing differently.

    transformers 5.23 forgets the value on saving and takes a missing one for False; the text after each control token,
    such as the line break after `</s>`, then loses its leading space piece. Delete when LlamaTokenizer saves it.
    """
    if hasattr(tokenizer, "legacy"):
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy


def _read_template(chat_template: str) -> str:
    path = TEMPLATE_FILE if chat_template == "hymba" else Path(chat_template)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(
            f"chat_template is {chat_template!r}, which is neither 'hymba' nor 'released' nor a readable .jinja file"
        ) from error


def has_generation_markers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template says which tokens the assistant writes, so that it can be trained with."""
    template = tokenizer.chat_template
    return isinstance(template, str) and re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The Rust tokenizer, neither truncating nor padding, and taking control tokens for what they are."""
    rust = tokenizer.backend_tokenizer
    rust.no_truncation()
    rust.no_padding()
    rust.encode_special_tokens = False
    return rust


@cache
def template_text() -> str:
    """This package's own chat template."""
    return TEMPLATE_FILE.read_text(encoding="utf-8")
