"""The distillation trainer on tiny models: the loss, batches, held-out loss, best model, checkpoints, the stage."""

import json
import math
import re
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, TrainingArguments

from dgpo.algorithms.distillation import DISTILLATION_LOSSES
from dgpo.coldstart.distill import distill
from dgpo.coldstart.examples import StepBatches, TrainingExample, collate, split_held_out
from dgpo.coldstart.metrics import MetricsFile
from dgpo.coldstart.train import train_on_examples
from dgpo.coldstart.trainer import DistillationTrainer
from dgpo.config.schema import DistillConfig, HardwareConfig
from dgpo.errors import ConfigError, DgpoError
from dgpo.tinyworld.models import save_model
from tests.distill_stage import EXAMPLES, tiny_model, tiny_tokenizer, write_stage

CPU = HardwareConfig(platform="cpu", gpus_per_node=1, dtype="float32", attention="sdpa", gradient_checkpointing=False)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def untied_model(tokenizer, seed):
    model = tiny_model(tokenizer, seed)
    config = type(model.config)(**{**model.config.to_dict(), "tie_word_embeddings": False})
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def make_trainer(tokenizer, tmp_path, *, make=tiny_model, **settings):
    model = make(tokenizer, 0)
    settings = DistillConfig(**{"kl_ratio": 0.5, "chunk_tokens": 2, **settings})
    trainer = DistillationTrainer(
        model=model,
        teacher=None if settings.loss == "seqkd" else make(tokenizer, 1),
        examples=EXAMPLES,
        held_out=[],
        pad_token_id=tokenizer.pad_token_id,
        settings=settings,
        num_steps=1,
        args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
        callbacks=[],
    )
    return model, trainer


def batch_of(tokenizer, examples):
    return collate(examples, pad_token_id=tokenizer.pad_token_id)


def expected_loss(tokenizer, *, kl_ratio, make=tiny_model):
    """The equation, one example and one token at a time, without padding."""
    student, teacher = make(tokenizer, 0), make(tokenizer, 1)
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
    return total / count, student


@pytest.mark.parametrize("kl_ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("make", [tiny_model, untied_model])
def test_loss_and_gradients_are_the_equation_on_policy_tokens_only(tokenizer, tmp_path, kl_ratio, make):
    model, trainer = make_trainer(tokenizer, tmp_path, kl_ratio=kl_ratio, make=make)
    loss = trainer.compute_loss(model, batch_of(tokenizer, EXAMPLES))
    expected, student = expected_loss(tokenizer, kl_ratio=kl_ratio, make=make)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    for mine, plain in zip(model.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-4, atol=1e-6)


def test_an_appended_end_token_is_trained_by_cross_entropy_alone(tokenizer, tmp_path):
    model, trainer = make_trainer(tokenizer, tmp_path, kl_ratio=1.0)
    ended = [*EXAMPLES[:1], replace(EXAMPLES[1], end_was_appended=True)]
    loss = trainer.compute_loss(model, batch_of(tokenizer, ended))
    expected, student = expected_loss(tokenizer, kl_ratio=1.0)
    teacher, ids = trainer.teacher, EXAMPLES[1].prompt_ids + EXAMPLES[1].response_ids
    p, q = (m(torch.tensor([ids])).logits[0, -2].log_softmax(-1) for m in (student, teacher.requires_grad_(False)))
    num_tokens = sum(sum(example.response_mask) for example in EXAMPLES)
    expected = expected + (-p[ids[-1]] - (q.exp() * (q - p)).sum()) / num_tokens
    trainer.loss_in_head.remove()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    for mine, plain in zip(model.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-4, atol=1e-6)


def test_micro_batches_add_up_to_the_whole_batch_and_an_empty_one_adds_nothing(tokenizer, tmp_path):
    model, trainer = make_trainer(tokenizer, tmp_path)
    whole = trainer.compute_loss(model, batch_of(tokenizer, EXAMPLES), num_items_in_batch=6)
    parts = [
        trainer.compute_loss(model, batch_of(tokenizer, part), num_items_in_batch=6) for part in (*zip(EXAMPLES), [])
    ]
    torch.testing.assert_close(sum(parts), whole)
    assert parts[-1] == 0
    parts[-1].backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_observation_tokens_are_no_targets(tokenizer):
    labels = batch_of(tokenizer, EXAMPLES)["labels"].tolist()
    assert labels == [[-100, -100, -100, 8, 9, -100, -100, 10, 1], [-100, -100, 11, -100, 12] + [-100] * 4]


def test_teacher_is_frozen_and_the_model_gets_its_logits_back(tokenizer, tmp_path):
    model, trainer = make_trainer(tokenizer, tmp_path)
    trainer.compute_loss(model, batch_of(tokenizer, EXAMPLES)).backward()
    assert all(p.grad is None for p in trainer.teacher.parameters())
    trainer.loss_in_head.remove()
    assert model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, len(tokenizer))


