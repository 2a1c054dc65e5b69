"""What the training benchmarks share: GSM8K conversations, a tokenizer trained on them, small models of one size.

GSM8K is read from a folder that holds its train.jsonl; without one, the shipped arithmetic problems take its place,
and `Conversations.origin` says so.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTTrainer

ROOT = Path(__file__).resolve().parents[1]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
SHIPPED = ROOT / "data" / "arithmetic"
VOCABULARY = 4096
HIDDEN, LAYERS = 256, 8
STEPS_OF_THE_SCHEDULE = 10_000


@dataclass(frozen=True)
class Conversations:
    """Tokenized questions with answers, of which the answers are trained on."""

    dataset: Dataset
    """`input_ids` and `assistant_masks`, one conversation per row."""
    tokenizer: PreTrainedTokenizerBase
    origin: str
    """What they are, for the notes of a table."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each conversation."""
        return [len(ids) for ids in self.dataset["input_ids"]]


def load_conversations(folder: Path, count: int, *, max_length: int = 2048, skip: int = 0) -> Conversations:
    """The first `count` problems after `skip` as conversations, in the file's order.

    The tokenizer has 4,096 entries where the whole file gives as many; it is trained on the file anew.
    """
    from hymba_align.data.prepare import prepare_sft
    from hymba_align.data.tokenizer_training import train_tokenizer
    from hymba_align.recipe import DataSection

    file, name = folder / "train.jsonl", "GSM8K"
    if not file.is_file():
        file, name = SHIPPED / "train.jsonl", "the shipped arithmetic problems, as GSM8K was not found"
    tokenizer = train_tokenizer(file, VOCABULARY)
    lines = file.read_text(encoding="utf-8").splitlines()[skip : skip + count]
    if len(lines) < count:
        raise ValueError(f"{file.name} has {len(lines)} problems after the first {skip}, {count} are asked for")
    with tempfile.TemporaryDirectory() as written:
        rows = Path(written) / "rows.jsonl"
        rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
        section = DataSection(path=str(rows), workers=1)
        dataset = prepare_sft(section, tokenizer, max_length, seed=0).dataset.select_columns(
            ["input_ids", "assistant_masks"]
        )
        dataset = type(dataset).from_dict(dataset.to_dict())  # in memory, as the file goes
    return Conversations(dataset, tokenizer, f"{count:,} conversations of {name}")


# ---- models ---------------------------------------------------------------------------------------------------------


def hymba_config(vocabulary: int, **changes: Any) -> dict[str, Any]:
    """A Hymba of about 10 million parameters in the released model's proportions, with 128 meta tokens."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": 704,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "v_head_dim": 64,
        "mamba_expand": 2,
        "mamba_d_state": 16,
        "mamba_dt_rank": 16,
        "num_memory_tokens": 128,
        "sliding_window": 1024,
        "global_attn_idx": [0, 4, 7],
        "kv_reuse_group": [[1, 2], [5, 6]],
        **changes,
    }


def build_hymba(vocabulary: int, **changes: Any) -> PreTrainedModel:
    """Hymba with random weights."""
    from hymba_align.model import HymbaConfig, HymbaForCausalLM

    torch.manual_seed(0)
    return HymbaForCausalLM(HymbaConfig(**hymba_config(vocabulary, **changes)))


def build_jamba(vocabulary: int) -> PreTrainedModel:
    """Transformers' Jamba without experts: attention in one layer of eight, as it is by default, Mamba-1 in the others."""
    from transformers import JambaConfig, JambaForCausalLM

    torch.manual_seed(0)
    return JambaForCausalLM(
        JambaConfig(
            vocab_size=vocabulary,
            tie_word_embeddings=True,
            hidden_size=HIDDEN,
            intermediate_size=888,
            num_hidden_layers=LAYERS,
            num_attention_heads=8,
            num_key_value_heads=2,
            num_experts=1,
            num_experts_per_tok=1,
            router_aux_loss_coef=0.0,  # there is no router
            mamba_d_state=16,
            mamba_dt_rank=16,
        )
    )


