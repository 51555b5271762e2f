"""The model card of an exported model, made from what its run recorded: nothing is filled in by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dgpo.agent.protocol import SEARCH_R1_PROMPT, TEMPLATE_VARIABLES
from dgpo.algorithms.advantages import ALGORITHMS
from dgpo.algorithms.selective_kl import GATES, TEACHER_FORMS
from dgpo.config.model_files import is_hub_name
from dgpo.data.rows import read_rows, row_question
from dgpo.errors import DataError
from dgpo.models.licences import HUB_LICENCES, inherited, licence_of
from dgpo.runs.artifacts import MANIFEST
from dgpo.runs.identity import model_identity
from dgpo.runs.summary import protocol_note, read_results

PAPER = "https://arxiv.org/abs/2508.20324"


def model_card(run: Path, stage: str, manifest: Mapping[str, Any], *, name: str, dtype: str) -> str:
    """The card as Markdown, with the hub's metadata in front.

    Args:
        run: the run folder; `test/results.json` there gives the results.
        stage: that made the model.
        manifest: of that stage.
        name: of the folder or repository, as users will load it.
    """
    config = yaml.safe_load(manifest["config"])
    student, teachers = lineage(manifest)
    sections = [
        _metadata(student, teachers),
        f"# {name.rsplit('/', 1)[-1]}",
        _introduction(stage, config, student),
        "## How it was made\n\n" + _table({**_facts(stage, manifest, config, student), "weights": dtype}),
        "## Results\n\n" + _results(run, stage),
        "## Use\n\n" + _use(name, config),
        "## Licences\n\n" + _licences(student, teachers),
        f"## Method\n\n*DGPO, Distillation-Guided Policy Optimization*: {PAPER}",
    ]
    return "\n\n".join(sections) + "\n"


def lineage(manifest: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The model that the first of the stages began with, and the teachers of all of them, through their manifests.

    A stage that was made again since, so that its model is no longer the one that was gone on with, is not followed.
    """
    inputs = manifest["inputs"]
    start = inputs.get("init") or inputs.get("student") or ""
    teacher = teacher_of(manifest)
    teachers = [teacher] if teacher else []
    for folder in (Path(start), Path(start).parent):  # train writes its manifest into the model, distill beside it
        before = _manifest(folder)
        if before.get("stage") in ("train", "distill") and _is_still(start, manifest):
            student, earlier = lineage(before)
            return student, [*teachers, *(name for name in earlier if name not in teachers)]
    return start, teachers


def _is_still(start: str, manifest: Mapping[str, Any]) -> bool:
    recorded = manifest.get("settings", {}).get("weights at the start")
    return recorded is None or recorded == model_identity(start)


def teacher_of(manifest: Mapping[str, Any]) -> str | None:
    """The stage's teacher; of a cold start on text alone, the one that played the episodes."""
    inputs = manifest["inputs"]
    if manifest["stage"] == "distill":
        played = _manifest(Path(inputs.get("episodes") or "").parent).get("inputs", {})
        return inputs.get("teacher") or played.get("teacher")
    return None if yaml.safe_load(manifest["config"])["train"]["teacher_term"]["gate"] == "none" else inputs["teacher"]


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    return json.loads(path.read_text()) if path.is_file() else {}


def _metadata(student: str, teachers: Sequence[str]) -> str:
    data: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "language": ["en"],
        "tags": ["dgpo", "search-agent", "question-answering", "reinforcement-learning"],
    }
    if is_hub_name(student):
        data |= {"base_model": student, "base_model_relation": "finetune"}
    # One word only where student and teachers share it; the section on licences says the rest.
    stated = {licence_of(name) for name in (student, *teachers)}
    data["license"] = HUB_LICENCES.get(stated.pop() or "", "other") if len(stated) == 1 else "other"
    return f"---\n{yaml.safe_dump(data, sort_keys=False)}---"


def _introduction(stage: str, config: Mapping[str, Any], student: str) -> str:
    made = _method(stage, config)
    return (
        "A search agent: it thinks, searches a corpus as often as it needs, and answers. Made from "
        f"`{_shown(student)}` by {made}. It writes `<search>query</search>` and expects passages between "
        "`<information>` and `</information>`; its answer stands in `<answer>`."
    )


def _method(stage: str, config: Mapping[str, Any]) -> str:
    if stage == "distill":
        return f"knowledge distillation (`{config['distill']['loss']}`) on a teacher's own correct episodes"
    train, term = config["train"], config["train"]["teacher_term"]
    algorithm = ALGORITHMS[train["algorithm"]].title
    if term["gate"] == "none":
        return f"{algorithm} without a teacher"
    coef = term["coef"] if term["coef"] is not None else TEACHER_FORMS[term["form"]].default_coef
    return f"{algorithm} with a teacher on {GATES[term['gate']].episodes} (form `{term['form']}`, coefficient {coef:g})"


