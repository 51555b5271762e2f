"""Fills the generated tables: of docs/methods.md from the presets and the rules that the checks use, of the README from
what tests/engine/test_families.py recorded.

python scripts/docs.py                             writes
python scripts/docs.py --families runs/families    takes new records of that test first
python scripts/docs.py --check                     fails where a page is not up to date
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from dgpo.config.load import group_choices, load_config
from dgpo.config.methods import ALGORITHMS, GATES, TEACHER_FORMS, support_table, teacher_coef
from dgpo.config.schema import Config
from dgpo.evaluation.paper import BASELINES, EXACT_MATCH, LABELS, MAIN_PAIR, ROWS, RULES

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ROOT / "tests" / "golden" / "families.json"  # what the test recorded, by family
WHERE = {
    "dgpo_grpo": "fig. 6",
    "kd_gkd": "fig. 6",
    "grpo": "fig. 4",
    "teacher_ppo": "Search-R1",
    **dict.fromkeys(BASELINES, "ours"),
}


def main() -> int:
    options = sys.argv[1:]
    if options[:1] == ["--families"]:
        take_records(Path(options[1]))
    pages = {
        ROOT / "docs" / "methods.md": {"presets": preset_table(), "support": rule_table()},
        ROOT / "README.md": {"families": family_table()},
    }
    stale = []
    for page, tables in pages.items():
        text = page.read_text()
        for name, lines in tables.items():
            text = filled(text, name, lines, page)
        if text != page.read_text():
            stale.append(page.name)
            if "--check" not in options:
                page.write_text(text)
    if stale and "--check" in options:
        print(f"{', '.join(stale)} not up to date: run `python scripts/docs.py`", file=sys.stderr)
        return 1
    return 0


def filled(text: str, name: str, lines: Sequence[str], page: Path) -> str:
    """The page with the lines in its block of that name."""
    block = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not block.search(text):
        raise SystemExit(f"{page} has no block {name!r}: restore its `<!-- generated: {name} -->` line")
    body = "\n".join(lines).replace("\\", r"\\")
    return block.sub(rf"\g<1>{body}\n\g<2>", text)


def take_records(folder: Path) -> None:
    """Records of a run of the test replace those of the same families."""
    records = json.loads(FAMILIES.read_text())
    for file in sorted(folder.glob("*.json")):
        records |= json.loads(file.read_text())
    FAMILIES.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n")


def family_table() -> list[str]:
    """One line per family that went through every stage."""
    head = ("family", "what is its own", "stages", "with", "on")
    rows = [
        (
            name,
            record["kind"],
            ", ".join(record["stages"]).replace("train", f"train ({record['rl_steps']} steps)"),
            ", ".join(f"{package} {version}" for package, version in record["versions"].items()),
            record["date"],
        )
        for name, record in json.loads(FAMILIES.read_text()).items()
    ]
    return _table(head, rows)


def preset_table() -> list[str]:
    """One line per experiment: what the composed configuration of the main pair says."""
    names = list(dict.fromkeys([*ROWS["main"], *ROWS["ablation"], *ROWS["figures"], "teacher_ppo"]))
    rows = [name for name in names if name in group_choices("experiment")]
    assert set(rows) == set(group_choices("experiment"))
    settings = ("stages", "cold start", "RL", "teacher term", "initial KL")
    head = ("preset", "row of the paper", *settings, "paper's EM", "of")
    return _table(head, [_preset_row(name) for name in rows])


def _preset_row(name: str) -> Sequence[str]:
    config = load_config([f"experiment={name}", f"pair={MAIN_PAIR}"])
    trains, distils = "train" in config.stages, "distill" in config.stages
    where = WHERE.get(name) or ("tab. 2" if name in ROWS["main"] else "tab. 6")
    values = EXACT_MATCH[MAIN_PAIR].get(name)
    return (
        f"`{name}`",
        f"{LABELS.get(name, 'how the teachers were made')} ({where})",
        " -> ".join(config.stages),
        f"`{config.distill.loss}`" if distils else "none",
        config.train.algorithm if trains else "none",
        _teacher_term(config) if trains else "-",
        f"{config.train.init_kl_coef:g} ({config.train.init_kl_form})" if trains and config.train.init_kl_coef else "-",
        f"{values[-1]:.3f}" if values else "-",
        RULES.get(name, "last") if values else "-",
    )


def _teacher_term(config: Config) -> str:
    term = config.train.teacher_term
    if term.gate == "none":
        return "none"
    return f"{term.form}, {term.gate}, {teacher_coef(term):g}"


def rule_table() -> list[str]:
    """Rows: algorithm and form; columns: gates; `yes`, or the number of the reason below."""
    support = {(algorithm, form, gate): reason for algorithm, form, gate, reason in support_table()}
    reasons = list(dict.fromkeys(reason for reason in support.values() if reason))
    body = [
        (f"`{a}`", f"`{f}`", *(f"no ({reasons.index(r) + 1})" if (r := support[a, f, g]) else "yes" for g in GATES))
        for a in ALGORITHMS
        for f in TEACHER_FORMS
    ]
    table = _table(("algorithm", "form", *(f"gate `{gate}`" for gate in GATES)), body)
    return [*table, "", *(f"{number}. {reason}." for number, reason in enumerate(reasons, start=1))]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


if __name__ == "__main__":
    sys.exit(main())
