"""Hostile prompts and unfinished latents: bounded, refused in one line, never let in."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kaleido_jax import bundle, cli, generate
from kaleido_jax.latents import load_document, read_png
from kaleido_jax.tokens import EOS, PAD, Vocabulary
from tests.test_generate import _bundle, _config, _pipe

MEGABYTE = 2**20
MARKUP = "<script>alert('x')</script> <img src=x onerror=y> &lt; a red shape"
SPECIAL = ("<extra_id_0>", "</s>", "<pad>", "<unk>", "<voken_17>", "#17#", "<bbox>", "<text>")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return bundle.save(tmp_path_factory.mktemp("model") / "export", _bundle(_config()))


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("p.txt", b"a cat\n" + b"x" * MEGABYTE, "line 2: the prompt has 1,048,576 characters"),
        ("p.jsonl", b'{"caption": "%s"}' % (b"x" * MEGABYTE), "line 1: the prompt has 1,048,576"),
        ("p.txt", b"one line " * 10_000, "line 1: the prompt has"),
        ("p.txt", b"a\x1b[2Jcat", "line 1: control character U+001B at position 1"),
        ("p.txt", b"a\x00cat", "line 1: control character U+0000"),
        ("p.txt", "a\u0085cat".encode(), "line 1: control character U+0085"),
        ("p.jsonl", b'{"caption": "a\\u0000cat"}', "line 1: control character U+0000"),
        ("p.jsonl", b'{"caption": "a\\ncat"}', "line 1: control character U+000A"),
        ("p.jsonl", b'{"caption": "\\ud800"}', "line 1: control character U+D800"),
        ("p.txt", b"a cat\na \xc3( dog\n", "line 2: byte 0xC3 is not UTF-8"),
        ("p.txt", b"a cat\n\xed\xa0\x80\n", "line 2: byte 0xED is not UTF-8"),
        ("p.jsonl", b'{"caption": "a cat", "seed": 1e400}', 'line 1: "seed" must be'),
        ("p.jsonl", b'{"caption": "a cat", "num": 1000000000}', 'line 1: "num" must be'),
        ("p.jsonl", b'{"caption": "a cat", "guidance": NaN}', "line 1: guidance"),
        ("p.jsonl", b'{"caption": "a cat", "steps": 1000000000}', "line 1: num_steps"),
        ("p.jsonl", b'{"caption": "a cat", "settings": {"topk": 1}}', "nearest is 'top_k'"),
    ],
)  # fmt: skip
def test_a_hostile_file_is_refused_in_one_line(model, tmp_path, capsys, name, data, says):
    path = tmp_path / name
    path.write_bytes(data)
    out = tmp_path / "out"
    words = ["sample", "--checkpoint", str(model), "--prompts", str(path), "--out", str(out)]
    assert cli.main(words) == 2
    line = capsys.readouterr().err
    assert says in line and str(path) in line
    assert line.count("\n") == 1 and len(line) < 500 and line.isprintable() is False
    assert all(character.isprintable() for character in line[:-1])
    assert not out.exists()


@pytest.mark.parametrize("text", SPECIAL)
def test_words_of_a_prompt_are_never_special_tokens(text):
    vocabulary = Vocabulary.default(num_vokens=8)
    ids = vocabulary.encode_caption(f"a {text} cat", 64)
    assert ids[-1] == EOS and (np.asarray(ids[:-1]) != EOS).all() and PAD not in ids
    # Pieces of ordinary text alone: no voken, no section, no sentinel.
    assert max(ids) < vocabulary.num_pieces
    plain = vocabulary.encode_caption("a cat", 64)
    assert len(ids) > len(plain)


def test_markup_is_text_and_comes_back_escaped_by_json_alone(model, tmp_path):
    out = tmp_path / "out"
    words = ["sample", "--checkpoint", str(model), "--num", "2", "--steps", "1", "--out", str(out)]
    assert cli.main([*words, "--prompt", MARKUP]) == 0
    document = load_document(out / "000000.json")
    assert document.caption == MARKUP == read_png(out / "000000.png")[1].caption
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert json.loads((out / "manifest.json").read_text())["pictures"] == 2


def test_latents_that_do_not_end_are_drawn_a_few_times_and_marked(tmp_path):
    """Without the constraint a random decoder writes no whole latent; with it, nothing else."""
    pipe = _pipe(("text",))
    (_, output), *rest = pipe.stream(["a cat"], 2, constrained=False, batch_size=2)
    assert not rest
    for document, warning in zip(output.documents, output.warnings, strict=True):
        assert document.decoding["draws"] <= generate.MAX_DRAWS and document.decoding["problems"]
        assert "not valid in 5 draws" in warning
    (_, output), *rest = pipe.stream(["a cat"], 2, batch_size=2)
    assert not rest and not output.warnings
    assert all("problems" not in document.decoding for document in output.documents)
