"""What a user may plug in by name: a reward function, and a search backend. See docs/extending.md."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from dgpo.agent.episode import Search
from dgpo.agent.search import SearchClient, read_token
from dgpo.agent.trajectory import Trajectory
from dgpo.config.schema import RetrieverConfig
from dgpo.errors import ConfigError

# (trajectory, golds, scores) -> the reward, or its named parts, whose sum is the reward.
Reward = Callable[[Trajectory, Sequence[str], Mapping[str, float]], float | Mapping[str, float]]


def load_object(path: str, *, key: str) -> Any:
    """The object that "package.module:name" names. The directory that the command was started in is searched too.

    Args:
        path: what the user wrote.
        key: the configuration key, for the message.

    Raises:
        ConfigError: not of this form, the module cannot be imported, or it has no such name.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name.isidentifier():
        raise ConfigError(f"{key}={path}: expected package.module:name, e.g. examples.format_reward:reward")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not put it there, `python -m` does
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a module of the user's does when it is imported
        raise ConfigError(
            f"{key}={path}: importing {module_name} failed with {type(error).__name__}: {error}; run the command where "
            "the module is found, or put its folder on PYTHONPATH"
        ) from error
    if not hasattr(module, name):
        raise ConfigError(f"{key}={path}: {module.__file__} has no {name}")
    return getattr(module, name)


def load_reward(path: str) -> Reward:
    """The function that `train.reward` names.

    Raises:
        ConfigError: it cannot be found, or does not take (trajectory, golds, scores).
    """
    reward = load_object(path, key="train.reward")
    if inspect.iscoroutinefunction(reward):
        raise ConfigError(f"train.reward={path}: expected a plain function, it is async")
    try:
        inspect.signature(reward).bind(None, None, None)
    except TypeError as error:
        raise ConfigError(f"train.reward={path}: expected a function (trajectory, golds, scores): {error}") from None
    return reward


def check_search(retriever: RetrieverConfig) -> None:
    """Looks at `retriever.backend` without making one: it may load an index.

    Raises:
        ConfigError: no such class, no async `search(query, *, topk, corpus)`, or options that it does not take.
    """
    backend = load_object(retriever.backend or "", key="retriever.backend")
    search = getattr(backend, "search", None)
    if not inspect.iscoroutinefunction(search):
        raise ConfigError(
            f"retriever.backend={retriever.backend}: expected a class with "
            "`async def search(self, query, *, topk, corpus)`"
        )
    try:
        inspect.signature(search).bind(None, "query", topk=1, corpus=None)
        inspect.signature(backend).bind(**retriever.backend_options)
    except TypeError as error:
        raise ConfigError(
            f"retriever.backend={retriever.backend} with retriever.backend_options={retriever.backend_options}: {error}"
        ) from None


def make_search(retriever: RetrieverConfig) -> Search:
    """The search of every stage that plays episodes: the client of the retrieval server, or `retriever.backend`."""
    if retriever.backend:
        return load_object(retriever.backend, key="retriever.backend")(**retriever.backend_options)
    return SearchClient(
        retriever.url,
        timeout_s=retriever.timeout_s,
        max_retries=retriever.max_retries,
        max_outage_s=retriever.max_outage_s,
        max_concurrency=retriever.max_concurrency,
        max_queries_per_request=retriever.max_queries_per_request,
        token=read_token(retriever.token_file),
    )


@asynccontextmanager
async def open_search(retriever: RetrieverConfig) -> AsyncIterator[Search]:
    """`make_search`, with its `close()` awaited in the end where it has one."""
    search = make_search(retriever)
    try:
        yield search
    finally:
        close = getattr(search, "close", None)
        if close is not None:
            await close()
