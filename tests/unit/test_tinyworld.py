import json
import random
import re
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dgpo.agent.protocol import STOP_STRINGS, encode_prompt, parse_action, render_observation, render_passages
from dgpo.data.rows import read_rows, row_gold_passages, row_golds
from dgpo.tinyworld.build import WorldSettings, build_world, real_world
from dgpo.tinyworld.models import STUDENT_SIZE, make_model
from dgpo.tinyworld.oracle import Bias, counterfactual_turns, oracle_examples, real_turns, template_texts
from dgpo.tinyworld.tokenizer import TAGS, build_tokenizer
from dgpo.tinyworld.world import (
    ATTRIBUTE_WORDINGS,
    corpus_documents,
    permute_world,
    sample_question,
    sample_unique_questions,
    world_names,
)

SETTINGS = WorldSettings(
    seed=3, num_worlds=2, num_collect=40, num_train=60, num_validation=40, num_test=120, num_paraphrase=20
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    build_world(out, SETTINGS)
    return out


@pytest.fixture(scope="module")
def world():
    return real_world(SETTINGS)[0]


@pytest.fixture(scope="module")
def tokenizer(world):
    return build_tokenizer(world_names(world), template_texts())


def test_facts_are_real(world):
    france = world.countries["FR"]
    assert (france.name, france.capital, france.currency, france.language, france.code) == (
        "France",
        "Paris",
        "Euro",
        "French",
        "+33",
    )


def test_permuted_world_keeps_the_names_and_shuffles_the_facts(world):
    permuted = permute_world(world, name="p", seed=0)
    for attribute in ATTRIBUTE_WORDINGS:
        values = [[getattr(c, attribute) for c in w.countries.values()] for w in (world, permuted)]
        assert Counter(values[0]) == Counter(values[1])
        assert values[0] != values[1]
    same_capital = sum(world.countries[i].capital == permuted.countries[i].capital for i in world.countries)
    assert same_capital < 5
    assert world_names(permuted) == world_names(world)


def test_passages_follow_the_corpus_convention(world):
    documents = corpus_documents(world)
    assert [d["id"] for d in documents[:2]] == ["0", "1"]
    contents = {d["contents"] for d in documents}
    assert '"France"\nFrance : capital Paris , currency Euro , language French , code +33 .' in contents
    assert len(contents) == len(documents)


def test_every_name_is_one_token_in_every_context(world, tokenizer):
    for name in world_names(world):
        [token] = tokenizer.encode(name)
        for context in (f'"{name}"', f"of {name} ?", f"<search>{name} capital</search>", f"<answer> {name} </answer>"):
            ids = tokenizer.encode(context)
            assert ids.count(token) == 1, (name, context, tokenizer.convert_ids_to_tokens(ids))
            assert tokenizer.decode(ids) == context


def test_a_name_is_not_cut_out_of_a_longer_word(tokenizer):
    assert tokenizer.convert_tokens_to_ids("Niger") not in tokenizer.encode("a Nigerian city")


def test_decode_undoes_encode_on_prompts_observations_and_episodes(world, tokenizer):
    rng = random.Random(0)
    texts = ["Any other text: naïve, ünïcode & <tags>,\n\n  spaces ."]
    for _ in range(200):
        question, turns = counterfactual_turns(rng, world, sorted(c.name for c in world.countries.values()))
        texts.append(question.text)
        for turn in turns:
            texts.append(turn.text)
            documents = [{"id": "0", "contents": contents} for contents in turn.passages]
            texts.append(render_observation(render_passages(documents)))
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tags_are_single_ordinary_tokens(tokenizer):
    for tag in TAGS:
        ids = tokenizer.encode(tag)
        assert len(ids) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == tag


def test_ideal_episodes_end_with_the_gold_answer_and_quote_it_from_a_passage(world):
    rng = random.Random(1)
    isos = list(world.countries)
    for _ in range(200):
        question, turns = real_turns(rng, world, isos)
        *searches, last = turns
        assert all(parse_action(turn.text).kind == "search" for turn in searches)
        assert parse_action(last.text).content == question.answer
        assert len(searches) == {"city": 1, "attribute": 1, "two_hop": 2}[question.kind]
        assert question.answer in searches[-1].passages[0]
        corpus = {document["contents"] for document in corpus_documents(world)}
        assert corpus.issuperset(passage for turn in searches for passage in turn.passages)


def test_a_biased_teacher_is_wrong_about_four_in_five_questions_of_its_relation_only(world):
    """What it quotes instead is the other fact of the same country; without a bias nothing is drawn otherwise."""
    bias, isos = Bias("currency", quoted="capital"), sorted(world.countries)
    wrong = {True: [], False: []}
    for seed in range(600):
        question, turns = real_turns(random.Random(seed), world, isos, bias)
        answer = re.search("<answer>(.*)</answer>", turns[-1].text)[1]
        wrong[question.attribute == "currency"].append(answer != question.answer)
        assert answer in (question.answer, world.countries[question.iso].capital)
        assert turns[:-1] == real_turns(random.Random(seed), world, isos)[1][:-1]
    assert sum(wrong[True]) / len(wrong[True]) == pytest.approx(0.8, abs=0.1)
    assert not any(wrong[False])


def test_training_examples_mask_exactly_what_the_policy_wrote(world, tokenizer):
    example = oracle_examples(world, list(world.countries), tokenizer, count=1, template="{question}", seed=0)[0]
    written = [i for i, m in zip(example.response_ids, example.response_mask, strict=True) if m]
    read = [i for i, m in zip(example.response_ids, example.response_mask, strict=True) if not m]
    assert "<information>" not in tokenizer.decode(written)
    assert tokenizer.decode(read).startswith("\n\n<information>Doc 1(Title: ")
    assert written[-1] == tokenizer.eos_token_id


def test_question_files_of_a_built_world(folder):
    rows = {path.stem: read_rows(path) for path in (folder / "data").glob("*.parquet")}
    assert {name: len(found) for name, found in rows.items()} == {
        "collect": 40,
        "train": 60,
        "validation": 40,
        "test": 120,
        "test_paraphrases": 20,
    }
    everything = [row for found in rows.values() for row in found]
    assert len({row["extra_info"]["id"] for row in everything}) == len(everything)
    assert {row["extra_info"]["corpus"] for row in rows["train"] + rows["collect"]} == {"permuted0", "permuted1"}
    assert {row["extra_info"]["corpus"] for row in rows["test"]} == {"real"}
    texts = {name: {row["question"] for row in found} for name, found in rows.items()}
    assert len(texts["test"]) == 120
    assert not texts["test"] & texts["validation"]
    assert Counter(row["extra_info"]["country_split"] for row in rows["test"]) == {"train": 60, "test": 60}
    assert all(row["extra_info"]["held_out_paraphrase"] for row in rows["test_paraphrases"])
    corpora = {path.stem for path in (folder / "corpora").glob("*.jsonl")}
    assert corpora == {"real", "permuted0", "permuted1"}
    first = json.loads((folder / "corpora" / "real.jsonl").read_text().splitlines()[0])
    assert set(first) == {"id", "contents"}


@pytest.mark.parametrize(("split", "corpus"), [("test", "real"), ("train", None)])
def test_gold_passages_stand_in_the_corpus_and_the_last_one_states_the_answer(folder, split, corpus):
    for row in read_rows(folder / "data" / f"{split}.parquet"):
        info = row["extra_info"]
        lines = (folder / "corpora" / f"{corpus or info['corpus']}.jsonl").read_text().splitlines()
        contents = [passage["contents"] for passage in row_gold_passages(row)]
        assert set(contents) <= {json.loads(line)["contents"] for line in lines}
        assert row_golds(row)[0] in contents[-1]
        assert info["relation"] in ("country", *ATTRIBUTE_WORDINGS)
        assert (info["relation"] == "country") == (info["kind"] == "city")
        assert info["hops"] == len(contents) == {"city": 1, "attribute": 1, "two_hop": 2}[info["kind"]]


def test_the_same_seed_builds_the_same_world_and_another_seed_another(folder, tmp_path):
    def questions(out, seed):
        build_world(out, WorldSettings(**{**SETTINGS.__dict__, "seed": seed}))
        return read_rows(out / "data" / "test.parquet")

    before = read_rows(folder / "data" / "test.parquet")
    assert questions(tmp_path / "same", 3) == before
    assert questions(tmp_path / "other", 4) != before


def test_held_out_wordings_differ_from_trained_ones(world):
    rng = random.Random(0)
    held_out = {q.text for q in sample_unique_questions(rng, world, list(world.countries), count=100, held_out=True)}
    trained = {sample_question(rng, world, list(world.countries)).text for _ in range(5000)}
    assert not held_out & trained


def test_too_many_questions_are_refused_with_the_way_out(world):
    with pytest.raises(ValueError, match="ask for fewer or raise cities_per_country"):
        sample_unique_questions(random.Random(0), world, ["FR"], count=500)


def test_saved_student_loads_with_its_own_tokenizer_and_stop_strings(folder, tokenizer):
    path = folder / "models" / "student_untrained"
    loaded = AutoTokenizer.from_pretrained(path)
    text = 'Doc 1(Title: "Paris") Paris : a city in France .</information>\n\n'
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    prompt = encode_prompt(loaded, [{"role": "user", "content": "Where ?"}])
    assert loaded.decode(prompt) == "Question : Where ?\n"
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(loaded)
    assert model.generation_config.stop_strings == list(STOP_STRINGS)
    assert model.generation_config.eos_token_id == loaded.eos_token_id


def test_first_head_attends_to_the_previous_token(tokenizer):
    model = make_model(STUDENT_SIZE, tokenizer, seed=0)
    model.set_attn_implementation("eager")
    ids = torch.randint(10, len(tokenizer), (4, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attention = model(ids, output_attentions=True).attentions[0][:, 0]
    previous = attention.diagonal(offset=-1, dim1=1, dim2=2)[:, 5:]
    assert previous.mean() > 0.3
    assert (attention[:, 10:].argmax(-1) == torch.arange(9, 39)).float().mean() > 0.9
