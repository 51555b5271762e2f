"""Tokenizers of the hub's kinds, trained on a few sentences: what their families do, and none of their contents."""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = ["Who wrote the novel about the whale?", "<search> the capital of Brazil </search>", "<answer> 1984 </answer>"]
HEADERS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
ANSWER = "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
TURNS = (
    """<|begin_of_text|>{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>

Today: {{ date_string }}

{{ message['content'] }}<|eot_id|>{% endfor %}"""
    + ANSWER
)
CONSTANT_DATE = "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}" + TURNS
TODAYS_DATE = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}" + TURNS
)


def llama_like(folder: Path, *, template: str = CONSTANT_DATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE as Llama 3's: no pad token, an end of text besides the end of a turn, a date in the template."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=HEADERS[0],
        eos_token=HEADERS[-1],
        additional_special_tokens=list(HEADERS[1:-1]),
    )
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    return wrapped
