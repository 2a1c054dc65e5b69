"""An inspection from its settings to its numbers: what is read, the checkpoints, one part after another."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
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
from hymba_align.inside.showing import display, forward_passes, one_more
from hymba_align.inspect_choices import PARTS, Part
from hymba_align.processes.launch import free_gpu_memory

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from hymba_align.model import HymbaConfig, HymbaForCausalLM

__all__ = ["InspectSettings", "check_output", "inspect_checkpoint", "write"]

TOKENS_PER_ROW = 2048
"""Documents are packed into rows of so many tokens; a longer one has a row of its own"""
MAP_TOKENS = 48
"""Of a document, that a map shows"""
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
            for line in f"Read: {inputs.words}".replace("\n", "\n  ").split("\n"):
                say(line)
        looking = _Looking(settings, inputs, say)
        found = _measure(looking)
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


def _measure(looking: _Looking) -> dict[str, Any]:
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
    say = looking.say
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
        with_attention = part == "fusion" and "attention" in found
        say(f"{NAMES[part]}: {'seen with attention' if with_attention else f'{seconds[part]:.1f} s'}")
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


@dataclass(frozen=True)
class _Seen:
    """What one pass of a model over the rows shows."""

    attention: Attention
    fusion: Fusion | None
    """None where it was not looked at"""
    states: Sequence[Tensor]
    """Of each row, those that predict what is under the loss; none where no checkpoints are compared"""


@dataclass
class _Looking:
    """The checkpoints under inspection; each method measures the part of its name."""

    settings: InspectSettings
    inputs: Inputs
    say: Callable[[str], None]
    """Prints a line"""
    seen: _Seen | None = None
    """Of the checkpoint inspected, once the part on attention has run it"""

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
        self.seen = self._see(self.model, "Attention", fusion="fusion" in self.settings.parts)
        return replace(self.seen.attention, maps=maps)

    def _see(self, model: HymbaForCausalLM, words: str, *, fusion: bool = False) -> _Seen:
        from hymba_align.inside.attention import AttentionSums
        from hymba_align.inside.fusion import FusionSums
        from hymba_align.inside.passes import PredictingStates, run_rows

        sums, states = AttentionSums(model, self.tokenizer.bos_token_id), PredictingStates()
        fusions = [FusionSums(model)] if fusion else []
        compares = self.reason_to_leave_out("alignment") is None
        with forward_passes(words, len(self.rows), model):
            run_rows(model, self.rows, [sums, *fusions, *([states] if compares else [])])
        return _Seen(sums.result(), fusions[0].result() if fusions else None, states.states)

    def importance(self) -> tuple[Importance, ...]:
        """The loss, and the accuracy on each task, without each branch of each layer."""
        from hymba_align.inside.importance import measure_loss_importance, scorings

        with display("Loss without each branch", len(self.rows) * scorings(self.model), "rows") as shown:
            loss = measure_loss_importance(self.model, self.rows, scored=partial(one_more, shown))
        return (loss, *self._importance_by_tasks())

    def _importance_by_tasks(self) -> Iterator[Importance]:
        from hymba_align.inside.task_importance import Kept, measure_task_importance

        scoring, output = self.settings.scoring, self.settings.output
        if scoring is None:
            return
        kept = Kept.of(self.settings.checkpoint, output) if output is not None else None
        for task in scoring.tasks:
            yield measure_task_importance(self.model, self.tokenizer, scoring, task, kept=kept, say=self.say)

    def fusion(self) -> Fusion:
        """Sizes of both branches."""
        from hymba_align.inside.fusion import measure_fusion

        if self.seen is not None and self.seen.fusion is not None:
            return self.seen.fusion
        with forward_passes("Fusion", len(self.rows), self.model):
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
        rounded = after is not self.model
        seen_before = self._see(before, "Attention before training")
        seen_after = self._see(after, "Attention after training") if rounded else self.seen
        states = seen_before.states, seen_after.states if seen_after is not None else self._states_of(after)
        divergence = measure_divergence(before, after, self.rows, self.tokenizer, source=inputs.source, states=states)
        return Alignment(
            against=str(self.settings.against),
            weights=weights,
            whole=whole,
            attention_before=seen_before.attention,
            attention_after=seen_after.attention if rounded and seen_after is not None else None,
            pairs=pairs,
            divergence=divergence,
            dtype=ALIGNMENT_DTYPE,
        )

    def _states_of(self, model: HymbaForCausalLM) -> Sequence[Tensor]:
        from hymba_align.inside.passes import PredictingStates, run_rows

        states = PredictingStates()
        with forward_passes("Predictions after training", len(self.rows), model):
            run_rows(model, self.rows, [states])
        return states.states

    def cost(self) -> Cost:
        """What decoding takes; the checkpoint to compare with makes room first."""
        from hymba_align.inside.cost import measure_cost

        self.seen = None
        self.__dict__.pop("compared", None)
        free_gpu_memory()
        contexts = tuple(self.settings.contexts or ())
        return measure_cost(self.model, contexts=contexts, batch_size=self.settings.batch_size)


def map_layers(config: HymbaConfig) -> Sequence[int]:
    """Layers whose maps are drawn by default: up to three global ones, and the local one in the middle."""
    layers = range(config.num_hidden_layers)
    wide = [layer for layer in layers if config.is_global(layer)]
    local = [layer for layer in layers if not config.is_global(layer)]
    few = {wide[0], wide[len(wide) // 2], wide[-1]} if wide else set()
    return sorted({*few, *local[len(local) // 2 :][:1]})
