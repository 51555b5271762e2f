"""Every command, called with what goes wrong on other people's machines: a line that names the guilty, and no harm.

Cases are drawn by hypothesis; the same properties hold for many more of them in the slow tier.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dgpo.__main__ import COMMANDS, main
from dgpo.checks.values import CHOICES
from dgpo.config.load import FREE_MAPPINGS, GROUPS, config_keys, load_config
from dgpo.config.ranges import RANGES
from dgpo.data.rows import write_rows
from dgpo.slurm.__main__ import main as slurm
from dgpo.tinyworld.__main__ import main as tinyworld
from tests.unit.stubs import healthy_server, make_collection, make_model, make_row
from tests.unit.test_ranges import NUMBERS, leaves

ROOT = Path(__file__).parents[2]
DRAWN, DRAWN_SLOWLY = 12, 60  # cases of each property
STAGES = ("collect", "distill", "train", "test", "arcap")
COMPOSING = sorted(set(COMMANDS) - {"own", "import", "compare"})  # their words are overrides
FIELDS = ("max_position_embeddings", "text_config", "hidden_size", "head_dim", "num_attention_heads", "added_tokens")
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


@dataclass(frozen=True)
class Site:
    """A user's folder in which every command's dry run says yes."""

    folder: Path
    url: str

    def overrides(self, command: str) -> list[str]:
        """What the command needs."""
        rows, models = self.folder / "rows.parquet", self.folder / "models"
        return [
            *(["world=tiny"] if command != "ask" else []),  # it would ask the latest quickstart's
            "hardware=cpu",
            f"run_dir={self.folder / ('run' if command in ('distill', 'report') else 'new')}",
            f"student.path={models / 'student'}",
            f"teacher.path={models / 'teacher'}",
            f"train.init={models / 'student'}",
            f"ask.model={models / 'student'}",
            f"data.collect_file={rows}",
            f"data.train_file={rows}",
            f"data.test_files.nq={rows}",
            f"test.models.kd={models / 'student'}",
            f"retriever.url={self.url}",
            f"prepare.source={self.folder / 'own.jsonl'}",
            f"prepare.out={self.folder / 'prepared'}",
            f"export.out={self.folder / 'exported'}",
            "dry_run=true",
        ]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    rows = [make_row(index) for index in range(64)]
    for row in rows:
        row["extra_info"]["gold_passages"] = [{"id": "0", "contents": '"A"\nme'}]
    write_rows(folder / "rows.parquet", rows)
    (folder / "own.jsonl").write_text('{"question": "who?", "answers": ["me"]}\n' * 2)
    make_collection(folder / "run")
    (folder / "run" / "train").mkdir()
    (folder / "run" / "train" / "metrics.jsonl").write_text('{"step": 1, "episode/em": 0.5}\n')
    make_model(folder / "models" / "student")
    make_model(folder / "models" / "teacher", weights=b"teacher")
    with healthy_server() as url, pytest.MonkeyPatch.context() as patch:
        import huggingface_hub.constants

        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.chdir(folder)
        yield Site(folder, url)


def state(folder: Path) -> dict[str, Any]:
    """Every file and folder below, with what would change if it were touched."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_mode)
    return found


def called(site: Site, command: str, *more: str, only: bool = False) -> tuple[int, str]:
    """Runs a command in this process: its exit code and what it complains of. Nothing may be written or deleted."""
    return ended(site, main, [command, *([] if only else site.overrides(command)), *more])


def ended(site: Site, run: Callable[[list[str]], int], arguments: list[str]) -> tuple[int, str]:
    """The same of any command's `main`."""
    before = state(site.folder)
    said, complaint = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complaint):
        code = run(arguments)
    assert code in (0, 1, 2), f"{arguments}: {code}\n{complaint.getvalue()}"
    assert state(site.folder) == before, arguments
    return code, complaint.getvalue()


