"""Where the trainer's text comes from: files, packages, tokens, streams, and their tokenizers."""

import contextlib
import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from examples.lm import data, hosts, meta, stream, tokenizers
from examples.lm.config import UsageError
from tests.trainer import worker

RUN = ["train", "--model", "micro", "--optimizer", "adamw", "--steps", "2", "--batch-size", "8"]
RUN += ["--eval-interval", "2", "--eval-batches", "1"]


@pytest.fixture(scope="module", autouse=True)
def compiled(compiled_steps):
    with worker.quick_compilation(compiled_steps):
        yield


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Learnt tokenizers go here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sophia_optax"


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("val_loss")) for line in lines]


# --- tokenizers -----------------------------------------------------------------------------------

TEXT = ("def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + 'ø∂'\n" * 50).encode()


@pytest.mark.parametrize("name", ["bytes", "bpe:300"])
def test_a_tokenizer_gives_back_the_text(name, cache):
    codec = tokenizers.find(name, lambda: TEXT)
    tokens = codec.encode(TEXT)
    assert tokens.max() < codec.size
    assert codec.decode(tokens.tolist()) == TEXT.decode()


def test_byte_pairs_are_fewer_than_bytes_and_learnt_once(cache, monkeypatch):
    codec = tokenizers.find("bpe:300", lambda: TEXT)
    assert 256 < codec.size <= 300
    assert len(codec.encode(TEXT)) < len(TEXT) / 2
    assert len(list(cache.glob("bpe-300-*.json"))) == 1
    monkeypatch.setattr(tokenizers, "ByteLevelBPETokenizer", None)
    again = tokenizers.find("bpe:300", lambda: TEXT)
    np.testing.assert_array_equal(again.encode(TEXT), codec.encode(TEXT))


def test_byte_pairs_whose_cache_is_torn_or_cannot_be_written_are_learnt_again(cache, monkeypatch):
    codec = tokenizers.find("bpe:300", lambda: TEXT)
    (path,) = cache.glob("bpe-300-*.json")
    path.write_bytes(path.read_bytes()[:100])
    again = tokenizers.find("bpe:300", lambda: TEXT)
    np.testing.assert_array_equal(again.encode(TEXT), codec.encode(TEXT))
    assert len(path.read_bytes()) > 100
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    again = tokenizers.find("bpe:300", lambda: TEXT)
    np.testing.assert_array_equal(again.encode(TEXT), codec.encode(TEXT))


def test_a_kept_tokenizer_is_used_whatever_the_text_has_become(cache, tmp_path):
    codec = tokenizers.find("bpe:300", lambda: TEXT)
    kept = tmp_path / "tokenizer.json"
    kept.write_text(codec.learnt)
    again = tokenizers.find("bpe:300", lambda: b"another text", kept)
    np.testing.assert_array_equal(again.encode(TEXT), codec.encode(TEXT))
    kept.write_text(codec.learnt[:100])
    with pytest.raises(UsageError, match=r"tokenizer\.json cannot be read"):
        tokenizers.find("bpe:300", lambda: TEXT, kept)


# --- sources, through the command line ------------------------------------------------------------


