"""`kaleido`: help of every verb, exit statuses, one line for each misuse."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

import kaleido_jax
from kaleido_jax import cli, prompts
from kaleido_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent


def misuse(capsys, *words: str) -> str:
    """Runs `kaleido WORDS`, which must exit 2 with one line; returns that line."""
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kaleido: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_every_verb_has_help_with_examples(capsys, verb):
    assert cli.main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: kaleido {verb}" in text
    assert f"  kaleido {verb}" in text.partition("examples:")[2]
    assert max(map(len, text.splitlines())) <= 100


def test_help_names_every_verb(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"    {verb}" in text for verb in cli.VERBS)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == kaleido_jax.__version__


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "which verb"),
        ("trian", "did you mean 'train'"),
        ("xyzzy", "unknown verb 'xyzzy'"),
        ("train --config base", "--workdir DIR is needed"),
        ("train --workdir w", "--config"),
        ("train --config base --workdr w", "did you mean '--workdir'"),
        ("train --config no_such --dry-run", "no_such"),
        ("train --config base --dry-run --config.train.batch_sise=4", "'train.batch_size'"),
        ("train --config base --dry-run --config.train.batch_size=many", "must be a int"),
        ("train --config base --dry-run --config.train.batch_size", "equals sign"),
        ("train --config base --dry-run --config.train.cond_drop_rate=1.5", "[0.0, 1.0]"),
        ("sample --checkpoint x --prompt p --config.a=1", "only `kaleido train`"),
        ("sample --prompt p", "--checkpoint"),
        ("sample --checkpoint x", "--prompt"),
        ("sample --checkpoint x --prompt p --prompts q", "not allowed with"),
        ("sample --checkpoint no_such --prompt p", "there is no folder no_such"),
        ("sample --checkpoint x --prompt p --guidence 3", "did you mean '--guidance'"),
        ("sample --checkpoint x --prompt p --guidance nan", "finite"),
        ("sample --checkpoint x --prompt p --steps 1001", "1 to 1000"),
        ("sample --checkpoint x --prompt p --steps 2.5", "1 to 1000"),
        ("sample --checkpoint x --prompt p --num 0", "at least 1"),
        ("sample --checkpoint x --prompt p --seed -1", "0 to 4294967295"),
        ("sample --checkpoint x --prompt p --temperature -0.1", "from 0"),
        ("sample --checkpoint x --prompt p --top-p 0", "over 0 to 1"),
        ("sample --checkpoint x --prompts no_such.txt", "no_such.txt"),
        ("demo --quik", "did you mean '--quick'"),
    ],
)
def test_misuse_is_one_line(capsys, words, expected):
    assert expected in misuse(capsys, *words.split())


def test_a_file_is_no_checkpoint(capsys, tmp_path):
    path = tmp_path / "file"
    path.write_text("x")
    line = misuse(capsys, "sample", "--checkpoint", str(path), "--prompt", "p")
    assert "a folder is needed" in line


def test_a_folder_without_a_model_is_no_checkpoint(capsys, tmp_path):
    line = misuse(capsys, "sample", "--checkpoint", str(tmp_path), "--prompt", "p")
    assert str(tmp_path) in line


@pytest.mark.parametrize("text", ["", "  \n", "x" * 2001, "a\x00b", "a\x1b[31mb", "\ud800"])
def test_bad_prompts_are_refused(capsys, tmp_path, text):
    line = misuse(capsys, "sample", "--checkpoint", str(tmp_path), "--prompt", text)
    assert "--prompt: " in line
    assert len(line) < 300


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("p.txt", b"", "no prompt in it"),
        ("p.txt", b"\n \n", "no prompt in it"),
        ("p.txt", b"fine\n\xff\xfe\n", "line 2: byte 0xFF is not UTF-8"),
        ("p.txt", b"fine\n\nbell\x07\n", "line 3: control character U+0007"),
        ("p.txt", b"fine\n" + b"y" * 2001, "line 2: the prompt has 2,001 characters"),
        ("p.jsonl", b'{"prompt": "fine"}\n{"prompt": }\n', "line 2: not JSON"),
        ("p.jsonl", b'{"captoin": "x"}\n', "line 1: unknown field 'captoin'; did you mean 'cap"),
        ("p.jsonl", b'{"id": "x"}\n', 'line 1: no text under "caption"'),
        ("p.jsonl", b'["x"]\n', "line 1: not an object"),
        ("p.jsonl", b'{"prompt": 3}\n', 'line 1: no text under "caption"'),
        ("p.jsonl", b'{"caption": "x", "seed": -1}\n', 'line 1: "seed" must be a whole number'),
        ("p.jsonl", b'{"caption": "x", "num": true}\n', 'line 1: "num" must be a whole number'),
        ("p.jsonl", b'{"caption": "x", "settings": 3}\n', 'line 1: "settings" must be an object'),
        ("p.jsonl", b'{"version": 9, "latents": []}\n', "line 1: version 9 is unknown"),
        ("p.jsonl", b'{"prompt": ""}\n', "line 1: the prompt is empty"),
        ("p.jsonl", b"[" * 100_000, "line 1: not JSON"),
    ],
)
def test_bad_prompt_files_are_refused(capsys, tmp_path, name, data, expected):
    path = tmp_path / name
    path.write_bytes(data)
    line = misuse(capsys, "sample", "--checkpoint", str(tmp_path), "--prompts", str(path))
    assert expected in line
    assert str(path) in line


def test_a_folder_is_no_prompt_file(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        prompts.read_requests(tmp_path)


def test_prompt_files_are_read(tmp_path):
    text = tmp_path / "p.txt"
    # A byte-order mark, Windows line ends, a decomposed letter, a tab, a line separator inside.
    text.write_bytes("\ufeffcafe\u0301\r\n\r\na\tcat \n".encode())
    assert [r.caption for r in prompts.read_requests(text)] == ["caf\u00e9", "a cat"]
    lines = tmp_path / "p.jsonl"
    lines.write_text(
        '{"prompt": "<extra_id_0> \\u00e9", "image_id": 1}\n'
        '{"caption": "a cat", "num": 2, "seed": 7, "guidance": 3, "settings": {"top_k": 5}}\n',
        "utf-8",
    )
    first, second = prompts.read_requests(lines)
    assert first == prompts.Request("<extra_id_0> \u00e9", f"{lines} line 1")
    assert (second.caption, second.num, second.seed) == ("a cat", 2, 7)
    assert second.settings == {"guidance_weight": 3, "top_k": 5}


def test_prompt_length_counts_after_normalisation():
    assert len(prompts.clean_prompt("e\u0301" * 2000)) == 2000


def test_dry_run_refuses_a_batch_that_the_devices_cannot_share(capsys):
    line = misuse(capsys, *"train --config toy --dry-run --config.train.batch_size=3".split())
    assert "multiple of the 8 devices" in line


def test_train_passes_config_workdir_and_hook(monkeypatch, tmp_path):
    from kaleido_jax import training_loop

    calls = []
    monkeypatch.setattr(
        training_loop, "train", lambda config, workdir, sample_hook, **_: calls.append(
            (config.seed, workdir, sample_hook is None)
        )
    )  # fmt: skip
    words = ["train", "--config", "toy", "--workdir", str(tmp_path), "--config.seed=3"]
    assert cli.main([*words, "--config.train.sample_every=0"]) == 0
    assert cli.main([*words, "--config.train.sample_every=5"]) == 0
    assert calls == [(3, tmp_path, True), (3, tmp_path, False)]


def test_sample_grids_hold_the_first_captions(monkeypatch):
    from kaleido_jax import cli_train, config, generate

    seen = []

    class Pipeline:
        def __init__(self, bundle, devices):
            assert bundle == "bundle"

        def __call__(self, captions, num_images, seed):
            seen.append((captions, num_images, seed))
            return types.SimpleNamespace(images=np.zeros((len(captions), 4, 4, 3), np.uint8))

    monkeypatch.setattr(generate, "Pipeline", Pipeline)
    overrides = ["train.num_samples=4", "seed=5"]
    draw = cli_train.sample_hook(config.load_config("shapes", overrides))
    grid = draw(10, "bundle")
    assert grid.shape[0] == grid.shape[1] >= 8
    assert draw(20, "bundle") is not None
    assert seen[0] == seen[1]
    captions, num_images, seed = seen[0]
    assert (len(captions), num_images, seed) == (4, 1, 5)
    assert cli_train.sample_hook(config.load_config("toy", overrides))(10, "bundle") is None


def test_grids_do_without_bad_records():
    from kaleido_jax import cli_train
    from kaleido_jax.data import RecordError

    class Source:
        captions = ("good", "", "bell\x07", None, "fine", "third")

        def __len__(self):
            return len(self.captions)

        def __getitem__(self, index):
            if self.captions[index] is None:
                raise RecordError("shard.tar: key", "not a picture")
            return {"caption": self.captions[index]}

    assert cli_train.first_captions(Source(), 2) == ["good", "fine"]
    assert cli_train.first_captions(Source(), 1) == ["good"]
    assert cli_train.first_captions(Source(), 9) == ["good", "fine", "third"]


def test_sample_refuses_a_full_folder_before_loading_the_model(capsys, tmp_path):
    (tmp_path / "picture.png").write_bytes(b"")
    words = ["sample", "--checkpoint", str(tmp_path), "--prompt", "p", "--out", str(tmp_path)]
    assert "new or empty folder" in misuse(capsys, *words)


class Boom(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("shapes.py: no"), 2, "kaleido: shapes.py: no\n"),
        (KeyboardInterrupt(), 130, "kaleido: interrupted\n"),
        (Boom("first\nsecond"), 1, "kaleido: Boom: first (--debug shows where)\n"),
        (Boom(), 1, "kaleido: Boom: no message (--debug shows where)\n"),
        (OSError(28, "No space left on device"), 1,
         "kaleido: OSError: [Errno 28] No space left on device (--debug shows where)\n"),
    ],
)  # fmt: skip
def test_errors_become_exit_statuses(monkeypatch, capsys, error, status, line):
    def fail(args):
        raise error

    monkeypatch.setitem(cli.VERBS, "doctor", (cli.VERBS["doctor"][0], fail))
    assert cli.main(["doctor"]) == status
    assert capsys.readouterr().err == line


def test_debug_shows_the_traceback(monkeypatch, capsys):
    def fail(args):
        raise Boom("here")

    monkeypatch.setitem(cli.VERBS, "doctor", (cli.VERBS["doctor"][0], fail))
    assert cli.main(["doctor", "--debug"]) == 1
    text = capsys.readouterr().err
    assert "in fail" in text
    assert text.endswith("kaleido: Boom: here\n")


def test_latent_errors_are_misuse(monkeypatch, capsys):
    from kaleido_jax.latents import bbox
    from kaleido_jax.latents.errors import LatentError

    def fail(args):
        bbox.parse("dog (1, 2, 3)")

    with pytest.raises(LatentError):
        fail(None)
    monkeypatch.setitem(cli.VERBS, "doctor", (cli.VERBS["doctor"][0], fail))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_doctor_reports_and_names_what_is_missing(monkeypatch, capsys):
    from kaleido_jax import cli_doctor

    real = cli_doctor.importlib.metadata.version
    monkeypatch.setattr(
        cli_doctor.importlib.metadata, "requires", lambda _: ["numpy>=1", "jax>=999", "nosuch>=1"]
    )
    monkeypatch.setattr(cli_doctor.importlib.metadata, "version", real)
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "devices: 8 x cpu" in text
    assert "numpy" in text
    assert "to mend: nosuch is missing" in text
    assert f"jax {real('jax')} is installed, >=999 is needed" in text


def test_the_process_exits_with_the_status():
    result = subprocess.run(
        [sys.executable, "-m", "kaleido_jax.cli", "trian"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
