"""The small tokenizer of the embedded default, trained on the shipped samples.

It is the released tokenizer in miniature: the same class, byte fallback, digits one by one, line breaks that never merge,
`<unk>` `<s>` `</s>` as 0, 1, 2 and `[PAD]` last; the role markers stay ordinary text.

    python -m hymba_align.data.tokenizer_training            writes data/arithmetic/tokenizer
    python -m hymba_align.data.tokenizer_training --check    compares the folder with what would be written
"""

from __future__ import annotations

import argparse
import json
import string
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hymba_align.data.arithmetic import SHIPPED
from hymba_align.data.template import keep_prefix_rule, template_text

if TYPE_CHECKING:
    from transformers import LlamaTokenizer

VOCABULARY_SIZE = 1024
LEAST_PAIR_COUNT = 20
SPACE = "\u2581"
CONTROL_TOKENS = ("<unk>", "<s>", "</s>")
PAD_TOKEN = "[PAD]"
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
# Without its conversation's letters a text falls back to bytes; these keep plain English readable as characters.
ALPHABET = tuple(SPACE + string.ascii_letters + string.digits + string.punctuation)
# As lm-evaluation-harness asks a GSM8K question; the words should be single pieces.
ASKED = "Question: {question}\nAnswer:"


def training_texts(train_file: Path) -> Iterator[str]:
    """The shipped training rows as conversations, one text per row."""
    for line in train_file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        asked = ASKED.format(question=row["question"])
        yield f"<extra_id_0>System\n\n<extra_id_1>User\n{asked}\n<extra_id_1>Assistant\n{row['answer']}"


def train_tokenizer(train_file: Path, vocabulary_size: int = VOCABULARY_SIZE) -> LlamaTokenizer:
    """A tokenizer trained on `train_file`; equal for equal input."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaTokenizer

    learner = Tokenizer(models.BPE(unk_token=CONTROL_TOKENS[0], byte_fallback=True, fuse_unk=True))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", behavior="removed"),
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=True),
            pre_tokenizers.Split(Regex(r"[0-9]"), behavior="isolated"),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - 1,
        min_frequency=LEAST_PAIR_COUNT,
        special_tokens=[*CONTROL_TOKENS, *BYTE_TOKENS],
        initial_alphabet=list(ALPHABET),
        show_progress=False,
    )
    learner.train_from_iterator(training_texts(train_file), trainer=trainer)
    learned = json.loads(learner.to_str())["model"]
    vocabulary: dict[str, int] = {**learned["vocab"], PAD_TOKEN: len(learned["vocab"])}
    tokenizer = LlamaTokenizer(
        vocab=vocabulary,
        merges=[tuple(merge) for merge in learned["merges"]],
        pad_token=PAD_TOKEN,
        padding_side="left",
        add_bos_token=True,
        add_prefix_space=True,
        legacy=True,
    )
    keep_prefix_rule(tokenizer)
    tokenizer.chat_template = template_text()
    return tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the tokenizer's folder, or with --check compares it; 0 when all is as trained."""
    parser = argparse.ArgumentParser(
        prog="python -m hymba_align.data.tokenizer_training", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="compare with the files on disk, write nothing")
    parser.add_argument("--train-file", type=Path, default=SHIPPED / "train.jsonl", help="rows to train on")
    parser.add_argument("--out", type=Path, default=SHIPPED / "tokenizer", help="folder of the tokenizer")
    options = parser.parse_args(arguments)
    tokenizer = train_tokenizer(options.train_file)
    if not options.check:
        tokenizer.save_pretrained(options.out)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        different = [
            path.name
            for path in sorted(Path(folder).iterdir())
            if not (options.out / path.name).is_file() or (options.out / path.name).read_bytes() != path.read_bytes()
        ]
    if different:
        print(f"{options.out} differs from what training gives: {', '.join(different)}", file=sys.stderr)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
