"""The report in a real browser: filters return the run's own counts, text is inert, keys work, it fits a phone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dgpo.evaluation.report import write_report
from tests.browser.chromium import Chromium, find_chromium
from tests.browser.synthetic import HOSTILE, Episode, make_episodes, write_run, write_training_episodes

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        find_chromium() is None, reason="no Chromium or Chrome on the PATH (Debian and Ubuntu: apt install chromium)"
    ),
]

MODELS = ("teacher", "kd", "dgpo")
NUM_QUESTIONS = 300


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    return make_episodes(MODELS, NUM_QUESTIONS)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, episodes: list[Episode]) -> Path:
    """Everything in one file; three training episodes, the last of them not scored by the teacher."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "run", episodes)
    write_training_episodes(folder, teacher_log_probs=[-1.5, 0.0, None])
    return write_report(folder)


@pytest.fixture(scope="module")
def paged(tmp_path_factory: pytest.TempPathFactory, episodes: list[Episode]) -> Path:
    """The same episodes in files beside the page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dgpo.evaluation.browser.MAX_INLINE_BYTES", 0)
        return write_report(write_run(tmp_path_factory.mktemp("runs") / "paged", episodes))


def count(browser: Chromium) -> int:
    return int(browser.run("document.getElementById('episode-count').textContent.split(' ')[0]"))


def choose(browser: Chromium, **filters: str) -> int:
    """Sets the filters as a user would, all others back to their first choice. Returns the shown count."""
    for name in ("model", "set", "property", "outcome", "against", "searches", "text"):
        value = filters.get(name, str(MODELS.index("dgpo")) if name == "model" else "")
        browser.run(
            f"(() => {{ const field = document.getElementById('filter-{name}'); field.value = {value!r};"
            "field.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )
    return count(browser)


def test_each_filter_shows_as_many_questions_as_the_run_has(browser: Chromium, page: Path, episodes: list[Episode]):
    browser.open(page)
    dgpo, kd = ([episode for episode in episodes if episode.model == name] for name in ("dgpo", "kd"))
    assert choose(browser) == NUM_QUESTIONS
    assert choose(browser, set="two") == sum(e.set_name == "two" for e in dgpo) == 100
    assert choose(browser, outcome="correct") == sum(e.em for e in dgpo)
    assert choose(browser, outcome="failed") == sum(not e.em for e in dgpo)
    assert choose(browser, outcome="wrong") == sum(not e.em and e.status == "answered" for e in dgpo)
    assert choose(browser, outcome="search_failed") == sum(e.status == "search_failed" for e in dgpo)
    assert choose(browser, outcome="found") == sum(not e.em and e.hit for e in dgpo)
    assert choose(browser, outcome="unfound") == sum(not e.em and not e.hit for e in dgpo)
    assert choose(browser, property="kind=odd") == NUM_QUESTIONS // 2
    assert choose(browser, searches="2") == sum(e.num_searches == 2 for e in dgpo)
    assert choose(browser, searches="2+") == sum(e.num_searches >= 2 for e in dgpo)
    assert choose(browser, model="1", outcome="correct") == sum(e.em for e in kd)
    assert choose(browser, text="CITY 29") == sum("city 29" in e.question for e in dgpo)
    assert choose(browser, text="gold77") == 1
    assert choose(browser, text="one/100") == 1
    assert choose(browser, text="city language") == sum(e.num_searches > 0 for e in dgpo)  # in the queries
    assert choose(browser, text="nowhere in it") == 0


def test_filters_narrow_each_other_and_compare_with_another_model(
    browser: Chromium, page: Path, episodes: list[Episode]
):
    browser.open(page)
    by_model = {name: [episode for episode in episodes if episode.model == name] for name in MODELS}
    pairs = list(zip(by_model["dgpo"], by_model["kd"], strict=True))
    assert choose(browser, outcome="correct", against="failed-1") == sum(a.em and not b.em for a, b in pairs)
    assert choose(browser, outcome="failed", against="correct-1") == sum(b.em and not a.em for a, b in pairs)
    expected = sum(not a.em and b.em and a.set_name == "one" and a.num_searches == 1 for a, b in pairs)
    assert choose(browser, set="one", searches="1", outcome="failed", against="correct-1") == expected > 0


def test_a_set_takes_along_a_model_that_has_it_and_a_model_drops_a_set_that_it_has_not(browser: Chromium, page: Path):
    browser.open(page)

    def change(name: str, value: str) -> int:
        field = f"document.getElementById('filter-{name}')"
        browser.run(f"{field}.value = {value!r}; {field}.dispatchEvent(new Event('input'))")
        return count(browser)

    assert change("set", "training, step 10") == 3
    assert browser.run("document.getElementById('filter-model').selectedOptions[0].textContent") == "in training"
    assert change("model", "1") == NUM_QUESTIONS
    assert browser.run("document.getElementById('filter-set').value") == ""


def test_the_address_keeps_the_filters(browser: Chromium, page: Path, episodes: list[Episode]):
    browser.open(page)
    shown = choose(browser, set="two", outcome="correct")
    fragment = browser.run("location.hash")
    assert fragment == "#set=two&outcome=correct"
    browser.open(page, fragment)
    assert count(browser) == shown


def test_a_link_opens_the_chosen_question_where_it_stands_in_the_list(browser: Chromium, page: Path):
    browser.open(page)
    browser.run("choose(250)")
    wait_for(browser, "location.hash === '#question=one%2F250'")
    browser.open(page, "#question=one%2F250&view=mask")
    selected = "document.querySelector('[aria-selected=true]')"
    assert "city 250?" in browser.run("document.querySelector('#episode-detail h3').textContent")
    wait_for(browser, f"{selected}?.id === 'row-250'")
    assert browser.run("document.getElementById('episode-list').scrollTop") > 10_000
    browser.run("location.hash = '#set=two&question=two%2F30'")  # another link in the same tab
    wait_for(browser, f"{selected}?.id === 'row-30'")
    assert count(browser) == 100
    assert browser.run("state.view") == "text"


def test_a_button_clears_the_filters_and_escape_the_text(browser: Chromium, page: Path):
    browser.open(page)
    assert choose(browser, model="1", set="two", outcome="correct") < 100
    browser.run("document.getElementById('filter-clear').click()")
    assert count(browser) == NUM_QUESTIONS
    assert browser.run("document.getElementById('filter-model').value") == str(MODELS.index("dgpo"))
    browser.press("/")
    for key in "gold77":
        browser.press(key)
    assert count(browser) == 1
    browser.press("Escape")
    assert browser.run("document.getElementById('filter-text').value") == ""
    assert browser.run("document.activeElement.tagName") == "BODY"
    assert count(browser) == NUM_QUESTIONS


@pytest.mark.parametrize("kind", ["page", "paged"])
def test_text_of_a_model_is_shown_and_never_run(browser: Chromium, request: pytest.FixtureRequest, kind: str):
    path = request.getfixturevalue(kind)
    browser.open(path)
    assert choose(browser, text="onerror") == 1
    for view in ("text", "mask", "kl"):
        browser.run(f"setView('{view}')")
        wait_for(browser, "!document.querySelector('#episode-detail').textContent.includes('loading')")
        shown = browser.run("document.querySelector('#episode-detail').textContent")
        assert shown.count(HOSTILE) >= 3  # question, gold, and what the models wrote
    assert browser.run("document.title") == f"DGPO: {path.parent.name}"
    assert browser.run("document.querySelectorAll('img, iframe, article script').length") == 0
    assert browser.errors == []
    assert all(address.startswith("file://") for address in browser.requests)


def test_even_an_injected_script_would_not_run(browser: Chromium, page: Path):
    """The page's own policy: only the script whose hash it names, and no connection anywhere."""
    browser.open(page)
    browser.run(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.bad = 1'}))"
    )
    assert browser.run("window.bad === undefined")
    assert browser.run("fetch('http://127.0.0.1:1/').then(() => 'sent', (error) => 'refused')") == "refused"
    assert any("Content Security Policy" in error for error in browser.errors)