def refused(site: Site, command: str, *more: str, names: str | tuple[str, ...], only: bool = False) -> None:
    """One line, of code 1 or 2, that names one of `names`."""
    code, complaint = called(site, command, *more, only=only)
    words = (names,) if isinstance(names, str) else names
    assert code in (1, 2), (command, more, complaint)
    assert complaint.count("\n") == 1, complaint
    assert complaint.startswith(f"dgpo {command}: "), complaint
    assert any(word in complaint for word in words), (words, complaint)


@pytest.mark.parametrize("command", [*STAGES, "prepare", "contamination", "report", "ask", "quickstart"])
def test_the_site_is_one_that_every_dry_run_says_yes_to(site: Site, command: str) -> None:
    more = [f"run_dir={site.folder / 'quick'}"] if command == "quickstart" else []
    assert called(site, command, *more) == (0, "")


def test_every_number_is_accepted_at_both_ends_of_its_range() -> None:
    for end in ("low", "high"):
        overrides = []
        for key, valid in RANGES.items():
            step = 1 if "int" in str(NUMBERS[key]) else 1e-6
            value = valid.low + step * valid.without_low
            if end == "high" and valid.high < math.inf:
                value = valid.high - step * valid.without_high
            number = f"{value:.0f}" if "int" in str(NUMBERS[key]) else f"{value:.7f}"
            overrides.append(f"{key}=[{number},{number}]" if "list" in str(NUMBERS[key]) else f"{key}={number}")
        load_config(overrides)


# The properties. Each draws one case.

words = st.text(st.characters(codec="utf-8", exclude_characters="\0\n\r"), min_size=1, max_size=12)
commands = st.sampled_from(COMPOSING)
stages = st.sampled_from(STAGES)


def wrong_number(site: Site, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(RANGES)))
    valid, whole = RANGES[key], "int" in str(NUMBERS[key])
    numbers = [st.integers(-(10**9), math.ceil(valid.low) - 1)]
    if valid.high < math.inf:
        numbers.append(st.integers(math.floor(valid.high) + 1, 10**12))
    if not whole:
        numbers.append(st.sampled_from(["nan", "inf", "-inf", "1e999"]))
    number = data.draw(st.one_of(numbers))
    value = f"[{number},{number}]" if "list" in str(NUMBERS[key]) else str(number)
    refused(site, data.draw(commands), f"{key}={value}", names=f"{key}=")


def wrong_type(site: Site, data: st.DataObject) -> None:
    typed = [key for key, kind in leaves() if kind is bool or "int" in str(kind) or "float" in str(kind)]
    key = data.draw(st.sampled_from(typed))
    refused(site, data.draw(commands), f"{key}=x{data.draw(words)}", names=(key, "dry_run", "${"))


def wrong_choice(site: Site, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from([*CHOICES, *GROUPS]))
    value = f"x{data.draw(words)}".replace("${", "$")
    section = key.partition(".")[0]
    command = {name: name for name in ("collect", "distill", "test", "ask")}.get(section, "train")
    refused(site, command, f"{key}={value}", names=f"{key}=")


def unknown_key(site: Site, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from([key for key in config_keys() if not key.startswith(FREE_MAPPINGS)]))
    place = data.draw(st.integers(0, len(key)))
    mangled = key[:place] + data.draw(st.sampled_from("xq_Z9")) + key[place:]
    refused(site, data.draw(commands), f"{mangled}=1", names=mangled)


def no_setting(site: Site, data: st.DataObject) -> None:
    word = data.draw(words).replace("=", "")
    command = data.draw(st.sampled_from(sorted(set(COMPOSING) - {"ask", "test", "train", "quickstart"})))
    code, complaint = called(site, command, f" {word}")
    assert code in (1, 2)
    assert complaint.count("\n") == 1


def text_of_any_kind(site: Site, data: st.DataObject) -> None:
    """Paths that are nowhere, whatever they are made of, are named; they are never a reason to fall over."""
    key = data.draw(st.sampled_from(["data.train_file", "train.init", "teacher.path", "retriever.token_file"]))
    value = f"/nowhere/{data.draw(words)}".replace("${", "$")
    refused(site, "train", f"{key}={value}", names=key)


