"""The text of a first recipe: every line with the reason for it."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

from hymba_align import __version__
from hymba_align.hardware import Hardware
from hymba_align.memory import Setting, Shape, estimate, gib
from hymba_align.recipe import TrainingStage
from hymba_align.recipe_init.data_file import CHARACTERS_PER_TOKEN, DataFile
from hymba_align.recipe_init.ways import Way, fits, rows_of_a_batch, stage_setting
from hymba_align.recipe_loading import dump_yaml

PUBLISHED_BATCH = 1024  # sequences per optimizer step. Source: Hymba, section 3.4
STEPS_WANTED = 50  # of an epoch, where there is too little data for the published batch
SMALLEST_BATCH = 8
FEW_STEPS = 10  # an epoch of fewer teaches next to nothing
HUB_ROWS_ON_CPU = 500  # of the published data sets, which take a processor years
HELD_OUT, FEWEST_HELD_OUT = 0.02, 10  # share of the rows, and rows
LEARNING_RATES: dict[tuple[TrainingStage, bool], tuple[str, str]] = {
    ("sft", False): ("5e-5", "the published rate"),
    ("dpo", False): ("3e-6", "the published rate, six times the usual one: watch rewards/chosen"),
    ("sft", True): (
        "2e-4",
        "four times that of all parameters (benchmarks/adapters.md: 3.3, a small model); not measured on Hymba-1.5B",
    ),
    ("dpo", True): ("1e-5", "3.3 times that of all parameters, as measured for SFT; never measured for DPO"),
}
WHY = {
    "format": "found from the columns; 'hymba-align data preview' shows what is trained on",
    "bad_rows": "a row that cannot be used stops the run; drop: leave it out and count it",
    "over_long": "the same for rows above max_length; drop, or for conversations truncate, split",
    "validation_fraction": "kept back, so that a falling loss can be told from learning by heart",
}
HUB_DATA = {
    "sft": ("allenai/tulu-3-sft-mixture", "train", "939,343 conversations; its card lists the licences of its parts"),
    "dpo": ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs", "61,135 pairs of answers; MIT"),
}


@dataclass(frozen=True)
class Plan:
    """All that a first recipe says."""

    name: str
    model: str
    shape: Shape
    hardware: Hardware
    way: Way
    data: DataFile | None

    @property
    def stages(self) -> tuple[TrainingStage, ...]:
        """The training stages that the data allows; both where nothing is known of it."""
        return self.data.stages if self.data is not None else ("sft", "dpo")

    @property
    def adapts(self) -> bool:
        """Whether adapters are trained."""
        return self.way.setting.adapters is not None

    def sequences(self, stage: TrainingStage) -> int | None:
        """Packed rows of an epoch, or pairs; None where nobody has counted."""
        if self.data is None:
            return HUB_ROWS_ON_CPU if self.hardware.on_cpu else None
        if not self.data.whole:
            return None
        share = self.data.given.get("keep_fraction", 1.0) * self.data.given.get("repeat", 1)
        rows, tokens = max(1, round(share * self.data.rows)), round(share * self.data.tokens)
        return rows if stage == "dpo" else max(1, min(rows, -(-tokens // self.way.max_length)))

    def global_batch(self, stage: TrainingStage) -> int:
        """Sequences of an optimizer step: the published number, or a power of two that makes enough steps of an epoch."""
        sequences = self.sequences(stage)
        least = max(SMALLEST_BATCH, self.way.setting.processes)
        batch = least
        while batch * 2 <= PUBLISHED_BATCH and (sequences is None or batch * 2 * STEPS_WANTED <= sequences):
            batch *= 2
        return batch

    def setting(self, stage: TrainingStage) -> Setting:
        """What of a stage decides about memory, with its micro-batch."""
        batch = self.global_batch(stage)
        return stage_setting(self.way, stage, rows_of_a_batch(self.way, self.hardware, self.shape, batch, stage), batch)

    def cpu_hours(self, tokens: float) -> float | None:
        """Hours that the matrix products of SFT over so many tokens take at least; None with a GPU, or where none was timed.

        A weight takes two operations a token forward, two again for recomputation, two for its input's gradient and two for
        its own, which frozen ones are spared.
        """
        if self.hardware.cpu_flops is None:
            return None
        return tokens * self.shape.parameters * (6 if self.adapts else 8) / self.hardware.cpu_flops / 3600

    def cpu_line(self) -> str | None:
        """A sentence on how long it takes without a GPU."""
        flops, million = self.hardware.cpu_flops, self.cpu_hours(1e6)
        if flops is None or million is None:
            return None
        return (
            f"without a GPU: this CPU did {flops / 1e9:.0f} GFLOP/s just now, at which 1,000,000 tokens of SFT take "
            f"{million:,.{0 if million >= 10 else 1}f} hours or more (matrix products alone)"
        )


def recipe_text(plan: Plan) -> str:
    """The recipe, as YAML with comments."""
    parts = [_head(plan), _base(plan)]
    if plan.adapts:
        parts.append(_lora(plan))
    if plan.data is not None:
        parts.append(_data(plan.data))
    parts += [_stage(plan, stage) for stage in plan.stages]
    parts.append(_eval(plan))
    if plan.way.setting.engine != "single":
        parts.append(_launch(plan))
    return "\n".join(parts)


def machine(hardware: Hardware) -> str:
    """The machine in words, e.g. `8 x NVIDIA A100 of 79.3 GiB, bfloat16; 64 cores, 503.6 GiB; 1800.0 GiB of disk free`."""
    host = f"{hardware.cpus} cores, {gib(hardware.memory_bytes)} GiB; {gib(hardware.disk_free_bytes)} GiB of disk free"
    if hardware.on_cpu:
        return f"no GPU; {host}"
    numbers = "bfloat16" if hardware.bf16 else "no bfloat16"
    if hardware.assumed is not None:
        return f"{len(hardware.gpus)} x {gib(hardware.device_bytes)} GiB of GPU memory, {numbers}, as --gpus says; here: {host}"
    return f"{len(hardware.gpus)} x {hardware.gpus[0].name} of {gib(hardware.device_bytes)} GiB, {numbers}; {host}"


def _scalar(value: str) -> str:
    """A text as YAML writes it within a line."""
    return dump_yaml({"value": value}).removeprefix("value: ").strip()


def _head(plan: Plan) -> str:
    setting = plan.setting(plan.stages[0])
    needed = estimate(plan.shape, setting)
    where = "for this machine:" if plan.hardware.assumed is None else "for GPUs that were assumed, not found:"
    lines = [
        f"# Written by 'hymba-align init {plan.name}' (hymba-align {__version__}) {where}",
        f"#   {machine(plan.hardware)}.",
        f"# {plan.way.title} of {_scalar(plan.model)} ({plan.shape.parameters:,} parameters): {plan.stages[0].upper()} takes",
        f"# about {needed.line()}",
        "# (of each device; the estimate is checked on the CPU only, within 15 %).",
        *([f"# {line}" for line in textwrap.wrap(plan.cpu_line() or "", 116)]),
        f"name: {_scalar(plan.name)} # results are in runs/{plan.name}",
        "seed: 42 # order of the data, and everything else that is drawn",
        "",
    ]
    return "\n".join(lines)


def _base(plan: Plan) -> str:
    frozen = plan.way.setting.adapters
    if frozen is None:
        dtype = "float32", "master weights: small updates are lost in bfloat16"
        if plan.hardware.bf16:
            dtype = "float32", "master weights; computed with in bfloat16, which loses small updates"
    elif frozen.frozen_bytes == 2:
        dtype = "bfloat16", "frozen, so half the memory; adapters are float32 beside it"
    else:
        dtype = "float32", "frozen; bfloat16 is not what this machine computes in"
    return "\n".join(
        [
            "base:",
            f"  model: {_scalar(plan.model)} # a folder or a hub repository; revision: COMMIT pins the latter",
            f"  dtype: {dtype[0]} # {dtype[1]}",
            "",
        ]
    )


def _lora(plan: Plan) -> str:
    adapters = plan.way.setting.adapters
    assert adapters is not None, "the way trains adapters"
    trained = adapters.parameters(plan.shape)
    lines = [
        "lora: # 'hymba-align init' prints what else fits. Without this section all parameters are trained",
        f"  r: {adapters.rank} # {trained:,} trained numbers, {trained / plan.shape.parameters:.1%} of the model's",
        f"  alpha: {2 * adapters.rank} # updates are scaled by alpha / r",
        "  targets: [linear] # every linear layer of attention, Mamba and MLP; also: mixer, ssm, mlp, names",
    ]
    if adapters.quantized:
        lines.append("  quantize: nf4 # large matrices in 4 bits; needs, in the clone, pip install -e '.[quantized]'")
    return "\n".join([*lines, ""])


def _data(data: DataFile) -> str:
    held_out = data.rows * HELD_OUT >= FEWEST_HELD_OUT and not data.given.get("streaming")  # a stream keeps none back
    counted = f"{data.rows:,} rows" if data.whole else f"{data.rows:,} rows and more"
    ours = {
        **({"format": data.schema} if data.schema is not None else {}),
        "bad_rows": "refuse",
        "over_long": "refuse",
        **({"validation_fraction": HELD_OUT} if held_out else {}),
    }
    lines = [
        "data:",
        f"  path: {_scalar(data.path)} # {counted}, about {data.tokens:,} tokens ({CHARACTERS_PER_TOKEN} characters each)",
        *(f"  {key}: {value} # {WHY[key]}" for key, value in ours.items() if key not in data.given),
    ]
    if data.given:
        lines += ["  # as the command line said:", textwrap.indent(dump_yaml(dict(data.given)), "  ").rstrip()]
    return "\n".join([*lines, ""])


def _stage(plan: Plan, stage: TrainingStage) -> str:
    setting, batch = plan.setting(stage), plan.global_batch(stage)
    processes = setting.processes
    of_steps = f"{setting.batch} x {setting.accumulation}" + (f" x {processes} devices" if processes > 1 else "")
    rate, why = LEARNING_RATES[stage, plan.adapts]
    steps, epochs = _steps_in_words(plan, stage)
    unit = "pairs" if stage == "dpo" else "packed rows"
    without = gib(estimate(plan.shape, _not_recomputed(setting)).total)
    needed = estimate(plan.shape, setting)
    room = "what fits" if fits(needed, plan.hardware) else "MORE THAN FITS here, take another --way"
    length = plan.way.dpo_length if stage == "dpo" else plan.way.max_length
    lines = [
        f"{stage}:",
        *(_hub_data(plan, stage) if plan.data is None else ()),
        f"  max_length: {length} # text tokens of {'prompt and answer' if stage == 'dpo' else 'a packed row'}",
        "  trainer: # any field of " + ("trl.DPOConfig" if stage == "dpo" else "trl.SFTConfig"),
        f"    learning_rate: {rate} # {why}",
        f"    num_train_epochs: 1 # {epochs}",
        f"    per_device_train_batch_size: {setting.batch} # {room}: about {gib(needed.total)} GiB",
        f"    gradient_accumulation_steps: {setting.accumulation} # {of_steps} = {batch} {unit} a step: {steps}",
        f"    activation_checkpointing: true # layers are computed again for their gradients; false: about {without} GiB",
        *(
            []
            if plan.hardware.on_cpu
            else ["    bf16: true # what these GPUs compute in"]
            if plan.hardware.bf16
            else ["    bf16: false # these GPUs have no bfloat16; float32 is computed in"]
        ),
        *(["    packing: true # several conversations a row, none sees another"] if stage == "sft" else []),
        *(["    beta: 0.1 # how far answers may move from the start"] if stage == "dpo" else []),
        "",
    ]
    return "\n".join(lines)


def _steps_in_words(plan: Plan, stage: TrainingStage) -> tuple[str, str]:
    """How many steps an epoch has, and what to think of one epoch."""
    sequences, epochs = plan.sequences(stage), "as published; small sets take 2 or 3: watch the loss of validation"
    if sequences is None:
        return "the published batch", epochs
    # Of the hub's data nobody counted the tokens: in packed rows they are fewer than as conversations.
    about = "at most" if plan.data is None and stage == "sft" else "about"
    steps = max(1, sequences // plan.global_batch(stage))
    if steps < FEW_STEPS:
        epochs = "as published; so few steps teach next to nothing: more epochs, or fewer rows a step"
    return f"{about} {steps:,} {'step' if steps == 1 else 'steps'} an epoch", epochs


def _hub_data(plan: Plan, stage: TrainingStage) -> list[str]:
    """The lines on a stage's data where the user has named none."""
    path, split, what = HUB_DATA[stage]
    lines = [
        f"  data: # {what}",
        f"    path: {path} # or a file of yours: docs/data.md lists the columns",
        f"    split: {split}",
        "    bad_rows: drop # nobody can correct a row of the hub",
        "    over_long: truncate",
    ]
    few = f"    max_rows: {HUB_ROWS_ON_CPU} # without a GPU all would take years"
    return [*lines, few] if plan.hardware.on_cpu else lines