def test_a_run_on_files_with_learnt_byte_pairs(cache, tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    for i in range(3):
        (tmp_path / "text" / f"{i}.txt").write_bytes(TEXT)
    model = dataclasses.replace(worker.MICRO, vocab_size=None)
    monkeypatch.setattr(worker, "MICRO", model)
    out = tmp_path / "out"
    source = ["--data", f"text:{tmp_path}/text/*.txt", "--tokenizer", "bpe:300"]
    assert worker.run([*RUN, *source, "--out", str(out)]) == 0
    assert losses(out)[0] == pytest.approx(np.log(300), rel=0.1)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_on_token_files(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for name in ("train", "val"):
        rng.integers(0, 50257, 2000).astype(np.uint16).tofile(tmp_path / f"{name}.bin")
    model = dataclasses.replace(worker.MICRO, vocab_size=None)
    monkeypatch.setattr(worker, "MICRO", model)
    out = tmp_path / "out"
    assert worker.run([*RUN, "--data", f"bin:{tmp_path}", "--out", str(out)]) == 0
    assert losses(out)[0] == pytest.approx(np.log(50257), rel=0.1)


CHARACTERS = sorted(set("to be, or not to be: ø∂"))


def write_characters(folder, **changes):
    """What nanoGPT's data/shakespeare_char/prepare.py writes, for another text."""
    content = {
        "vocab_size": len(CHARACTERS),
        "itos": dict(enumerate(CHARACTERS)),
        "stoi": {c: i for i, c in enumerate(CHARACTERS)},
    }
    (folder / "meta.pkl").write_bytes(pickle.dumps(content | changes))
    tokens = np.arange(2000).astype(np.uint16) % len(CHARACTERS)
    for part in ("train", "val"):
        tokens.tofile(folder / f"{part}.bin")


def test_a_run_on_characters_samples_and_generates_without_their_file(tmp_path, capsys):
    write_characters(tmp_path)
    out = tmp_path / "run"
    sizes = ["--layers", "1", "--width", "16", "--heads", "2", "--context", "16"]
    source = ["--model", "tiny", *sizes, "--data", f"bin:{tmp_path}"]
    assert worker.run([*RUN, *source, "--out", str(out)]) == 0
    assert "bigram counts" in capsys.readouterr().out
    (tmp_path / "meta.pkl").unlink()
    assert worker.run(["generate", "--out", str(out), "--prompt", "to be ø", "--tokens", "9"]) == 0
    text = capsys.readouterr().out.removesuffix("\n")
    assert text.startswith("to be ø")
    assert len(text) == len("to be ø") + 9
    assert set(text) <= set(CHARACTERS)
    assert worker.run(["generate", "--out", str(out), "--prompt", "To be"]) == 2
    assert "lacks 'T'" in capsys.readouterr().err
    assert worker.run(["generate", "--out", str(out), "--prompt", "\udcff"]) == 2  # a byte, 255
    assert "lacks '\ufffd'" in capsys.readouterr().err
    assert worker.run(["train", "--resume", "--out", str(out)]) == 0


def test_tokens_that_only_the_model_has_are_never_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(worker, "MICRO", dataclasses.replace(worker.MICRO, vocab_size=512))
    out = tmp_path / "run"
    assert worker.run([*RUN, "--out", str(out)]) == 0
    capsys.readouterr()
    decoded = []
    bytes_of = tokenizers.find("bytes", bytes)
    codec = dataclasses.replace(bytes_of, decode=lambda tokens: decoded.extend(tokens) or "")
    monkeypatch.setattr(tokenizers, "find", lambda *_: codec)
    hot = ["--tokens", "30", "--temperature", "100"]
    assert worker.run(["generate", "--out", str(out), *hot]) == 0
    assert len(decoded) == len("def ") + 30
    assert max(decoded) < 256
    assert bytes_of.decode([97, 256, 511]) == "a\ufffd\ufffd"


def test_a_run_from_before_characters_were_read_goes_on_with_gpt2s_tokens(tmp_path):
    write_characters(tmp_path)
    assert data.load(f"bin:{tmp_path}").vocab_size == len(CHARACTERS)
    assert data.load(f"bin:{tmp_path}", kept=tmp_path / "none").vocab_size == 50257


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_vocabulary_of_many_characters_is_read_in_every_binary_protocol(protocol, tmp_path):
    characters = [chr(i) for i in range(0x4E00, 0x4E00 + 2500)]
    tokens = {c: i for i, c in enumerate(characters)}
    content = {"vocab_size": 2500, "itos": dict(enumerate(characters)), "stoi": tokens}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(content, protocol))
    assert meta.read(tmp_path / "meta.pkl") == characters


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_vocabulary_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    trap = tmp_path / "trap"
    write_characters(tmp_path, more=Touch(trap))
    with pytest.raises(UsageError, match=r"meta\.pkl is not the vocabulary .*opcode"):
        data.load(f"bin:{tmp_path}")
    assert not trap.exists()
    pickle.loads((tmp_path / "meta.pkl").read_bytes())
    assert trap.exists()


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"vocab_size": 3}, "vocab_size"),
        ({"itos": {0: "a", 2: "b"}}, "lacks 1"),
        ({"itos": [*CHARACTERS]}, "opcode"),
        ({"stoi": {}}, "inverse"),
        ({"itos": {0: "ab"}, "stoi": {"ab": 0}}, "inverse"),
        ({"itos": {}, "stoi": {}, "vocab_size": 0}, "inverse"),
        ({"itos": {0: "\ud800"}, "stoi": {"\ud800": 0}}, "inverse"),
        ({"itos": 7}, "len"),
    ],
)
def test_a_vocabulary_of_another_form_is_one_sentence(changes, reason, tmp_path):
    write_characters(tmp_path, **changes)
    with pytest.raises(UsageError, match=reason):
        data.load(f"bin:{tmp_path}")


