"""The search: a retrieval server that answers and knows the corpora, or a backend of the user's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dgpo.agent.plugins import check_search
from dgpo.agent.search import check_health, read_token
from dgpo.config.schema import Config
from dgpo.errors import ConfigError

HEALTH_TIMEOUT_S = 5.0


def check_retriever(config: Config, rows: Sequence[Mapping[str, Any]], notes: list[str]) -> None:
    """That the server answers, and has the corpora of the questions; a plan for another machine gets a note instead."""
    if config.dry_run.assume:
        notes.append("the search was not tried: the plan is for another machine")
        return
    if config.retriever.backend:
        check_search(config.retriever)
        return  # it has no server, and does not name its corpora
    token = read_token(config.retriever.token_file)
    health = check_health(config.retriever.url, timeout_s=HEALTH_TIMEOUT_S, token=token)
    served = health.get("corpora")
    if served is None:
        return  # another server of the same protocol: it has one corpus and does not name it
    wanted = {row["extra_info"].get("corpus") for row in rows} - {None}
    missing = sorted(wanted - set(served))
    if missing:
        raise ConfigError(
            f"the questions search in corpus {missing[0]!r}, but {config.retriever.url} serves {', '.join(served)}: "
            "start it with an --index for each corpus"
        )