JUNK = [
    b"",
    b"\0",
    b"{",
    b"[]",
    b"null",
    b"{}",
    b"PAR1",
    b"\xff\xfe\xfa",
    b"version https://git-lfs\n",
    b"\x1f\x8b\x08",
]
contents = st.one_of(st.sampled_from(JUNK), st.binary(max_size=64))


def wrong_file(site: Site, data: st.DataObject) -> None:
    """A file of questions that holds anything."""
    command, key = data.draw(
        st.sampled_from(
            [
                ("train", "data.train_file"),
                ("train", "data.validation_file"),
                ("collect", "data.collect_file"),
                ("test", "data.test_files.nq"),
                ("contamination", "data.train_file"),
                ("prepare", "prepare.source"),
            ]
        )
    )
    path = site.folder.parent / "junk.parquet"
    whole = (site.folder / "rows.parquet").read_bytes()
    cut = st.integers(0, len(whole) - 1).map(lambda size: whole[:size])
    path.write_bytes(data.draw(st.one_of(contents, cut)))
    refused(site, command, f"{key}={path}", names=(key, str(path)))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | words, lambda inner: st.lists(inner, max_size=2), max_leaves=3
)


def wrong_row(site: Site, data: st.DataObject) -> None:
    """A row with a field that holds anything: refused by its number, or usable."""
    name = data.draw(st.sampled_from(["data_source", "prompt", "reward_model", "extra_info"]))
    value = data.draw(json_values)
    path = site.folder.parent / "strange.parquet"
    row = {**make_row(0), name: value}
    try:
        pq.write_table(pa.Table.from_pylist([row] * 64), path)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        return  # no parquet file can hold it
    code, complaint = called(site, "train", f"data.train_file={path}")
    assert code == 0 or (complaint.count("\n") == 1 and f"{path}, row 0: " in complaint), complaint


def strange_model(site: Site, data: st.DataObject) -> None:
    """A model folder in which a file is junk, cut off, or JSON of another kind: told by key and file, or usable."""
    folder = site.folder.parent / "strange"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(site.folder / "models" / "student", folder)
    name = data.draw(st.sampled_from(MODEL_FILES))
    whole = (folder / name).read_bytes()
    kinds = [contents, st.integers(0, len(whole) - 1).map(lambda size: whole[:size])]
    if name.endswith("json"):
        kinds.append(
            st.dictionaries(st.sampled_from([*json.loads(whole), *FIELDS]), json_values).map(
                lambda x: json.dumps(x).encode()
            )
        )
    (folder / name).write_bytes(data.draw(st.one_of(kinds)))
    command, key = data.draw(
        st.sampled_from(
            [("train", "train.init"), ("train", "teacher.path"), ("test", "test.models.kd"), ("ask", "ask.model")]
        )
    )
    code, complaint = called(site, command, f"{key}={folder}")
    assert code == 0 or (complaint.count("\n") == 1 and f"{key}={folder}" in complaint), complaint


ENVIRONMENTS: Mapping[str, list[str]] = {
    "HOME": ["/dev/null", "/nonexistent", "", "/tmp"],
    "XDG_CACHE_HOME": ["/dev/null", "/proc/x", ""],
    "HF_HOME": ["/dev/null", ""],
    "RAY_ADDRESS": ["", "127.0.0.1:9", "auto", "x", "ray://127.0.0.1:9", ":", "[::1]:9"],
    "CUDA_VISIBLE_DEVICES": ["", "NoDevFiles", "-1", "7", "x"],
    "http_proxy": ["http://127.0.0.1:9", "nonsense", ""],
    "HTTP_PROXY": ["http://127.0.0.1:9"],
    "https_proxy": ["http://127.0.0.1:9"],
    "all_proxy": ["socks5://127.0.0.1:9"],
    "LC_ALL": ["C", "tr_TR.UTF-8", "nonsense"],
    "LANG": ["C", ""],
    "TMPDIR": ["/nonexistent", "/tmp/" + "x" * 99],
    "TERM": ["dumb", ""],
    "COLUMNS": ["1", "0", "x"],
    "SLURM_NNODES": ["x", "0", ""],
    "OMP_NUM_THREADS": ["0", "x"],
    "PYTHONHASHSEED": ["0"],
}


