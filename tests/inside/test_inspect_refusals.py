"""What the command `inspect` refuses, and in which words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hymba_align.cli import main
from hymba_align.data.template import load_tokenizer
from hymba_align.errors import TokenizerError
from hymba_align.inside.inspecting import InspectSettings
from hymba_align.inside.stored import read
from hymba_align.recipe import DataSection
from tests.inside.looking import FEW, ROWS, inspect, look


@pytest.fixture
def without_tokenizer(checkpoint: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, folder)
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "0,2"], "layer 2 is none of CHECKPOINT, which has layers 0 to 1; name one of them"),
        (["--layers", "-1"], "'-1' is no whole number from 0 on; write such, separated by commas: 0,15"),
        (["--parts", "atention"], "'atention' is no part; parts: attention, importance, fusion, meta_tokens, alignment, cost"),
        (["--domain", "law"], "'law' is not NAME=FILE, such as law=law.jsonl"),
        (["--domain", "law=a.jsonl", "--domain", "law=b.jsonl"], "the domain law is named twice, for a.jsonl and b.jsonl; rename one of them"),
        (["--domain", "law=TMP/law.jsonl"], "the domain law is to be read from TMP/law.jsonl, which does not exist; correct the path"),
        (["--text", "TMP/absent.txt"], "TMP/absent.txt: there is no such file of text; correct the path"),
        (["--text", "TMP/empty.txt"], "TMP/empty.txt: it holds no text; name a file that does"),
        (["--data", ROWS, "--preferences", "TMP/messages.jsonl"], "TMP/messages.jsonl: no row of it has a better and a worse answer; name a file of preferences, or leave it out"),
        (["--tasks", "gsm8k", "--parts", "fusion"], "accuracy on gsm8k is measured in the part importance, which is not asked for; add that part, or leave the tasks out"),
        (["--tasks", "gsm8k", f"gsm8k.train_path={ROWS}", "gsm8k.test_path=TMP/messages.jsonl"], "TMP/messages.jsonl:1: GSM8K rows have a question and an answer; this one has messages"),
        (["--parts", "alignment"], "the part alignment compares with an earlier checkpoint, and none is given; name it with --against OTHER, or ask for other parts"),
        (["--against", "runs/nope"], "; if a folder is meant, check the path"),
        (["limit=3"], "limit=3 is about --tasks, and none is given; add --tasks gsm8k, or leave it out"),
        (["data.seed=3"], "data.seed=3 is about --data, and none is given; add it, or leave this out"),
        (["--data", ROWS, "preferences.seed=3"], "preferences.seed=3 is about --preferences, and none is given; add it, or leave this out"),
        (["--data", ROWS, "data.path=x.jsonl"], "data.path=x.jsonl names other rows than --data does; name them there"),
        (["--data", ROWS, "data.bad_rows=drop"], "data.bad_rows=drop is about training, and changes nothing here; leave it out"),
        (["--data", "TMP/plain.txt", "data.columns.text=x"], "data.columns.text=x is about rows, and TMP/plain.txt is a text: one document; leave it out"),
        (["--data", ""], "--data is empty; name a file or folder there"),
        (["--contexts", "4000", "--parts", "cost"], "--contexts names 4000, but the checkpoint's context is 1024 (max_position_embeddings); name none above 1024"),
        (["--chat-template", "nope"], "Error: chat_template is 'nope', which is neither 'hymba' nor 'released' nor a readable .jinja file"),
        (["--against", "TMP/nothing"], "TMP/nothing: there is no such checkpoint folder; check the path"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_cannot_be_done_is_said_before_anything_is_measured(
    words: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "plain.txt").write_text("Ana has coins.")
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    (tmp_path / "messages.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    out = tmp_path / "out"
    given = [word.replace("TMP", str(tmp_path)) for word in words]

    code = main(["inspect", str(checkpoint), *given, "--output", str(out)])

    assert code == 2
    expected = message.replace("TMP", str(tmp_path)).replace("CHECKPOINT", str(checkpoint))
    captured = capsys.readouterr()
    assert expected in captured.err
    assert "Read: " not in captured.out
    assert not out.exists()


FAULTS = {
    "one.jsonl": '{"question": "How many?", "answer": \n',
    "two.jsonl": "no JSON\n[1]\n",
    "empty.jsonl": json.dumps({"question": "", "answer": "1"}) + "\n" + json.dumps({"question": "How many?"}) + "\n",
    "turns.jsonl": json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}),
    "titles.csv": "title,abstract\nHymba,Heads in parallel.\n",
    "long.jsonl": json.dumps({"question": "How many coins? " * 300, "answer": "2"}) + "\n",
    "chat.jsonl": json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
    "same.jsonl": json.dumps({"prompt": "2 + 2?", "chosen": "4", "rejected": "4"}) + "\n",
}
NEITHER = (
    "the columns found are 'title', 'abstract', neither (prompt, completion) nor (messages) nor (question, answer) nor "
    "another set of docs/data.md"
)


@pytest.mark.parametrize(
    ("words", "message", "topic"),
    [
        (["--data", "one.jsonl"], "one.jsonl:1: malformed JSON, Expecting value at column 36; correct the line (no row of one.jsonl can be read; 'hymba-align data check' lists what is wrong with each)", "data-file"),
        (["--domain", "law=two.jsonl"], "two.jsonl:1: malformed JSON, Expecting value at column 1; correct the line (no row of two.jsonl can be read; 'hymba-align data check' lists what is wrong with each)", "data-file"),
        (["--data", "empty.jsonl"], "empty.jsonl:1: the column 'question' is empty; fill it in or remove the row (1 more row of empty.jsonl gives no document either; 'hymba-align data check' lists why)", "rows"),
        (["--preferences", "turns.jsonl"], "turns.jsonl:1: turn 2, the assistant's, is empty; give it content or tool_calls", "rows"),
        (["--data", "titles.csv"], f"titles.csv:2: {NEITHER}; say which is which, as in \"data.columns={{prompt: 'NAME', completion: 'NAME'}}\", or name a function with data.convert", "columns"),
        (["--data", ROWS, "--preferences", "titles.csv"], f"titles.csv:2: {NEITHER}; say which is which, as in \"preferences.columns={{prompt: 'NAME', completion: 'NAME'}}\", or name a function with preferences.convert", "columns"),
        (["--domain", "law=titles.csv"], f"titles.csv:2: {NEITHER}; rename them in the file", "columns"),
        (["--data", "titles.csv", "data.columns.text=titel"], "titles.csv:2: data.columns says that text is called 'titel', and the first row has only 'title', 'abstract'; correct the name, or give the first row that column (null will do)", "columns"),
        (["--data", "titles.csv", "data.format=text"], "titles.csv:2: data.format is text, which takes text, and the columns found are 'title', 'abstract'; correct data.format, or map the columns with data.columns", "columns"),
        (["--data", "long.jsonl", "--max-length", "64"], "long.jsonl:1: the turns up to the assistant's first answer are longer than --max-length 64; raise --max-length or shorten them", "rows"),
        (["--data", "chat.jsonl", "data.examples_per_conversation=6"], "chat.jsonl: data.examples_per_conversation is 6, but only rows of question and answer can be joined; set data.examples_per_conversation=1", "rows"),
        (["--data", ROWS, "--preferences", "same.jsonl"], "same.jsonl:1: chosen equals rejected, so there is nothing to prefer; correct or remove the pair (no pair came of same.jsonl; name a file of preferences, or leave it out)", "rows"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_told_with_its_place_in_the_commands_words(
    words: list[str],
    message: str,
    topic: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, text in FAULTS.items():
        (tmp_path / name).write_text(text)
    given = [word if word != ROWS else str(Path(ROWS).resolve()) for word in words]
    monkeypatch.chdir(tmp_path)

    assert inspect(checkpoint, *given, "--output", "out", parts="meta_tokens") == 2

    assert capsys.readouterr().err.splitlines() == [f"Error: {message}", f"More: hymba-align explain {topic}"]


def test_a_name_that_the_system_refuses_is_told_in_a_sentence(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "x" * 5000

    assert inspect(checkpoint, "--data", ROWS, "--output", tmp_path / name) == 2

    told, topic = capsys.readouterr().err.splitlines()
    assert told == (f"Error: {tmp_path / name} cannot be used (File name too long); name another")
    assert topic == "More: hymba-align explain inspect"


def test_every_refusal_of_the_command_names_a_topic_that_says_more(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect(checkpoint, "--layers", "99", "--output", tmp_path / "out", parts="attention") == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last == "More: hymba-align explain inspect"

    assert main(last.split()[2:]) == 0

    assert capsys.readouterr().out.splitlines()[2] == "An inspection is asked for something that it cannot do."


def test_options_that_nothing_looks_at_are_told(
    asked: list[InspectSettings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*words: str, parts: str) -> list[str]:
        assert inspect("A", *words, "--output", tmp_path / "out", parts=parts) == 130
        return capsys.readouterr().out.splitlines()

    of_attention = ["--text", "t.txt", "--layers", "0"]
    of_cost = ["--contexts", "64", "--batch-size", "2"]
    of_texts = ["--data", ROWS, "--domain", f"law={ROWS}"]

    of_documents = ["--documents", "5", "--max-length", "99", "--chat-template", "released"]
    assert told(*of_attention, *of_texts, *of_documents, "--against", "B", parts="cost") == [
        "--against has no effect on what is measured here: it is for the parts alignment and meta_tokens",
        "--data has no effect on what is measured here: it is for all parts but cost",
        "--domain has no effect on what is measured here: it is for the part meta_tokens",
        "--documents has no effect on what is measured here: it is for all parts but cost",
        "--max-length has no effect on what is measured here: it is for the texts of --data and --text",
        "--chat-template has no effect on what is measured here: it is for all parts but cost",
        "--text has no effect on what is measured here: it is for the part attention",
        "--layers has no effect on what is measured here: it is for the part attention",
    ]
    assert told(*of_cost, "--data", ROWS, "--preferences", ROWS, parts="alignment,attention") == [
        "--preferences has no effect on what is measured here: it is for the part alignment, which needs --against",
        "--contexts has no effect on what is measured here: it is for the part cost",
        "--batch-size has no effect on what is measured here: it is for the part cost",
    ]
    assert told(*of_texts, "--preferences", ROWS, "--against", "B", parts="alignment,meta_tokens") == []
    assert told("--domain", f"law={ROWS}", parts="fusion") == []
    assert told(*of_documents, "--data", ROWS, parts="fusion") == []


def test_a_checkpoint_of_another_shape_is_not_compared_with(
    checkpoint: Path, write_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_checkpoint(tmp_path / "other", 1, num_memory_tokens=6)

    assert inspect(checkpoint, "--against", other, *FEW, "--output", tmp_path / "out", parts="alignment") == 2

    assert capsys.readouterr().err.splitlines()[0] == (
        f"Error: {checkpoint} and {other} cannot be compared: num_memory_tokens is 4 in the one and 6 in the other; compare "
        "checkpoints of one shape, such as the stages of one run"
    )


def test_a_checkpoint_whose_tokens_have_other_ids_is_not_compared_with(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    described = json.loads((other / "tokenizer.json").read_text())
    pieces = described["model"]["vocab"]
    pieces["▁How"], pieces["▁many"] = pieces["▁many"], pieces["▁How"]
    (other / "tokenizer.json").write_text(json.dumps(described))

    with pytest.raises(TokenizerError, match=r"their tokenizers differ in 2 tokens, such as '▁(How|many)'"):
        look(checkpoint, against=str(other), parts=("alignment",))


def test_that_the_other_checkpoint_has_no_tokenizer_is_told(checkpoint: Path, without_tokenizer: Path) -> None:
    found = look(checkpoint, against=str(without_tokenizer), parts=("fusion",))

    assert f"; {without_tokenizer} is taken to have the tokenizer of {checkpoint}, for want of one (" in found.data


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    tokenizer = load_tokenizer(str(checkpoint))
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(other)

    with pytest.raises(TokenizerError, match=r"the model has 596 embeddings and the tokenizer 597 tokens"):
        look(other, parts=("fusion",))


def test_without_a_tokenizer_costs_alone_are_measured(
    without_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect(without_tokenizer, *FEW, "--output", tmp_path / "out") == 2
    told = capsys.readouterr().err.splitlines()[0]
    assert inspect(without_tokenizer, "--contexts", 24, "--output", tmp_path / "out", parts="cost") == 0

    assert told == (
        f"Error: {without_tokenizer} has no tokenizer that can be used ({without_tokenizer}: the folder has no "
        "tokenizer.json; name one that has, or a hub id); put it there, or measure what needs none: --parts cost"
    )
    assert read(tmp_path / "out" / "inspect.json").cost is not None


def test_texts_that_the_tokenizer_spells_in_bytes_are_looked_at_and_told(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "han.jsonl"
    file.write_text(json.dumps({"text": "三 + 四 = 七"}) + "\n")

    found = look(checkpoint, data=DataSection(path=str(file)), parts=("fusion",))

    assert found.tokens == 18
    assert found.data.endswith(
        "; 50.0 % of their tokens are unknown to the tokenizer, or single bytes of characters without a piece"
    )
