"""`ask`: a question, or a prompt for questions, or a page. Makes what it needs: engine, and the tiny world's retriever.

python -m dgpo ask "What is the capital of France?" world=tiny
python -m dgpo ask ask.model=runs/dgpo/train/model hardware=cpu ask.web=true
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from dgpo.agent.plugins import open_search
from dgpo.agent.search import RetrieverUnavailableError, check_health, read_token
from dgpo.ask.asker import Asker
from dgpo.ask.terminal import answer_once, prompt_loop
from dgpo.ask.web import serve
from dgpo.checks import check_ask
from dgpo.config.load import ConfigError, chosen, load_config
from dgpo.config.schema import Config
from dgpo.engines.play import load_tokenizer, make_policy
from dgpo.hardware.dry_run import print_dry_run
from dgpo.pipeline import tiny
from dgpo.pipeline.processes import Stages, retrieval_server
from dgpo.runs.artifacts import MANIFEST

RUNS = Path("runs")
_OVERRIDE = re.compile(r"[+~]*[\w.]+=")


def ask(arguments: Sequence[str]) -> None:
    """Runs the command.

    Args:
        arguments: overrides; whatever else is there is the question.

    Raises:
        ConfigError: no checkpoint, or no retriever.
        QuestionError: the question cannot be asked.
    """
    overrides = [argument for argument in arguments if _OVERRIDE.match(argument)]
    question = " ".join(argument for argument in arguments if not _OVERRIDE.match(argument))
    is_tiny = chosen("world", overrides) == "tiny"
    if is_tiny:
        overrides = [*tiny.OVERRIDES, *(override for override in overrides if override not in tiny.OVERRIDES)]
    config = load_config(overrides)
    config.hardware.env.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings would stand between the questions
    run = _tiny_run(config) if is_tiny else None
    if run and not config.ask.model:
        config.ask.model = str(run / "train" / "model")
    with _retriever(config, run):
        check_ask(config)
        if config.dry_run:
            print_dry_run(config, "ask", f"{config.ask.model} would answer", [])
            return
        with contextlib.suppress(KeyboardInterrupt) if config.ask.web else contextlib.nullcontext():
            asyncio.run(_answer(config, question))


async def _answer(config: Config, question: str) -> None:
    console = Console()
    model, trusted = config.ask.model or "", config.student.trust_remote_code
    console.print(f"[dim]loading {model} ...[/]", highlight=False)
    tokenizer = load_tokenizer(model, trust_remote_code=trusted)
    policy = make_policy(config, model, temperature=config.ask.temperature, trust_remote_code=trusted)
    async with policy, open_search(config.retriever) as search:
        asker = Asker(config, policy=policy, tokenizer=tokenizer, search=search)
        if config.ask.web:
            await serve(asker, model=model, port=config.ask.port)
        elif question:
            await answer_once(asker, question, console)
        else:
            await prompt_loop(asker, console)


def _tiny_run(config: Config) -> Path:
    """The quickstart's folder that `ask.model` lies in, or the latest one that was trained to its end."""
    model = config.ask.model
    if model:
        found = [folder for folder in Path(model).absolute().parents if (folder / "indexes").is_dir()]
    else:
        finished = RUNS.glob(f"quickstart*/train/model/{MANIFEST}")
        found = [path.parents[2] for path in sorted(finished, key=lambda path: path.stat().st_mtime, reverse=True)]
    if not found:
        raise ConfigError(
            f"no folder of the tiny world holds ask.model={model}: name a checkpoint of a quickstart"
            if model
            else f"no finished quickstart in {RUNS}: run `python -m dgpo quickstart` first, or set ask.model"
        )
    return found[0]


@contextlib.contextmanager
def _retriever(config: Config, run: Path | None) -> Iterator[None]:
    """Serves the tiny world's own index while the context lasts, unless a server of it answers already."""
    if run is None or config.retriever.backend or _serves_tiny_world(config):
        yield
        return
    with (
        tempfile.TemporaryDirectory() as logs,
        retrieval_server(Stages(Path(logs)), run / "indexes", default="real") as url,
    ):
        config.retriever.url = url
        yield


def _serves_tiny_world(config: Config) -> bool:
    try:
        health = check_health(config.retriever.url, token=read_token(config.retriever.token_file))
    except (RetrieverUnavailableError, ValueError):
        return False
    return "real" in health.get("corpora", {})