def test_a_model_that_caps_its_logits_is_refused(tokenizer, tmp_path):
    def capped(*arguments):
        model = tiny_model(*arguments)
        model.config.final_logit_softcapping = 30.0
        return model

    with pytest.raises(ValueError, match="final_logit_softcapping"):
        make_trainer(tokenizer, tmp_path, make=capped)


def test_each_epoch_holds_every_example_once_in_batches_of_similar_lengths():
    lengths = [(7 * i) % 50 for i in range(70)]
    batches = list(StepBatches(lengths, batch_size=4, micro_batch_size=4, num_steps=36, seed=0))
    first, second = batches[:18], batches[18:]
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(70))
    assert first != second
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in first]
    assert max(spread[:-1]) <= 12


@pytest.mark.parametrize(("num_ranks", "micro_batch_size"), [(1, 2), (2, 4), (2, 1), (3, 2)])
def test_the_batch_of_a_step_does_not_depend_on_ranks_or_micro_batches(num_ranks, micro_batch_size):
    lengths = list(range(10, 20))
    settings = {"batch_size": 4, "num_steps": 5, "seed": 3}
    whole = list(StepBatches(lengths, micro_batch_size=4, **settings))
    ranks = [
        StepBatches(lengths, micro_batch_size=micro_batch_size, rank=rank, num_ranks=num_ranks, **settings)
        for rank in range(num_ranks)
    ]
    parts, count = [list(rank) for rank in ranks], ranks[0].num_micro_batches
    assert {len(part) for part in parts} == {5 * count} == {len(rank) for rank in ranks}
    for step, batch in enumerate(whole):
        dealt = [micro for part in parts for micro in part[step * count : (step + 1) * count]]
        assert sorted(chain(*dealt)) == sorted(batch)
        assert all(len(micro) <= micro_batch_size for micro in dealt)


def test_held_out_questions_are_in_no_training_example():
    examples = [TrainingExample([1, question], [2], [1]) for question in range(20) for _ in range(3)]
    training, held_out = split_held_out(examples, share=0.25, seed=0)
    assert len(held_out) == 15
    assert len(training) == 45
    assert not {tuple(e.prompt_ids) for e in training} & {tuple(e.prompt_ids) for e in held_out}
    assert split_held_out(examples[::-1], share=0.25, seed=0)[1] == held_out[::-1]
    assert len(split_held_out(examples, share=0.01, seed=0)[1]) == 3
    assert split_held_out(examples[:3], share=0.9, seed=0)[1] == []


