import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from dgpo.artifacts import RunFolderExistsError, write_manifest
from dgpo.coldstart.distill import distill, distill_episodes
from dgpo.coldstart.trainer import BucketSampler, DistillationTrainer, TrainingExample, train_on_examples
from dgpo.config.load import load_config
from dgpo.config.schema import DistillConfig, HardwareConfig
from dgpo.tinyworld.models import ModelSize, make_model, save_model
from dgpo.tinyworld.tokenizer import build_tokenizer
from dgpo.trajectory import Trajectory, write_trajectories

CPU = HardwareConfig(platform="cpu", dtype="float32", attention="sdpa", gradient_checkpointing=False)
EXAMPLES = [
    TrainingExample([5, 6, 7], [8, 9, 20, 21, 10, 1], [1, 1, 0, 0, 1, 1]),
    TrainingExample([5, 6], [11, 22, 12], [1, 0, 1]),
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["Lyon", "France"], ["What is the country of ?"])


def tiny_model(tokenizer, seed):
    return make_model(ModelSize(hidden_size=32, num_layers=1, num_heads=1), tokenizer, seed=seed).eval()


def make_trainer(tokenizer, tmp_path, *, loss="kd", kl_ratio=0.5, chunk_tokens=2):
    model = tiny_model(tokenizer, 0)
    trainer = DistillationTrainer(
        model=model,
        teacher=tiny_model(tokenizer, 1) if loss == "kd" else None,
        examples=EXAMPLES,
        pad_token_id=tokenizer.pad_token_id,
        loss=loss,
        kl_ratio=kl_ratio,
        chunk_tokens=chunk_tokens,
        args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
        callbacks=[],
    )
    return model, trainer


def expected_loss(tokenizer, *, kl_ratio):
    """The equation, one example and one token at a time, without padding."""
    student, teacher = tiny_model(tokenizer, 0), tiny_model(tokenizer, 1)
    total, count = 0.0, 0
    for example in EXAMPLES:
        ids = example.prompt_ids + example.response_ids
        p, q = (m(torch.tensor([ids])).logits[0].log_softmax(-1) for m in (student, teacher))
        for i, trained in enumerate(example.response_mask):
            if trained:
                at = len(example.prompt_ids) + i
                kl = (q[at - 1].exp() * (q[at - 1] - p[at - 1])).sum()
                total = total + (1 - kl_ratio) * -p[at - 1, ids[at]] + kl_ratio * kl
                count += 1
    return total / count


@pytest.mark.parametrize("kl_ratio", [0.0, 0.5, 1.0])
def test_loss_is_the_equation_on_policy_tokens_only(tokenizer, tmp_path, kl_ratio):
    model, trainer = make_trainer(tokenizer, tmp_path, kl_ratio=kl_ratio)
    batch = trainer.collate([example.features() for example in EXAMPLES])
    loss = trainer.compute_loss(model, batch)
    torch.testing.assert_close(loss, expected_loss(tokenizer, kl_ratio=kl_ratio), rtol=1e-5, atol=1e-6)


def test_micro_batches_add_up_to_the_whole_batch(tokenizer, tmp_path):
    model, trainer = make_trainer(tokenizer, tmp_path)
    whole = trainer.compute_loss(model, trainer.collate([e.features() for e in EXAMPLES]), num_items_in_batch=6)
    parts = [trainer.compute_loss(model, trainer.collate([e.features()]), num_items_in_batch=6) for e in EXAMPLES]
    torch.testing.assert_close(sum(parts), whole)


def test_observation_tokens_are_no_targets(tokenizer, tmp_path):
    _, trainer = make_trainer(tokenizer, tmp_path, loss="seqkd")
    labels = trainer.collate([EXAMPLES[0].features()])["labels"][0].tolist()
    assert labels == [-100, -100, -100, 8, 9, -100, -100, 10, 1]


def test_teacher_is_frozen_and_hooks_can_be_removed(tokenizer, tmp_path):
    model, trainer = make_trainer(tokenizer, tmp_path)
    trainer.compute_loss(model, trainer.collate([e.features() for e in EXAMPLES])).backward()
    assert all(p.grad is None for p in trainer.teacher.parameters())
    assert model.lm_head.weight.grad is not None
    trainer.remove_hooks()
    assert model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, len(tokenizer))


