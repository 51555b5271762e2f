"""A hub of our own: corpus, index, question sets and models in the layouts that `dgpo download` fetches, all made here.

Towns, rivers and questions are invented. The models have their families' shapes in small, and were trained until they
know by heart the episodes that a script plays on these questions, so that `collect` finds correct ones by itself.
tests/e2e/hub_cache.py keeps what is made here between sessions of pytest.

python -m tests.e2e.local_hub FOLDER    writes FOLDER/{datasets,models}/<owner>/<name>/ and FOLDER/made_of.json
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dgpo.config.load import load_config
from dgpo.config.schema import Config, DistillConfig
from dgpo.engines.environment import export_environment
from tests.e2e.hub_cache import MADE_OF, current_sources
from tests.unit.tokenizer_kinds import CONSTANT_DATE, HEADERS, TODAYS_DATE

SIZES = [
    "hardware=cpu",
    "episode.max_turns=2",
    "episode.max_turn_tokens=64",
    "episode.max_prompt_tokens=320",
    "episode.max_response_tokens=448",
    "episode.min_turn_tokens=16",
    "episode.topk=2",
    "episode.max_passage_tokens=48",
]
NAMES = """
Orvella Brinmar Tesskog Haldane Ulverin Marquil Sandrec Pelloway Kirnost Dravena Lomond Vastero Quillan Jorvice Aldmoor
Fennick""".split()  # noqa: SIM905
RIVERS = """
Tamsin Ouledd Brakka Silvane Nerrow Ithaca Corvin Dunmere Elsted Farrow Gindel Hexley Ilmara Jessop Kolm Lavant
""".split()  # noqa: SIM905
SEAS = ("Amber Sea", "Copper Bay", "Long Sound", "Northern Gulf")
MAYORS = """
Ruth Ines Karl Odette Piet Salome Tomas Ursula Viktor Wanda Yannick Zelda Anselm Berta Clovis Dagny
""".split()  # noqa: SIM905
SURNAMES = ("Calder", "Benning", "Ostrow", "Hallam", "Vance", "Merrit", "Lund", "Sorel")
POSITIONS, VOCABULARY = 2048, 900
PADDED_VOCABULARY = 1024  # rows of the embedding, more than there are tokens, as Qwen's have
NUM_LEARNED = 20  # questions that the models know, the first of the training set
TEACHER_STEPS, COLD_STEPS, STUDENT_STEPS = 140, 40, 12
LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
MOST_TEXTS_OF_A_NAME = 7
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Town:
    name: str
    river: str
    sea: str
    mayor: str
    founded: str

    @property
    def passage(self) -> tuple[str, str]:
        where = f"{self.name} lies on the river {self.river}."
        return self.name, f"{where} Its mayor is {self.mayor}. It was founded in {self.founded}."

    @property
    def river_passage(self) -> tuple[str, str]:
        return self.river, f"{self.river} is a river that ends in the {self.sea}."

    def questions(self) -> list[tuple[str, str]]:
        return [
            (f"Which river flows through {self.name}?", self.river),
            (f"Who is the mayor of {self.name}?", self.mayor),
            (f"In which year was {self.name} founded?", self.founded),
        ]

    def two_hops(self) -> tuple[str, str]:
        return f"Where does the river of {self.name} end?", self.sea


TOWNS = [
    Town(name, RIVERS[i], SEAS[i % 4], f"{MAYORS[i]} {SURNAMES[i % 8]}", str(1203 + 37 * i))
    for i, name in enumerate(NAMES)
]
PASSAGES = [town.passage for town in TOWNS] + [town.river_passage for town in TOWNS]
CONTENTS = [f'"{title}"\n{text}' for title, text in PASSAGES]


def simple(split: str, number: int, question: str, answer: str, **metadata: Any) -> dict[str, Any]:
    """A line of FlashRAG's files."""
    line = {"id": f"{split}_{number}", "question": question, "golden_answers": [answer]}
    return {**line, "metadata": metadata} if metadata else line


def hotpot(split: str, number: int, town: Town) -> dict[str, Any]:
    titles, texts = zip(town.passage, town.river_passage, strict=True)
    facts = {"title": list(titles), "sent_id": [0, 0]}
    context = {"title": list(titles), "sentences": [[text] for text in texts]}
    question, answer = town.two_hops()
    more = {"type": "bridge", "level": "easy", "supporting_facts": facts, "context": context}
    return simple(split, number, question, answer, **more)