def run(tokenizer, tmp_path, *, examples=EXAMPLES * 4, model=None, checkpoints=None, resume=False, **settings):
    """A short training of the tiny student with the tiny teacher: (its weights, the returned counts, metrics)."""
    model = model or tiny_model(tokenizer, 0)
    settings = DistillConfig(
        **{"kl_ratio": 0.5, "batch_size": 8, "learning_rate": 1e-2, "held_out_share": 0.0, **settings}
    )
    counts = train_on_examples(
        model,
        tiny_model(tokenizer, 1),
        examples,
        tokenizer,
        checkpoint=tmp_path / "model",
        metrics=tmp_path / "metrics.jsonl",
        settings=settings,
        hardware=CPU,
        seed=0,
        name="t",
        checkpoints=checkpoints,
        resume=resume,
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    return torch.cat([p.detach().flatten() for p in model.parameters()]), counts, lines


def kl_to_teacher(tokenizer, model):
    ids, at = torch.tensor([[5, 6, 11, 22, 12]]), [1, 3]
    teacher, student = (network(ids).logits[0, at].log_softmax(-1) for network in (tiny_model(tokenizer, 1), model))
    return (teacher.exp() * (teacher - student)).sum()


# distillm plays episodes: tests/engine/test_distill.py
@pytest.mark.parametrize("loss", sorted(set(DISTILLATION_LOSSES) - {"distillm"}))
def test_every_loss_trains_the_student(tokenizer, tmp_path, loss):
    """By its own loss; TAID's target moves, so that is measured by the distance to the teacher."""
    model = tiny_model(tokenizer, 0)
    _, _, lines = run(tokenizer, tmp_path, model=model, loss=loss, kl_ratio=1.0, max_steps=6)
    assert len(lines) == 6
    assert all(math.isfinite(line["loss"]) and line["tokens_per_s"] > 0 for line in lines)
    if loss == "taid":
        assert kl_to_teacher(tokenizer, model) < kl_to_teacher(tokenizer, tiny_model(tokenizer, 0))
    else:
        assert lines[-1]["loss"] < lines[0]["loss"]
    assert ("taid_t" in lines[0]) == (loss == "taid")


def test_gradient_accumulation_gives_the_same_weights(tokenizer, tmp_path):
    whole, *_ = run(tokenizer, tmp_path, max_steps=3)
    parts, *_ = run(tokenizer, tmp_path, max_steps=3, micro_batch_size=3)
    torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-4)


def test_on_a_cpu_freed_memory_is_given_back_after_steps(tokenizer, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("dgpo.coldstart.heap.GIVE_BACK_EVERY_S", 0.0)
    monkeypatch.setattr("dgpo.coldstart.heap.give_back_heap", lambda: calls.append(None))
    run(tokenizer, tmp_path, max_steps=3)
    assert len(calls) == 3


def test_bfloat16_trains_close_to_float32_and_keeps_float32_weights(tokenizer, tmp_path, monkeypatch):
    exact, _, lines = run(tokenizer, tmp_path, max_steps=3)
    monkeypatch.setattr("tests.unit.test_distill.CPU", replace(CPU, dtype="bfloat16"))
    mixed, _, mixed_lines = run(tokenizer, tmp_path, max_steps=3)
    assert mixed.dtype == torch.float32
    assert not torch.equal(mixed, exact)
    assert mixed_lines[0]["loss"] == pytest.approx(lines[0]["loss"], rel=0.02)


def questions(count):
    return [TrainingExample([5, 6, 7 + i], [11, 22, 12 + i % 3], [1, 0, 1]) for i in range(count)]


def test_the_best_model_on_held_out_questions_is_kept_and_patience_ends_the_run(tokenizer, tmp_path, capsys):
    """Random targets for the held-out questions: what is learnt about the others makes those worse."""
    examples = [TrainingExample([5, 6, 7 + i], [11, 22, 12 + i % 3], [1, 0, 1]) for i in range(12)]
    _, held_out = split_held_out(examples, share=0.25, seed=0)
    examples = [replace(e, response_ids=[9, 22, 8]) if e in held_out else e for e in examples]
    _, counts, lines = run(
        tokenizer,
        tmp_path,
        examples=examples,
        loss="seqkd",
        held_out_share=0.25,
        evaluate_every=2,
        max_steps=60,
        patience=3,
        checkpoints=tmp_path / "checkpoints",
    )
    losses = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    best = min(losses, key=losses.get)
    assert counts["held_out_episodes"] == 3
    assert counts["best_step"] == best
    assert counts["steps"] == max(losses) == best + 3 * 2 < 60
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([e.prompt_ids + e.response_ids for e in examples if 9 in e.response_ids])
    with torch.no_grad():
        log_probs = saved(ids).logits.log_softmax(-1)
    values = torch.stack([log_probs[:, at - 1].gather(-1, ids[:, at, None]) for at in (3, 5)])
    assert -values.mean().item() == pytest.approx(losses[best], rel=1e-4)
    assert not (tmp_path / "checkpoints").exists()
    assert "held-out loss" in capsys.readouterr().out


def test_progress_is_told_by_time_and_over_all_steps_since_the_last_line(tmp_path, capsys, monkeypatch):
    told = MetricsFile(tmp_path / "metrics.jsonl", name="t", num_steps=1000, steps_per_epoch=500)
    now_s = told._printed_s
    monkeypatch.setattr("dgpo.coldstart.metrics.time.monotonic", lambda: now_s)
    for step, (passed_s, step_s, tokens_per_s) in enumerate([(5, 2, 100), (6, 4, 400), (9, 9, 100), (30, 1, 100)], 1):
        now_s += passed_s
        state = SimpleNamespace(global_step=step, is_world_process_zero=True)
        told.on_log(None, state, None, {"loss": 1.0, "step_s": step_s, "tokens_per_s": tokens_per_s})
    assert capsys.readouterr().out.splitlines() == [
        "t: step 2/1000 loss 1.000, 300 tokens/s, 0:49:54 left",  # 1,800 tokens in 6 s; 998 steps of 3 s
        "t: step 4/1000 loss 1.000, 100 tokens/s, 1:23:00 left",
    ]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_loss_that_is_not_finite_stops_before_the_update(tokenizer, tmp_path):
    model = tiny_model(tokenizer, 0)
    model.model.norm.weight.data[0] = math.nan
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(DgpoError, match=r"step 1: loss nan.*distill.learning_rate"):
        run(tokenizer, tmp_path, model=model, max_steps=2)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], equal_nan=True, rtol=0, atol=0)


