"""Chats as ChatML: the template that exported folders carry, and the same in ids."""

from collections.abc import Mapping, Sequence

from jaxllm.data.tokenizer import BEGIN_ID, END_ID, Tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML as a Jinja template: <|im_start|>role, a line break, content, <|im_end|>."""


def chat_ids(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> list[int]:
    """Gives the ids of CHAT_TEMPLATE with the assistant's turn begun.

    A message's own text never becomes a special id, whatever it spells.
    """
    ids: list[int] = []
    for message in messages:
        said = tokenizer.encode(f"{message['role']}\n{message['content']}")
        ids += [BEGIN_ID, *said, END_ID, *tokenizer.encode("\n")]
    return [*ids, BEGIN_ID, *tokenizer.encode("assistant\n")]
