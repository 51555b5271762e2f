"""The plan of a stage as text: models, placement, memory by part and phase, time by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from dgpo.config.schema import Config
from dgpo.hardware.budget import PARTS, Budget, Models, is_on_this_node
from dgpo.hardware.disk import DOWNLOAD
from dgpo.hardware.known_gpus import GIB
from dgpo.hardware.placement import Placement, ranges
from dgpo.hardware.throughput import Throughput, average_episode

Rows = Sequence[tuple[str, str]]
Rows3 = Sequence[tuple[str, float | None, float]]


def facts(rows: Rows) -> Table:
    """Two columns: a name, and what is to be known of it."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, text in rows:
        table.add_row(name, text)
    return table


def placement_table(config: Config, stage: str, models: Models, placement: Placement) -> Table:
    """Node by node: what its GPUs hold, and what runs beside them."""
    table = _grid()
    for column in ("node", "GPUs", "trained", "frozen", "engine", "CPU"):
        table.add_column(column)
    for node in range(placement.nodes):
        own = range(node * placement.gpus, (node + 1) * placement.gpus)
        table.add_row(
            str(node),
            ranges(list(own)),
            _trained(stage, models, placement),
            _frozen(stage, models),
            _engines([replica for replica in placement.replicas if replica[0] in own]),
            _processes(config, stage, node),
        )
    return table


def _trained(stage: str, models: Models, placement: Placement) -> str:
    if not placement.shards:
        return "-"
    names = "student" if stage == "distill" else "actor, critic" if models.critic else "actor"
    copies = f", {placement.copies} copies" if placement.copies > 1 else ""
    return f"{names}: {_count(placement.shards, 'shard')}{copies}"


def _frozen(stage: str, models: Models) -> str:
    beside = {"teacher": models.teacher is not None, "initial policy": models.initial_policy}
    names = [name for name, is_there in beside.items() if is_there]
    if not names:
        return "-"
    if stage == "distill":
        return "teacher: whole on each GPU"
    return f"{', '.join(names)}: host memory"


def _engines(replicas: list[list[int]]) -> str:
    if not replicas:
        return "-"
    size = len(replicas[0])
    return f"{_count(len(replicas), 'replica')} of {_count(size, 'GPU')}" + (
        f": {' '.join(ranges(replica) for replica in replicas)}" if size > 1 else ""
    )


def _processes(config: Config, stage: str, node: int) -> str:
    parts = []
    if stage == "train":
        parts = [_count(config.hardware.num_agent_workers, "agent loop"), *(["trainer"] if node == 0 else [])]
    if node == 0 and not config.retriever.backend and is_on_this_node(config.retriever.url):
        parts.append("retriever")
    return ", ".join(parts) or "-"


def memory_table(budget: Budget) -> Table:
    """GiB on one GPU: a row per part, a column per phase, totals last; the fullest phase is bold."""
    table = _grid()
    fullest, _ = budget.peak
    table.add_column("part")
    for phase in budget.phases:
        table.add_column(phase, justify="right", style="bold" if phase == fullest else "")
    for part in PARTS:
        sizes = [parts.get(part, 0.0) for parts in budget.phases.values()]
        if max(sizes) >= 0.005 * GIB:
            table.add_row(part, *(_gib(size) for size in sizes))
    table.add_section()
    table.add_row("total", *(_gib(sum(parts.values())) for parts in budget.phases.values()))
    if budget.capacity is not None:
        free = [budget.capacity - sum(parts.values()) for parts in budget.phases.values()]
        table.add_row("free", *(_gib(size, always=True) for size in free))
    return table


def memory_facts(config: Config, budget: Budget) -> Rows:
    """What the table has no column for: the KV cache in tokens, host memory."""
    rows = []
    if budget.kv_tokens_needed:
        episodes = budget.kv_tokens / average_episode(config).tokens
        rows.append(
            (
                "KV cache",
                f"{max(0.0, budget.kv_tokens):,.0f} tokens per replica: {max(0.0, episodes):,.0f} average episodes; "
                f"{config.hardware.engine.max_num_seqs} decode at once",
            )
        )
    if budget.host:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in budget.host.items())
        total = sum(budget.host.values()) / GIB
        limit = f" of {budget.host_capacity / GIB:,.0f}" if budget.host_capacity else ""
        rows.append(("host memory", f"{total:.1f}{limit} GiB per node: {parts}"))
    return rows


def time_table(estimate: Throughput) -> Table:
    """Seconds by part."""
    table = _grid()
    for part in estimate.seconds:
        table.add_column(part, justify="right")
    table.add_column("together", justify="right", style="bold")
    table.add_row(*(duration(seconds) for seconds in [*estimate.seconds.values(), estimate.step_s]))
    return table


def time_facts(estimate: Throughput, num_gpus: int) -> Rows:
    """What follows for the whole stage."""
    whole = f"{duration(estimate.total_hours * 3600)}, {estimate.total_hours * num_gpus:,.1f} GPU hours"
    rows = [(f"{estimate.steps} steps" if estimate.steps > 1 else "stage", whole)]
    rows.append(("speed", f"{estimate.episodes_per_hour:,.0f} episodes/hour"))
    if estimate.tokens_per_s:
        rows.append(("generation", f"{estimate.tokens_per_s:,.0f} tokens/s"))
    return rows


def experiment_table(rows: Rows3) -> Table:
    """Hours and disk of each stage, and their sums; a stage whose time is not known makes the sum a lower bound."""
    table = _grid()
    for column in ("stage", "time", "disk in run_dir, GB"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage, hours, size in rows:
        table.add_row(stage, "-" if hours is None else duration(3600 * hours), f"{size / 1e9:.1f}" if size else "")
    table.add_section()
    total = sum(hours or 0.0 for _, hours, _ in rows)
    known = any(hours is not None for _, hours, _ in rows)
    table.add_row("total", duration(3600 * total) if known else "-", f"{sum(size for *_, size in rows) / 1e9:.1f}")
    return table


def besides(hub: Mapping[str, float], unknown: Sequence[str]) -> str:
    """What is needed on the disk outside `run_dir`: bytes of the hub's models, and those whose size is not known."""
    models = f"{sum(hub.values()) / 1e9:.1f} GB" + (f" without {', '.join(unknown)}" if unknown else "")
    return f"corpus and index of Wikipedia {DOWNLOAD / 1e9:.0f} GB, the hub's models {models}"


def _grid() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)


def _gib(size: float, *, always: bool = False) -> str:
    return f"{size / GIB:.2f}" if always or size else ""


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def parameters(count: int) -> str:
    """In billions, or millions."""
    return f"{count / 1e9:.3f} billion parameters" if count >= 1e8 else f"{count / 1e6:.2f} million parameters"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"
