"""The tiny world's tokenizer: byte-level BPE in which every name is one token wherever it stands.

A model this small cannot learn to spell names out (with names split into pieces nothing generalised), so each
name is an added token without spaces, the same one in `"Lyon"`, ` Lyon ` and `Lyon?`. Words keep a space on
their left only after a name, and the one on their right; the fixed frames of an observation are single pieces.
Any other text still round-trips, byte by byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"
TAGS = tuple(f"<{slash}{tag}>" for tag in ("think", "search", "information", "answer") for slash in ("", "/"))
# Longest frames first: passage head, end of a title, words and punctuation with their spaces, line breaks.
PIECES = r'Doc \d+\(Title: "|"\) |[ ]?[A-Za-z]+[ ]?|[ ]?[^A-Za-z\s]+[ ]?|\n+|\s+'
CHAT_TEMPLATE = "{% for message in messages %}{{ 'Question : ' + message['content'] + '\\n' }}{% endfor %}"
MODEL_MAX_LENGTH = 1024
VOCAB_SIZE = 800


def build_tokenizer(names: Iterable[str], texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A Hugging Face fast tokenizer with a chat template.

    `names` become one token each. `texts` are samples of everything else that will be read or written, with
    the names left out; their bytes and merges are `VOCAB_SIZE`, names come on top.
    The tags are ordinary tokens (not "special"), so that decoding with skip_special_tokens keeps them.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    tokenizer.add_tokens(
        # single_word: "Niger" must not be cut out of "Nigeria"; codes start with "+", which is no word character.
        [AddedToken(n, normalized=False, special=False, single_word=n[0].isalpha()) for n in sorted(set(names))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=MODEL_MAX_LENGTH,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