def build_falcon(vocabulary: int) -> PreTrainedModel:
    """Transformers' Falcon-H1: attention and Mamba-2 heads in parallel in every layer."""
    from transformers import FalconH1Config, FalconH1ForCausalLM

    torch.manual_seed(0)
    return FalconH1ForCausalLM(
        FalconH1Config(
            vocab_size=vocabulary,
            tie_word_embeddings=True,
            hidden_size=HIDDEN,
            intermediate_size=672,
            num_hidden_layers=LAYERS,
            num_attention_heads=8,
            num_key_value_heads=2,
            mamba_d_ssm=512,
            mamba_n_heads=16,
            mamba_d_head=32,
            mamba_d_state=16,
            mamba_expand=2,
            mamba_chunk_size=128,
        )
    )


def parameters_of(model: PreTrainedModel) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


# ---- steps ----------------------------------------------------------------------------------------------------------


def trainer_of(
    trainer_class: type[SFTTrainer],
    model: PreTrainedModel,
    rows: Dataset,
    conversations: Conversations,
    *,
    packing: bool,
    max_length: int = 2048,
    **settings: Any,
) -> SFTTrainer:
    """A trainer whose first batch is all of `rows`, with TRL's settings for both kinds of rows."""
    from trl import SFTConfig

    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(prefix="benchmark-"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=5e-5,
        max_length=max_length,
        packing=packing,
        per_device_train_batch_size=len(rows),
        dataset_kwargs={"skip_prepare_dataset": True},
        **{"activation_checkpointing": False, **settings},
    )
    trainer = trainer_class(model=model, args=arguments, train_dataset=rows, processing_class=conversations.tokenizer)
    trainer.create_optimizer_and_scheduler(STEPS_OF_THE_SCHEDULE)
    Path(arguments.output_dir).rmdir()
    return trainer


def batch_of(trainer: SFTTrainer) -> dict[str, Any]:
    """The trainer's first batch, from its own loader."""
    return next(iter(trainer.get_train_dataloader()))


def labels_in(batch: dict[str, Any]) -> int:
    """Trained tokens."""
    return int((batch["labels"][:, 1:] != -100).sum())


def training_step(trainer: SFTTrainer, batch: dict[str, Any]) -> Callable[[], float]:
    """One step on the batch as `Trainer.train` makes it: loss, gradients, clipping, optimizer. Its loss comes back."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    items = trainer._get_num_items_in_batch([batch], torch.device("cpu"))

    def step() -> float:
        loss = trainer.training_step(trainer.model, dict(batch), items)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.model.zero_grad()
        trainer._metrics["train"].clear()
        return float(loss)

    return step


def shares_of_time(step: Callable[[], object]) -> dict[str, float]:
    """Which parts of one call the main thread's time goes to, largest first; the parts add up to 1."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    spent: dict[str, float] = {}
    for event in profiler.events():
        part, ancestor = _part_of(event.name), event.cpu_parent
        while ancestor is not None:
            part = next((name for word, name in WITH_ALL_WITHIN.items() if word in ancestor.name), part)
            ancestor = ancestor.cpu_parent
        spent[part] = spent.get(part, 0.0) + event.self_cpu_time_total
    return {part: seconds / sum(spent.values()) for part, seconds in sorted(spent.items(), key=lambda item: -item[1])}


WITH_ALL_WITHIN = {"Scan": "selective scan", "LogProb": "head and loss", "Optimizer": "optimizer"}
"""Words in the names of profiled functions, and the part that these and all they call belong to."""

PARTS = {
    **WITH_ALL_WITHIN,
    "bmm": "attention",
    "softmax": "attention",
    "scaled_dot": "attention",
    "aten::mm": "matrix products",
    "addmm": "matrix products",
    "conv": "convolution",
    "Conv": "convolution",
}


def _part_of(name: str) -> str:
    return next((part for word, part in PARTS.items() if word in name), "the rest")


def options(description: str) -> argparse.ArgumentParser:
    """The options of a training benchmark: those of all, and --gsm8k."""
    from measure import add_options

    parser = argparse.ArgumentParser(description=description)
    add_options(parser)
    parser.add_argument("--gsm8k", type=Path, default=GSM8K, help="folder with GSM8K's train.jsonl")
    return parser


def describe(lengths: list[int]) -> str:
    """Number, shortest, longest and total of conversations, for a table's notes."""
    return f"{len(lengths)} of {min(lengths)} to {max(lengths)} tokens, {sum(lengths):,} in all"