def _facts(stage: str, manifest: Mapping[str, Any], config: Mapping[str, Any], student: str) -> dict[str, str]:
    counts, inputs = manifest["counts"], manifest["inputs"]
    facts = {
        "method": _method(stage, config),
        "student": f"`{_shown(student)}`",
        "teacher": f"`{_shown(teacher)}`" if (teacher := teacher_of(manifest)) else "none",
    }
    before = inputs.get("init")
    if before and before != student:
        facts["started from"] = f"`{_shown(before)}`, a model of an earlier stage"
    if stage == "distill":
        facts["data"] = f"{counts['episodes']:,} correct episodes of the teacher"
        facts["steps"] = f"{counts['steps']:,} of {config['distill']['batch_size']} episodes"
        if counts.get("best_step"):
            facts["steps"] += f"; the best on held-out episodes, of step {counts['best_step']}"
        facts["learning rate"] = f"{config['distill']['learning_rate']:g}"
    else:
        train = config["train"]
        facts["data"] = f"questions of `{_shown(config['data']['train_file'])}`"
        facts["steps"] = f"{counts['steps']:,} of {train['batch_size']} questions x {train['samples_per_question']}"
        if counts.get("rollbacks"):
            facts["steps"] += f", after {counts['rollbacks']} rollbacks"
        facts["reward"] = f"`{train['reward']}`" if train["reward"] else "exact match"
        facts["learning rate"] = f"{train['actor_learning_rate']:g}"
        if train["init_kl_coef"]:
            facts["penalty to the initial policy"] = f"{train['init_kl_coef']:g}"
    facts["seed"] = str(manifest["seed"])
    facts["made"] = manifest["created_at"][:10]
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    return facts


def _results(run: Path, stage: str) -> str:
    """The results of these very weights in the run's test stage, whatever the folder was called that it tested."""
    try:
        results = read_results(run)
    except FileNotFoundError:
        return "Not evaluated in its run."
    weights = model_identity(str(run / stage / "model"))
    rows = [each for each in results["models"].values() if each.get("weights") == weights]
    if not rows:
        return "These weights were not evaluated in their run."
    (scores, *_) = rows
    lines = ["| test set | questions | exact match | 95% interval | F1 | searches |", "|---|---|---|---|---|---|"]
    sets = {**scores["sets"], "average": {**scores["average"], "num_questions": scores["num_questions"]}}
    if len(scores["sets"]) == 1:
        del sets["average"]
    for name, values in sets.items():
        low, high = values["em_ci95"]
        lines.append(
            f"| {name} | {values['num_questions']:,} | {values['em']:.3f} | {low:.3f} to {high:.3f} | "
            f"{values['f1']:.3f} | {values['num_searches']:.2f} |"
        )
    note = protocol_note(results).strip()
    return "\n".join(
        [*lines, "", note + "." if note else "One greedy episode of each question; intervals by bootstrap."]
    )


def _use(name: str, config: Mapping[str, Any]) -> str:
    episode = config["episode"]
    return f"""With its searches, on a retrieval server (the project's own, or Search-R1's):

```bash
python -m dgpo ask "who wrote the song that opened the film?" ask.model={name} retriever.url=http://127.0.0.1:8000
```

With transformers, one turn; generation stops after `</search>` or `</answer>`. After a search, append what it found as
`\\n\\n<information>Doc 1(Title: "..") ..</information>\\n\\n` and generate again.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "{name}"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
prompt = {json.dumps(_prompt_template(config))}
messages = [{{"role": "user", "content": prompt.replace("{{question}}", "who wrote the song that opened the film?")}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True, **{TEMPLATE_VARIABLES}
)
output = model.generate(**inputs, tokenizer=tokenizer, max_new_tokens={episode["max_turn_tokens"]})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
```

Trained on episodes of at most {episode["max_turns"]} searches, {episode["max_turn_tokens"]} tokens a turn and
{episode["topk"]} passages a search."""


def _prompt_template(config: Mapping[str, Any]) -> str:
    """The prompt that the model was trained on, from the first question of its data; Search-R1's where that is gone."""
    data = config["data"]
    try:
        row = read_rows(data["train_file"] or data["collect_file"] or "")[0]
    except (DataError, OSError, IndexError):
        return SEARCH_R1_PROMPT
    text, question = row["prompt"][0]["content"], row_question(row)
    return text.replace(question, "{question}") if question in text else SEARCH_R1_PROMPT


def _licences(student: str, teachers: Sequence[str]) -> str:
    """What docs/licences.md states of the models; it is a map, not legal advice."""
    unlisted = "not in the project's list: see its own page"
    return "\n".join(
        [
            "The weights descend from the student" + (", and a teacher taught them." if teachers else "."),
            "",
            *("| model | licence |", "|---|---|"),
            *(f"| `{_shown(name)}` | {licence_of(name) or unlisted} |" for name in (student, *teachers)),
            "",
            *(f"{row}\n" for row in inherited(student, teachers)),
            "Data sets and corpora have licences of their own. From the project's list; no legal advice.",
        ]
    )


def _table(facts: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())])


def _shown(model: str) -> str:
    """A hub name as it is; of a path, its last parts: where it was on this machine is no one's business."""
    return model if is_hub_name(model) else "/".join(Path(model).parts[-2:])
