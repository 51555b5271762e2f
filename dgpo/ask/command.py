"""`python -m dgpo ask`: one question, a prompt for many, or a page on this machine (`ask.web=true`).

python -m dgpo ask run_dir=runs/own-docs "Who wrote it?"        a run of `dgpo own` or `quickstart`: its own retriever
python -m dgpo ask                                              the latest such run
python -m dgpo ask ask.model=runs/dgpo/train/model ask.web=true
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from dgpo.agent.episode import Search
from dgpo.agent.plugins import open_search
from dgpo.agent.search import check_health, read_token
from dgpo.ask.asker import Asker
from dgpo.ask.runs import AskedRun, find_run
from dgpo.ask.terminal import answer_once, prompt_loop
from dgpo.ask.web import PageFacts, listen, serve
from dgpo.checks import check_ask
from dgpo.config.load import chosen, load_config
from dgpo.config.schema import Config
from dgpo.engines.play import load_tokenizer, make_policy
from dgpo.errors import ConfigError
from dgpo.hardware.dry_run import print_dry_run
from dgpo.pipeline.processes import Stages, retrieval_server

_OVERRIDE = re.compile(r"[+~]*[\w.-]+=")


def ask(arguments: Sequence[str]) -> None:
    """Runs the command.

    Args:
        arguments: overrides; whatever else is there is the question.

    Raises:
        ConfigError: no checkpoint, no retriever, or a page whose port is taken.
        QuestionError: the question cannot be asked.
    """
    overrides = [argument for argument in arguments if _OVERRIDE.match(argument)]
    question = " ".join(argument for argument in arguments if not _OVERRIDE.match(argument))
    config, run = asked_config(overrides)
    examples = run.asking.examples if run else []
    with contextlib.ExitStack() as stack:
        listener = _listen(config.ask.port) if config.ask.web and not config.dry_run else None
        if listener:
            stack.enter_context(listener)
        stack.enter_context(served(config, run, reuse=chosen("retriever.url", overrides) is not None))
        check_ask(config)
        if config.dry_run:
            print_dry_run(config, "ask", f"{config.ask.model} would answer", [])
            return
        _answer(config, question, listener, examples)


def asked_config(overrides: Sequence[str]) -> tuple[Config, AskedRun | None]:
    """The settings for asking, those of the run first, and the run, where there is one.

    Raises:
        ConfigError: the named run is none, or a setting is wrong.
    """
    run = find_run(overrides)
    from_run = [each for each in run.asking.overrides if each not in overrides] if run else []
    if chosen("hardware", overrides):  # a folder may have moved to another machine
        from_run = [each for each in from_run if not each.startswith("hardware")]
    config = load_config([*from_run, *overrides])
    if run and not config.ask.model:
        config.ask.model = run.asking.model
    return config, run


@contextlib.asynccontextmanager
async def opened(config: Config, *, search: Search | None = None) -> AsyncIterator[Asker]:
    """The checkpoint, loaded, with the search that is given or configured."""
    _quiet()
    model, trusted = config.ask.model or "", config.student.trust_remote_code
    config.hardware.env.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings would stand between the questions
    tokenizer = load_tokenizer(model, trust_remote_code=trusted)
    policy = make_policy(config, model, temperature=config.ask.temperature, trust_remote_code=trusted)
    async with policy, contextlib.nullcontext(search) if search else open_search(config.retriever) as found:
        yield Asker(config, policy=policy, tokenizer=tokenizer, search=found)


@contextlib.contextmanager
def served(config: Config, run: AskedRun | None, *, reuse: bool) -> Iterator[None]:
    """Serves the run's own indexes while the context lasts.

    Args:
        reuse: whether `retriever.url` was named; then a server there that has a corpus of this name is used instead.
    """
    if run is None or config.retriever.backend or (reuse and _serves(config, run.asking.corpus)):
        yield
        return
    with (
        tempfile.TemporaryDirectory() as logs,
        retrieval_server(Stages(Path(logs)), run.folder / "indexes", default=run.asking.corpus) as url,
    ):
        config.retriever.url = url
        yield


def _answer(config: Config, question: str, listener: socket.socket | None, examples: list[str]) -> None:
    """Loads the model and answers. Between questions at the prompt no loop runs, so that keys go where they belong."""
    console = Console()
    console.print(f"[dim]loading {config.ask.model} ...[/]", highlight=False)
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        try:
            asker = runner.run(stack.enter_async_context(opened(config)))
            if listener:
                facts = PageFacts(model=config.ask.model or "", corpus=_corpus(config), examples=examples)
                with contextlib.suppress(KeyboardInterrupt):
                    runner.run(serve(asker, facts, listener=listener))
            elif question:
                runner.run(answer_once(asker, question, console))
            else:
                prompt_loop(asker, console, run=runner.run, examples=examples)
        finally:
            runner.run(stack.aclose())


def _corpus(config: Config) -> str:
    """What is searched, for the page: the corpora of the server with their sizes, or the backend."""
    if config.retriever.backend:
        return config.retriever.backend
    health = check_health(config.retriever.url, token=read_token(config.retriever.token_file))
    corpora = health.get("corpora") or {}
    name = config.ask.corpus or health.get("default")
    size = (corpora.get(name) or {}).get("count")
    return f"{name}, {size:,} passages" if size else str(name or config.retriever.url)


def _listen(port: int) -> socket.socket:
    try:
        return listen(port)
    except OSError as error:
        raise ConfigError(
            f"ask.port={port} on this machine is taken ({error.strerror}): choose another ask.port, or 0 for a free one"
        ) from error


def _quiet() -> None:
    """Progress bars and notices of the libraries that load the model would stand in the trace."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _serves(config: Config, corpus: str) -> bool:
    try:
        health = check_health(config.retriever.url, token=read_token(config.retriever.token_file))
    except ConfigError:
        return False
    return corpus in health.get("corpora", {})
