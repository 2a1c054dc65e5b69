"""What a chat begins with: a model on its device, and files and settings that were checked before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hymba_align.checkpoint import check_embeddings, check_is_hymba, load_model, tokenizer_place
from hymba_align.data.reading.tool_calls import Tool
from hymba_align.data.template import load_tokenizer
from hymba_align.errors import DataFileError, UsageError
from hymba_align.inference.conversation import ChatSettings, Conversation, default_chat_settings
from hymba_align.inference.conversation_files import (
    ConversationFile,
    changed_settings,
    load_conversation,
    load_tools,
)
from hymba_align.inference.sampling import SamplingSettings
from hymba_align.model import HymbaForCausalLM


@dataclass(frozen=True)
class ChatFiles:
    """What the files hold that a chat is given; None for those that were not named."""

    loaded: ConversationFile | None
    tools: list[Tool] | None


def check_files(*, load: Path | None, tools: Path | None, save: Path | None, settings: Mapping[str, Any]) -> ChatFiles:
    """The files' contents.

    Args:
        load: a conversation.
        tools: a JSON list of tools.
        save: where the conversation is to be written; an existing file must be a conversation.
        settings: to check against their ranges.

    Raises:
        UsageError: a setting out of range, or a file that cannot be used.
    """
    loaded = load_conversation(load) if load is not None else None
    changed_settings(ChatSettings(SamplingSettings(), 1), {**(loaded.settings if loaded else {}), **settings})
    if save is not None:
        _check_can_save(save)
    return ChatFiles(loaded, load_tools(tools) if tools is not None else None)


def _check_can_save(path: Path) -> None:
    """Raises DataFileError where something else than a conversation would be written over, or nothing can be written."""
    if not path.parent.is_dir():
        raise DataFileError(f"{path}: there is no folder {path.parent} to save in; make it first")
    if path.exists():
        try:
            load_conversation(path)
        except UsageError as error:
            raise DataFileError(
                f"{path} is there already and is no conversation, so it is not written over; name another file"
            ) from error


def check_device(name: str | None) -> torch.device:
    """The device of that name; by default a GPU where there is one. Raises: UsageError."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device is {name!r:.60}; use cpu, cuda, or cuda with a number such as cuda:1") from None
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= count):
        found = f"{count} GPUs are" if count != 1 else "1 GPU is"
        raise UsageError(f"device is {name!r:.60}, and {found} available here; use cpu, or a GPU that is there")
    return device


def load_for_inference(
    checkpoint: str, *, device: torch.device, dtype: str | None, chat_template: str
) -> tuple[HymbaForCausalLM, PreTrainedTokenizerBase]:
    """The model of a checkpoint or adapter folder, on the device and ready to generate, and its tokenizer.

    Args:
        dtype: a torch dtype's name; by default bfloat16 on a GPU and float32 on a CPU.
        chat_template: as `load_tokenizer` takes it.

    Raises:
        CheckpointError: either cannot be loaded, or they do not belong together.
    """
    check_is_hymba(checkpoint, None)  # before the tokenizer, whose absence would hide it
    place, revision = tokenizer_place(checkpoint)
    tokenizer = load_tokenizer(place, revision=revision, chat_template=chat_template)
    model = load_model(checkpoint, dtype=dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    check_embeddings(checkpoint, model.config.vocab_size, tokenizer)
    on_device: HymbaForCausalLM = model.to(device).eval()  # type: ignore[arg-type]  # torch's own signature of to()
    return on_device, tokenizer


def begin(
    checkpoint: str,
    *,
    device: torch.device,
    dtype: str | None,
    chat_template: str,
    system: str | None,
    files: ChatFiles,
    settings: Mapping[str, Any],
) -> Conversation:
    """A conversation with a checkpoint.

    What is given here counts before what a loaded conversation says, and that before generation_config.json.

    Raises:
        CheckpointError: the model or its tokenizer cannot be loaded.
        RenderError: the messages or tools have no place in the chat template.
    """
    model, tokenizer = load_for_inference(checkpoint, device=device, dtype=dtype, chat_template=chat_template)
    loaded = files.loaded
    chosen = changed_settings(default_chat_settings(model), {**(loaded.settings if loaded else {}), **settings})
    conversation = Conversation(model, tokenizer, settings=chosen)
    messages = list(loaded.messages) if loaded else []
    if system is not None:
        messages = [message for message in messages if message["role"] != "system"]
        messages = [{"role": "system", "content": system}, *messages] if system.strip() else messages
    tools = files.tools if files.tools is not None else loaded.tools if loaded else None
    conversation.restart(messages, tools=tools)
    return conversation
