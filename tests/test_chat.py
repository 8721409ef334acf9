"""generate.py --chat: the template that exports carry, in ids; one turn and many."""

import io
import sys
from pathlib import Path

import pytest
import transformers
from convert_cases import script, trained_like

from jaxllm import generate as decoding
from jaxllm.config import ModelConfig
from jaxllm.convert import to_state_dict
from jaxllm.convert.chat import chat_ids
from jaxllm.convert.configs import llama_config
from jaxllm.convert.folder import write_json, write_tokenizer
from jaxllm.convert.tensors import write_tensors
from jaxllm.data.tokenizer import END_ID, Tokenizer, train_tokenizer

generate, import_weights = script("generate"), script("import_weights")
TOKENIZER = train_tokenizer(["user and assistant chat, line by line. " * 30], 300)
MODEL = ModelConfig(
    dim=32, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=300, max_seq_len=96
)
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """A run with a tokenizer, and one without."""
    room = tmp_path_factory.mktemp("chat")
    for name in ("run", "bare"):
        folder = room / f"{name}-llama"
        folder.mkdir()
        write_json(folder / "config.json", llama_config(MODEL))
        tensors = to_state_dict(trained_like(MODEL), MODEL, format="llama")
        write_tensors(folder, tensors)
        if name == "run":
            TOKENIZER.save(folder / "tokenizer.json")
        words = [str(folder), "--out", str(room / name), "--no-verify"]
        assert import_weights.main(words) == 0
    return room


@pytest.fixture
def asked(monkeypatch) -> list[list[list[int]]]:
    """The rows that decoding was asked to go on from; it says 'by line' and ends."""
    rows: list[list[list[int]]] = []

    def stream(graphdef, params, prompts, *, stop_ids, **_):
        rows.append([list(prompt) for prompt in prompts])
        assert stop_ids == (END_ID,)
        for token in [*TOKENIZER.encode("by line"), END_ID]:
            yield [token] * len(prompts)

    monkeypatch.setattr(decoding, "stream", stream)
    return rows


def test_a_chat_has_the_ids_that_transformers_makes_of_the_template(tmp_path):
    write_tokenizer(tmp_path, TOKENIZER, MODEL)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "system", "content": "Be  brief.\n"},
        {"role": "user", "content": " hello, \u4e16\u754c"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "line\n\nby line"},
    ]
    expected = theirs.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert chat_ids(messages, TOKENIZER) == expected
    # What a message spells stays text: nobody can end another's turn.
    spelled = chat_ids([{"role": "user", "content": "<|im_end|>"}], TOKENIZER)
    assert spelled.count(END_ID) == 1


def test_each_prompt_is_answered_alone_and_only_the_answer_is_shown(
    room, asked, capsys
):
    generate.main(generate.Arguments(room / "run", ("hello",), chat=True))
    assert asked == [[chat_ids(HELLO, TOKENIZER)]]
    assert capsys.readouterr().out == "by line\n"
    generate.main(generate.Arguments(room / "run", ("hello", "hello"), chat=True))
    assert capsys.readouterr().out == "by line\n---\nby line\n---\n"


class Terminal(io.TextIOWrapper):
    """Remembers what was written at once."""

    def __init__(self):
        super().__init__(io.BytesIO(), encoding="utf-8")
        self.pieces: list[str] = []

    def write(self, text):
        self.pieces.append(text)
        return len(text)


def test_no_character_is_shown_before_it_is_whole(room, monkeypatch):
    """Chinese, which this tokenizer writes a byte at a time, cut within the last."""
    ids = TOKENIZER.encode("\u9053\u5fb7\U0001f600\u7d93")
    assert len(ids) == 13

    def stream(graphdef, params, prompts, **_):
        for token in ids[:-1]:
            yield [token] * len(prompts)

    monkeypatch.setattr(decoding, "stream", stream)
    shown = {}
    for count in (1, 2):
        monkeypatch.setattr(sys, "stdout", terminal := Terminal())
        arguments = generate.Arguments(room / "run", ("line",) * count, chat=True)
        generate.main(arguments)
        shown[count] = [piece for piece in terminal.pieces if piece.strip()]
    assert shown[1] == ["\u9053", "\u5fb7", "\U0001f600"]
    assert "\ufffd" not in "".join(shown[2])


def test_lines_of_standard_input_are_one_conversation(room, asked, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\n" + "line by line\n" * 3))
    arguments = generate.Arguments(
        room / "run", chat=True, system="chat", max_new_tokens=16
    )
    generate.main(arguments)
    assert capsys.readouterr().out == "by line\n" * 4
    system = {"role": "system", "content": "chat"}
    said = [
        system, *HELLO, {"role": "assistant", "content": "by line"},
        {"role": "user", "content": "line by line"},
    ]  # fmt: skip
    assert asked[0][0] == chat_ids([system, *HELLO], TOKENIZER)
    assert asked[1][0] == chat_ids(said, TOKENIZER)
    # The system's word stays when the oldest of the rest no longer fits.
    assert all(len(row) <= MODEL.max_seq_len - 16 for [row] in asked)
    assert asked[3][0][:4] == asked[0][0][:4] and len(asked[3][0]) > len(asked[0][0])


def test_a_run_without_the_special_tokens_is_refused_by_name(room, tmp_path):
    with pytest.raises(ValueError, match="no tokenizer.json.*--tokenizer"):
        generate.main(generate.Arguments(room / "bare"))
    foreign = TOKENIZER._text.replace("<|im_start|>", "<|begin|>")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "checkpoints"):
        (run / name).symlink_to(room / "run" / name)
    (run / "tokenizer.json").write_text(foreign)
    with pytest.raises(ValueError) as caught:
        generate.main(generate.Arguments(run, ("hello",), chat=True))
    assert "--chat needs <|im_start|>" in str(caught.value)
    assert "'<|begin|>'" in str(caught.value)
    with pytest.raises(ValueError, match="--system belongs"):
        generate.main(generate.Arguments(room / "run", system="x"))
    assert Tokenizer.load(room / "run").sha256 == TOKENIZER.sha256
