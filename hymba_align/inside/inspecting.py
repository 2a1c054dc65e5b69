"""An inspection from its settings to its numbers: what is read, the checkpoints, one part after another."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from hymba_align.eval.run import hardware
from hymba_align.inside.output import check_output, write
from hymba_align.inside.result import (
    Alignment,
    Attention,
    Cost,
    Fusion,
    Importance,
    Inspection,
    MetaTokens,
)
from hymba_align.inside.rows import Row, pack_rows
from hymba_align.inside.settings import Inputs, InspectSettings, read_inputs
from hymba_align.inspect_choices import PARTS, Part
from hymba_align.processes.launch import free_gpu_memory
from hymba_align.progress import Display

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hymba_align.model import HymbaConfig, HymbaForCausalLM

__all__ = ["InspectSettings", "check_output", "inspect_checkpoint", "write"]

TOKENS_PER_ROW = 2048
"""Documents are packed into rows of so many tokens; a longer one has a row of its own"""
MAP_TOKENS = 48
"""Of a document, that a map shows"""
BETWEEN_LINES_S = 30.0
"""Of progress in a log: as long as the whole step takes for a small model"""
ALIGNMENT_DTYPE = "float32"
PACKAGES = ("hymba-align", "transformers", "torch")
NAMES: dict[Part, str] = {
    "attention": "attention",
    "importance": "importance of the heads",
    "fusion": "fusion",
    "meta_tokens": "meta tokens",
    "alignment": "what training changed",
    "cost": "cost",
}


def inspect_checkpoint(settings: InspectSettings, say: Callable[[str], None]) -> Inspection:
    """Everything that is asked for, measured; findings included.

    On this process's GPU, where there is one, else on the CPU.

    Args:
        say: prints a line; called for each part, with how long it took.
    Raises: UsageError for settings, checkpoints or files that cannot be used, before anything is measured.
    """
    from hymba_align.inside.findings import findings
    from hymba_align.train.common import quiet_libraries

    with quiet_libraries():
        inputs = read_inputs(settings)
        if inputs.words:
            say(f"Read: {inputs.words}")
        looking = _Looking(settings, inputs)
        found = _measure(looking, say)
    inspection = Inspection(
        checkpoint=settings.checkpoint,
        against=settings.against,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        data=inputs.words,
        documents=len(inputs.documents),
        tokens=sum(len(document.token_ids) for document in inputs.documents),
        shape=_shape(inputs.config, looking.model.num_parameters()),
        dtype=looking.dtype,
        device=looking.device,
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
        hardware=hardware(),
        **found,
    )
    return replace(inspection, findings=findings(inspection))


def _measure(looking: _Looking, say: Callable[[str], None]) -> dict[str, Any]:
    """The parts, how long each took, and which are left out."""
    measures = {
        "attention": looking.attention,
        "importance": looking.importance,
        "fusion": looking.fusion,
        "meta_tokens": looking.meta_tokens,
        "alignment": looking.alignment,
        "cost": looking.cost,
    }
    found: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for part in PARTS:
        reason = looking.reason_to_leave_out(part)
        if reason is not None:
            left_out[part] = reason
            if part in looking.settings.parts:
                say(f"{NAMES[part]}: left out, {reason}")
            continue
        began = time.perf_counter()
        found[part] = measures[part]()
        seconds[part] = time.perf_counter() - began
        say(f"{NAMES[part]}: {seconds[part]:.1f} s")
    return {**found, "seconds": seconds, "left_out": left_out}


def _shape(config: HymbaConfig, parameters: int) -> dict[str, int | str | bool]:
    return {
        "layers": config.num_hidden_layers,
        "global layers": ", ".join(map(str, config.global_attn_idx)),
        "hidden size": config.hidden_size,
        "attention heads": config.num_attention_heads,
        "key/value heads": config.num_key_value_heads,
        "meta tokens": config.num_memory_tokens,
        "window": config.sliding_window,
        "state size": config.mamba_d_state,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "parameters": parameters,
    }


@dataclass
class _Looking:
    """The checkpoints under inspection; each method measures the part of its name."""

    settings: InspectSettings
    inputs: Inputs

    def __post_init__(self) -> None:
        import torch

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = self.settings.dtype or ("bfloat16" if self.device == "cuda" else "float32")
        self.model = self._load(self.settings.checkpoint)
        self.rows: list[Row] = list(pack_rows(self.inputs.documents, TOKENS_PER_ROW))

    def _load(self, checkpoint: str, dtype: str | None = None) -> HymbaForCausalLM:
        import torch

        from hymba_align.checkpoint import load_model

        model = load_model(checkpoint, dtype=dtype or self.dtype)
        torch.nn.Module.to(model, self.device)  # PreTrainedModel hides the signature
        return model.eval()

    @cached_property
    def compared(self) -> tuple[HymbaForCausalLM, HymbaForCausalLM]:
        """The checkpoint to compare with and the one inspected, loaded when they are first asked for, both in float32.

        Rounding weights and activations to bfloat16 can move a model further than training did.
        """
        assert self.settings.against is not None, "asked for only where there is one"
        before = self._load(self.settings.against, ALIGNMENT_DTYPE)
        is_loaded = self.dtype == ALIGNMENT_DTYPE
        return before, self.model if is_loaded else self._load(self.settings.checkpoint, ALIGNMENT_DTYPE)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's."""
        assert self.inputs.tokenizer is not None, "read_inputs refuses a checkpoint without one, for parts that need it"
        return self.inputs.tokenizer

    def reason_to_leave_out(self, part: Part) -> str | None:
        """Why a part is not measured; None where it is."""
        if part not in self.settings.parts:
            return "not asked for"
        if part == "alignment" and self.settings.against is None:
            return "there is no checkpoint to compare with"
        if part == "meta_tokens" and not self.inputs.domains:
            return self.inputs.no_domains
        return None

    def attention(self) -> Attention:
        """Where attention goes, with maps."""
        from hymba_align.inside.maps import attention_maps

        layers = self.settings.layers if self.settings.layers is not None else map_layers(self.inputs.config)
        document = self.inputs.text or self.inputs.documents[0]
        maps = attention_maps(self.model, document, self.tokenizer, layers, most_tokens=MAP_TOKENS)
        return replace(self._attention_of(self.model), maps=maps)

    def _attention_of(self, model: HymbaForCausalLM) -> Attention:
        from hymba_align.inside.attention import measure_attention

        return measure_attention(model, self.rows, bos_token_id=self.tokenizer.bos_token_id)

    def importance(self) -> tuple[Importance, ...]:
        """The loss, and the accuracy on each task, without each branch of each layer."""
        from hymba_align.inside.importance import measure_loss_importance, measure_task_importance, scorings

        scoring = self.settings.scoring
        with _display("Loss without each branch", len(self.rows) * scorings(self.model), "rows") as display:
            loss = measure_loss_importance(self.model, self.rows, scored=partial(_one_more, display))
        found = [loss]
        if scoring is None:
            return (loss,)
        for task in scoring.tasks:
            with _display(f"{task} without each branch", scorings(self.model), "models") as display:
                one_more = partial(_one_more, display)
                found.append(measure_task_importance(self.model, self.tokenizer, scoring, task, scored=one_more))
        return tuple(found)

    def fusion(self) -> Fusion:
        """Sizes of both branches."""
        from hymba_align.inside.fusion import measure_fusion

        return measure_fusion(self.model, self.rows)

    def meta_tokens(self) -> MetaTokens:
        """Which domains each meta token is for, and how far training moved it."""
        from hymba_align.inside.meta_tokens import measure_meta_tokens
        from hymba_align.inside.movement import meta_movement

        measured = measure_meta_tokens(self.model, self.inputs.domains, self.tokenizer, tokens_per_row=TOKENS_PER_ROW)
        if self.settings.against is None:
            return measured
        return replace(measured, movement=meta_movement(*self.compared))

    def alignment(self) -> Alignment:
        """What lies between both checkpoints."""
        from hymba_align.inside.alignment import measure_divergence, measure_pairs
        from hymba_align.inside.movement import weight_movement

        inputs = self.inputs
        before, after = self.compared
        weights, whole = weight_movement(before, after)
        pairs = None
        if inputs.pairs:
            pairs = measure_pairs(before, after, inputs.pairs, source=inputs.pairs_source, tokenizer=self.tokenizer)
        return Alignment(
            against=str(self.settings.against),
            weights=weights,
            whole=whole,
            attention_before=self._attention_of(before),
            attention_after=self._attention_of(after) if after is not self.model else None,
            pairs=pairs,
            divergence=measure_divergence(before, after, self.rows, self.tokenizer, source=inputs.source),
            dtype=ALIGNMENT_DTYPE,
        )

    def cost(self) -> Cost:
        """What decoding takes; the checkpoint to compare with makes room first."""
        from hymba_align.inside.cost import measure_cost

        self.__dict__.pop("compared", None)
        free_gpu_memory()
        contexts = tuple(self.settings.contexts or ())
        return measure_cost(self.model, contexts=contexts, batch_size=self.settings.batch_size)


def _display(name: str, total: int, unit: str) -> Display:
    """The progress of a part of this step."""
    return Display(name, total, unit=unit, between_lines_s=BETWEEN_LINES_S, is_part=True)


def _one_more(display: Display) -> None:
    display.advance(display.done + 1)
    display.tell()


def map_layers(config: HymbaConfig) -> Sequence[int]:
    """Layers whose maps are drawn by default: up to three global ones, and the local one in the middle."""
    layers = range(config.num_hidden_layers)
    wide = [layer for layer in layers if config.is_global(layer)]
    local = [layer for layer in layers if not config.is_global(layer)]
    few = {wide[0], wide[len(wide) // 2], wide[-1]} if wide else set()
    return sorted({*few, *local[len(local) // 2 :][:1]})
