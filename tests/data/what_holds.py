"""What must hold of whatever was read: expectations computed from the messages alone, without the template."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hymba_align.data.prepare import Prepared
from hymba_align.data.reading.examples import Conversation, PlainText, Preference, QuestionAnswer
from hymba_align.data.reading.schemas import read_examples, schema_of
from hymba_align.data.rendering import Rendered, render_conversations, render_prompts, render_text
from hymba_align.errors import DataError, RenderError
from hymba_align.recipe import SourceSection

MAX_LENGTH = 4096
HEADER = re.compile(r"<extra_id_\d>")


# ---- a rendered conversation -----------------------------------------------------------------------------------------


def broken_up(text: str) -> str:
    """A text as the template has to write it: no marker in one piece."""
    for marker in ("<extra_id_", "<s>", "</s>", "<unk>", "[PAD]"):
        text = text.replace(marker, marker[0] + "\u2060" + marker[1:])
    return text


def expected_pieces(conversation: Conversation) -> list[tuple[str, bool]]:
    """The pieces of a rendered conversation by hand, each with whether it is trained on."""
    messages, tools = conversation.messages, conversation.tools
    head = "<extra_id_0>System"
    for message in messages:
        if message["role"] == "system":
            head += "\n" + broken_up(message["content"].strip()) + ("\n" if tools else "")
    head += "".join(f"\n<tool> {broken_up(json.dumps(tool, ensure_ascii=False))} </tool>" for tool in tools)
    pieces = [(head + "\n\n", False)]
    others = [message for message in messages if message["role"] != "system"]
    for place, message in enumerate(others):
        if place and others[place - 1]["role"] == "assistant":
            pieces.append(("\n", False))
        said = broken_up(message["content"].strip())
        pieces.append((f"<extra_id_1>{message['role'].capitalize()}\n", False))
        if message["role"] == "assistant":
            calls = [written(call) for call in message.get("tool_calls", [])]
            said = "\n".join([*([said] if said else []), *calls])
            pieces.append((said + "</s>", message.get("train", True)))
        else:
            pieces.append((said + "\n", False))
    return pieces


def written(call: dict[str, Any]) -> str:
    function = call["function"]
    text = f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": {function["arguments"]}}}'
    return f"<toolcall> {broken_up(text)} </toolcall>"


def decoded(tokenizer: Any, ids: Sequence[int], *, first: bool = False) -> str:
    """The text of tokens from the middle of a conversation, or from its beginning."""
    line_break = tokenizer.convert_tokens_to_ids("<0x0A>")
    return tokenizer.decode(ids) if first else tokenizer.decode([line_break, *ids]).removeprefix("\n")


def plainly(text: str) -> str:
    """A text as decoding gives it back: SentencePiece's mark is a space, and one more space follows an end token."""
    return text.replace("\u2581", " ").replace("</s> \n", "</s>\n")


def check_rendering(tokenizer: Any, conversation: Conversation, ids: list[int], mask: list[int]) -> None:
    """What must hold of every conversation that is trained on, however its texts were forged."""
    pieces = expected_pieces(conversation)
    text = plainly(decoded(tokenizer, ids, first=True))
    assert text == plainly("".join(piece for piece, _ in pieces))
    # (a) one header per message and one for the system, in the tokens
    turns = [message for message in conversation.messages if message["role"] != "system"]
    assert len(HEADER.findall(text)) == 1 + len(turns)
    assert header_count(tokenizer, ids) == len(turns)
    # (b) no control token but the end tokens of the assistant's turns
    ends = [place for place, token in enumerate(ids) if token in tokenizer.all_special_ids]
    assert {ids[place] for place in ends} <= {tokenizer.eos_token_id}
    assert len(ends) == sum(message["role"] == "assistant" for message in turns)
    # (c) trained on: the assistant's texts, whole, and nothing else
    assert [plainly(run) for run in trained_runs(tokenizer, ids, mask)] == [
        plainly(said) for said, yes in pieces if yes
    ]