class KilledError(Exception):
    """Stands in for the end of the process."""


@pytest.mark.parametrize("loss", ["kd", "taid"])
def test_a_run_that_was_cut_short_goes_on_as_if_it_had_not_been(tokenizer, tmp_path, loss, monkeypatch):
    settings = {"loss": loss, "examples": questions(30), "held_out_share": 0.1, "evaluate_every": 3, "max_steps": 11}
    through, counts, lines = run(tokenizer, tmp_path / "a", checkpoints=tmp_path / "a" / "states", **settings)
    training_step, calls = DistillationTrainer.training_step, []

    def until_killed(self, *arguments, **named):
        calls.append(self.state.global_step)
        if self.state.global_step == 8:
            raise KilledError
        return training_step(self, *arguments, **named)

    monkeypatch.setattr(DistillationTrainer, "training_step", until_killed)
    with pytest.raises(KilledError):
        run(tokenizer, tmp_path / "b", checkpoints=tmp_path / "b" / "states", **settings)
    (tmp_path / "b" / "states" / "checkpoint-6" / "manifest.json").unlink()
    calls.clear()
    monkeypatch.setattr(DistillationTrainer, "training_step", training_step)
    resumed, resumed_counts, resumed_lines = run(
        tokenizer, tmp_path / "b", checkpoints=tmp_path / "b" / "states", resume=True, **settings
    )
    torch.testing.assert_close(resumed, through, rtol=0, atol=1e-6)
    assert resumed_counts == counts
    timeless = [{k: v for k, v in line.items() if k not in ("step_s", "tokens_per_s")} for line in lines]
    for line, expected in zip(resumed_lines, timeless, strict=True):
        assert {key: line[key] for key in expected} == pytest.approx(expected, abs=1e-6)


@pytest.fixture
def stopped(tokenizer, tmp_path, monkeypatch):
    """A cold start that ended after its settings were recorded, to be resumed."""
    config = write_stage(tmp_path, ["distill.max_steps=2"])

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dgpo.coldstart.distill.run_on_ranks", stop)
    with pytest.raises(KeyboardInterrupt):
        distill(config)
    monkeypatch.undo()
    return replace(config, resume=True)