def strange_environment(site: Site, data: st.DataObject) -> None:
    """Whatever the shell has set, a dry run says yes, or what is wrong in a line."""
    names = data.draw(st.lists(st.sampled_from(sorted(ENVIRONMENTS)), min_size=1, max_size=3, unique=True))
    chosen = {name: data.draw(st.sampled_from(ENVIRONMENTS[name])) for name in names}
    with mock.patch.dict(os.environ, chosen):
        code, complaint = called(site, data.draw(stages))
    assert code == 0 or (complaint.count("\n") == 1 and any(name in complaint for name in names)), complaint


def words_of_other_commands(site: Site, data: st.DataObject) -> None:
    """Commands whose words are no overrides."""
    command = data.draw(st.sampled_from(["own", "import", "compare"]))
    given_words = data.draw(st.lists(words.map(lambda word: word.replace("/", "")), max_size=3))
    if any("dry" in word or word in ("-h", "--help") for word in given_words):
        return
    code, complaint = called(site, command, *given_words, only=True)
    assert code in (1, 2)
    assert complaint.count("\n") == 1, complaint


SLURM_OPTIONS = {
    "--stages": st.sampled_from(["tain", "train,train", ",", "train,"]),
    "--time": st.sampled_from(["soon", "5", "train=5", "tran=1-00", "-1", "1:2:3:4", ""]),
    "--nodes": st.sampled_from(["0", "2", "x", "train=0", "tran=1", "-1"]),
    "--seeds": st.sampled_from(["x", "1,1", "1,", "-1", "4294967296", "1.5"]),
    "--lead-s": st.sampled_from(["x", "119", "65536", "nan", "-1"]),
    "--retries": st.sampled_from(["x", "-1", "1.5"]),
    "--retriever": st.sampled_from(["--index 'a", "--index a=/nowhere", '"', "--index a=.\n--port 1"]),
    "--sbatch": st.sampled_from(["-C=h200", "constraint", "=", "--", "--comment=a\nb", "--comment='a b'"]),
    "--partition": st.sampled_from(["a\nb", 'a"b', "a'b", "a\\", "a\tb"]),
    "--account": st.sampled_from(["lab\n#SBATCH --nodes=9", "\r"]),
    "--container": st.sampled_from(["apptainer exec --bind '/a b' x.sif", "a\nb"]),
    "--node-tmp": st.sampled_from(["tmp", "", "/" + "x" * 30, "/größe (1)"]),
}


def wrong_option_of_slurm(site: Site, data: st.DataObject) -> None:
    option = data.draw(st.sampled_from(sorted(SLURM_OPTIONS)))
    value = data.draw(SLURM_OPTIONS[option])
    given = [word for word in site.overrides("train") if not word.startswith(("dry_run", "retriever.url"))]
    url = [] if option == "--retriever" else [f"retriever.url={site.url}"]
    code, complaint = ended(site, slurm, [*given, *url, f"{option}={value}"])
    assert code in (1, 2), (option, value)
    assert complaint.count("\n") == 1, complaint
    assert option in complaint, complaint


def wrong_input_of_slurm(site: Site, data: st.DataObject) -> None:
    """What its jobs would read is looked at before they are submitted."""
    names = ["data.train_file", "teacher.path", "test.models.kd", "train.num_steps", "train.algorithm", "distill.loss"]
    key = data.draw(st.sampled_from(names))
    value = f"/nowhere/{data.draw(words)}".replace("${", "$")
    given = [word for word in site.overrides("train") if not word.startswith("dry_run")]
    code, complaint = ended(site, slurm, [*given, f"{key}={value}"])
    assert code in (1, 2), (key, value)
    assert complaint.count("\n") == 1, complaint
    assert key in complaint, complaint