def wait_for(browser: Chromium, condition: str) -> None:
    deadline = time.monotonic() + 20
    while not browser.run(condition):
        assert time.monotonic() < deadline, f"never true: {condition}"
        time.sleep(0.02)


def test_parts_are_coloured_by_their_tags_and_writers_cannot_be_confused(browser: Chromium, page: Path):
    browser.open(page)
    choose(browser, searches="2", text="city")
    parts = browser.run(
        "[...document.querySelectorAll('article[data-model=dgpo] .text > span')].map((span) => span.className)"
    )
    assert parts == ["think", "search", "information"] * 2 + ["think", "answer"]
    # A policy may write <information> itself: that is its own text, not something that was retrieved.
    assert browser.run("JSON.stringify(partsOf(true, '<information>x</information>'))") == '[["",0,28]]'
    assert browser.run("JSON.stringify(partsOf(false, '<answer>x</answer>'))") == '[["notice",0,18]]'


def test_the_text_is_what_the_tokens_decode_to_also_over_split_characters(browser: Chromium, page: Path):
    browser.open(page)
    choose(browser, searches="1", text="city 1")
    text = browser.run("document.querySelector('article[data-model=dgpo] .text').textContent")
    assert text.startswith("<think>the é of dgpo</think><search>city language</search><information> people speak")


def test_the_token_mask_marks_what_the_policy_wrote(browser: Chromium, page: Path):
    browser.open(page)
    choose(browser, searches="1", text="city 1")
    browser.run("setView('mask')")
    trained, masked = (
        browser.run(
            f"[...document.querySelectorAll('article[data-model=dgpo] .token.{kind}')]"
            ".map((token) => token.textContent).join('')"
        )
        for kind in ("trained", "masked")
    )
    assert trained.startswith("<think>the ")
    assert trained.endswith("<think>so</think><answer>Lao</answer>")
    assert masked == f"\n\n<information>{' people speak' * 6}</information>\n\n"