def _not_recomputed(setting: Setting) -> Setting:
    return replace(setting, checkpointing=False)


def _eval(plan: Plan) -> str:
    few = plan.hardware.on_cpu
    if plan.data is not None and plan.data.schema != "question_answer":
        return (
            "# eval: {tasks: [gsm8k], limit: 200} # scores before training and after each stage: school mathematics, from the hub;\n"
            "# docs/scores.md has other tasks, docs/training_display.md answers to held-out rows of your own while training\n"
        )
    if plan.data is not None:
        test = Path(plan.data.path).with_name("test.jsonl")
        if plan.data.path.endswith(".jsonl") and not test.is_file():
            return (
                "# eval: {tasks: [gsm8k]} # scores, as soon as test.jsonl lies beside the data or eval.gsm8k.test_path names\n"
                "# questions that are not trained on\n"
            )
    lines = [
        "eval: # before training and after each stage; docs/scores.md says what a score may be compared with",
        "  tasks: [gsm8k] # school mathematics, from the hub; suite: published adds GPQA and BFCL (eval/README.md)",
        f"  limit: {50 if few else 200} # problems; without it all 1,319, for a number to publish",
        f"  batch_size: {4 if few else 32}",
    ]
    return "\n".join([*lines, ""])


def _launch(plan: Plan) -> str:
    setting = plan.way.setting
    why = {
        "ddp": "everything fits on each GPU; gradients are sent once a step, the least of all",
        "zero1": "divides the optimizer's state; sends as much as ddp",
        "zero2": "divides the optimizer's state and gradients; sends as much as ddp in each micro-batch",
        "zero3": "divides weights too, which are sent twice in each micro-batch",
        "zero3_offload": "keeps weights and state in main memory, which every step moves: slow",
    }[setting.engine]
    return "\n".join(
        [
            "launch:",
            f"  launcher: {setting.engine} # {why}",
            f"  num_processes: {setting.processes} # one for each GPU",
            "",
        ]
    )