def test_a_torn_or_mutated_vocabulary_is_read_or_refused(tmp_path, monkeypatch):
    write_characters(tmp_path)
    path = tmp_path / "meta.pkl"
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(UsageError):
            meta.read(path)
    for _ in range(300):
        mutated = bytearray(whole)
        mutated[rng.integers(len(whole))] = rng.integers(256)
        path.write_bytes(bytes(mutated))
        with contextlib.suppress(UsageError):
            meta.read(path)
    path.write_bytes(whole)
    monkeypatch.setattr(meta, "LARGEST", len(whole) - 1)
    with pytest.raises(UsageError, match="it has more than"):
        meta.read(path)


@pytest.mark.parametrize("name", ["train", "val"])
def test_a_token_beyond_the_vocabulary_is_named_with_its_file_and_position(name, tmp_path):
    for part in ("train", "val"):
        tokens = np.arange(2000).astype(np.uint16)
        tokens[123] = 50276 if part == name else 50256
        tokens.tofile(tmp_path / f"{part}.bin")
    with pytest.raises(UsageError, match=rf"{name}\.bin holds the token 50276 at position 123"):
        data.load(f"bin:{tmp_path}")


def test_every_token_of_a_file_that_fits_the_bound_is_looked_at(monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 8)
    tokens = np.arange(33, dtype=np.uint16)
    seen = np.concatenate([block for _, block in data.blocks(tokens)])
    np.testing.assert_array_equal(seen, tokens)
    monkeypatch.setattr(data, "BLOCKS", 3)
    assert [start for start, _ in data.blocks(tokens)] == [0, 16, 32]


@pytest.mark.parametrize("split", list(data.SPLITS))
def test_a_fingerprint_tells_texts_apart_by_any_split(split):
    splits = {name: np.arange(1000, dtype=np.uint8) for name in data.SPLITS}
    before = data.fingerprint(data.Corpus(**splits, vocab_size=256))
    splits[split] = splits[split].copy()
    splits[split][500] += 1
    after = data.fingerprint(data.Corpus(**splits, vocab_size=256))
    assert [name for name in data.SPLITS if before[name] != after[name]] == [split]


def test_packages_are_the_standard_library_and_what_is_installed_each_text_once(
    tmp_path, monkeypatch
):
    for folder, name, text in (
        ("stdlib", "a.py", "first"),
        ("stdlib", "site-packages/b.py", "found by its own folder"),
        ("purelib", "b.py", "second"),
        ("purelib", "vendored/a.py", "first"),
        ("purelib", "tests/c.py", "left out"),
    ):
        path = tmp_path / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text * 100)
    places = {"stdlib": "stdlib", "purelib": "purelib", "platlib": "purelib"}
    monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(tmp_path / places[name]))
    data.packages.cache_clear()
    texts = b"".join(data.texts_of("packages").values())
    data.packages.cache_clear()
    assert texts.count(b"first") in (98, 99, 100)  # cut in two places
    assert texts.count(b"second") in (98, 99, 100)
    assert b"left out" not in texts
    assert b"own folder" not in texts


