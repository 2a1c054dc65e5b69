"""Stock TRL trainers on Hymba: packed and shared computation equals every document run alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from hymba_align.model import HymbaForCausalLM


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Words are numbers: TRL only needs ids and special tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    backend = Tokenizer(WordLevel({str(i): i for i in range(60)} | {"[PAD]": 60}, unk_token="0"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="2", pad_token="[PAD]", unk_token="0")


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "max_steps": 1,
        "logging_steps": 1,
        "disable_tqdm": True,
        "activation_checkpointing": False,
        "dataset_num_proc": None,
    } | changes


def next_token_losses(model: HymbaForCausalLM, ids: list[int], labels: list[int]) -> Tensor:
    with torch.no_grad():
        logprobs = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
    targets = torch.tensor(labels[1:])
    losses = -logprobs.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return losses[targets >= 0]


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_first_packed_sft_loss_is_the_mean_over_documents_run_alone(
    small_model: HymbaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, activation_checkpointing: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (5, 17, 2, 30, 11, 8, 23):
        ids = torch.randint(3, 60, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100 if i % 3 == 1 else token for i, token in enumerate(ids)]})
    losses = [next_token_losses(small_model, row["input_ids"], row["labels"]) for row in rows]
    expected = torch.cat(losses).mean().item()

    trainer = SFTTrainer(
        model=small_model,
        args=SFTConfig(
            **settings(
                tmp_path,
                packing=True,
                max_length=32,
                per_device_train_batch_size=4,
                activation_checkpointing=activation_checkpointing,
            ),
            learning_rate=0.0,
            average_tokens_across_devices=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    assert len(trainer.train_dataset) == 4  # packed
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-5)


class SharingCollator(DataCollatorForPreference):
    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        batch["shared_prefix_lengths"] = torch.tensor([len(example["prompt_ids"]) for example in examples])
        return batch


def one_dpo_step(
    policy: HymbaForCausalLM,
    reference: HymbaForCausalLM,
    collator: DataCollatorForPreference,
    arguments: DPOConfig,
    rows: list[dict[str, str]],
    tokenizer: PreTrainedTokenizerFast,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """What stock TRL logs at its first step, and the gradient of every parameter."""
    model = copy.deepcopy(policy)
    gradients = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.register_hook(gradients[name].add_)
    trainer = DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(reference),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        data_collator=collator,
    )
    trainer.train()
    return trainer.state.log_history[0], gradients


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "apo_zero", "sft"])
@pytest.mark.parametrize("precompute", [False, True])
def test_dpo_is_the_same_with_and_without_a_shared_prefix(
    small_model: HymbaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, loss_type: str, precompute: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    text = [" ".join(map(str, torch.randint(3, 60, (n,), generator=generator).tolist())) for n in range(1, 13)]
    rows = [
        {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}
        for prompt, chosen, rejected in zip(text[::3], text[1::3], text[2::3], strict=True)
    ]
    reference = copy.deepcopy(small_model)
    with torch.no_grad():  # a policy that differs from its reference, or every reward is zero
        for parameter in small_model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    arguments = DPOConfig(
        **settings(tmp_path, per_device_train_batch_size=4),
        loss_type=[loss_type],
        precompute_ref_log_probs=precompute,
    )

    (plain, plain_gradients), (shared, shared_gradients) = (
        one_dpo_step(small_model, reference, collator(pad_token_id=60), arguments, rows, tokenizer)
        for collator in (DataCollatorForPreference, SharingCollator)
    )

    assert plain["rewards/margins"] != 0
    for key in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert shared[key] == pytest.approx(plain[key], abs=1e-5, rel=1e-6), key
    for name, gradient in plain_gradients.items():
        assert gradient.abs().max() > 0, name
        assert_close(shared_gradients[name], gradient, atol=1e-5, rtol=1e-5)  # observed 2e-6 of gradients up to 5


def test_trl_loads_a_saved_hymba_from_its_path(
    small_model: HymbaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    small_model.save_pretrained(tmp_path / "model")
    trainer = SFTTrainer(
        model=str(tmp_path / "model"),
        args=SFTConfig(**settings(tmp_path / "out", packing=True, max_length=16)),
        train_dataset=Dataset.from_list([{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}]),
        processing_class=tokenizer,
    )
    assert isinstance(trainer.model, HymbaForCausalLM)
    trainer.train()