def test_token_kl_is_shown_where_the_run_recorded_it_and_said_to_be_missing_elsewhere(browser: Chromium, page: Path):
    browser.open(page, "#view=kl")
    article = "document.querySelector('article')"
    assert "Not recorded: the teacher plays no part in an evaluation" in browser.run(f"{article}.textContent")
    training = str(len(MODELS))
    assert choose(browser, model=training, set="training, step 10") == 3
    notes = []
    for number in range(3):
        choose(browser, model=training, text=f"training question {number}")
        notes.append(browser.run("document.querySelector('article .note').textContent"))
    assert "mean 1.000 over" in notes[0]  # -0.5 of the student less -1.5 of the teacher
    assert "mean -0.500 over" in notes[1]
    assert "Not recorded: the teacher did not score this episode" in notes[2]
    choose(browser, model=training, text="training question 0")
    heats = browser.run(
        "JSON.stringify([...new Set([...document.querySelectorAll('.token.trained')].map(t => t.style.cssText))])"
    )
    assert heats == '["--heat: 50%; --tone: var(--line-2);"]'
    assert browser.run("document.querySelectorAll('.token.masked[style]').length") == 0


def test_models_stand_beside_each_other_on_the_same_question(browser: Chromium, page: Path):
    browser.open(page)
    shown = "[...document.querySelectorAll('article')].map((side) => side.dataset.model).join()"
    assert browser.run(shown) == "teacher,dgpo"
    browser.run("[...document.querySelectorAll('.chip')].find((chip) => chip.textContent === 'kd').click()")
    assert browser.run(shown) == "teacher,kd,dgpo"
    top = browser.run("[...new Set([...document.querySelectorAll('article')].map(a => a.offsetTop))].length")
    assert top == 1  # one row of columns


def test_the_keyboard_moves_through_the_list_and_switches_views(browser: Chromium, page: Path):
    browser.open(page)
    selected = "document.querySelector('[aria-selected=true]').id"
    assert browser.run(selected) == "row-0"
    browser.press("j")
    browser.press("j")
    browser.press("k")
    assert browser.run(selected) == "row-1"
    browser.press("t")
    assert browser.run("document.querySelectorAll('.token.trained').length") > 0
    browser.press("/")
    assert browser.run("document.activeElement.id") == "filter-text"
    browser.press("j")  # typed, not a command
    assert browser.run("document.getElementById('filter-text').value") == "j"
    browser.press("Escape")
    browser.run("document.getElementById('episode-list').focus()")
    browser.press("End")
    assert browser.run(selected) == f"row-{NUM_QUESTIONS - 1}"
    assert browser.run("document.getElementById('episode-list').scrollTop") > 10_000


def test_only_the_visible_part_of_the_list_is_drawn(browser: Chromium, page: Path):
    browser.open(page)
    assert browser.run("document.querySelectorAll('.row').length") < 50


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_width_in_both_schemes(browser: Chromium, page: Path, width: int, scheme: str):
    browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.open(page, width=width)
    assert browser.run("innerWidth") == width
    assert browser.run("document.documentElement.scrollWidth") <= width
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(246, 247, 249)", "dark": "rgb(18, 22, 28)"}[scheme]
    browser.send("Emulation.setEmulatedMedia", features=[])


def test_a_page_without_its_folder_says_so(browser: Chromium, paged: Path, tmp_path: Path):
    alone = tmp_path / "report.html"
    alone.write_bytes(paged.read_bytes())
    browser.open(alone)
    assert count(browser) == NUM_QUESTIONS
    wait_for(browser, "document.querySelector('article').textContent.includes('report_episodes beside this page')")


@pytest.mark.slow
def test_fifty_thousand_episodes_are_written_in_a_minute_and_filtered_in_two_seconds(
    browser: Chromium, tmp_path: Path, record_property: pytest.RecordProperty
):
    episodes = make_episodes(("kd", "dgpo"), 25_000)
    folder = write_run(tmp_path / "run", episodes, words_per_passage=60)
    started = time.perf_counter()
    page = write_report(folder)
    written_s = time.perf_counter() - started
    opened_s = browser.open(page)
    expected = sum(e.model == "dgpo" and not e.em and e.num_searches >= 2 for e in episodes)
    filter_ms = []
    for fields in ({"outcome": "failed"}, {"searches": "2+"}, {"text": "lang"}):
        for name, value in fields.items():
            filter_ms.append(
                browser.run(
                    f"(() => {{ const f = document.getElementById('filter-{name}'); f.value = {value!r};"
                    "const started = performance.now(); f.dispatchEvent(new Event('input'));"
                    "return performance.now() - started; })()"
                )
            )
    assert count(browser) == expected
    wait_for(browser, "!!document.querySelector('article .think')")
    size = page.stat().st_size
    print(f"written {written_s:.1f} s, {size / 1e6:.1f} MB, opened {opened_s:.2f} s, filters {filter_ms} ms")
    assert written_s < 60
    assert size < 50e6
    assert opened_s < 2
    assert max(filter_ms) < 2000
