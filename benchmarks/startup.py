"""From the start of a process to an answer: help, import, and the first training step, beside TRL and axolotl.

    python benchmarks/startup.py [--axolotl PATH/TO/axolotl] [--output benchmarks/startup.md]

Processes take turns; every side starts once before anything is timed. The first training step is that of SFT on the
shipped arithmetic problems in the shipped tokenizer, two conversations, up to the line in which the command tells its
loss; then the process is ended. `hymba-align sft` makes a Hymba of random weights; `trl sft` reads a Llama of the same
sizes, 1 MB, from disk. Both find empty caches. Exits with 1 where this project is not the fastest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from measure import Table, add_options, alternate, finish, median_ratio

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "data" / "arithmetic"
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
CONVERSATIONS = 64


WITH_TRL = "import of model and trainer"
"""What both sides import much the same for."""


def script(name: str) -> str:
    """The path of a console script beside this Python, else of the one in the PATH. Raises: FileNotFoundError."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed beside {sys.executable}")
    return found


def run(command: Sequence[str], folder: Path, *, until: str | None = None) -> None:
    """Runs a process to its end, or until it writes a line that holds `until`; then it is ended.

    Raises: RuntimeError when it fails, or ends without such a line.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    environment["HF_DATASETS_CACHE"] = tempfile.mkdtemp(dir=folder)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    said = []
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if until is not None and until in line:
                os.killpg(process.pid, signal.SIGKILL)  # the launcher's children too; this session is theirs alone
                return
    if process.returncode != 0 or until is not None:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}\n{''.join(said)}"[-3000:])


def help_sides(folder: Path, axolotl: str | None) -> dict[str, Callable[[], object]]:
    """`--help` of each command line."""
    scripts = {"hymba-align": script("hymba-align"), "trl": script("trl")}
    if axolotl is not None:
        scripts["axolotl"] = axolotl
    return {name: partial(run, [path, "--help"], folder) for name, path in scripts.items()}


def import_sides(folder: Path, axolotl: str | None) -> dict[str, Callable[[], object]]:
    """`import` of each package, which is what a program that uses it pays first."""
    pythons = {"hymba_align": sys.executable, "trl": sys.executable}
    if axolotl is not None:
        pythons["axolotl"] = str(Path(axolotl).with_name("python"))
    return {
        module.replace("_", "-"): partial(run, [python, "-c", f"import {module}"], folder)
        for module, python in pythons.items()
    }


def trainer_import_sides(folder: Path) -> dict[str, Callable[[], object]]:
    """The import after which a model can be trained."""
    code = {
        "hymba-align": "import hymba_align.model, hymba_align.train.sft",
        "trl": "from transformers import LlamaForCausalLM; from trl import SFTTrainer",
    }
    return {name: partial(run, [sys.executable, "-c", line], folder) for name, line in code.items()}


def first_step_sides(folder: Path) -> dict[str, Callable[[], object]]:
    """SFT on the same conversations through each command line, up to the loss of the first step."""
    return {
        "hymba-align": partial(_fresh_run, our_step_command(folder), folder, "sft  step 1/1"),
        "trl": partial(_fresh_run, trl_step_command(folder), folder, "'loss': "),
    }


def _fresh_run(command: Sequence[str], folder: Path, until: str) -> None:
    for written in ("runs", "out"):
        shutil.rmtree(folder / written, ignore_errors=True)
    run(command, folder, until=until)


def our_step_command(folder: Path) -> list[str]:
    """`hymba-align sft` on a recipe of random weights."""
    config = {**SIZES, "num_key_value_heads": 1, "v_head_dim": 64, "mamba_d_state": 4, "mamba_dt_rank": 4}
    trainer = {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 2, "packing": False, "use_cpu": True}
    recipe = {
        "name": "startup",
        "base": {
            "tokenizer": str(SHIPPED / "tokenizer"),
            "config": {**config, "num_memory_tokens": 4, "global_attn_idx": [0], "kv_reuse_group": []},
        },
        "data": {"path": str(SHIPPED / "train.jsonl"), "max_rows": CONVERSATIONS, "workers": 1},
        "sft": {"max_length": 512, "trainer": trainer},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return [script("hymba-align"), "sft", "recipe.yaml"]


def trl_step_command(folder: Path) -> list[str]:
    """`trl sft` on the same conversations and a Llama of the same sizes, which is written to `folder` first."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from hymba_align.data.template import load_tokenizer

    tokenizer = load_tokenizer(str(SHIPPED / "tokenizer"))
    tokenizer.save_pretrained(folder / "llama")
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **SIZES)
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    (folder / "chat").mkdir(exist_ok=True)
    with (folder / "chat" / "train.jsonl").open("w") as file:
        for line in (SHIPPED / "train.jsonl").read_text().splitlines()[:CONVERSATIONS]:
            row = json.loads(line)
            prompt = [{"role": "user", "content": row["question"]}]
            reply = [{"role": "assistant", "content": row["answer"]}]
            file.write(json.dumps({"prompt": prompt, "completion": reply}) + "\n")
    options = "--model_name_or_path llama --dataset_name chat --output_dir out --max_steps 1 --max_length 512"
    options += " --per_device_train_batch_size 2 --use_cpu true --bf16 false --report_to none --save_strategy no"
    options += " --logging_steps 1 --disable_tqdm true"
    return [script("trl"), "sft", *options.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--axolotl", help="its console script, where it is installed", default=shutil.which("axolotl"))
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds = {
            "--help": help_sides(folder, arguments.axolotl),
            "import of the package": import_sides(folder, arguments.axolotl),
            WITH_TRL: trainer_import_sides(folder),
            "first training step": first_step_sides(folder),
        }
        seconds = {kind: alternate(sides, rounds=arguments.rounds) for kind, sides in kinds.items()}
    table = Table(
        "From the start of a process to an answer",
        "python benchmarks/startup.py",
        ("what", "hymba-align, s", "trl, s", "axolotl, s", "trl / hymba-align", "wanted"),
        [
            "Whole processes, medians, the sides taking turns; wall time from start to end. The first training step is that "
            f"of SFT on {CONVERSATIONS} shipped conversations, two per batch, with empty caches: reading, chat template, "
            "tokens, model, optimizer, and the step, up to the line that tells its loss. `trl sft` trains a Llama of the "
            "same hidden size and layers from a folder. Both import TRL's trainer, so the third row can at best be equal.",
            "axolotl trains in the versions that it pins alone (0.19.0: transformers 5.16.1, trl 1.9.0, and with them "
            "xformers, bitsandbytes, torchao and triton), so its first step cannot stand beside these in one environment; "
            "its help and import are measured with this environment's libraries, where `--axolotl` names its script.",
        ],
    )
    missed = []
    for kind, sides in seconds.items():
        ratio = median_ratio(sides["trl"], sides["hymba-align"])
        medians = {name: statistics.median(values) for name, values in sides.items()}
        wanted = "" if kind == WITH_TRL else "fastest"
        if wanted and min(medians, key=lambda name: medians[name]) != "hymba-align":
            missed.append(kind)
        axolotl = f"{medians['axolotl']:.2f}" if "axolotl" in medians else "not measured"
        table.add(kind, f"{medians['hymba-align']:.2f}", f"{medians['trl']:.2f}", axolotl, f"{ratio:.2f}", wanted)
    finish(table, arguments.output, missed)


if __name__ == "__main__":
    main()
