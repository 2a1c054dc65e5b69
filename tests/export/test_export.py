"""`export`: a folder for other people, which opens here and, asked for, in the released code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoTokenizer

from hymba_align.checkpoint import load_model
from hymba_align.checkpoint_checks import expected_shapes
from hymba_align.cli import main
from hymba_align.model.configuration import RELEASED_CLASSES

RELEASED = Path(__file__).parents[3] / "shared" / "hymba_1_5b"
needs_released = pytest.mark.skipif(
    not RELEASED.is_dir(), reason="the released configuration is not part of the repository"
)
QUESTION = "a question of GPQA that nobody may publish"


def exported(source: Path, output: Path, *words: str) -> dict[str, Any]:
    """config.json of what was exported."""
    assert main(["export", str(source), str(output), *words]) == 0
    config: dict[str, Any] = json.loads((output / "config.json").read_text())
    return config


def test_a_run_is_exported_by_its_last_stage_and_opens_here(run: Path, base: Path, tmp_path: Path) -> None:
    config = exported(run, tmp_path / "out")

    assert "auto_map" not in config
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    ours, theirs = load_model(tmp_path / "out").state_dict(), load_model(base).state_dict()
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert {(file.stat().st_mode & 0o777) for file in (tmp_path / "out").iterdir()} == {
        (tmp_path / "out" / "README.md").stat().st_mode & 0o777
    }
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert not settings.keys() & {"is_local", "local_files_only", "name_or_path"}


def test_a_run_whose_first_stage_was_stopped_is_not_exported_untrained(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "sft" / "final").rename(run / "sft" / "checkpoint-1")

    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[0] == (
        f"Error: {run} is a run without a finished training stage; finish it with 'hymba-align run' first, or name "
        f"{run}/base/final, the weights before training"
    )
    assert not (tmp_path / "out").exists()


def test_a_run_whose_dpo_was_stopped_says_which_stage_it_exports_and_what_is_not_finished(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(f"{recipe}dpo: {{max_length: 64}}\n")
    (run / "dpo" / "checkpoint-1").mkdir(parents=True)

    exported(run, tmp_path / "out")

    told = capsys.readouterr().out
    assert f"Exported: {run}/sft/final\n" in told
    assert (
        "To do: dpo, a later stage of this run's recipe, is not finished, so this is the model of sft; "
        "'hymba-align run RECIPE' finishes it\n"
    ) in told


@needs_released
def test_with_remote_code_every_key_of_the_released_configuration_is_there(base: Path, tmp_path: Path) -> None:
    config = exported(base, tmp_path / "out", "--with-remote-code")

    released = json.loads((RELEASED / "config.json").read_text())
    assert released.keys() - config.keys() == set()
    assert config["auto_map"] == RELEASED_CLASSES
    assert config["conv_dim"] == {str(layer): 64 for layer in range(3)}
    assert config["layer_type"] == ["h", "h", "h"]
    assert load_model(tmp_path / "out").config.num_hidden_layers == 3


def test_with_remote_code_the_tokenizer_is_written_as_transformers_4_reads_it_and_gives_the_same_tokens(
    base: Path, tmp_path: Path
) -> None:
    exported(base, tmp_path / "out", "--with-remote-code")

    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    merges = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["merges"]
    assert "add_prefix_space" not in settings
    assert merges
    assert all(isinstance(merge, str) for merge in merges)
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(base)
    assert settings["chat_template"] == theirs.chat_template
    for text in ("Tom buys  2 boxes.", "x</s>\ny", "<extra_id_1>User\n"):
        assert ours(text).input_ids == theirs(text).input_ids


def test_the_tensors_have_the_released_names(base: Path, tmp_path: Path) -> None:
    exported(base, tmp_path / "out")

    stored = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items()}
    expected = expected_shapes(
        load_model(base).config
    )  # which tests/model/test_configuration.py compares with the released ones
    assert {**stored, "lm_head.weight": stored["model.embed_tokens.weight"]} == expected


def test_weights_are_cast_and_divided_among_files(base: Path, tmp_path: Path) -> None:
    exported(base, tmp_path / "out", "--dtype", "bfloat16", "--max-shard-size", "40KB")

    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert {str(tensor.dtype) for tensor in load_file(shards[0]).values()} == {"torch.bfloat16"}
    load_model(tmp_path / "out", dtype="bfloat16")


def test_an_adapter_is_exported_merged(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported(adapter, tmp_path / "out")

    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert "LoRA of rank 4 merged into 21 layers" in capsys.readouterr().out
    assert (
        "- Merged into the weights: LoRA of rank 4, alpha 8, in 21 layers."
        in (tmp_path / "out" / "README.md").read_text()
    )


def test_a_stage_that_changed_since_it_was_saved_is_not_handed_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hymba_align.run.manifest import seal

    seal(run / "sft" / "final", {})
    (run / "sft" / "final" / "generation_config.json").write_text("{}")

    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert f"{run}/sft/final is not what was saved there: generation_config.json has" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_size_that_is_none_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(base), str(tmp_path / "out"), "--max-shard-size", "large"]) == 2
    assert "'large' is not a size such as 5GB or 500MB" in capsys.readouterr().err


# ---- the card --------------------------------------------------------------------------------------------------------


def test_the_card_tells_what_the_run_recorded_and_no_secret_path_or_question(run: Path, tmp_path: Path) -> None:
    exported(run, tmp_path / "out")

    text = (tmp_path / "out" / "README.md").read_text()
    for told in (
        "learning_rate: 0.001", "secret: '***'", "model: …/Hymba-of-alice", "| SFT | `…/train.jsonl` | 9 | 8 | 8 | 321 | 123 | 1 too long | unknown |",
        "| strict match | 50.0 ± 35.0 |", "train SFT | 42 s | 321 |", "a folder called `Hymba-of-alice`; which weights those were is not recorded",
        "### GSM8K, problems of …/test.jsonl", "n = 2", "partial: 2 of 448", "No licence for this model has been named",
    ):  # fmt: skip
        assert told in text, told
    for untold in ("hunter2", "/home/alice", QUESTION):
        assert untold not in text, untold


def test_the_metadata_are_what_the_hub_reads(run: Path, tmp_path: Path) -> None:
    exported(run, tmp_path / "out", "--license", "apache-2.0", "--title", "My Hymba")

    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag, data.model_name) == (
        "apache-2.0",
        "transformers",
        "text-generation",
        "My Hymba",
    )
    assert data.tags == ["hymba", "hymba-align", "sft"]
    assert [(one.dataset_type, one.metric_type, one.metric_value) for one in data.eval_results] == [
        ("gsm8k", "strict_match", 50.0)
    ]


def test_weights_from_nvidia_bring_its_licence_and_notice(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = (run / "recipe.yaml").read_text().replace("/home/alice/Hymba-of-alice", "nvidia/Hymba-1.5B-Base")
    (run / "recipe.yaml").write_text(recipe)

    exported(run, tmp_path / "out")

    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.license, data.license_name, data.base_model) == (
        "other",
        "nvidia-open-model-license",
        "nvidia/Hymba-1.5B-Base",
    )
    notice = (tmp_path / "out" / "NOTICE").read_text()
    assert notice.startswith("Licensed by NVIDIA Corporation under the NVIDIA Open Model License\n")
    assert "To do: Add a copy of the NVIDIA Open Model License Agreement as LICENSE" in capsys.readouterr().out


def test_a_checkpoint_that_no_run_made_says_that_nothing_is_known(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported(base, tmp_path / "out")

    text = (tmp_path / "out" / "README.md").read_text()
    assert "Trained from: unknown: the checkpoint does not say what it was trained from." in text
    assert "## Recipe\n\nUnknown." in text
    assert "## Scores\n\nNone were made." in text
    assert "To do: README.md cannot tell recipe, data, scores and costs" in capsys.readouterr().out


def test_the_snippet_of_the_card_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported(run, tmp_path / "out")
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}

    exec(code.replace("max_new_tokens=64", "max_new_tokens=2"), names)

    assert isinstance(names["answer"], str)
    assert names["output"].shape[1] == names["inputs"]["input_ids"].shape[1] + 2


def test_the_licence_beside_a_data_file_is_read_from_its_card(tmp_path: Path) -> None:
    from hymba_align.export.model_card import licence_of

    (tmp_path / "train.jsonl").write_text("{}")
    assert licence_of(str(tmp_path / "train.jsonl")) == "unknown"
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Data\n")
    assert licence_of(str(tmp_path / "train.jsonl")) == "cc-by-4.0"
    assert licence_of("openai/gsm8k") == "see its page on the hub"
    assert licence_of("data/arithmetic/train.jsonl") == "apache-2.0"  # the set that ships with this repository