# --- streams --------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A folder of documents, as `datasets` loads them, and its `--data`."""
    pytest.importorskip("datasets", reason="the extra hf is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(data, "HELD_OUT", 1000)
    monkeypatch.setattr(data, "SHUFFLED", 8)
    folder, rng = tmp_path / "documents", np.random.default_rng(0)
    folder.mkdir()
    for part in range(4):
        documents = [
            {"text": " ".join(map(str, rng.integers(0, 1000, rng.integers(1, 40))))}
            for _ in range(30)
        ]
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        (folder / f"{part}.jsonl").write_text(lines)
    return f"hf:{folder}"


def windows(corpus, process=0, processes=1):
    return data.training_batches(corpus, 16, 4, 0, process, processes)


def test_a_stream_resumes_at_the_very_next_batch_wherever_it_was_cut(dataset):
    corpus = data.load(dataset)
    batches = windows(corpus)
    epochs = [next(batches) for _ in range(350)]
    text = sum(p.stat().st_size for p in Path(dataset.removeprefix("hf:")).iterdir())
    assert sum(batch[:, 1:].size for batch in epochs) > text  # the stream has begun anew
    for cut in (0, 7, 8, 9, 200):
        batches = windows(corpus)
        for _ in range(cut):
            next(batches)
        resumed = windows(corpus)
        resumed.set_state(json.loads(json.dumps(batches.get_state())))
        for expected in epochs[cut : cut + 10]:
            np.testing.assert_array_equal(next(resumed), expected)


def test_a_streams_held_out_documents_are_never_trained_on(dataset):
    corpus = data.load(dataset)
    batches = windows(corpus)
    seen = b"".join(next(batches)[:, 1:].astype(np.uint8).tobytes() for _ in range(400))
    held_out = corpus.validation.astype(np.uint8).tobytes().split(data.SEPARATOR)
    long = [text for text in held_out if len(text) > 30]
    assert long
    assert not any(text[:30] in seen for text in long)


def test_each_process_reads_its_own_part_of_a_stream(dataset):
    corpus = data.load(dataset)
    readers = [windows(corpus, process, 2) for process in range(2)]
    rows = [{row.tobytes() for _ in range(20) for row in next(reader)} for reader in readers]
    assert not rows[0] & rows[1]
    with pytest.raises(UsageError, match=r"read by 2 process\(es\)"):
        windows(corpus).set_state(readers[0].get_state())


def test_a_run_on_a_stream_resumes_to_the_bit(dataset, tmp_path):
    run = [*RUN, "--steps", "6", "--data", dataset, "--log-interval", "1", "--out"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert worker.run([*run, str(whole)]) == 0
    assert worker.run([*run, str(cut)], stop_after=1) == 0
    assert worker.run([*run, str(cut), "--resume"]) == 0
    assert losses(cut) == losses(whole)


def test_a_dataset_that_cannot_be_read_is_named(dataset, tmp_path):
    with pytest.raises(UsageError, match=r"nowhere' cannot be loaded"):
        data.load(f"hf:{tmp_path}/nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.jsonl").write_text('{"content": "words"}\n')
    with pytest.raises(UsageError, match="no column 'text' but content"):
        data.load(f"hf:{tmp_path}/other")


def test_null_documents_are_left_out_of_a_stream_and_counted(dataset, capsys):
    expected = data.load(dataset).train
    for path in sorted(Path(dataset.removeprefix("hf:")).iterdir()):
        path.write_text('{"text": null}\n' + path.read_text() + '{"text": null}\n')
    corpus = data.load(dataset)
    assert "8 document(s)" in capsys.readouterr().err
    np.testing.assert_array_equal(corpus.train, expected)
    assert next(windows(corpus)).shape == (4, 17)


def test_a_path_may_hold_what_a_pattern_means_otherwise(tmp_path, monkeypatch):
    (tmp_path / "a[1].txt").write_text("in brackets " * 100)
    (tmp_path / "a1.txt").write_text("matches the pattern " * 100)
    monkeypatch.setenv("HOME", str(tmp_path))
    corpus = data.load("text:~/a[1].txt")
    assert corpus.codec is not None
    assert corpus.codec.decode(corpus.train[:11].tolist()) == "in brackets"


def test_the_order_of_the_files_is_that_of_their_names(tmp_path):
    """A run that goes on needs the text that it began with."""
    for name in ("a/x.txt", "a-b/x.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(f"{name} " * 100)
    corpus = data.load(f"text:{tmp_path}/*/x.txt")
    assert corpus.codec is not None
    assert corpus.codec.decode(corpus.train[:9].tolist()) == "a-b/x.txt"


@pytest.mark.parametrize("place", ["~no-such-user/a.txt", "a" * 300])
def test_a_path_that_cannot_be_is_one_sentence(place):
    with pytest.raises(UsageError, match="No file matches"):
        data.load(f"text:{place}")


def test_a_document_that_is_no_text_is_said():
    with pytest.raises(UsageError, match=r"of type int \(7\)|of type int \('7'\)"):
        data.beginning([{"text": "a document"}, {"text": 7}])


def test_an_empty_shard_is_passed_over_and_a_stream_of_nothing_else_is_said(dataset):
    folder = Path(dataset.removeprefix("hf:"))
    paths = sorted(folder.iterdir())
    paths[0].write_text("")
    assert next(windows(data.load(dataset))).shape == (4, 17)
    for path in paths:
        path.write_text("")
    with pytest.raises(UsageError, match="cannot be loaded"):
        data.load(dataset)


def test_without_the_package_a_stream_is_answered_with_how_to_install_it(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(stream.importlib, "import_module", missing)
    with pytest.raises(UsageError, match="pip install 'datasets"):
        data.load("hf:anything")


def test_what_every_process_knows_comes_back_to_it():
    position = {"next_index": 3, "name": "ø"}
    assert hosts.own_position(hosts.gather(position)) == position