def header_count(tokenizer: Any, ids: Sequence[int]) -> int:
    """How often the tokens that head a turn, as the template's own text gives them, stand in `ids`."""
    line_break = tokenizer.convert_tokens_to_ids("<0x0A>")
    count = 0
    for role in ("User", "Assistant", "Tool"):
        whole = tokenizer(f"x\n<extra_id_1>{role}\n", add_special_tokens=False)["input_ids"]
        header = whole[whole.index(line_break) :]
        count += sum(list(ids[start : start + len(header)]) == header for start in range(len(ids)))
    return count


def trained_runs(tokenizer: Any, ids: list[int], mask: list[int]) -> list[str]:
    """The texts of the runs of tokens under the loss."""
    runs: list[list[int]] = []
    for place, trained in enumerate(mask):
        if trained and (not place or not mask[place - 1]):
            runs.append([])
        if trained:
            runs[-1].append(ids[place])
    return [decoded(tokenizer, run) for run in runs]


# ---- a row, an example, a reason -------------------------------------------------------------------------------------


def check_reason(reason: str, longest: int = 500) -> None:
    """A reason is one sentence for people, and holds no more than a glimpse of the user's text."""
    assert reason.strip() == reason != ""
    assert len(reason) < longest, reason
    assert "\n" not in reason
    assert not re.search(r"Traceback|\b[A-Z]\w*(Error|Exception)\b", reason), reason


def check_example(tokenizer: Any, example: Any) -> bool:
    """Whether the example can be trained on; if so, only what it says is trained."""
    if isinstance(example, PlainText):
        rendered = render_text(tokenizer, example.text)
        control = [token for token in rendered.input_ids if token in tokenizer.all_special_ids]
        assert control == [tokenizer.bos_token_id, tokenizer.eos_token_id]
        return True
    if isinstance(example, Preference):
        return check_preference(tokenizer, example)
    if isinstance(example, QuestionAnswer):
        turns = [("user", example.question), ("assistant", example.answer)]
        example = Conversation([{"role": role, "content": text} for role, text in turns])
    assert isinstance(example, Conversation)
    return check_conversation(tokenizer, example)


def check_conversation(tokenizer: Any, conversation: Conversation) -> bool:
    (rendered,) = render_conversations(tokenizer, [conversation], max_length=MAX_LENGTH)
    if isinstance(rendered, RenderError):
        check_reason(str(rendered))
        return False
    check_rendering(tokenizer, conversation, rendered.input_ids, rendered.assistant_mask)
    return True


def check_preference(tokenizer: Any, pair: Preference) -> bool:
    (prompt,) = render_prompts(tokenizer, [Conversation(pair.prompt, pair.tools)], max_length=MAX_LENGTH)
    usable = isinstance(prompt, Rendered)
    for reply in (pair.chosen, pair.rejected):
        whole = Conversation([*pair.prompt, *reply], pair.tools)
        usable = check_conversation(tokenizer, whole) and usable
        (rendered,) = render_conversations(tokenizer, [whole], max_length=MAX_LENGTH)
        if isinstance(prompt, Rendered) and isinstance(rendered, Rendered):
            assert rendered.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    return usable


def check_row(tokenizer: Any, row: dict[str, Any], section: SourceSection) -> bool:
    """Whether a row gives anything to train on; a DataError must say why not."""
    try:
        examples = read_examples(row, schema_of(section, row), section)
    except DataError as error:
        check_reason(str(error))
        return False
    assert examples
    usable = [check_example(tokenizer, example) for example in examples]
    return all(usable)


# ---- a file ----------------------------------------------------------------------------------------------------------


def accounted(prepared: Prepared, path: Path, first: int, lines: Sequence[bytes]) -> set[int]:
    """The line numbers that came out as records; every line that is not blank is there or lost, never both."""
    (counts,) = prepared.sources
    lost = {one.place for one in counts.lost}
    kept = set(prepared.dataset["place"])
    expected = {f"{path}:{number}" for number, line in enumerate(lines, start=first) if line.strip()}
    assert kept | lost == expected
    assert not kept & lost
    assert counts.rows_read == counts.rows_kept + len(lost) == len(expected)
    for one in counts.lost:
        check_reason(one.reason)
    return {int(place.rpartition(":")[2]) for place in kept}
