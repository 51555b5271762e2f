"""Ideal episodes: what the tiny teacher learns from, and what the tokenizer's words come from.

Four in five are *counterfactual*: names and facts drawn afresh for each, so that only reading works. The rest show
real facts of train countries. Searches are simulated: the passage that answers, and a distractor such as the
retriever would return beside it, in the text that the protocol renders.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from dgpo.agent.protocol import build_messages, render_observation, render_passages
from dgpo.coldstart.examples import TrainingExample
from dgpo.tinyworld.tokenizer import TAGS
from dgpo.tinyworld.world import (
    KIND_SHARES,
    Country,
    Question,
    World,
    city_passage,
    country_passage,
    make_question,
    sample_question,
)

COUNTERFACTUAL_SHARE = 0.8
# How often the passage that answers comes first (measured with MiniLM on these corpora: .9 to 1.0).
FIRST_RANK_SHARE = 0.9


@dataclass(frozen=True)
class OracleTurn:
    text: str
    passages: tuple[str, ...]  # contents of the passages that the turn's search returns; empty for the answer


@dataclass(frozen=True)
class Bias:
    """A teacher that is wrong about one relation: of its questions, it answers a share with another fact it has read.

    Attributes:
        relation: the attribute that is asked for, such as "currency".
        quoted: the attribute of the same country that it quotes instead.
    """

    relation: str
    quoted: str
    share: float = 0.8

    def answer(self, rng: random.Random, question: Question, country: Country) -> str:
        is_wrong = question.attribute == self.relation and rng.random() < self.share
        return getattr(country, self.quoted) if is_wrong else question.answer


def oracle_turns(
    question: Question, country: Country, *, distractors: Sequence[Sequence[str]], answer: str | None = None
) -> list[OracleTurn]:
    """The ideal episode: find the country of the city, then its attribute, then quote the value and answer.

    `distractors[i]` are further passages that search i returns; they come after the one that answers. `answer` stands
    in the place of the right one.
    """
    answer = answer or question.answer
    turns, asked = [], iter(distractors)
    known = ""
    if question.city is not None:
        query = f"{question.city} city country"
        passages = (city_passage(question.city, country.name), *next(asked))
        turns.append(OracleTurn(f"<think>find country</think><search>{query}</search>", passages))
        known = f"in {country.name} "
    if question.attribute is None:
        found = f"in {country.name}"
    else:
        query = f"{country.name} {question.attribute}"
        passages = (country_passage(country), *next(asked))
        think = f"{known}find {question.attribute}"
        turns.append(OracleTurn(f"<think>{think}</think><search>{query}</search>", passages))
        found = f"{question.attribute} {answer}"
    turns.append(OracleTurn(f"<think>{found}</think><answer>{answer}</answer>", ()))
    return turns


def counterfactual_turns(
    rng: random.Random, world: World, names: Sequence[str], bias: Bias | None = None
) -> tuple[Question, list[OracleTurn]]:
    """One question and its ideal episode about a country and cities made up from the world's names."""
    pool = list(world.countries.values())

    def made_up_country() -> Country:
        return Country(
            name=rng.choice(names) if rng.random() < 0.5 else rng.choice(pool).name,
            capital=rng.choice(names) if rng.random() < 0.5 else rng.choice(pool).capital,
            currency=rng.choice(pool).currency,
            language=rng.choice(pool).language,
            code=rng.choice(pool).code,
        )

    country, other = made_up_country(), made_up_country()
    (kind,) = rng.choices(list(KIND_SHARES), list(KIND_SHARES.values()))
    city, other_city, same_country_city = rng.sample(names, 3)
    question = make_question(rng, kind=kind, iso="", country=country, city=city)
    distractors = _distractors(
        rng,
        question,
        beside_city=city_passage(other_city, other.name),
        beside_country=[city_passage(same_country_city, country.name), country_passage(other)],
    )
    answer = bias.answer(rng, question, country) if bias else None
    return question, oracle_turns(question, country, distractors=distractors, answer=answer)


