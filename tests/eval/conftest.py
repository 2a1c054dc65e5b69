"""Local GSM8K files, a tiny Hymba, and one whose answers are looked up instead of computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba_align.data.template import load_tokenizer
from hymba_align.model import HymbaConfig, HymbaForCausalLM
from hymba_align.recipe import EvalSection, GSM8KSection

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "data" / "arithmetic"
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "v_head_dim": 32,
    "mamba_expand": 2,
    "mamba_d_state": 4,
    "mamba_d_conv": 4,
    "mamba_dt_rank": 2,
    "num_memory_tokens": 4,
    "sliding_window": 32,
    "global_attn_idx": [0],
    "kv_reuse_group": [],
    "rope_type": None,
    "max_position_embeddings": 2048,
    "orig_max_position_embeddings": 2048,
}


class LookUp(HymbaForCausalLM):
    """Answers the last question of a prompt by `answers[question]`; keeps every batch of prompts that it was given."""

    answers: Callable[[str], str]
    tokenizer: Any

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **settings: Any) -> torch.Tensor:
        self.given.append((input_ids, attention_mask, settings))
        replies = []
        for row, mask in zip(input_ids, attention_mask, strict=True):
            asked = self.tokenizer.decode(row[mask.bool()]).split("Question: ")[-1].split("\nAnswer:")[0]
            replies.append(self.tokenizer.encode(self.answers(asked), add_special_tokens=False))
        width = max(map(len, replies))
        padded = [reply + [self.tokenizer.pad_token_id] * (width - len(reply)) for reply in replies]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_tokenizer(str(SHIPPED / "tokenizer"))


@pytest.fixture
def model(tokenizer: Any) -> HymbaForCausalLM:
    torch.manual_seed(0)
    return HymbaForCausalLM(_config(tokenizer)).eval()


@pytest.fixture
def look_up(tokenizer: Any) -> Callable[[Callable[[str], str]], LookUp]:
    def make(answers: Callable[[str], str]) -> LookUp:
        model = LookUp(_config(tokenizer)).eval()
        model.answers, model.tokenizer, model.given = answers, tokenizer, []
        return model

    return make


def _config(tokenizer: Any) -> HymbaConfig:
    return HymbaConfig(
        **SHAPE,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@pytest.fixture
def section(tmp_path: Path) -> EvalSection:
    """Five shots, seven problems, in batches of three."""
    for name, rows in (("train", 40), ("test", 7)):
        lines = (SHIPPED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
        official = [json.dumps({key: json.loads(line)[key] for key in ("question", "answer")}) for line in lines]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(official) + "\n", encoding="utf-8")
    files = GSM8KSection(train_path=str(tmp_path / "train.jsonl"), test_path=str(tmp_path / "test.jsonl"))
    return EvalSection(batch_size=3, max_new_tokens=48, gsm8k=files)


@pytest.fixture
def solutions(section: EvalSection) -> dict[str, str]:
    """Question to worked answer, of the test file."""
    assert section.gsm8k.test_path is not None
    rows = [json.loads(line) for line in Path(section.gsm8k.test_path).read_text(encoding="utf-8").splitlines()]
    return {row["question"]: row["answer"] for row in rows}
