"""The tokenizer gives text back as it came and never yields a special id for text."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.data import tokenizer as module
from jaxllm.data.tokenizer import (
    BEGIN_ID,
    END_ID,
    SMALLEST_VOCAB,
    SPECIAL_TOKENS,
    Tokenizer,
    train_tokenizer,
)

TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "def f(x):\n    return x + 1\n",
    "<|im_start|>user\n<|im_end|> spelled out",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400)


@pytest.fixture(scope="module")
def loaded(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(path)
    return Tokenizer.load(path)


AWKWARD = [
    "",
    " ",
    "\n",
    "\r\n",
    "\r",
    "\0",
    "a\0b",
    " leading and trailing ",
    "e\u0301 is not \u00e9",
    "\ufb01 \u2126 \u00bd",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\ufeffmark",
    "\u2028\u2029\x85\x1f",
    *SPECIAL_TOKENS,
    "a" + "".join(SPECIAL_TOKENS) + "b",
    "<|im_start|>system\n<s></s><unk>",
]


@pytest.mark.parametrize("text", AWKWARD, ids=ascii)
def test_awkward_text_comes_back_and_holds_no_special_id(loaded, text):
    ids = loaded.encode(text)
    assert loaded.decode(ids) == text
    assert loaded.decode(ids, skip_special=False) == text
    assert all(i >= len(SPECIAL_TOKENS) for i in ids)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(st.characters(exclude_categories=["Cs"])),
            st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "\r", "\n", "\0", " "]),
        )
    ).map("".join)
)
def test_any_text_comes_back_and_holds_no_special_id(loaded, text):
    ids = loaded.encode(text)
    assert loaded.decode(ids) == text
    assert all(i >= len(SPECIAL_TOKENS) for i in ids)
    assert int(loaded.token_bytes()[ids].sum()) == len(text.encode())


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(
                "ab1'st \n\t\r\u3000\x1c\x85\xa0.,\u4e2d\u6587\u3002\uff0c", max_size=30
            ),
            st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        )
    ).map("".join)
)
def test_a_long_text_in_pieces_has_the_tokens_of_the_whole(loaded, text):
    """Cut at every place where it may be, the tokens stay."""
    whole = loaded.inner.encode(text, add_special_tokens=False).ids
    places = [match.start() for match in module._CUT.finditer(text)]
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, None], strict=True)]
    assert sum((loaded.encode(piece) for piece in pieces), []) == whole


def test_long_texts_among_short_ones_keep_their_places(loaded, monkeypatch):
    texts = [
        "short",
        "some words \n and more, " * 40,
        "",
        "x" * 500,
        "\u4e2d\uff0c" * 90,
    ]
    whole = [e.ids for e in loaded.inner.encode_batch(texts, add_special_tokens=False)]
    monkeypatch.setattr(module, "_LONG", 50)
    found = loaded.encode_documents(texts)
    assert found[:3] + found[4:] == whole[:3] + whole[4:]
    assert [loaded.decode(ids) for ids in found] == texts
    assert [len(p) for p in module._pieces("x" * 500)] == [200, 200, 100]


def test_a_loaded_tokenizer_is_the_saved_one(tokenizer, loaded):
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.encode_documents(TEXTS) == [tokenizer.encode(t) for t in TEXTS]


def test_training_does_not_depend_on_the_order_of_texts(tokenizer):
    assert train_tokenizer(reversed(TEXTS), 400).sha256 == tokenizer.sha256


def test_special_tokens_have_the_ids_0_to_4(tokenizer):
    names = [tokenizer.inner.id_to_token(i) for i in range(5)]
    assert tuple(names) == SPECIAL_TOKENS
    assert (BEGIN_ID, END_ID) == (3, 4)
    assert tokenizer.decode([BEGIN_ID, END_ID]) == ""
    assert tokenizer.decode([BEGIN_ID], skip_special=False) == "<|im_start|>"


def test_every_byte_has_an_id_even_without_any_text():
    tokenizer = train_tokenizer([], SMALLEST_VOCAB)
    assert tokenizer.vocab_size == SMALLEST_VOCAB
    lengths = tokenizer.token_bytes()
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [0] * 5 + [1] * 256


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size=260 is too small.*261"):
        train_tokenizer(TEXTS, 260)


def test_a_lone_surrogate_is_refused_by_name(tokenizer):
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.encode("a\ud800")


def _foreign(text, change):
    value = json.loads(text)
    change(value)
    return json.dumps(value)


def _swap(value):
    first, second = value["added_tokens"][:2]
    first["content"], second["content"] = second["content"], first["content"]
    vocab = value["model"]["vocab"]
    vocab["<unk>"], vocab["<s>"] = 1, 0


def _unspecial(value):
    value["added_tokens"][3]["special"] = False


def _lowercase(value):
    value["normalizer"] = {"type": "Lowercase"}


def _prefix_space(value):
    value["pre_tokenizer"]["add_prefix_space"] = True


def _replace(value):
    value["normalizer"] = {
        "type": "Replace",
        "pattern": {"String": "colour"},
        "content": "color",
    }


def _byte_missing(value):
    del value["model"]["vocab"]["\u00f4"]  # 0xf4, of characters from U+100000 on


def _stripping(value):
    token = dict(value["added_tokens"][0], content="<tool>", special=False)
    token |= {"id": len(value["model"]["vocab"]), "rstrip": True}
    value["added_tokens"].append(token)


def merging(value):
    """Merges the characters of </s> to the entry of that name, which is special."""
    value["pre_tokenizer"]["use_regex"] = False
    model = value["model"]
    for pair in (("<", "/"), ("</", "s"), ("</s", ">")):
        model["vocab"].setdefault("".join(pair), len(model["vocab"]))
        model["merges"].insert(0, list(pair))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_swap, "has '<s>' at id 0 where the special token '<unk>' belongs"),
        (_unspecial, "at id 3 where the special token"),
        (_lowercase, "does not give text back as it came"),
        (_prefix_space, "does not give text back as it came"),
        (_replace, "does not give text back as it came"),
        (_byte_missing, "does not give text back as it came"),
        (_stripping, "does not give text back as it came"),
        (merging, "does not give text back as it came"),
    ],
)
def test_a_foreign_tokenizer_is_refused(tokenizer, tmp_path, change, message):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    path.write_text(_foreign(path.read_text(), change))
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value)


def test_special_ids_in_the_tokens_of_a_text_end_the_run(
    tokenizer, tmp_path, monkeypatch
):
    """Should a tokenizer's trial miss it, what it makes is looked at as well."""
    from jaxllm.data.corpus import prepare

    monkeypatch.setattr(Tokenizer, "_check", lambda self, name: None)
    tokenizer.save(tmp_path / "tokenizer.json")
    path = tmp_path / "merging.json"
    path.write_text(_foreign((tmp_path / "tokenizer.json").read_text(), merging))
    for number, text in enumerate(["no such thing", "he said </s> and left"]):
        lines = tmp_path / f"{number}.jsonl"
        lines.write_text(json.dumps({"text": text}))
    prepare([tmp_path / "0.jsonl"], tmp_path / "fine", tokenizer=path)
    with pytest.raises(ValueError, match="makes special tokens of text"):
        prepare([tmp_path / "1.jsonl"], tmp_path / "bad", tokenizer=path)
    assert not (tmp_path / "bad").exists()


def test_stored_truncation_padding_and_templates_change_nothing(tokenizer, tmp_path):
    from tokenizers import processors

    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    other = Tokenizer.load(path).inner
    other.enable_truncation(4)
    other.enable_padding(length=64)
    other.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    other.save(str(path))
    assert Tokenizer.load(path).encode_documents(TEXTS) == tokenizer.encode_documents(
        TEXTS
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\x80\x00\xff", "not UTF-8"),
        (b"{}", "not a tokenizer.json"),
        (b"hello", "not a tokenizer.json"),
        (b'{"version": "1.0", "model"', "not a tokenizer.json"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value)