def two_wiki(number: int, town: Town) -> dict[str, Any]:
    line = hotpot("dev", number, town)
    line["metadata"]["context"]["content"] = line["metadata"]["context"].pop("sentences")
    return line


def musique(number: int, town: Town) -> dict[str, Any]:
    steps = [
        {"question": "?", "answer": "?", "support_paragraph": {"title": title, "paragraph_text": text}}
        for title, text in (town.passage, town.river_passage)
    ]
    return simple("dev", number, *town.two_hops(), question_decomposition=steps)


def question_files() -> dict[str, list[dict[str, Any]]]:
    """FlashRAG's files by name."""
    asked = [pair for town in TOWNS for pair in town.questions()]
    few = asked[:4]
    return {
        "nq/train.jsonl": [simple("train", i, *pair) for i, pair in enumerate(asked)],
        "nq/test.jsonl": [simple("test", i, *pair) for i, pair in enumerate(asked[4:8])],
        "hotpotqa/train.jsonl": [hotpot("train", i, town) for i, town in enumerate(TOWNS)],
        "hotpotqa/dev.jsonl": [hotpot("dev", i, town) for i, town in enumerate(TOWNS[:4])],
        "triviaqa/test.jsonl": [simple("test", i, *pair) for i, pair in enumerate(few)],
        "popqa/test.jsonl": [simple("test", i, *pair, prop="capital") for i, pair in enumerate(few)],
        "2wikimultihopqa/dev.jsonl": [two_wiki(i, town) for i, town in enumerate(TOWNS[4:8])],
        "musique/dev.jsonl": [musique(i, town) for i, town in enumerate(TOWNS[8:12])],
        "bamboogle/test.jsonl": [simple("test", i, *pair) for i, pair in enumerate(few)],
    }


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def train_rows() -> list[dict[str, Any]]:
    """Search-R1's training set holds the same questions in the schema of data/train.parquet."""
    from dgpo.data.questions import parse_question, question_rows

    rows = []
    for source in ("nq", "hotpotqa"):
        questions = [parse_question(line, default_id="") for line in question_files()[f"{source}/train.jsonl"]]
        rows += question_rows(questions, source=source, split="train", with_passages=True)
    return rows


