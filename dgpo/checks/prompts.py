"""Prompts as a model will read them, rendered and counted before anything starts, without importing torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dgpo.agent.protocol import TEMPLATE_VARIABLES, build_messages, encode_prompt
from dgpo.agent.trajectory import Trajectory
from dgpo.config.model_files import chat_template, model_file, read_json
from dgpo.config.schema import Config, ModelConfig
from dgpo.errors import ConfigError, one_line

Messages = Sequence[Mapping[str, str]]
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class PromptReader:
    """A model's chat template and tokenizer.

    Args:
        model: folder or hub name.
        key: of the configuration, to name in messages.
        trust_remote_code: for a tokenizer that is code.

    Raises:
        ConfigError: it has no chat template, or a tokenizer that cannot be read.
    """

    def __init__(self, model: str, *, key: str, trust_remote_code: bool = False) -> None:
        self.name = f"{key}={model}"
        self._overhead: dict[tuple[str, ...], int] = {}  # roles -> bytes that the template adds
        file = model_file(model, "tokenizer.json", key=key)
        if file is None:
            self._render, self._count = _of_transformers(model, self.name, trust_remote_code)
            return
        tokenizer = _tokenizer(file, self.name)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._render = _renderer(model, key, self.name)
        self._count = lambda messages: len(tokenizer.encode(self._render(messages), add_special_tokens=False).ids)

    def check_template(self) -> None:
        """Raises `ConfigError` where a question does not survive the template."""
        self._template_bytes(build_messages("Who was it?"), "an example question")

    def check_lengths(self, rows: Sequence[Mapping[str, Any]], *, source: str, limit: int) -> None:
        """Raises `ConfigError` for the first row whose prompt has more than `limit` tokens, or cannot be rendered.

        A token is a byte at least, so that most prompts need not be cut into tokens to be known short.

        Args:
            source: key and file of the rows, for the message.
        """
        for index, row in enumerate(rows):
            messages, where = row["prompt"], f"{source}, row {index}"
            size = sum(len(message["content"].encode(errors="replace")) for message in messages)
            if size + self._template_bytes(messages, where) <= limit:
                continue
            num_tokens = self._count(messages)
            if num_tokens > limit:
                raise ConfigError(
                    f"{where}: its prompt has {num_tokens} tokens, more than episode.max_prompt_tokens={limit}: raise "
                    "the limit, or drop the row"
                )

    def _template_bytes(self, messages: Messages, where: str) -> int:
        """What the template adds to messages of these roles, at most; rendered once."""
        roles = tuple(message["role"] for message in messages)
        if roles not in self._overhead:
            try:
                text = self._render(messages)
            except Exception as error:  # a template is a program of its author's
                reason = one_line(error)
                raise ConfigError(
                    f"{self.name}: its chat template fails on {where} ({type(error).__name__}: {reason}); correct the "
                    "template, or the roles of the prompt"
                ) from None
            contents = [message["content"].strip() for message in messages]
            if contents[-1] not in text:
                raise ConfigError(f"{self.name}: its chat template leaves out what {where} asks; correct the template")
            self._overhead[roles] = len(text.encode(errors="replace")) - sum(
                len(each.encode(errors="replace")) for each in contents
            )
        return self._overhead[roles]


def check_prompts(
    config: Config, model: str, rows: Sequence[Mapping[str, Any]], *, key: str, source: str, loaded_as: ModelConfig
) -> None:
    """`PromptReader.check_lengths` of one model and one file of questions."""
    reader = PromptReader(model, key=key, trust_remote_code=loaded_as.trust_remote_code)
    reader.check_template()
    reader.check_lengths(rows, source=source, limit=config.episode.max_prompt_tokens)


def check_tokens(model: str, episode: Trajectory, *, key: str, source: str) -> None:
    """Raises `ConfigError` where an episode's token ids are not, to this model's tokenizer, what was played.

    Args:
        source: where the episode is from, for the message.
    """
    file = model_file(model, "tokenizer.json", key=key)
    if file is None:
        return
    tokenizer = _tokenizer(file, f"{key}={model}")
    for turn in episode.turns:
        text = tokenizer.decode(episode.response_ids[turn.start : turn.end], skip_special_tokens=False)
        if "".join(turn.content.split()) not in "".join(text.split()):
            raise ConfigError(
                f"{key}={model}: the episodes in {source} are of another tokenizer, to which {text!r} was "
                f"{turn.content!r}; collect again with a teacher of the student's family"
            )


def _tokenizer(file: Path, name: str) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more special
        raise ConfigError(f"{name}: tokenizer.json cannot be read ({error}); save the tokenizer again") from None


def _renderer(model: str, key: str, name: str) -> Callable[[Messages], str]:
    """What transformers' `apply_chat_template` does to text, from the files that it reads."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = chat_template(model, key=key)
    if not template:
        raise ConfigError(
            f"{name}: its tokenizer has no chat template, and questions are put to it through one; save it as "
            "chat_template.jinja beside the weights"
        )
    settings_file = model_file(model, "tokenizer_config.json", key=key)
    settings = read_json(settings_file, f"{name}") if settings_file else {}
    tokens = {each: settings[each] for each in SPECIAL_TOKENS if settings.get(each)}
    special = {each: token["content"] if isinstance(token, dict) else token for each, token in tokens.items()}

    def render(messages: Messages) -> str:
        rendered, _ = render_jinja_template(
            [list(messages)],
            chat_template=template,
            add_generation_prompt=True,
            **TEMPLATE_VARIABLES,
            **special,
        )
        return str(rendered[0])

    return render


def _of_transformers(
    model: str, name: str, trust_remote_code: bool
) -> tuple[Callable[[Messages], str], Callable[[Messages], int]]:
    """The same of a tokenizer that only transformers can read."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, LookupError, TypeError, ImportError) as error:
        reason = one_line(error)[:200]
        raise ConfigError(f"{name}: its tokenizer cannot be loaded ({reason}); save it beside the weights") from None

    def render(messages: Messages) -> str:
        return str(tokenizer.decode(encode_prompt(tokenizer, list(messages))))

    return render, lambda messages: len(encode_prompt(tokenizer, list(messages)))