def other_weights(folder):
    path = Path(folder) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: setattr(c.distill, "batch_size", 16), "distill.batch_size was"),
        (lambda c: setattr(c, "seed", 7), "seed was 1, now 7"),
        (lambda c: setattr(c.hardware, "dtype", "bfloat16"), 'hardware.dtype was "float32", now "bfloat16"'),
        (lambda c: other_weights(c.teacher.path), "weights of the teacher was"),
        (lambda c: other_weights(c.student.path), "weights at the start was"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_resuming_from_something_else_is_refused_with_what_differs(stopped, change, named, finished):
    if finished:
        distill(stopped)
    change(stopped)
    with pytest.raises(ConfigError, match=rf"run/distill was made with other settings \(.*{re.escape(named)}"):
        distill(stopped)


def test_how_the_machine_does_it_may_change(stopped):
    stopped.distill.micro_batch_size, stopped.distill.chunk_tokens, stopped.distill.patience = 1, 64, 9
    distill(stopped)


def test_stage_learns_and_leaves_a_checkpoint_a_curve_and_a_manifest(tokenizer, tmp_path):
    out = distill(write_stage(tmp_path, ["distill.epochs=10"]))
    assert out == tmp_path / "run" / "distill"
    curve = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [point["step"] for point in curve] == list(range(1, 21))
    assert curve[-1]["loss"] < curve[0]["loss"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["counts"] == {
        "episodes": 16, "held_out_episodes": 0, "trained_tokens": 48, "steps": 20, "best_step": None
    }  # fmt: skip
    assert {"model/config.json", "settings.json"} <= manifest["sha256"].keys()
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert model.generation_config.stop_strings == ["</search>", "</answer>"]
    assert AutoTokenizer.from_pretrained(out / "model").get_vocab() == tokenizer.get_vocab()
    logits = model(torch.tensor([[5, 6]])).logits[0, -1]
    assert F.softmax(logits, -1)[11] > 0.05


def test_a_finished_stage_is_neither_repeated_nor_overwritten(tokenizer, tmp_path, capsys):
    config = write_stage(tmp_path, ["distill.max_steps=2"])
    folder = distill(config)
    written = (folder / "model" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(ConfigError, match="resume=true"):
        distill(config)
    assert distill(replace(config, resume=True)) == folder
    assert "finished already" in capsys.readouterr().err
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == written


def test_a_dry_run_says_what_would_run_and_what_is_only_planned(tokenizer, tmp_path, capsys):
    config = write_stage(tmp_path, ["dry_run=true", "stages=[train,collect,distill]"])
    (tmp_path / "run" / "collect" / "episodes.jsonl").unlink()
    assert distill(config) is None
    plan = capsys.readouterr().out
    assert f"{Path(config.run_dir) / 'train' / 'model'} would learn from {config.teacher.path} by kd" in plan
    assert "will be written by an earlier stage" in plan
    assert "will be written by collect" in plan
    assert "Memory of a rank and its engine, GiB" in plan


def test_the_inverted_order_starts_from_the_student_of_rl(tokenizer, tmp_path):
    config = write_stage(tmp_path, ["distill.max_steps=1", "stages=[train,collect,distill]"])
    after_rl = tmp_path / "run" / "train" / "model"
    save_model(tiny_model(tokenizer, 5), tokenizer, after_rl)
    config.distill.learning_rate = 1e-9
    out = distill(config)
    model, start = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out / "model", after_rl))
    torch.testing.assert_close(model.lm_head.weight, start.lm_head.weight, rtol=0, atol=1e-6)
    assert json.loads((out / "manifest.json").read_text())["inputs"]["student"] == str(after_rl)


def test_episodes_of_another_run_can_be_used(tokenizer, tmp_path):
    config = write_stage(tmp_path, ["distill.max_steps=1"])
    (tmp_path / "run" / "collect").rename(tmp_path / "shared")
    config.distill.episodes = str(tmp_path / "shared")
    out = distill(config)
    assert json.loads((out / "manifest.json").read_text())["counts"]["episodes"] == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "kdd"}, "expected one of"),
        ({"loss": "distillm", "held_out_share": 0.0}, "raise it"),
        ({"examples": []}, "no episodes"),
    ],
)
def test_wrong_settings_name_the_way_out(tokenizer, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(tokenizer, tmp_path, **change)