def write_data_sets(folder: Path, encoder: Path) -> None:
    import gzip

    import faiss

    from dgpo.data.rows import write_rows
    from retriever.encoder_config import EncoderConfig
    from retriever.encoders import load_encoder

    for name, lines in question_files().items():
        write_lines(folder / "RUC-NLPIR" / "FlashRAG_datasets" / name, lines)
    corpus = folder / "PeterJinGo" / "wiki-18-corpus" / "wiki-18.jsonl.gz"
    index = folder / "PeterJinGo" / "wiki-18-e5-index"
    train = folder / "PeterJinGo" / "nq_hotpotqa_train" / "train.parquet"
    for path in (corpus, index / "x", train):
        path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": str(i), "contents": contents}) + "\n" for i, contents in enumerate(CONTENTS)]
    corpus.write_bytes(gzip.compress("".join(lines).encode()))
    write_rows(train, train_rows())
    vectors = load_encoder(EncoderConfig(spec=str(encoder), preset="e5")).encode_passages(CONTENTS)
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    data = faiss.serialize_index(flat).tobytes()
    (index / "part_aa").write_bytes(data[: len(data) // 2])
    (index / "part_ab").write_bytes(data[len(data) // 2 :])


def write_encoder(folder: Path) -> Path:
    """BERT's shape without layers: the mean of random word vectors, in which words of many texts count for little."""
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    wordpiece = BertWordPieceTokenizer(lowercase=True)
    texts = [*CONTENTS, *(question for town in TOWNS for question, _ in town.questions()), "query: passage:"]
    wordpiece.train_from_iterator(texts * 4, vocab_size=800, show_progress=False)
    tokenizer = BertTokenizerFast(tokenizer_object=wordpiece._tokenizer, model_max_length=512)
    counts = torch.zeros(len(tokenizer))
    for text in texts:
        counts[sorted(set(tokenizer(text)["input_ids"]))] += 1
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=96, num_hidden_layers=0, num_attention_heads=3, intermediate_size=96
    )
    model = BertModel(config)
    with torch.no_grad():
        embeddings = model.embeddings
        embeddings.position_embeddings.weight.zero_()
        embeddings.token_type_embeddings.weight.zero_()
        # Normalisation makes the rest of a vector small where one coordinate is large, and then drops that one.
        embeddings.word_embeddings.weight[:, 0] = (counts > MOST_TEXTS_OF_A_NAME).float()
        embeddings.LayerNorm.weight[0] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def texts() -> list[str]:
    """What tokenizers are learned from: everything that an episode holds."""
    from dgpo.agent.protocol import INVALID_ACTION_TEXT, build_messages
    from dgpo.coldstart.oracle import FIRST_THOUGHTS

    prompts = [build_messages(question)[0]["content"] for town in TOWNS for question, _ in town.questions()]
    tags = "<think> </think>\n<search> </search> <answer> Doc 1"
    return prompts + [*CONTENTS, *FIRST_THOUGHTS, INVALID_ACTION_TEXT, tags] * 4


def qwen_tokenizer() -> Any:
    """Byte-level BPE with Qwen's splitting rules and its names for turns, learned from our own texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    pieces = Qwen2Tokenizer()._tokenizer.pre_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pieces
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    qwen = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=POSITIONS,
    )
    qwen.chat_template = CHAT_TEMPLATE
    return qwen


def learned(tokenizer: Any, special: list[str], alphabet: list[str]) -> Any:
    from tokenizers import trainers

    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def byte_level(special: list[str], *, digits: str, eos: str, template: str, **names: Any) -> Any:
    """Byte-level BPE, in which numbers are cut by `digits`: Llama 3's and SmolLM2's kind."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(digits), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = learned(tokenizer, special, sorted(pre_tokenizers.ByteLevel.alphabet()))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, model_max_length=POSITIONS, **names)
    wrapped.chat_template = template
    return wrapped


def llama_tokenizer(template: str = TODAYS_DATE) -> Any:
    """Llama 3's kind: no pad token, two end tokens, a date in the template (3.1: a constant one; 3.2: today's)."""
    return byte_level(list(HEADERS), digits=r"\p{N}{1,3}", eos=HEADERS[-1], template=template, bos_token=HEADERS[0])


def oracle_episodes(tokenizer: Any, encoder: Path, config: Config) -> list[Any]:
    """What a script plays on the training questions against the very index that the hub holds."""
    import numpy as np

    from dgpo.agent.episode import EpisodeLimits, run_episode
    from dgpo.coldstart.collect import COLLECT_STOP_STRINGS
    from dgpo.coldstart.examples import TrainingExample
    from dgpo.coldstart.oracle import OraclePolicy
    from dgpo.engines.episode_runner import plan_episodes
    from retriever.encoder_config import EncoderConfig
    from retriever.encoders import load_encoder

    model = load_encoder(EncoderConfig(spec=str(encoder), preset="e5"))
    vectors = model.encode_passages(CONTENTS)

    class Index:
        async def search(self, query: str, *, topk: int, corpus: str | None) -> list[dict[str, str]]:
            found = np.argsort(-(vectors @ model.encode_queries([query])[0]))[:topk]
            return [{"id": str(i), "contents": CONTENTS[i]} for i in found]

    planned = plan_episodes(train_rows()[:NUM_LEARNED], tokenizer, config=config)
    policy = OraclePolicy(tokenizer, planned, seed=1)
    limits = EpisodeLimits(**{k: v for k, v in asdict(config.episode).items() if k != "max_prompt_tokens"})

    async def play() -> list[Any]:
        return [
            await run_episode(
                episode_id=episode.episode_id,
                prompt_ids=episode.prompt_ids,
                policy=policy,
                search=Index(),
                tokenizer=tokenizer,
                limits=limits,
                stop=COLLECT_STOP_STRINGS,
            )
            for episode in planned
        ]

    played = asyncio.run(play())
    answered = [each for each in played if each.answer]
    print(f"{len(answered)} of {len(played)} scripted episodes have an answer")
    return [TrainingExample.from_trajectory(each) for each in answered]


def make_qwen(tokenizer: Any, *, seed: int) -> Any:
    """Qwen2.5's shape in small: biases of queries, keys and values, tied embeddings with rows to spare."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    from dgpo.tinyworld.models import initialize

    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    config = Qwen2Config(
        vocab_size=PADDED_VOCABULARY,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    initialize(model, generator=torch.Generator().manual_seed(seed))
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    return model


def make_llama(tokenizer: Any, *, seed: int) -> Any:
    """Llama 3's shape in small: scaled RoPE, two tokens that end a turn, none that pads."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    from dgpo.tinyworld.models import initialize

    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(HEADERS[1])]
    config = LlamaConfig(
        vocab_size=PADDED_VOCABULARY,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=POSITIONS,
        rope_parameters=LLAMA_ROPE,
        attention_bias=True,  # unlike Llama's: the initialisation that learns in a minute sets them
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    initialize(model, generator=torch.Generator().manual_seed(seed))
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=ends)
    return model


@dataclass(frozen=True)
class HubModel:
    """`steps` of training on the episodes; `template` is a Llama's, whose two generations word it differently."""

    name: str
    steps: int
    template: str | None = None


# Teachers know the episodes by heart, students have begun to, what a teacher is made from is a beginner.
QWENS = (
    HubModel("omron-sinicx/SearchR1-ppo-qwen2.5-3b-instruct", TEACHER_STEPS),
    HubModel("Qwen/Qwen2.5-0.5B-Instruct", STUDENT_STEPS),
    HubModel("Qwen/Qwen2.5-3B-Instruct", 1),
    HubModel("omron-sinicx/Qwen2.5-0.5B-Instruct-kd", COLD_STEPS),
    HubModel("omron-sinicx/DGPO-qwen2.5-0.5b", COLD_STEPS),
)
# Nobody published the pair's teacher: the model that it is made from stands in for it.
LLAMAS = (
    HubModel("meta-llama/Llama-3.1-8B-Instruct", TEACHER_STEPS, CONSTANT_DATE),
    HubModel("meta-llama/Llama-3.2-1B-Instruct", STUDENT_STEPS, TODAYS_DATE),
)


def write_untrained_llamas(folder: Path) -> None:
    """The pair llama8b_1b with random weights, in FOLDER/models: enough for all that is looked at before a run."""
    for seed, model in enumerate(LLAMAS):
        tokenizer = llama_tokenizer(model.template or TODAYS_DATE)
        path = folder / "models" / model.name
        make_llama(tokenizer, seed=seed).save_pretrained(path)
        tokenizer.save_pretrained(path)


def write_models(folder: Path, encoder: Path) -> dict[str, float]:
    """Every model of the hub, trained. Returns the seconds that each took, by name."""
    from dgpo.coldstart.train import train_on_examples

    config = load_config(SIZES)
    seconds = {}
    for kind, family in ((make_qwen, QWENS), (make_llama, LLAMAS)):
        played = llama_tokenizer() if family is LLAMAS else qwen_tokenizer()
        examples = oracle_episodes(played, encoder, config)
        for seed, model in enumerate(family, start=1):
            started = time.monotonic()
            tokenizer = llama_tokenizer(model.template) if model.template else played
            recipe = DistillConfig(
                loss="seqkd",
                batch_size=4,
                max_steps=model.steps,
                learning_rate=3e-3,
                warmup_ratio=0.1,
                held_out_share=0.0,
            )
            train_on_examples(
                kind(tokenizer, seed=seed),
                None,
                examples,
                tokenizer,
                checkpoint=folder / model.name,
                metrics=folder.parent / f"{model.name.replace('/', '-')}.jsonl",
                settings=recipe,
                hardware=config.hardware,
                seed=seed,
                name=model.name,
            )
            seconds[model.name] = round(time.monotonic() - started, 1)
    return seconds


def main(folder: Path) -> None:
    export_environment(load_config(SIZES).hardware)
    early = current_sources()  # a file that is edited while this runs is recorded as it was read
    encoder = write_encoder(folder / "models" / "intfloat" / "e5-base-v2")
    write_data_sets(folder / "datasets", encoder)
    seconds = write_models(folder / "models", encoder)
    record = {"sources": current_sources() | early, "seconds": seconds}
    (folder / MADE_OF).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
