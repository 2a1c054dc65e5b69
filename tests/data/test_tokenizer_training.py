from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hymba_align.data import tokenizer_training
from hymba_align.data.arithmetic import SHIPPED
from hymba_align.data.template import template_text
from hymba_align.data.tokenizer_training import BYTE_TOKENS, VOCABULARY_SIZE

CONTROL = ("<unk>", "<s>", "</s>", "[PAD]")


def test_training_again_gives_the_shipped_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tokenizer_training.main(["--check"]) == 0
    assert tokenizer_training.main(["--out", str(tmp_path)]) == 0
    for path in (SHIPPED / "tokenizer").iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    (tmp_path / "tokenizer.json").write_text("{}")
    assert tokenizer_training.main(["--check", "--out", str(tmp_path)]) == 1
    assert "differs from what training gives: tokenizer.json" in capsys.readouterr().err


def test_the_vocabulary_is_laid_out_as_the_released_one(small: Any) -> None:
    vocabulary = small.get_vocab()
    assert [vocabulary[token] for token in CONTROL] == [0, 1, 2, len(small) - 1]
    assert [vocabulary[token] for token in BYTE_TOKENS] == list(range(3, 259))
    assert sorted(vocabulary.values()) == list(range(len(small)))
    assert len(small) <= VOCABULARY_SIZE
    assert (small.padding_side, small.pad_token, small.eos_token) == ("left", "[PAD]", "</s>")
    assert small.chat_template == template_text()


def test_it_is_the_class_of_the_released_tokenizer_with_its_rules(load: Any) -> None:
    small, released = load("small"), load("released")
    assert type(small) is type(released)
    for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        ours, theirs = (json.loads(t.backend_tokenizer.to_str())[part] for t in (small, released))
        assert ours == theirs
    assert small.special_tokens_map == released.special_tokens_map


def test_digits_and_line_breaks_stand_alone_and_role_markers_are_ordinary_text(small: Any) -> None:
    assert small.tokenize("12 345\n\n6") == ["▁", "1", "2", "▁", "3", "4", "5", "<0x0A>", "<0x0A>", "6"]
    merged = [t for t in small.get_vocab() if len(t.lstrip("▁")) > 1 and t not in (*BYTE_TOKENS, *CONTROL)]
    assert not [token for token in merged if any(character.isdigit() for character in token)]
    for marker in ("<extra_id_0>System", "<extra_id_1>User", "<extra_id_1>Assistant", "<extra_id_1>Tool"):
        assert len(small.tokenize(marker)) > 1
        assert not set(small(marker, add_special_tokens=False).input_ids) & set(small.all_special_ids)


# Two characters have another meaning in this class of tokenizer, the released one included: "▁" stands for a space, and
# a leading space is the one that the first word has anyway. The names of control and byte tokens are not text.
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_any_text_comes_back(small: Any, text: str) -> None:
    if not any(token in text for token in (*CONTROL, *BYTE_TOKENS)):
        assert small.decode(small("\n" + text, add_special_tokens=False).input_ids) == "\n" + text