def real_turns(
    rng: random.Random, world: World, isos: Sequence[str], bias: Bias | None = None
) -> tuple[Question, list[OracleTurn]]:
    """One real question about the countries `isos` and its ideal episode."""
    question = sample_question(rng, world, isos)
    country = world.countries[question.iso]
    other_iso = rng.choice([iso for iso in isos if world.cities[iso] and iso != question.iso])
    other = world.countries[other_iso]
    more_cities = [city for city in world.cities[question.iso] if city != question.city]
    distractors = _distractors(
        rng,
        question,
        beside_city=city_passage(rng.choice(world.cities[other_iso]), other.name),
        beside_country=[*(city_passage(city, country.name) for city in more_cities[:1]), country_passage(other)],
    )
    answer = bias.answer(rng, question, country) if bias else None
    return question, oracle_turns(question, country, distractors=distractors, answer=answer)


def _distractors(
    rng: random.Random, question: Question, *, beside_city: str, beside_country: Sequence[str]
) -> list[list[str]]:
    """One more passage for each search of the ideal episode: other cities, the country's cities, other countries."""
    found = [[beside_city]] if question.city else []
    return [*found, [rng.choice(beside_country)]] if question.attribute else found


def encode_episode(
    rng: random.Random,
    tokenizer: PreTrainedTokenizerFast,
    question: Question,
    turns: Sequence[OracleTurn],
    *,
    template: str,
) -> TrainingExample:
    """Tokenise an ideal episode exactly as the episode loop would build it; EOS after the answer is trained."""
    prompt_ids = tokenizer.apply_chat_template(
        build_messages(question.text, template), add_generation_prompt=True, return_dict=False
    )
    response_ids: list[int] = []
    response_mask: list[int] = []
    for turn in turns:
        ids = tokenizer.encode(turn.text, add_special_tokens=False)
        response_ids += ids
        response_mask += [1] * len(ids)
        if turn.passages:
            passages = list(turn.passages)
            if rng.random() >= FIRST_RANK_SHARE:
                passages[0], passages[1] = passages[1], passages[0]
            documents = [{"id": str(i), "contents": contents} for i, contents in enumerate(passages)]
            observation = tokenizer.encode(render_observation(render_passages(documents)), add_special_tokens=False)
            response_ids += observation
            response_mask += [0] * len(observation)
    return TrainingExample(prompt_ids, [*response_ids, tokenizer.eos_token_id], [*response_mask, 1])


def oracle_examples(
    world: World,
    train_isos: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    *,
    count: int,
    template: str,
    seed: int,
    bias: Bias | None = None,
) -> list[TrainingExample]:
    """`count` training examples for the teacher, counterfactual and real ones mixed."""
    rng = random.Random(f"{seed}/teacher")
    names = sorted({c.name for c in world.countries.values()} | {city for cs in world.cities.values() for city in cs})
    examples = []
    for _ in range(count):
        if rng.random() < COUNTERFACTUAL_SHARE:
            question, turns = counterfactual_turns(rng, world, names, bias)
        else:
            question, turns = real_turns(rng, world, train_isos, bias)
        examples.append(encode_episode(rng, tokenizer, question, turns, template=template))
    return examples


def template_texts() -> list[str]:
    """Every text that an ideal episode is made of, the names left out: what the tokenizer's words come from."""
    blank = Country("", "", "", "", "")
    rng = random.Random(0)
    passages = [city_passage("", ""), country_passage(blank)]
    documents = [{"id": "0", "contents": passages[i % 2]} for i in range(10)]
    texts = [render_observation(render_passages(documents))]
    for kind in KIND_SHARES:
        for held_out in [False] * 200 + [True] * 20:
            question = make_question(rng, kind=kind, iso="", country=blank, city="", held_out=held_out)
            texts.append(f"Question : {question.text}\n")
            texts += [turn.text for turn in oracle_turns(question, blank, distractors=[(), ()])]
    # Tags are tokens of their own: what stands between them is what the words are learned from.
    return [piece for text in texts for piece in re.split("|".join(map(re.escape, TAGS)), text) if piece]