def wrong_word_of_tinyworld(site: Site, data: st.DataObject) -> None:
    """Options that cannot be, and folders that are taken, no world, or hold anything in its place."""
    taken = site.folder / "models" / "student"
    junk = site.folder.parent / "junk_world"
    shutil.rmtree(junk, ignore_errors=True)
    junk.mkdir()
    for name in ("world.json", "manifest.json"):
        (junk / name).write_bytes(data.draw(contents))
    arguments, named = data.draw(
        st.sampled_from(
            [
                (["build", "--out", str(taken)], str(taken)),
                (["build", "--out", str(site.folder / "own.jsonl")], "own.jsonl"),
                (["build", "--out", "new", "--seed", "-1"], "--seed"),
                (["build", "--out", "new", "--seed", "4294967296"], "--seed"),
                (["build", "--out", "new", "--seed", "x"], "--seed"),
                (["build", "--out", "new", "--num-test", "0"], "--num-test"),
                (["build", "--out", "new", "--num-test", "6001"], "--num-test"),
                (["teacher", "--out", str(taken)], str(taken)),
                (["teacher", "--out", str(junk)], str(junk)),
                (["teacher", "--out", "/nowhere"], "/nowhere"),
                (["teacher", "--out", "new", "--biased", "x"], "--biased"),
                (["teacher"], "--out"),
                (["biuld", "--out", "new"], "biuld"),
            ]
        )
    )
    code, complaint = ended(site, tinyworld, arguments)
    assert code in (1, 2), arguments
    assert complaint.count("\n") == 1, complaint
    assert named in complaint, complaint


def doctor_anywhere(site: Site, data: st.DataObject) -> None:
    """Whatever the shell has set, the doctor ends with its lines: well, or not."""
    names = data.draw(st.lists(st.sampled_from(sorted(ENVIRONMENTS)), min_size=1, max_size=3, unique=True))
    with mock.patch.dict(os.environ, {name: data.draw(st.sampled_from(ENVIRONMENTS[name])) for name in names}):
        code, complaint = called(site, "doctor")
    assert (code, complaint) == (0, "") or (code, complaint.count("\n")) == (1, 1), complaint


PROPERTIES = [
    wrong_option_of_slurm,
    wrong_input_of_slurm,
    wrong_word_of_tinyworld,
    doctor_anywhere,
    wrong_number,
    wrong_type,
    wrong_choice,
    unknown_key,
    no_setting,
    text_of_any_kind,
    wrong_file,
    wrong_row,
    strange_model,
    strange_environment,
    words_of_other_commands,
]


def draw_cases(holds: Any, site: Site, count: int, *, derandomize: bool) -> None:
    checks = settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=derandomize,
        suppress_health_check=list(HealthCheck),
    )
    checks(given(st.data())(lambda data: holds(site, data)))()


@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda each: each.__name__)
def test_some_drawn_cases(site: Site, holds: Any) -> None:
    draw_cases(holds, site, DRAWN, derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda each: each.__name__)
def test_many_drawn_cases(site: Site, holds: Any) -> None:
    draw_cases(holds, site, DRAWN_SLOWLY, derandomize=False)


# Cases as a user types them: (command and words, variables of the shell, what the line must name).