def test_bucket_sampler_gives_each_index_once_and_similar_lengths_together():
    lengths = [(7 * i) % 50 for i in range(70)]
    sampler = BucketSampler(lengths, batch_size=4, seed=0)
    first, second = list(sampler), list(sampler)
    assert sorted(first) == list(range(70))
    assert first != second
    again = BucketSampler(lengths, batch_size=4, seed=0)
    assert list(again) == first
    spread = [max(lengths[i] for i in first[s : s + 4]) - min(lengths[i] for i in first[s : s + 4]) for s in (0, 4, 8)]
    assert max(spread) <= 12


def write_stage_input(tokenizer, tmp_path):
    for name, seed in (("student", 0), ("teacher", 1)):
        save_model(tiny_model(tokenizer, seed), tokenizer, tmp_path / name)
    trajectories = [
        Trajectory(
            str(i), e.prompt_ids, e.response_ids, e.response_mask, [0.0] * len(e.response_ids), [], [], "x", "answered"
        )
        for i, e in enumerate(EXAMPLES * 8)
    ]
    write_trajectories(tmp_path / "episodes.jsonl", trajectories)
    settings = DistillConfig(kl_ratio=0.5, epochs=10, batch_size=8, learning_rate=1e-2)
    return {
        "student": str(tmp_path / "student"),
        "teacher": str(tmp_path / "teacher"),
        "episodes": tmp_path / "episodes.jsonl",
        "settings": settings,
        "hardware": CPU,
        "seed": 0,
    }


def test_stage_learns_and_leaves_a_checkpoint_a_curve_and_a_manifest(tokenizer, tmp_path):
    out = distill_episodes(output=tmp_path / "out", **write_stage_input(tokenizer, tmp_path))
    curve = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [point["step"] for point in curve] == [10, 20]
    assert curve[-1]["loss"] < curve[0]["loss"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["counts"] == {"episodes": 16, "trained_tokens": 48}
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert model.generation_config.stop_strings == ["</search>", "</answer>"]
    assert AutoTokenizer.from_pretrained(out / "model").get_vocab() == tokenizer.get_vocab()
    logits = model(torch.tensor([[5, 6]])).logits[0, -1]
    assert F.softmax(logits, -1)[11] > 0.05


def test_stage_reads_the_collection_of_its_run_folder(tokenizer, tmp_path, capsys):
    write_stage_input(tokenizer, tmp_path)
    collected = tmp_path / "run" / "collect"
    collected.mkdir(parents=True)
    (tmp_path / "episodes.jsonl").rename(collected / "episodes.jsonl")
    write_manifest(collected, stage="collect", inputs={}, config={}, counts={"kept": 16}, seed=0)
    overrides = [
        "world=tiny",
        "hardware=cpu",
        f"run_dir={tmp_path / 'run'}",
        f"student.path={tmp_path / 'student'}",
        f"teacher.path={tmp_path / 'teacher'}",
        "distill.max_steps=2",
    ]
    assert distill(load_config([*overrides, "dry_run=true"])) is None
    assert "dry run" in capsys.readouterr().out
    folder = distill(load_config(overrides))
    assert folder == tmp_path / "run" / "distill"
    assert (folder / "model" / "model.safetensors").exists()
    with pytest.raises(RunFolderExistsError, match="resume=true"):
        distill(load_config(overrides))


def test_gradient_accumulation_gives_the_same_weights(tokenizer, tmp_path):
    weights = []
    for micro in (None, 2):
        model = tiny_model(tokenizer, 0)
        settings = DistillConfig(loss="seqkd", max_steps=3, batch_size=8, micro_batch_size=micro, learning_rate=1e-2)
        train_on_examples(
            model,
            None,
            EXAMPLES * 4,
            tokenizer,
            checkpoint=tmp_path / f"micro_{micro}",
            metrics=tmp_path / "metrics.jsonl",
            settings=settings,
            hardware=CPU,
            seed=0,
            name="t",
        )
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)


def test_different_tokenizers_are_refused(tokenizer, tmp_path):
    stage = write_stage_input(tokenizer, tmp_path)
    other = build_tokenizer(["Rome"], ["What is the country of ?"])
    save_model(tiny_model(other, 1), other, tmp_path / "teacher")
    with pytest.raises(ValueError, match="different tokenizers"):
        distill_episodes(output=tmp_path / "out", **stage)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"loss": "kdd"}, "expected one of"), ({"batch_size": 8, "micro_batch_size": 3}, "must be a multiple")],
)
def test_wrong_settings_name_the_way_out(tokenizer, tmp_path, change, message):
    stage = write_stage_input(tokenizer, tmp_path)
    stage["settings"] = replace(stage["settings"], **change)
    with pytest.raises(ValueError, match=message):
        distill_episodes(output=tmp_path / "out", **stage)
