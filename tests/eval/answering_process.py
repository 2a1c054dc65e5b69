"""One of several real processes that answer together, started by test_answers.py:

    python answering_process.py FOLDER RANK WORLD_SIZE KILL_AFTER

Writes what it got to FOLDER/<rank>.json. Then it answers again, with the answers kept in FOLDER/store, and kills itself
after KILL_AFTER of its own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hymba_align.data.template import load_tokenizer
from hymba_align.eval.answers import Answers, Processes
from hymba_align.model import HymbaForCausalLM


def gather(value: object) -> list[Any]:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def main(folder: Path, rank: int, world_size: int, kill_after: int) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    asked = json.loads((folder / "asked.json").read_text())
    model = HymbaForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = load_tokenizer(asked["tokenizer"])
    settings = {"processes": Processes(rank, world_size, gather), "identity": "a", "batch_size": 2, "max_length": 400}

    answers = Answers(model, tokenizer, store=None, **settings)
    found = answers.generate(asked["prompts"], max_new_tokens=asked["most"], name="test")
    scores = answers.score(asked["contexts"], asked["continuations"], name="test")
    counters = {key: getattr(answers, key) for key in ("new_tokens", "reused", "truncated_prompts", "longest_prompt")}
    result = {"answers": [asdict(one) for one in found], "scores": scores, "counters": counters}
    (folder / f"{rank}.json").write_text(json.dumps(result))

    own: list[int] = []

    def count(number: int, answer: object) -> None:
        own.append(number)
        if len(own) == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    answers = Answers(model, tokenizer, store=folder / "store" / "gsm8k", **settings)
    answers.generate(asked["prompts"], max_new_tokens=asked["most"], name="test", on_answer=count)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
