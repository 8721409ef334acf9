"""Text <-> token ids: a byte-level BPE that is trained here and travels as a file.

Two properties hold for every text: `decode(encode(text)) == text`, and `encode` never
yields a special id, not even for text that spells one out. Documents are delimited by
the ids BEGIN_ID and END_ID, which only the corpus writer and the prompt writer insert.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from jaxllm.data.files import write_atomically

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
"""Fixed at ids 0-4, as in the lineage of the reference."""
BEGIN_ID = 3
"""Opens a document."""
END_ID = 4
"""Closes a document."""
SMALLEST_VOCAB = len(SPECIAL_TOKENS) + 256
"""The special tokens and one entry for each byte: below this, text has no encoding."""
LARGEST_VOCAB = 1 << 24

# What a foreign tokenizer tends to change: case, unicode form, spaces, line ends.
_PROBE = (
    " Aa  b\r\n\t\u00e9e\u0301\ufb01 \u4e2d\u6587 \U0001f600\x00<s></s><|im_end|> \n"
)
# Every byte that UTF-8 can have: those of ASCII, those that go on, those that begin.
_BYTES = "".join(
    map(
        chr,
        [*range(192), *range(192, 2048, 64), 2048, *range(4096, 1 << 16, 4096)]
        + [0x10000, 0x40000, 0x80000, 0xC0000, 0x100000],
    )
)


_LONG = 1 << 17
"""Characters beyond which a text is encoded in pieces: a tokenizer needs 200 bytes of
memory for each byte of what it encodes at once."""
# Between a visible character and a space, and between a Han character and its stop, the
# GPT-2 pattern always ends a word, and looks no further back: cutting there changes no
# token. (Behind a space it would.)
_CUT = re.compile(
    "(?<=\\S)(?=[ \\n])|(?<=[\u4e00-\u9fff])(?=[\uff0c\u3002\uff01\uff1f\uff1b\u3001])"
)


class Tokenizer:
    """A byte-level BPE with the special tokens at ids 0-4."""

    def __init__(self, text: str, *, name: str = "tokenizer.json"):
        """Builds the tokenizer from the text of a tokenizer.json.

        Raises: ValueError if the text is not one, or one that breaks the two
        properties above; `name` is how the message calls it.
        """
        import tokenizers

        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the Rust side raises bare Exception
            raise ValueError(
                f"{name} is not a tokenizer.json ({error}): give a file that "
                f"scripts/prepare_data.py wrote"
            ) from None
        # Not stored in the file, and without it text may spell special ids.
        inner.encode_special_tokens = True
        inner.no_truncation()
        inner.no_padding()
        self.inner = inner
        self._text = text
        pre = json.loads(text).get("pre_tokenizer") or {}
        self._cuts = pre.get("type") == "ByteLevel" and pre.get("use_regex", True)
        added = inner.get_added_tokens_decoder()
        self.is_special = np.zeros(self.vocab_size, bool)
        """Which ids are special: bool [V]. No text has one."""
        self.is_special[[i for i, token in added.items() if token.special]] = True
        self._check(name)

    def _check(self, name: str) -> None:
        added = self.inner.get_added_tokens_decoder()
        for i, token in enumerate(SPECIAL_TOKENS):
            found = self.inner.id_to_token(i)
            if found != token or i not in added or not added[i].special:
                raise ValueError(
                    f"{name} has {found!r} at id {i} where the special token {token!r} "
                    f"belongs: leave --tokenizer out to train one of our own"
                )
        # Added tokens are looked for in text, and may swallow the spaces around them.
        tokens = "  ".join(token.content for token in added.values())
        changes = json.loads(self._text).get("normalizer") is not None
        for probe in (_PROBE, _PROBE.lstrip(), _BYTES, f" {tokens} "):
            ids = self.encode(probe)
            changes |= self.decode(ids, skip_special=False) != probe
            if changes or self.is_special[ids].any():
                raise ValueError(
                    f"{name} does not give text back as it came (a normalizer, a "
                    f"prefix space, no byte-level alphabet, an added token that "
                    f"strips spaces, merges that make a special token): leave "
                    f"--tokenizer out to train one of our own"
                )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Reads a tokenizer.json.

        Raises: ValueError naming the file if it is missing, empty, not text, not a
        tokenizer, or foreign (special tokens not at ids 0-4, text not given back).
        """
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        try:
            text = path.read_bytes().decode("utf-8")
        except FileNotFoundError:
            raise ValueError(
                f"tokenizer {path} does not exist: give a tokenizer.json, or prepare "
                f"the data with scripts/prepare_data.py"
            ) from None
        except UnicodeDecodeError:
            raise ValueError(
                f"tokenizer {path} is not UTF-8 text: give a tokenizer.json"
            ) from None
        if not text.strip():
            raise ValueError(f"tokenizer {path} is empty: give a tokenizer.json")
        return cls(text, name=f"tokenizer {path}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the tokenizer.json, whole or not at all."""
        write_atomically(Path(path), self._text.encode())

    @property
    def sha256(self) -> str:
        """Hash of the tokenizer.json, in hexadecimal."""
        return hashlib.sha256(self._text.encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id (V)."""
        return max(self.inner.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Gives the ids of a text, without begin and end.

        Raises: ValueError if the text holds a lone surrogate, which no encoding of
        unicode can write.
        """
        return self.encode_documents([text])[0]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes many texts at once, on the threads TOKENIZERS_PARALLELISM allows.

        Long texts are encoded in pieces, with the same result, save that a run of half
        a million characters without any space is cut.
        """
        long = {i: t for i, t in enumerate(texts) if self._cuts and len(t) > _LONG}
        short = ["" if i in long else text for i, text in enumerate(texts)]
        encoded = self._encode(short)
        for i, text in long.items():
            encoded[i] = list(
                chain.from_iterable(self._encode([p])[0] for p in _pieces(text))
            )
        return encoded

    def _encode(self, texts: list[str]) -> list[list[int]]:
        try:
            encodings = self.inner.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            # A lone surrogate reaches us as "must be str".
            raise ValueError(
                "text holds a lone surrogate (half of a UTF-16 pair): it is not valid "
                "unicode; repair or drop it"
            ) from None
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Gives the text of some ids; a cut character becomes U+FFFD."""
        return self.inner.decode(
            [int(i) for i in ids], skip_special_tokens=skip_special
        )

    def token_bytes(self) -> np.ndarray:
        """Counts the bytes of text behind each id: int32 [V]; special ids count 0."""
        lengths = np.zeros(self.vocab_size, np.int32)
        # In the byte-level alphabet every byte is written as one character.
        for token, i in self.inner.get_vocab(with_added_tokens=False).items():
            lengths[i] = len(token)
        for i, token in self.inner.get_added_tokens_decoder().items():
            lengths[i] = 0 if token.special else len(token.content.encode())
        return lengths


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _LONG:
        stop = start + 4 * _LONG
        match = _CUT.search(text, start + _LONG, stop)
        end = match.start() if match else stop
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def require_vocab_size(vocab_size: int) -> None:
    """Raises ValueError for a size without room for the special tokens and 256 bytes,
    or one for which the trainer's tables would take all memory."""
    if vocab_size < SMALLEST_VOCAB:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: {len(SPECIAL_TOKENS)} special "
            f"tokens and 256 bytes need at least {SMALLEST_VOCAB}"
        )
    if vocab_size > LARGEST_VOCAB:
        raise ValueError(
            f"vocab_size={vocab_size} is beyond {LARGEST_VOCAB}: lower it, since "
            f"tokenizers have 6,000 to 300,000 entries"
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE with the GPT-2 pattern on some texts.

    The result depends on the texts alone, not on their order or on threads. It has
    fewer than `vocab_size` entries when the texts hold fewer pairs to merge.

    Raises: ValueError if `vocab_size` has no room for the special tokens and 256 bytes,
    or is beyond any use.
    """
    require_vocab_size(vocab_size)
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = Inner(models.BPE())
    # The GPT-2 pattern is the one pre-tokenizer that other runtimes know by a name.
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(  # type: ignore[assignment]
        add_prefix_space=False, use_regex=True
    )
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(iter(texts), trainer)
    return Tokenizer(inner.to_str(pretty=True), name="the trained tokenizer")
