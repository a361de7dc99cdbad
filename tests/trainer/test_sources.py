"""Where the trainer's text comes from: files, packages, tokens, streams, and their tokenizers."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from examples.lm import data, hosts, stream, tokenizers
from examples.lm.config import UsageError
from tests.trainer import worker

RUN = ["train", "--model", "micro", "--optimizer", "adamw", "--steps", "2", "--batch-size", "8"]
RUN += ["--curvature-batch", "8", "--eval-interval", "2", "--eval-batches", "1"]


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    with worker.quick_compilation(tmp_path_factory.mktemp("compiled")):
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
    encode, decode, size = tokenizers.find(name, TEXT)
    tokens = encode(TEXT)
    assert tokens.max() < size
    assert decode(tokens.tolist()) == TEXT.decode()


def test_byte_pairs_are_fewer_than_bytes_and_learnt_once(cache, monkeypatch):
    encode, _, size = tokenizers.find("bpe:300", TEXT)
    assert 256 < size <= 300
    assert len(encode(TEXT)) < len(TEXT) / 2
    assert len(list(cache.glob("bpe-300-*.json"))) == 1
    monkeypatch.setattr(tokenizers, "ByteLevelBPETokenizer", None)
    again, _, _ = tokenizers.find("bpe:300", TEXT)
    np.testing.assert_array_equal(again(TEXT), encode(TEXT))


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


def test_without_the_package_a_stream_is_answered_with_how_to_install_it(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(stream.importlib, "import_module", missing)
    with pytest.raises(UsageError, match="pip install 'datasets"):
        data.load("hf:anything")


def test_what_every_process_knows_comes_back_to_it():
    position = {"next_index": 3, "name": "ø"}
    assert hosts.own(hosts.gather(position)) == position