Case = tuple[str, dict[str, str], str]
TYPED: list[Case] = [
    ("train train.num_steps=four", {}, "train.num_steps=four: expected a whole number"),
    ("train train.num_steps=0", {}, "train.num_steps=0: expected at least 1"),
    ("train train.actor_learning_rate=nan", {}, "train.actor_learning_rate=nan: expected more than 0"),
    ("train train.actor_learning_rate=1e999", {}, "train.actor_learning_rate=inf"),
    ("train train.clip_ratio=-1", {}, "train.clip_ratio=-1.0"),
    ("train train.gamma=2", {}, "train.gamma=2.0"),
    ("train train.max_grad_norm=0", {}, "train.max_grad_norm=0.0"),
    ("train train.log_episodes_every=0", {}, "train.log_episodes_every=0"),
    ("train retriever.max_failed_share=2", {}, "retriever.max_failed_share=2.0"),
    ("train retriever.max_retries=-1", {}, "retriever.max_retries=-1"),
    ("train hardware.engine.max_num_seqs=0", {}, "hardware.engine.max_num_seqs=0"),
    ("train train.limits.start_s=0", {}, "train.limits.start_s=0.0"),
    ("train train.init_kl_coef=-1", {}, "train.init_kl_coef=-1.0"),
    ("distill distill.warmup_ratio=1.5", {}, "distill.warmup_ratio=1.5"),
    ("distill distill.chunk_tokens=0", {}, "distill.chunk_tokens=0"),
    ("train train.loggers=[foo]", {}, "train.loggers: unknown logger 'foo'"),
    ("train train.loggers=[wandb]", {"HOME": "/tmp", "WANDB_API_KEY": ""}, "there is no key for api.wandb.ai"),
    ("train hardware.verl.trainer.critic_warmpu=5", {}, "hardware.verl.trainer.critic_warmpu: veRL has no such key"),
    ("train train.smaples_per_question=2", {}, "did you mean train.samples_per_question?"),
    ("train gate=failed", {}, "did you mean train.teacher_term.gate?"),
    ("test hardware=h100 test.models.dgpo=M", {}, "unknown choice 'hardware=h100'"),
    ("test test.models.a=M test.samples=abc", {}, "test.samples=abc: expected a whole number"),
    ("test test.models=runs/x", {}, "test.models.NAME=value"),
    ("test test.models.a=/größe/[1]", {}, "test.models.a=/größe/[1]"),
    ("train data.train_file=/data(1)/nq.parquet", {}, "'/data(1)/nq.parquet' does not exist"),
    ("train data.train_file=/a=b/größe.parquet", {}, "'/a=b/größe.parquet' does not exist"),
    ("train data.train_file=models", {}, "'models' is a folder"),
    ("train data.train_file=[a,b]", {}, "'[a,b]' does not exist"),
    ("train data.train_file=own.jsonl", {}, "own.jsonl is not a parquet file"),
    ("train episode.max_prompt_tokens=1 data.train_file=long.parquet", {}, "long.parquet, row 0: its prompt has"),
    ("train retriever.url=127.0.0.1:8124", {}, "expected http://host:port"),
    ("train retriever.url=http://127.0.0.1:9", {}, "no retrieval server answers at http://127.0.0.1:9"),
    ("train train.init=notemplate", {}, "train.init=notemplate: its tokenizer has no chat template"),
    ("train train.init=badtemplate", {}, "train.init=badtemplate: its chat template fails"),
    ("train train.init=nojson", {}, "train.init=nojson: tokenizer.json"),
    ("train train.init=noshard", {}, "which is not there"),
    ("train pair=qwen3b_05b", {}, "pair=qwen3b_05b with world=tiny"),
    ("quickstart pair=qwen3b_05b", {}, "pair=qwen3b_05b with world=tiny"),
    ("train", {"RAY_ADDRESS": "127.0.0.1:9"}, "RAY_ADDRESS=127.0.0.1:9: no Ray answers there"),
    ("train", {"TMPDIR": "/tmp/" + "x" * 99}, "TMPDIR=/tmp/xx"),
    ("test", {"HOME": "/dev/null"}, "cannot be written to (HOME=/dev/null)"),
    ("collect run_dir=rows.parquet", {}, "rows.parquet"),
    ("report run_dir=nowhere dry_run=false", {}, "nowhere"),
    ("export run_dir=nowhere", {}, "run_dir=nowhere has no finished"),
    ("prepare prepare.source=nowhere.jsonl", {}, "nowhere.jsonl does not exist"),
    ("collect collect.source=transcripts data.collect_file=own.jsonl", {}, "own.jsonl, line 1: `response` is None"),
    ("distill run_dir=unfinished", {}, "unfinished/collect/manifest.json is missing"),
    ("collect resume=maybe", {}, "resume=maybe: expected true or false"),
    ("train ++hardware=gpu", {}, "unknown choice 'hardware=gpu'"),
    ("train train.init=", {}, "train.init= has nothing behind it: expected a text or null"),
    ("collect run_dir=", {}, "run_dir= has nothing behind it"),
    ("test test.models.qwen2.5=M", {}, "the name 'qwen2.5' cannot be read"),
    ("test test.models.größe=M", {}, "the name 'größe' cannot be read"),
    ("train hardware.env.=1", {}, "the name '' cannot be read"),
    ("train train.init=${nope}", {}, "train.init: Interpolation key 'nope' not found"),
    ("train data.train_file=/a${b", {}, "${ begins a reference to another setting"),
    ("train hardware.verl.trainer.save_freq=abc", {}, "hardware.verl.trainer.save_freq=abc: veRL has -1 there"),
    ("train hardware.verl.trainer=5", {}, "hardware.verl.trainer=5: veRL has a section of settings there"),
    ("train hardware.verl.trainer.logger=[foo]", {}, "hardware.verl.trainer.logger cannot be set: set train.loggers"),
    ("train hardware.attention=flash_attention_2", {}, "hardware.attention=flash_attention_2"),
    ("distill hardware.attention=flash_attention_2", {}, "hardware.attention=flash_attention_2"),
    ("train hardware.engine.worker_extension=nonsense", {}, "hardware.engine.worker_extension=nonsense"),
    ("test hardware.engine.worker_extension=os.path.x.Y", {}, "hardware.engine.worker_extension=os.path.x.Y"),
    ("test hardware.engine.max_num_batched_tokens=10", {}, "hardware.engine.max_num_batched_tokens=10"),
    ("train hardware.object_store_gb=0.01", {}, "hardware.object_store_gb=0.01: expected at least 0.08"),
    ("train hardware.logical_cpus=1", {}, "hardware.logical_cpus has 1 CPUs"),
    ("test retriever.backend_options.x=1", {}, "retriever.backend_options are read with retriever.backend alone"),
    ("train data.train_file=corpora.parquet", {}, "corpora.parquet, row 0: `extra_info.corpus` is ['real']"),
    ("arcap data.test_files.nq=hops.parquet", {}, "hops.parquet, row 0: `extra_info.hops` is '2'"),
    (
        "collect collect.source=transcripts data.collect_file=told.jsonl student.path=notemplate",
        {},
        "student.path=notemplate: its tokenizer has no chat template",
    ),
    ("distill distill.episodes=nowhere", {}, "nowhere/episodes.jsonl does not exist"),
    ("distill distill.loss=seqkd student.path=othertokens", {}, "are of another tokenizer, to which 'b' was 'a'"),
    (
        "distill distill.loss=seqkd distill.demonstrations=rag data.collect_file=others.parquet",
        {},
        "data.collect_file=others.parquet is not what",
    ),
    ("distill distill.loss=seqkd run_dir=broken", {}, "broken/collect/episodes.jsonl, line 1 is no recorded episode"),
    ("ask ask.mode=foo", {}, "ask.mode=foo: expected one of agent"),
    ("report run_dir=nowhere", {}, "nowhere holds no test results"),
    ("report report.runs=[nowhere]", {}, "nowhere holds no test results"),
    ("quickstart train.algorithm=foo", {}, "train.algorithm=foo"),
    ("quickstart train.loggers=[foo]", {}, "train.loggers: unknown logger 'foo'"),
    ("quickstart train.batch_size=7", {}, "train.batch_size=7 is not a multiple"),
    ("quickstart test.sets=[nope]", {}, "test.sets: unknown set 'nope'"),
    ("quickstart stages=[collect]", {}, "stages=['collect']: expected distill or train"),
    ("quickstart stages=[train,test]", {}, "the test follows by itself"),
    ("quickstart stages=[tran]", {}, "stages=['tran']"),
    ("quickstart student.path=nowhere", {}, "student.path=nowhere"),
    ("quickstart data.train_file=nowhere", {}, "data.train_file: data file 'nowhere' does not exist"),
    ("download download.endpoint=nonsense", {}, "download.endpoint=nonsense: expected an address"),
    ("train", {"DGPO_OVERRIDES": "rows.parquet"}, "DGPO_OVERRIDES=rows.parquet cannot be read"),
]
FIT: list[Case] = [  # what works in surroundings that are not ours
    ("train ++train.num_steps=3 +hardware=cpu ++dry_run=true", {}, ""),
    ("train hardware.verl.trainer.save_freq=7 hardware.verl.actor_rollout_ref.rollout.name=vllm", {}, ""),
    ("train", {"CUDA_VISIBLE_DEVICES": ""}, ""),
    ("train", {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, ""),
    ("train", {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}, ""),
    ("test", {"LC_ALL": "C", "LANG": "C"}, ""),
    ("collect", {"LC_ALL": "tr_TR.UTF-8", "TERM": "dumb", "COLUMNS": "1"}, ""),
]


def variants(site: Site) -> None:
    """Models and data that the typed cases name."""
    models = site.folder / "models"
    for name in ("notemplate", "badtemplate", "nojson", "noshard", "othertokens"):
        if not (site.folder / name).exists():
            shutil.copytree(models / "student", site.folder / name)
    (site.folder / "notemplate" / "tokenizer_config.json").write_text("{}")
    (site.folder / "badtemplate" / "chat_template.jinja").write_text("{% if %}")
    (site.folder / "nojson" / "tokenizer.json").write_text("{")
    tokenizer = {"model": {"vocab": {"b": 0, "a": 1}, "merges": []}, "added_tokens": []}
    (site.folder / "othertokens" / "tokenizer.json").write_text(json.dumps(tokenizer))
    (site.folder / "told.jsonl").write_text(
        '{"question": "who?", "answers": ["me"], "response": "<answer>a</answer>"}\n'
    )
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (site.folder / "noshard" / "model.safetensors.index.json").write_text(json.dumps(index))
    if not (site.folder / "unfinished").exists():
        make_collection(site.folder / "unfinished")
        (site.folder / "unfinished" / "collect" / "manifest.json").unlink()
    if not (site.folder / "broken").exists():
        make_collection(site.folder / "broken", "{}\n")
    strange = {"corpora": {"corpus": ["real"]}, "hops": {"hops": "2"}, "others": {"index": 100}}
    for name, info in strange.items():
        row = make_row(0)
        row["extra_info"] |= info
        pq.write_table(pa.Table.from_pylist([row]), site.folder / f"{name}.parquet")
    if not (site.folder / "long.parquet").exists():
        rows = [{**make_row(number), "prompt": [{"role": "user", "content": "ab" * 40}]} for number in range(64)]
        write_rows(site.folder / "long.parquet", rows)


@pytest.fixture(scope="module")
def typed_site(site: Site) -> Site:
    variants(site)
    return site


@pytest.mark.parametrize("case", TYPED, ids=lambda case: case[0])
def test_a_typed_mistake_is_one_line_that_names_it(typed_site: Site, case: Case) -> None:
    (command, *more), variables, named = case[0].split(" "), case[1], case[2]
    with mock.patch.dict(os.environ, variables):
        refused(typed_site, command, *more, names=named)


@pytest.mark.parametrize("case", FIT, ids=lambda case: str(case[1]))
def test_what_other_machines_have_set_does_no_harm(typed_site: Site, case: Case) -> None:
    with mock.patch.dict(os.environ, case[1]):
        assert called(typed_site, *case[0].split(" ")) == (0, "")


def run_process(site: Site, case: Case) -> None:
    (command, *more), variables, named = case[0].split(" "), case[1], case[2]
    before = state(site.folder)
    run = subprocess.run(
        [sys.executable, "-m", "dgpo", command, *site.overrides(command), *more],
        cwd=site.folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=240,
    )
    assert run.returncode in ((1, 2) if named else (0,)), run.stderr
    assert state(site.folder) == before
    if named:
        assert run.stderr.startswith(f"dgpo {command}: ")
        assert run.stderr.count("\n") == 1, run.stderr
        assert named in run.stderr
    else:
        assert "Traceback" not in run.stderr


def id_of(case: Case) -> str:
    return f"{case[0]} {case[1] or ''}"


@pytest.mark.parametrize("case", [TYPED[0], TYPED[26], TYPED[38], FIT[0]], ids=id_of)
def test_a_process_says_the_same(typed_site: Site, case: Case) -> None:
    run_process(typed_site, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*TYPED, *FIT], ids=id_of)
def test_every_process_says_the_same(typed_site: Site, case: Case) -> None:
    run_process(typed_site, case)
