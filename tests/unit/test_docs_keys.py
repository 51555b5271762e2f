"""Pages that name keys and files name ones that exist."""

import re
from pathlib import Path

import pytest

from dgpo.config.load import FREE_MAPPINGS, config_keys

ROOT = Path(__file__).parents[2]
SECTIONS = {key.partition(".")[0] for key in config_keys()}


def new_cells(section: str) -> list[str]:
    """The second cell of every row of a section's table in the page for Search-R1's users."""
    text = (ROOT / "docs" / "from-search-r1.md").read_text()
    rows = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1].splitlines()
    return [row.split("|")[2] for row in rows if row.startswith("| `") or row.startswith("| *")]


def known(key: str) -> bool:
    keys = config_keys()
    return key.startswith(FREE_MAPPINGS) or any(each == key or each.startswith(f"{key}.") for each in keys)


@pytest.mark.parametrize("page", ["from-search-r1.md", "evaluation.md"])
def test_new_keys_exist(page):
    cells = new_cells("Flags") if page == "from-search-r1.md" else [(ROOT / "docs" / page).read_text()]
    names = [name for cell in cells for name in re.findall(r"(?<![\w./-])((?:\w+\.)+\w+)(?==|`|\b)", cell)]
    modules = {name for name in names if (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()}
    keys = [
        name
        for name in names
        if name.partition(".")[0] in SECTIONS and name not in modules and name.rsplit(".", 1)[-1] not in ("md", "json")
    ]
    assert len(keys) > 8
    assert [key for key in keys if not known(key)] == []


def test_new_files_exist():
    files = [name for cell in new_cells("Files") for name in re.findall(r"`([\w/]+\.(?:py|yaml))`", cell)]
    assert len(files) > 15
    assert [name for name in files if not (ROOT / name).is_file()] == []
