"""
What is claimed, as tests: each claim of the README and of the docstrings has one here.

  tasks     the data are what mad.md says, bit for bit; oracles are right wherever there is an answer
  layers    for every entry of LAYERS, so that a new layer inherits them: fast path = plain loop with
            gradients, causal, step = forward, counted state and FLOPs, bfloat16, compilation
  model     patterns, ledgers, generation
  train     the command line, the schedule, a run that learns, a run that is stopped and goes on

  python test_all.py            all of it, about two minutes on two cores
  python test_all.py -k mamba   what names mamba
"""
import argparse
import contextlib
import csv
import dataclasses
import hashlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import layers
import model
import scaling
import tasks
import train
from layers import LAYERS, build_layer

HERE = Path(__file__).parent
D = 128                                                  # width of all layers below

# =================================================================================================
# tasks.py
# =================================================================================================

RECALL, FUZZY, NOISY, COPYING, COMPRESSION, MEMORIZATION = tasks.TASKS
HARD = [dataclasses.replace(tasks.BASELINES[task], **change) for task, change in [
    (RECALL, {"vocab_size": 128, "seq_len": 512}),
    (RECALL, {"vocab_size": 7, "seq_len": 4}),
    (FUZZY, {"vocab_size": 128, "seq_len": 257}),
    (FUZZY, {"vocab_size": 9, "seq_len": 300, "max_motif": 4}),
    (FUZZY, {"vocab_size": 6, "seq_len": 4, "max_motif": 1}),
    (NOISY, {"frac_noise": 0.99, "seq_len": 16}),
    (NOISY, {"frac_noise": 0.8, "vocab_size": 144}),
    (COPYING, {"num_tokens_to_copy": 127, "seq_len": 255}),
    (COMPRESSION, {"vocab_size": 3, "seq_len": 2}),
    (MEMORIZATION, {"vocab_size": 8191})]]
SETTINGS = [*tasks.BASELINES.values(), *HARD]


def setting(task, **change):
    return dataclasses.replace(tasks.BASELINES[task], **change)


def pairs_of(s, row):
    """(key motif, value motif, column of the value) by plain Python; noise and padding skipped."""
    keys, values = tasks.halves(s)
    pairs, last = [], None
    for t, token in enumerate(int(x) for x in row):
        kind = "key" if token < keys else "value" if token < keys + values else None
        if kind == "key" and last != "key":
            pairs.append([(), (), None])
        if kind == "key":
            pairs[-1][0] += (token,)
        elif kind:
            pairs[-1][2] = pairs[-1][2] or t
            pairs[-1][1] += (token,)
        last = kind
    return pairs


@pytest.mark.parametrize("s", SETTINGS, ids=str)
def test_oracle_is_right_wherever_it_answers_and_answers_all_that_is_tested(s):
    for split in ("train", "test"):
        x, y = tasks.generate(s, 300, 5, split)
        p = tasks.oracle(s, x, 5)
        assert x.shape == y.shape == p.shape == (300, s.length) and x.dtype == y.dtype == np.int64
        assert 0 <= x.min() and x.max() < s.vocab_size and (y != -100).any()
        assert ((p == y) | (p == -1) | (y == -100)).all() and (p[y != -100] != -1).any()
        if split == "test":
            assert tasks.accuracy(p, y) == 1.0 and ((y != -100).sum(1) > 0).all()
        if s.backbone == "lm":                           # it reads the past: cut the future off
            t = s.length // 2
            past = np.where(np.arange(s.length) <= t, x, 0)
            assert (tasks.oracle(s, past, 5)[:, t] == p[:, t]).all()


@pytest.mark.parametrize("s", [s for s in SETTINGS if "recall" in s.task], ids=str)
@pytest.mark.parametrize("split", ["train", "test"])
def test_recall_structure(s, split):
    (keys, values), fuzzy = tasks.halves(s), s.task.startswith("fuzzy")
    L, pad = (s.max_motif, s.vocab_size - 1) if fuzzy else (1, -1)
    noise, lengths = 0, set()
    for x, y in zip(*tasks.generate(s, 60, 1, split)):
        # The last token is not in inputs: training targets have it, test targets the last value.
        row = np.append(x, y[-1])
        pairs, seen, expected = pairs_of(s, row), {}, np.full(s.seq_len, -100)
        for key, value, column in pairs:
            if key in seen:
                expected[column:column + len(value)] = value
            assert seen.setdefault(key, value) == value              # one value a key
            for motif in (key, value):
                assert len(set(motif)) == len(motif) <= L            # no token twice in a motif
            lengths |= {("k", len(key)), ("v", len(value))}
        assert pairs[-1][0] in [p[0] for p in pairs[:-1]]            # the probe is in the context
        assert pairs[-1][2] + len(pairs[-1][1]) == s.seq_len
        real = row != pad
        assert (np.diff(real.astype(int)) >= 0).all() and (~real).sum() < 2 * L
        if split == "train":
            expected = np.where(real, row, -100)                     # padding is never a target
        assert (y == expected[1:]).all()
        is_noise = (row >= keys + values) & real
        noise += is_noise.sum() / 2
        assert not is_noise.any() or (is_noise[0::2] == is_noise[1::2]).all()
    free = 60 * (s.seq_len // 2 - 2)                                 # pairs that may be noise
    assert abs(noise - free * s.frac_noise) <= 4 * (free * s.frac_noise * (1 - s.frac_noise)) ** .5
    short = [L] if fuzzy and split == "test" else range(1, L + 1)
    assert lengths == {("k", i) for i in short} | {("v", i) for i in range(1, L + 1)}


def test_copying_compression_memorization_structure():
    s = setting(COPYING, num_tokens_to_copy=9, seq_len=100)
    x, y = tasks.generate(s, 2000, 0, "train")
    assert (x[:, 90] == 15).all() and ((x == 15).sum(1) == 1).all() and (x[:, 91:] == 14).all()
    assert (x[:, :90] < 14).sum() == 9 * 2000 and (y[:, :-9] == -100).all()
    for a, b in zip(x[:50], y):
        assert [t for t in a if t < 14] == list(b[-9:])
    gaps = np.diff(np.nonzero(x[:, :90] < 14)[1].reshape(2000, 9), prepend=-1) - 1
    assert abs(gaps.mean(0) - 9).max() < 0.4 and abs(gaps.var(0) - 8).max() < 1   # multinomial
    s = setting(COMPRESSION)
    x, y = tasks.generate(s, 500, 0, "test")
    assert (x == y).all() and (x[:, -1] == 15).all() and set(np.unique(x[:, :-1])) == set(range(15))
    s = setting(MEMORIZATION)
    both = [tasks.generate(s, 256, 4, split) for split in ("train", "test")]
    fact = {}
    for x, y in both:                                    # one map for the train and the test data
        assert (x[:, 1::2] == 255).all() and (x[:, 0::2] < 128).all() and (y[:, 0::2] == -100).all()
        assert ((y[:, 1::2] >= 128) & (y[:, 1::2] < 255)).all()
        for k, v in zip(x[:, 0::2].ravel(), y[:, 1::2].ravel()):
            assert fact.setdefault(k, v) == v
    assert len(fact) == 128 and (tasks.facts(s, 4) != tasks.facts(s, 5)).mean() > 0.9


def test_every_draw_is_uniform():
    for high in (3, 15, 2 ** 32):
        parts = tasks.dice(SETTINGS[0], 0, "x")(high, 800).ravel()
        assert 0 <= parts.min() and parts.max() < high
        assert abs(np.histogram(parts, 3, (0, high))[0] / len(parts) - 1 / 3).max() < 0.005
    x, _ = tasks.generate(setting(RECALL, seq_len=8), 20000, 0, "train")
    for column in range(7):
        counts = np.bincount(x[:, column] % 8, minlength=8)
        assert abs(counts / 20000 - 1 / 8).max() < 0.01
    orders = tasks.motifs(tasks.dice(SETTINGS[0], 0, "m"), 4, 3, 100).reshape(-1, 3) @ [16, 4, 1]
    counts = np.unique(orders, return_counts=True)[1]
    assert len(counts) == 24 and abs(counts / len(orders) - 1 / 24).max() < 0.006
    order, used = tasks.fuzzy_order(tasks.dice(SETTINGS[0], 0, "o"), np.full((256, 99), 4), 24)
    assert (used == 6).all() and (order[:, 5] == 0).all()          # 4 others and the probe twice
    assert (np.sort(order[:, :5]) == np.arange(5)).all()
    assert abs(np.bincount((order[:, :5] == 0).argmax(1), minlength=5) / 256 - 1 / 5).max() < 0.1


def test_seeds_splits_and_checksums():
    sums = {}
    for s in tasks.BASELINES.values():
        x, y = tasks.generate(s, 300, 0, "train")
        sums[s.task] = hashlib.sha256(np.stack([x, y]).astype("<i8").tobytes()).hexdigest()[:12]
        smaller = dataclasses.replace(s, num_train=np.int64(7), num_test=8)
        again = tasks.generate(smaller, 290, 0, "train")             # a prefix; sizes don't count
        assert (again[0] == x[:290]).all() and (again[1] == y[:290]).all()
        other, test = tasks.generate(s, 300, 1, "train")[0], tasks.generate(s, 300, 0, "test")[0]
        rows = {r.tobytes() for r in x}
        assert len(rows) == 300                                      # no block repeats another
        assert not rows & {r.tobytes() for r in np.concatenate([other, test])}
    assert sums == {
        "in-context-recall": "f7480da092c9", "fuzzy-in-context-recall": "2f393e3edde4",
        "noisy-in-context-recall": "e9a72ede7b57", "selective-copying": "86d6655f7505",
        "compression": "97b51e1b727a", "memorization": "c0a7e355d7ea"}


def test_mad_settings():
    assert [len(tasks.mad_settings(t)) for t in tasks.TASKS] == [11, 11, 14, 13, 11, 6]
    every = tasks.mad_settings()
    assert len(set(every)) == 66 and {s.num_test for s in every} == {1280}
    for s in every:                                                  # one variable at a time
        base = dataclasses.asdict(tasks.BASELINES[s.task])
        assert sum(v != base[k] for k, v in dataclasses.asdict(s).items()) <= 1
    assert {s.vocab_size for s in tasks.mad_settings(NOISY)} == {32, 48, 80, 144}
    assert {s.frac_noise for s in tasks.mad_settings(NOISY)} == {.2, .4, .6, .8}
    assert {s.seq_len for s in tasks.mad_settings(COPYING)} == {256, 512, 1024}
    assert {s.num_tokens_to_copy for s in tasks.mad_settings(COPYING)} == {16, 32, 64, 96}
    assert {s.num_train for s in tasks.mad_settings(FUZZY)} == {12800, 6400, 3200, 1600, 800}


BAD = [(RECALL, "seq_len", 127, "even number, at least 4"), (RECALL, "seq_len", 2, "at least 4"),
       (RECALL, "seq_len", 128.0, "whole number, at least 1"), (RECALL, "vocab_size", 3, "least 4"),
       (RECALL, "num_train", 0, "at least 1"), (RECALL, "num_train", True, "whole number"),
       (RECALL, "frac_noise", 0.2, "0 and 0"), (RECALL, "noise_vocab_size", 4, "0 and 0"),
       (NOISY, "frac_noise", 1.0, r"\[0, 1\)"), (NOISY, "frac_noise", -0.1, r"\[0, 1\)"),
       (NOISY, "frac_noise", float("nan"), r"\[0, 1\)"), (NOISY, "frac_noise", "1", r"\[0, 1\)"),
       (NOISY, "frac_noise", True, r"\[0, 1\)"), (NOISY, "vocab_size", 19, "at least 20"),
       (NOISY, "noise_vocab_size", 0, "at least 1"), (NOISY, "seq_len", 9, "even"),
       (FUZZY, "vocab_size", 6, "at least 7"), (FUZZY, "max_motif", 8, "at least 17"),
       (FUZZY, "seq_len", 11, "at least 12"), (FUZZY, "max_motif", 0, "at least 1"),
       (COPYING, "num_tokens_to_copy", 128, "1 to 127"), (COPYING, "vocab_size", 3, "at least 4"),
       (COPYING, "num_tokens_to_copy", 0, "at least 1"), (COMPRESSION, "seq_len", 1, "at least 2"),
       (COMPRESSION, "num_test", -1, "at least 1"), (COMPRESSION, "vocab_size", "16", "whole"),
       (COMPRESSION, "vocab_size", 2, "at least 3"), (MEMORIZATION, "vocab_size", 4, "at least 5"),
       (MEMORIZATION, "seq_len", 31, "even number, at least 2")]


@pytest.mark.parametrize("task, field, value, permitted", BAD)
def test_impossible_settings(task, field, value, permitted):
    with pytest.raises(ValueError, match=permitted) as error:
        setting(task, **{field: value})
    assert f"{field} is {value!r}" in str(error.value) or field == "max_motif"


def test_bad_arguments_of_generate():
    s = SETTINGS[0]
    for n, seed, split in ((4, 0, "valid"), (0, 0, "test"), (2.0, 0, "test"), (4, -1, "test")):
        with pytest.raises(ValueError, match="permitted"):
            tasks.generate(s, n, seed, split)
    with pytest.raises(ValueError, match="'selective-coping'.*did you mean selective-copying"):
        tasks.Setting("selective-coping")
    with pytest.raises(ValueError, match="memorization"):
        tasks.mad_settings("recall")
    with pytest.raises(ValueError, match="max_motif is 20; permitted: a whole number, 1 to 9"):
        setting(FUZZY, vocab_size=100, max_motif=20)             # its code would not fit an int64


@pytest.mark.parametrize("s", [*tasks.BASELINES.values(), HARD[2], HARD[6]], ids=str)
def test_chance(s):
    y = np.concatenate([tasks.generate(s, 1500, seed, "test")[1] for seed in range(8)])
    rng, columns = np.random.default_rng(0), np.nonzero((y != -100).any(0))[0]
    answers = {c: np.unique(y[:, c][y[:, c] != -100]) for c in columns}      # all that occur there
    guess = np.stack([rng.choice(answers[c], len(y)) if c in answers else y[:, c]
                      for c in range(s.length)], 1)
    scored = (y != -100).sum()
    error = (tasks.chance(s) / scored) ** 0.5
    assert abs(tasks.accuracy(guess, y) - tasks.chance(s)) < 5 * error
    if s.task in (COPYING, RECALL, NOISY):                           # no constant guess is better
        best = max((y == v).sum() / scored for v in range(s.vocab_size))
        assert best < tasks.chance(s) + 5 * error


def test_ceiling():
    ceilings = [tasks.ceiling(s) for s in tasks.mad_settings("memorization")]
    assert round(np.mean(ceilings), 3) == 0.913 and round(ceilings[-1], 2) == 0.63
    for s, expected in list(zip(tasks.mad_settings("memorization"), ceilings))[2:]:
        known = np.unique(tasks.generate(s, s.num_train, 0, "train")[0][:, 0::2])
        tested = tasks.generate(s, s.num_test, 0, "test")[0][:, 0::2]
        assert abs(np.isin(tested, known).mean() - expected) < 0.015
    assert tasks.ceiling(SETTINGS[0]) == 1.0


def test_show():
    out = subprocess.run([sys.executable, tasks.__file__], capture_output=True, text=True).stdout
    assert out.count("oracle 1.000") == 6 and max(map(len, out.splitlines())) <= 100
    assert tasks.chance(tasks.BASELINES[NOISY]) == 0.125 and "chance 0.125" in out


# -------------------------------------------------------------------------------------------------
# Text


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """tiktoken's gpt2 and o200k_base without a download: their word patterns, few merges."""
    import tiktoken
    ranks = [*(bytes([i]) for i in range(256)), b"\n\n", b".\n", b" \n", b"th", b" t", b" th"]

    def get(name):
        word = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        return tiktoken.Encoding(name, pat_str=word, special_tokens={"<|endoftext|>": 300},
                                 mergeable_ranks={b: i for i, b in enumerate(ranks)})

    monkeypatch.setattr(tiktoken, "get_encoding", get)
    monkeypatch.setenv("NANOMAD_CACHE", str(tmp_path / "cache"))
    return get


def shard(path, version, tokens, count=None, magic=20240520):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + tokens.tobytes())
    return path


def test_load_tokenized(tmp_path):
    ids = np.arange(50000, 50100)
    ids.astype("<u2").tofile(tmp_path / "raw.bin")
    np.save(tmp_path / "a.npy", ids)
    shard(tmp_path / "gpt2.bin", 1, ids.astype("<u2"))
    shard(tmp_path / "llama.bin", 7, (2 * ids).astype("<u4"), magic=20240801)
    for name in ("raw.bin", "a.npy", "gpt2.bin"):
        tokens = tasks.load_tokens(tmp_path / name, "gpt2")
        assert isinstance(tokens, np.memmap) and (tokens == ids).all() and len(tokens) == 100
    assert (tasks.load_tokens(str(tmp_path / "llama.bin"), "o200k_base") == 2 * ids).all()


def test_load_text(tmp_path, toy, monkeypatch):
    text = "the end.\n\nthe théa \n\n then\n  日本語\nab\n\n\n" * 20
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_bytes(text[250:].encode())
    (folder / "a.txt").write_bytes(text[:250].encode())
    (folder / ".hidden").write_bytes(b"no")
    (tmp_path / "one.txt").write_bytes(text.encode())
    monkeypatch.setattr(tasks, "PIECE", 30)              # many pieces, the same tokens
    for path in (tmp_path / "one.txt", folder):
        tokens = tasks.load_tokens(path)
        assert isinstance(tokens, np.memmap) and tokens.tobytes() == text.encode()
        assert tasks.token_stats(tokens) == (len(tokens), max(text.encode()) + 1, 1.0)
        tokens = tasks.load_tokens(path, "gpt2")
        assert tokens.tolist() == toy("gpt2").encode_ordinary(text) and tokens.dtype == np.uint16
        n, M, ratio = tasks.token_stats(tokens, "gpt2")
        assert (n, M) == (len(tokens), tokens.max() + 1) and ratio == len(text.encode()) / n > 1
        assert tasks.token_stats(np.append(tokens, 300), "gpt2")[2] == len(text.encode()) / (n + 1)
    assert tasks.load_tokens(path, "o200k_base").dtype == np.uint32
    monkeypatch.setattr(tasks, "get_encoding", None)     # the second time comes from the cache
    assert (tasks.load_tokens(folder, "gpt2") == tokens).all()
    assert len(list((tmp_path / "cache").iterdir())) == 3
    (folder / "b.txt").write_bytes(b"other")             # other content isn't served from it
    assert tasks.load_tokens(folder).tobytes() == text[:250].encode() + b"other"
    bad = type("Bad", (), {"encode_ordinary": lambda self, text: 1 / 0})()
    monkeypatch.setattr(tasks, "get_encoding", lambda name: bad)
    with pytest.raises(ZeroDivisionError):
        tasks.load_tokens(folder, "cl100k_base")
    assert len(list((tmp_path / "cache").iterdir())) == 4              # no half of a file is left


def test_bad_data(tmp_path, toy, monkeypatch):
    ids, t = np.arange(10, dtype="<u2"), tmp_path
    np.save(t / "float.npy", np.ones(3))
    np.save(t / "square.npy", np.ones((2, 2), int))
    np.save(t / "negative.npy", np.array([3, -1]))
    np.save(t / "object.npy", np.array([{}], object), allow_pickle=True)
    (t / "cut.npy").write_bytes((t / "square.npy").read_bytes()[:-8])
    (t / "odd.bin").write_bytes(b"123")
    for name in ("empty.npy", "empty.bin", "empty.txt", "x.parquet"):
        (t / name).write_bytes(b"")
    (t / "latin.txt").write_bytes("é".encode("latin-1"))
    (t / "half.txt").write_bytes("é".encode()[:1])
    (t / "empty").mkdir()
    (t / "shards").mkdir()
    shard(t / "shards" / "s.bin", 1, ids)
    cut, version = shard(t / "cut.bin", 1, ids, 11), shard(t / "version.bin", 2, ids)
    none, big = shard(t / "none.bin", 1, ids[:0]), shard(t / "big.bin", 1, ids + 300)
    (t / "head.bin").write_bytes(cut.read_bytes()[:6])
    cases = {"float.npy": "integers", "square.npy": r"\(n,\)", "negative.npy": "-1 to 3",
             "object.npy": "npy", "cut.npy": "npy", "odd.bin": "3 bytes", "empty.npy": "npy",
             "empty.bin": "0 bytes", "empty.txt": "no text", "x.parquet": "parquet",
             "latin.txt": "UTF-8", "half.txt": "UTF-8", "empty": "without files",
             "shards": "its own path", cut.name: "truncated", version.name: "version 2",
             none.name: "promis|says", big.name: "beyond the 256", "head.bin": "version 0"}
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            tasks.load_tokens(t / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="missing.txt does not exist"):
        tasks.load_tokens(t / "missing.txt")
    with pytest.raises(ValueError, match="did you mean gpt2"):
        tasks.load_tokens(t / "latin.txt", "gpt-2")


@pytest.mark.parametrize("kind, message", [("refused", "Error: captive portal"), ("hung", "20 s")])
def test_no_network(kind, message, monkeypatch, tmp_path):
    import tiktoken
    release = threading.Event()

    def fetch(name):
        release.wait(30) if kind == "hung" else None
        raise OSError("captive\nportal")

    monkeypatch.setattr(tiktoken, "get_encoding", fetch)
    join = threading.Thread.join
    monkeypatch.setattr(threading.Thread, "join",
                        lambda self, timeout: join(self, timeout and min(timeout, 0.2)))
    (tmp_path / "a.txt").write_text("hello")
    monkeypatch.setenv("NANOMAD_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=f"{message}.*--tokenizer bytes.*TIKTOKEN_CACHE_DIR"):
        tasks.load_tokens(tmp_path / "a.txt", "gpt2")
    assert tasks.token_stats(np.arange(5), "gpt2") == (5, 5, None)
    assert not list((tmp_path / "cache").iterdir())
    release.set()


def test_standard_library(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOMAD_CACHE", str(tmp_path))
    name, data, sha = tasks.standard_library()
    assert "Python 3" in name and data.dtype == np.uint8 and len(data) > 5e6
    assert sha == hashlib.sha256(data.tobytes()).hexdigest()
    files = [f.as_posix() for f in tasks.library_files()]
    assert any(f.endswith("/json/decoder.py") for f in files)
    assert not any("/test/" in f or "/tests/" in f or "site-packages" in f for f in files)
    assert files == sorted(files)
    assert (tasks.load_tokens(None) == data).all()


# =================================================================================================
# layers.py: the fast paths
# =================================================================================================


def gap(a, b, floor=1e-12):
    """Largest difference relative to the largest entry of b."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=floor)).item()


def normal(*shape, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def agree(fast, slow, inputs, tolerance):
    """Outputs, and gradients of all inputs for one random direction, agree."""
    y, z = fast(*inputs), slow(*inputs)
    assert y.shape == z.shape and gap(y, z, 1e-3) < tolerance
    g = normal(*y.shape, dtype=y.dtype, seed=9)
    leaves = [x for x in inputs if x is not None]
    grads = [torch.autograd.grad((out * g).sum(), leaves, allow_unused=True,
                                 materialize_grads=True) for out in (y, z)]
    largest = max(b.abs().max() for b in grads[1])
    for a, b in zip(*grads):                             # (a gradient of exactly 0 has no relative)
        assert gap(a, b, float(1e-2 * largest) + 1e-12) < tolerance


LENGTHS = (1, 2, 7, 64, 100, 127, 257)
PRECISIONS = [(torch.float64, 1e-9), (torch.float32, 1e-4)]
DECAYS = {"none": 0.0, "mild": -0.1, "strong": -20.0}


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("T", LENGTHS)
def test_convolutions_equal_their_loops(T, dtype, tolerance):
    u, h, w = normal(2, T, 6, dtype=dtype), normal(6, T + 3, dtype=dtype), normal(6, 3, dtype=dtype)
    for method in ("fft", "toeplitz", "auto"):
        agree(lambda u, h: layers.long_conv(u, h, method=method), layers.long_conv.reference, (u, h),
              tolerance)
    agree(layers.short_conv, layers.short_conv.reference, (normal(2, 6, T, dtype=dtype), w),
          tolerance)
    q, k, v = (normal(2, 3, T, 4, dtype=dtype, seed=i) for i in range(3))
    for method in ("mask", "fft", "auto"):
        agree(lambda *x: layers.toeplitz_attention(*x, method=method),
              layers.toeplitz_attention.reference, (q, k, v, normal(3, T, dtype=dtype)), tolerance)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("decay", DECAYS)
def test_recurrences_equal_their_loops(decay, T, dtype, tolerance):
    log_a = DECAYS[decay] * normal(2, 3, T, 5).detach().abs().to(dtype)
    log_a = log_a.clamp(min=-20).requires_grad_()
    q, k, v = (normal(2, 3, T, n, dtype=dtype, seed=n) for n in (5, 5, 4))
    u = normal(3, 5, dtype=dtype)
    scan, loop = layers.gated_linear_scan, layers.gated_linear_scan.reference
    for bonus in (None, u):
        agree(scan, loop, (q, k, v, log_a, bonus), tolerance)
        agree(scan, loop, (q, k, v, None, bonus), tolerance)
        shared = log_a[:1, :, :, :1].detach().requires_grad_()       # one decay a head, all sequences
        agree(scan, loop, (q, k, v, shared, bonus), tolerance)
    with torch.no_grad():
        assert (scan(0 * q, k, v, log_a) == 0).all() and (scan(q, 0 * k, v, log_a, u) == 0).all()
    a, b = log_a.detach().mT.exp().requires_grad_(), normal(2, 3, 5, T, dtype=dtype)
    agree(layers.linear_scan, layers.linear_scan.reference, (a, b), tolerance)
    blocks = layers._scan_blocks(a.detach()[:, 0].mT, b.detach()[:, 0].mT)      # what a GPU runs
    assert gap(blocks, layers.linear_scan.reference(a[:, 0].mT, b[:, 0].mT), 1e-3) < tolerance


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("T", LENGTHS)
def test_attention_equals_its_loop(T, dtype, tolerance):
    q, k, v = (normal(2, 3, T, 4, dtype=dtype, seed=i) for i in range(3))
    for window in (None, 1, 5, 64):
        agree(lambda *x: layers.causal_attention(*x, window),
              lambda *x: layers.causal_attention.reference(*x, window), (q, k, v), tolerance)


# =================================================================================================
# layers.py: every layer of the table
# =================================================================================================

every_layer = pytest.mark.parametrize("name", LAYERS)
MODAL = [(name, dict(filter="modal")) for name in LAYERS if "hyena" in name]
VARIANTS = [*((name, {}) for name in LAYERS), *MODAL]
every_variant = pytest.mark.parametrize("name, settings", VARIANTS,
                                        ids=[n + "-modal" * bool(s) for n, s in VARIANTS])


def make(name, dtype=torch.float32, max_len=300, **settings):
    torch.manual_seed(0)
    return build_layer(name, D, max_len, **settings).to(dtype)


def run_steps(layer, x, state=None):
    state = layer.init_state(len(x), dtype=x.dtype) if state is None else state
    ys = []
    with torch.no_grad():
        for t in range(x.shape[1]):
            y, state = layer.step(x[:, t], state)
            ys.append(y)
    return torch.stack(ys, 1), state


@every_variant
@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_layer_equals_its_loops(name, settings, dtype, tolerance):
    layer = make(name, dtype, **settings)

    def plain(x, *_):
        with layers.plain_loops():
            return layer(x)
    for T in LENGTHS:
        agree(lambda x, *_: layer(x), plain,
              (normal(1, T, D, dtype=dtype), *layer.parameters()), tolerance)


@every_variant
def test_layer_is_causal(name, settings):
    layer, x, t = make(name, **settings), normal(1, 100, D, dtype=torch.float32), 60
    exact = "hyena" not in name                          # an FFT mixes all times, to rounding
    for probe in (t, 0):
        grad, = torch.autograd.grad(layer(x)[0, probe].square().sum(), x)
        later = grad[0, probe + 1:].abs().max()
        assert later == 0 if exact else later < 1e-6 * grad.abs().max()
        assert grad[0, probe].abs().max() > 0


@every_variant
def test_step_equals_forward(name, settings):
    layer = make(name, torch.float64, **settings)
    x = normal(2, 130, D).detach()
    whole = layer(x).detach()
    stepped, _ = run_steps(layer, x)
    assert gap(stepped, whole) < 1e-9
    prefix, state = run_steps(layer, x[:, :70])          # a prefix, then on from its state
    assert gap(layer(x[:, :70]).detach(), prefix) < 1e-9
    assert gap(run_steps(layer, x[:, 70:], state)[0], whole[:, 70:]) < 1e-9


GROWS = {"attention": 2 * D, "mh-attention": 2 * D, "hyena": 4 * D, "mh-hyena": 2 * D,
         "hyena-experts": D}                             # numbers a token
EXTRA = {"linear-attention": D, "mh-linear-attention": 128, "mamba": 3 * 256,
         "rwkv5-time-mixer": D, "rwkv6-time-mixer": D}   # normalisers, tails, a shifted token


@every_variant
def test_state_is_counted(name, settings):
    layer = make(name, **settings)
    counts = []
    state = layer.init_state(3)
    for t in range(40):
        state = layer.step(torch.randn(3, D), state)[1]
        counts.append(layers.count_state(state))
    growth = 0 if settings else GROWS.get(name, 0)
    assert counts == [counts[0] + t * growth for t in range(40)]
    assert counts[-1] == model.state_after(layer, D, 40)
    if not growth and not settings:
        assert counts[0] == layer.nominal(40) + EXTRA.get(name, 0)


def test_nominal_state_of_mad_architectures():
    def nominal(arch, part=None):
        m = model.Model(model.ARCHS[arch], 16, D, 128)
        return sum(b.layer.nominal(128) for n, b in zip(m.names, m.blocks)
                   if "channel-mixer" not in n)
    for arch in ("hyena", "mh-hyena", "hyena-experts", "mamba", "mh-gla", "rwkv5", "rwkv6"):
        assert nominal(arch) == 4096, arch
    assert nominal("mh-linear-attention") == 2048 and nominal("sliding") == 2 * 2 * D * 32
    assert nominal("linear-attention") == nominal("gla") == 2 * D * D
    assert nominal("transformer") == 2 * 2 * D * 128


@every_layer
def test_flops_are_those_that_torch_counts(name):
    from torch.utils.flop_counter import FlopCounterMode
    layer, x = make(name), torch.randn(1, 48, D)
    with FlopCounterMode(display=False) as counter, layers.plain_loops():
        layer(x)
    counted = counter.get_total_flops()
    if name == "moe-mlp":                                # its definition computes all experts
        counted -= 2 * 48 * 6 * (D * 32 + 16 * D)
    assert counted == layer.matmul_flops(48) <= layer.flops(48)
    assert layer.flops(96) > 1.4 * layer.flops(48)       # (some weights are multiplied once)


@every_variant
@pytest.mark.parametrize("scale", [1, 30])
def test_bfloat16(name, settings, scale):
    """Finite, and within 5% (root mean square) of float32, at inputs of scale 1 and 30."""
    layer = make(name, **settings)
    x = (scale * torch.randn(2, 100, D)).requires_grad_()
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    grads = torch.autograd.grad(y.float().square().mean(), [x, *layer.parameters()])
    assert y.isfinite().all() and all(g.isfinite().all() for g in grads)
    error = (y - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < (0.05 if scale == 1 or "attention" not in name else 0.3)


@every_variant
def test_layer_compiles_without_graph_breaks(name, settings):
    layer, x = make(name, **settings), torch.randn(2, 100, D)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    y = compiled(x)
    y.sum().backward()
    assert gap(y, layer(x), 1e-3) < 1e-5


@every_variant
def test_init_is_at_scale(name, settings):
    """Inputs of scale 1 give outputs between 1/300 and 30, and no gradient is lost."""
    layer = make(name, **settings)
    y = layer(torch.randn(4, 128, D))
    assert 1 / 300 < y.std() < 30
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_mamba_dt_survives_in_a_model():
    for backbone in ("lm", "autoencoder"):
        m = model.Model(model.ARCHS["mamba"], 16, D, 64, backbone)
        for block in m.blocks:
            dt = F.softplus(block.layer.dt_bias)
            assert 0.00099 < dt.min() < 0.003 and 0.03 < dt.max() < 0.101
            assert torch.allclose(block.layer.A_log.exp(), torch.arange(1.0, 5.0).expand(256, 4))


def test_routing_is_sparse_and_weights_sum_to_one():
    router = layers.Router(D, 8, 2)
    x = torch.randn(50, D)
    weight, chosen = router(x)
    assert torch.allclose(weight.sum(-1), torch.ones(50)) and weight.shape == (50, 2)
    best = router.score(x).topk(2).indices
    assert (chosen == best).all()
    layer = make("hyena-experts")                        # an expert that no token picks is unread
    y = torch.randn(1, 50, D, requires_grad=True)
    layer.readout(y, x[None]).sum().backward()
    off = y.grad[0].unflatten(-1, (8, 16)).abs().sum(-1) == 0
    assert (off.sum(-1) == 6).all()


@pytest.mark.parametrize("pile", ["even", "one expert", "few tokens"])
def test_experts_equal_their_loop(pile):
    n = 3 if pile == "few tokens" else 500
    x, w_in, w_out = normal(n, 8), normal(4, 8, 10), normal(4, 5, 8)
    weight = normal(n, 2)
    g = torch.Generator().manual_seed(0)
    chosen = torch.rand(n, 4, generator=g).topk(2).indices
    if pile == "one expert":
        chosen = torch.tensor([[2, 0]]).expand(n, 2)
    agree(lambda *a: layers.expert_glu(a[0], a[1], chosen, *a[2:], block=16),
          lambda *a: layers.expert_glu.reference(a[0], a[1], chosen, *a[2:]),
          (x, weight, w_in, w_out), 1e-9)


def test_layer_errors_name_the_way_out():
    for call, message in [
            (lambda: build_layer("mamab", D, 8), "did you mean 'mamba'.*rwkv6-time-mixer"),
            (lambda: build_layer("mamba", D, 8, heads=2), "no setting 'heads'; it has: expand"),
            (lambda: build_layer("hyena", D, 8, filter="fir"), "choose one of implicit, modal"),
            (lambda: build_layer("mh-attention", 100, 8), "heads=16"),
            (lambda: build_layer("hyena-experts", 64, 8), "8 x 16"),
            (lambda: layers.long_conv(torch.ones(1, 9, 2), torch.ones(2, 8)), "length 8")]:
        with pytest.raises(ValueError, match=message):
            call()


# =================================================================================================
# model.py
# =================================================================================================


def test_patterns():
    assert model.ARCHS["hybrid"] == "mh-hyena swiglu mh-attention swiglu"
    assert model.ARCHS["mamba"] == "mamba mamba mamba mamba" and len(model.ARCHS) >= 21
    quarter = model.stripe("mh-hyena", "swiglu", 8, 4).split()
    assert [i for i, n in enumerate(quarter) if n == "mh-attention"] == [6, 14]
    assert model.parse_pattern("hyena(filter=modal, order=2) mlp") == \
        [("hyena", dict(filter="modal", order=2)), ("mlp", {})]
    for bad, message in [("", "empty"), ("hyena(order) mlp", "key=value"),
                         ("hyena( mlp", "unknown|unclosed|write"), ("swigul", "did you mean")]:
        with pytest.raises(ValueError, match=message):
            model.Model(bad, 16)
    with pytest.raises(ValueError, match="Did you mean hybrid"):
        model.find_pattern("hibrid")


@pytest.mark.parametrize("arch", model.ARCHS)
def test_every_architecture_trains_and_counts(arch):
    torch.manual_seed(0)
    m = model.Model(model.ARCHS[arch], 16, D, 40)
    tokens = torch.randint(16, (2, 40))
    loss = F.cross_entropy(m(tokens).flatten(0, 1), tokens.flatten())
    assert abs(loss.item() - math.log(16)) < 0.6         # near uniform at the start
    loss.backward()
    assert all(p.grad is not None for p in m.parameters())
    rows = model.ledger(m, 40)
    assert model.total(rows).parameters == sum(p.numel() for p in m.parameters())
    state = m.init_state(1)
    for _ in range(40):
        state = m.step(tokens[:1, 0], state)[1]
    assert model.total(rows).state == sum(map(layers.count_state, state))


@pytest.mark.parametrize("arch", ["hybrid", "mamba", "rwkv6", "sliding", "striped-hyena-moe"])
def test_greedy_generation_equals_the_parallel_forward(arch):
    torch.manual_seed(0)
    m = model.Model(model.ARCHS[arch], 50, D, 64).double()
    out = m.generate(torch.randint(50, (2, 5)), 40, temperature=0)
    assert out.shape == (2, 45)
    with torch.no_grad():
        assert (m(out)[:, 4:-1].argmax(-1) == out[:, 5:]).all()


def test_sampling():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(20000, 1)
    drawn = model.pick(logits, 2.0, 3).bincount(minlength=4) / 20000
    expected = torch.tensor([0.0, *(torch.tensor([1.0, 2.0, 3.0]) / 2).softmax(-1)])
    assert (drawn - expected).abs().max() < 0.02
    with pytest.raises(ValueError, match="autoencoder"):
        model.Model("mlp", 16, backbone="autoencoder").generate(torch.zeros(1, 1).long(), 1)


@pytest.mark.parametrize("T", [1, 2, 31, 64])
def test_autoencoder_reads_the_last_position_only(T):
    m = model.Model("mh-attention swiglu", 16, D, 64, "autoencoder")
    seen = []
    m.blocks[-1].register_forward_hook(lambda *a: (a[2].retain_grad(), seen.append(a[2]))[0])
    logits = m(torch.randint(16, (2, T)))
    assert logits.shape == (2, T, 16)
    logits.square().sum().backward()
    assert (seen[0].grad[:, :-1] == 0).all() and seen[0].grad[:, -1].abs().sum() > 0


def test_weight_decay_is_for_matrices_only():
    m = model.Model(model.ARCHS["mamba"] + " moe-mlp rwkv6-time-mixer", 16)
    chosen = {id(p) for p in model.decayed(m)}
    names = {n: id(p) in chosen for n, p in m.named_parameters()}
    for n, yes in names.items():
        if any(s in n for s in ("A_log", ".D", "bias", "norm", "taps", "bonus", "log_rate", "mix")) \
                and not n.endswith(("mix_down.weight",)):
            assert not yes, n
    assert names["embed.weight"] and names["blocks.0.layer.xz.weight"]
    assert names["blocks.4.layer.w_in.weight"] and len(set(names.values())) == 2


# =================================================================================================
# Scaling laws
# =================================================================================================

LAW = dict(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)   # Besiroglu et al. 2024
BUDGETS = np.geomspace(1e18, 1e20, 5)


def law(N, D, E, A, B, alpha, beta):
    return E + A / N ** alpha + B / D ** beta


def sizes_of(budgets=BUDGETS, sizes=7, spread=4.0):
    """N and D of IsoFLOP groups at C = 6ND, `spread` either way of 20 tokens a parameter."""
    C = np.repeat(budgets, sizes)
    N = np.tile(np.geomspace(1 / spread, spread, sizes), len(budgets)) * np.sqrt(C / 120)
    return N, C / 6 / N


def exact_parabolas(k=0.05, a=0.46, sizes=5):
    """Runs whose loss is 3 (C / 1e18)^-0.07 + k (log N - log N*)^2 with N* = 2e7 (C / 1e18)^a."""
    N, D = sizes_of(sizes=sizes, spread=8.0)
    C = 6 * N * D / 1e18
    return N, D, 3 * C ** -0.07 + k * np.log(N / (2e7 * C ** a)) ** 2


def write_csv(path, **columns):
    rows = zip(*(np.broadcast_to(c, len(columns["N"])) for c in columns.values()))
    path.write_text("\n".join([",".join(columns), *(",".join(map(str, r)) for r in rows)]) + "\n")
    return path


def noisy_runs(seed=0, **changes):
    N, D = sizes_of(sizes=5)
    noise = np.random.default_rng(seed).normal(0, 0.003, len(N))
    return N, D, law(N, D, **LAW | changes) * np.exp(noise)


@pytest.fixture
def few_starts(monkeypatch):
    """One in 41 of the 4,500: enough for what isn't about them, and quick."""
    every = scaling.Huber.starts
    monkeypatch.setattr(scaling.Huber, "starts", lambda self: every(self)[::41])


@pytest.mark.parametrize("fit", [scaling.fit_parametric, scaling.fit_variable_projection])
@pytest.mark.parametrize("true", [LAW, dict(E=0.9, A=30.0, B=9000.0, alpha=0.21, beta=0.52)])
def test_a_law_without_noise_is_recovered(fit, true):
    N, D = sizes_of()
    found = fit(N, D, law(N, D, **true), target=1e22, bootstrap=20)
    for name, value in true.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-6)
        assert found.intervals[name] == pytest.approx([value] * 2, rel=1e-6)
    assert found.a == pytest.approx(true["beta"] / (true["alpha"] + true["beta"]), rel=1e-6)
    assert found.a + found.b == pytest.approx(1) and not found.flags and not found.failed
    assert found.objective < 1e-15 and found.rss < 1e-12 and found.reached > 0.4
    sizes = np.geomspace(1e7, 1e13, 200_001)             # the optimum, by looking everywhere
    losses = law(sizes, 1e22 / 6 / sizes, **true)
    goal = found.target
    assert goal["N"] == pytest.approx(sizes[losses.argmin()], rel=1e-3)
    assert goal["loss"] == pytest.approx(losses.min(), rel=1e-6)
    assert 6 * goal["N"] * goal["D"] == pytest.approx(1e22) and goal["decades"] == pytest.approx(2)
    assert goal["tokens_per_parameter"] == pytest.approx(goal["D"] / goal["N"])


def test_parabolas_without_noise_are_recovered():
    N, D, loss = exact_parabolas()
    fit = scaling.fit_isoflop(N, D, loss, target=1e21, bootstrap=50)
    assert fit.a == pytest.approx(0.46, abs=1e-9) and fit.b == pytest.approx(0.54, abs=1e-9)
    assert fit.loss_exponent == pytest.approx(0.07, abs=1e-9) and not fit.flags
    for row, C in zip(fit.parabolas, BUDGETS):
        assert row["C"] == pytest.approx(C) and row["runs"] == row["sizes"] == 5
        assert row["N"] == pytest.approx(2e7 * (C / 1e18) ** 0.46)
        assert row["D"] == pytest.approx(C / 6 / row["N"])
        assert row["loss"] == pytest.approx(3 * (C / 1e18) ** -0.07)
        assert row["curvature"] == pytest.approx(0.05) and row["flag"] == ""
    assert fit.optimum(1e21) == pytest.approx([fit.target[k] for k in ("N", "D", "loss")])
    assert fit.target["N"] == pytest.approx(2e7 * 1000 ** 0.46)
    assert np.abs(fit.residuals).max() < 1e-12
    excess = scaling.overtraining(fit, {}, 1e19)["isoflop"]          # k (log ratio)^2, by hand
    assert excess["2"] == pytest.approx(0.05 * math.log(2) ** 2)
    assert excess["curvature"] == pytest.approx(0.05) and "0.25" not in excess   # not sampled


def test_power_law():
    x = np.geomspace(1, 1e4, 9)
    fit = scaling.fit_power_law(x, 7 * x ** -0.28)
    assert fit.k == pytest.approx(7) and fit.c == pytest.approx(-0.28) and not fit.flags
    assert np.abs(fit.residuals).max() < 1e-12 and fit.intervals["c"] == pytest.approx([-0.28] * 2)
    fit = scaling.fit_power_law([1, 10, 100, np.nan], [2, 20, -1, 5], bootstrap=200)
    assert fit.c == pytest.approx(1) and 60 < fit.failed < 140       # half draw one point twice
    assert fit.failed == np.isnan(fit.draws["c"]).sum()
    assert "2 points dropped" in fit.flags[0] and "two x" in fit.flags[1]
    for x, y in [([1, 1, 1], [1, 2, 3]), ([1, 2], [1, -2]), ([], [])]:
        with pytest.raises(scaling.FitError, match="two different x"):
            scaling.fit_power_law(x, y)


def test_bootstrap_is_seeded_joint_and_counts_failures():
    runs = noisy_runs()
    for fit in (scaling.fit_isoflop, scaling.fit_variable_projection):
        one, same, other = (fit(*runs, bootstrap=300, seed=s) for s in (1, 1, 2))
        for name, draws in one.draws.items():
            assert np.array_equal(draws, same.draws[name], equal_nan=True)
            assert not np.array_equal(draws, other.draws[name]) and len(draws) == 300
            assert one.intervals[name] == pytest.approx(np.nanpercentile(draws, [2.5, 97.5]))
        d = one.draws                                    # a draw is one resample in all of them
        assert np.allclose(d["a"] + d["b"], 1) and np.allclose(6 * d["N"] * d["D"], 1e20)
        assert np.allclose(d["tokens_per_parameter"], d["D"] / d["N"])
    low, high = one.intervals["alpha"]
    assert low < LAW["alpha"] < high and high - low < 0.15
    # Three sizes a budget: a resample keeps all three in 6 of 27 cases, at two budgets 1 in 20.
    N, D = sizes_of(BUDGETS[::4], 3)
    fit = scaling.fit_isoflop(N, D, law(N, D, **LAW), bootstrap=400)
    assert fit.failed == np.isnan(fit.draws["N"]).sum() and 0.9 < fit.failed / 400 < 0.99
    assert any(f"{fit.failed} of 400 resamples failed" in flag for flag in fit.flags)
    assert np.isnan(scaling.interval(fit.draws["a"][:100])).all()    # too few for percentiles
    counts = scaling.resample(6, 500, 0, np.array([0, 0, 1, 1, 1, 1]))
    assert (counts[:, :2].sum(1) == 2).all() and (counts[:, 2:].sum(1) == 4).all()


def test_bootstrap_intervals_cover():
    """A nominal 95% interval of alpha holds the truth in most of 20 repetitions."""
    N, D = sizes_of(sizes=6)
    held = 0
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(0, 0.003, len(N))
        fit = scaling.fit_variable_projection(N, D, law(N, D, **LAW) * np.exp(noise), bootstrap=60)
        held += fit.intervals["alpha"][0] <= LAW["alpha"] <= fit.intervals["alpha"][1]
    assert 15 <= held


def test_rank_correlation():
    """Tables: n = 5, rho 0.9: p 0.083; n = 6, rho 0.886: p 0.033 (two-sided, exact)."""
    rank = scaling.rank_correlation
    found = rank([1, 2, 3, 4, 5], [2, 1, 3, 4, 5])
    assert (found.rho, found.n) == (pytest.approx(0.9), 5) and found.p == pytest.approx(10 / 120)
    assert rank(range(6), [1, 0, 2, 3, 5, 4]).p == pytest.approx(24 / 720)
    found = rank([1, 2, 2, 3], [1, 3, 2, 4])             # ties share: 1, 2.5, 2.5, 4
    assert found.rho == pytest.approx(math.sqrt(0.9)) and found.p == pytest.approx(4 / 24)
    assert rank([1, 2, 3], [9, 5, 1]).rho == pytest.approx(-1)
    assert rank([1, 2, 3], [9, 5, 1]).p == pytest.approx(2 / 6)
    far = rank(range(30), np.arange(30) ** 3)
    assert far.rho == pytest.approx(1) and far.p == pytest.approx(1e-4)  # the observed one counts
    rng = np.random.default_rng(0)
    several = [rank(*rng.normal(size=(2, 12)), permutations=999, seed=i).p for i in range(200)]
    assert 0.02 <= np.mean(np.array(several) <= 0.1) <= 0.18             # uniform without relation
    for x, y, why in [([1, 2], [1, 2], "at least 3"), ([1, 2, 3], [1, 1, 1], "constant"),
                      ([1, 2, np.nan], [1, 2, 3], "finite"), ([1, 2, 3], [1, 2], "one length")]:
        with pytest.raises(scaling.FitError, match=why):
            rank(x, y)


EVERY = scaling.METHODS.values()
N7, D7 = sizes_of()
GOOD = law(N7, D7, **LAW)
ONE = sizes_of(BUDGETS[:1], 8)


@pytest.mark.parametrize("fits, N, D, loss, why", [
    (EVERY, *ONE, law(*ONE, **LAW), "two budgets|one line"),                   # one budget
    ([scaling.fit_isoflop], *sizes_of(BUDGETS, 2), law(*sizes_of(BUDGETS, 2), **LAW),
     "2 different sizes, a parabola needs 3"),
    ([scaling.fit_isoflop], N7, D7, law(N7, D7, 1.8, 1e-9, 2e4, 0.35, 0.37),
     "one side of the optimum, which lies below"),
    ([scaling.fit_isoflop], N7, D7, law(N7, D7, 1.8, 1e4, 1e-9, 0.35, 0.37), "lies above"),
    ([scaling.fit_isoflop], N7, D7, 10 - GOOD, "curvature not positive"),
    (EVERY, N7 * 0 + 1e8, D7, GOOD, "N takes 1|two budgets"),                  # constant N
    (list(EVERY)[1:], N7, D7 * 0 + 1e9, GOOD, "D takes 1"),
    (list(EVERY)[1:], N7, 20 * N7, GOOD, "one line"),                          # one ratio D / N
    (EVERY, N7[:5], D7[:5], GOOD[:5], "at least 6|two budgets"),
    (EVERY, N7, D7, GOOD * np.nan, "no usable run in 35 rows .*loss.: 35"),
    (EVERY, N7, D7, GOOD[:5], "columns of one length"), (EVERY, [], [], [], "no usable run")])
def test_runs_that_cannot_tell_are_refused(fits, N, D, loss, why):
    for fit in fits:
        with pytest.raises(scaling.FitError, match=why) as refusal:
            fit(N, D, loss, bootstrap=0)
        assert "\n" not in str(refusal.value)


def flags_of(fit, *runs, **options):
    return "; ".join(fit(*runs, bootstrap=0, **options).flags)


def test_doubtful_runs_are_flagged(few_starts):
    iso, projection = scaling.fit_isoflop, scaling.fit_variable_projection
    assert flags_of(iso, N7, D7, GOOD) == flags_of(projection, N7, D7, GOOD) == ""
    bad = GOOD.copy()
    bad[[0, 9, 11]] = np.nan, np.inf, -1
    N = np.append(N7[:-1], np.nan)                       # bad rows are dropped, and the rest is
    assert flags_of(projection, N, D7, bad).startswith("1 rows dropped: N is missing")
    assert "3 rows dropped: loss is missing, infinite" in flags_of(iso, N, D7, bad)
    for fit in (iso, projection):                        # fitted as if they were not there
        keep = np.isfinite(N) & np.isfinite(bad) & (bad > 0)
        a, b = (fit(*(c[m] for c in (N, D7, bad)), bootstrap=0) for m in (keep, N7 > 0))
        assert a.a == b.a and a.target == b.target
    twice = [np.append(c, c[:4]) for c in (N7, D7, GOOD)]
    assert "4 rows repeat another exactly" in flags_of(iso, *twice)
    zero = law(N7, D7, **LAW | dict(E=0.0))
    assert "E is at 0" in flags_of(projection, N7, D7, zero)
    assert "E is at 0" in flags_of(scaling.fit_parametric, N7, D7, zero)
    assert "term in N is not resolved" in flags_of(projection, N7, D7, 1.8 + 2e3 / D7 ** 0.37)
    assert "only 6 runs" in flags_of(projection, *(c[[0, 3, 6, 8, 17, 30]] for c in (N7, D7, GOOD)))
    two = [c[7:21] for c in (N7, D7, GOOD)]
    assert "two budgets" in flags_of(iso, *two)
    lopsided = GOOD.copy()
    lopsided[:7] = 3 + 0.02 * np.arange(2, 9) ** 2       # the smallest budget rises throughout
    assert "budget 1e+18 left out: all runs on one side" in flags_of(iso, N7, D7, lopsided)
    wide = 6 * N7 * D7 * np.tile(np.linspace(0.93, 1.08, 7), 5)
    assert "differ by up to 15%" in flags_of(iso, N7, D7, GOOD, wide)
    assert scaling.group_budgets(wide)[1] == pytest.approx(BUDGETS, rel=0.01)


def test_compute_that_is_not_6ND():
    """C = 4 N^1.1 D: both ways find that optimum, not the one for 6ND, and say so."""
    C = np.repeat(BUDGETS, 9)
    N = np.tile(np.geomspace(1 / 3, 3, 9), 5) * (C / 300) ** 0.48
    D = C / (4 * N ** 1.1)
    fit = scaling.fit_variable_projection(N, D, law(N, D, **LAW), C, bootstrap=0)
    assert fit.rule == pytest.approx((4, 1.1)) and any("times 6ND" in flag for flag in fit.flags)
    sizes = np.geomspace(1e7, 1e11, 100_001)
    losses = law(sizes, 1e20 / (4 * sizes ** 1.1), **LAW)
    assert fit.target["N"] == pytest.approx(sizes[losses.argmin()], rel=1e-3)
    iso = scaling.fit_isoflop(N, D, law(N, D, **LAW), C, bootstrap=0)
    assert iso.a == pytest.approx(fit.a, abs=0.005) and "a + b is 0.9" in "".join(iso.flags)
    ratio = iso.target["N"] ** 1.1 * iso.target["D"] * 4 / 1e20
    assert ratio == pytest.approx(1, abs=0.01)


def test_outliers_and_their_influence():
    N, D, loss = N7, D7, GOOD.copy()
    loss[24] *= 1.3                                      # one run that diverged a little
    huber, squares = (fit(N, D, loss, bootstrap=0) for fit in list(EVERY)[1:])
    first = huber.influence[0]
    assert len(huber.influence) == 5 and (first["N"], first["D"]) == (N[24], D[24])
    assert first["residual"] == pytest.approx(math.log(1.3), rel=0.05)
    for name, value in LAW.items():                      # without it the law is exact again
        assert first["without"][name] == pytest.approx(value, rel=1e-5)
        assert squares.influence[0]["without"][name] == pytest.approx(value, rel=1e-5)
    off = [abs(f.alpha - LAW["alpha"]) for f in (huber, squares)]
    assert off[0] < 0.01 < off[1]                        # Huber's loss bears it, squares don't
    assert any("without the run at N" in flag for flag in squares.flags)


def test_hold_out_scores_a_prediction_by_its_distance(few_starts):
    runs = scaling.clean(N7, D7, GOOD)
    rows = {r["method"]: r for r in scaling.hold_out(runs, above=3e19)}
    assert len(rows) == 3                                # (the largest of two budgets held out)
    for method, row in rows.items():
        assert row["decades"] == pytest.approx(1.0) and row["C"] == pytest.approx(1e20)
        tight = 1e-6 if method != "isoflop" else 0.05    # a parabola's log L is not a line in log C
        assert abs(row["loss_error"]) < tight and abs(row["log10_N_error"]) < 0.02
    assert 1e-4 < abs(rows["isoflop"]["loss_error"])
    bent = GOOD * np.where(runs.C > 5e19, 1.05, 1)       # the largest budget is 5% worse than told
    row = scaling.hold_out(scaling.clean(N7, D7, bent))[-1]
    assert row["loss_error"] == pytest.approx(-math.log(1.05), abs=1e-6) == -row["loss_rms"]
    with pytest.raises(scaling.FitError, match="both sides"):
        scaling.hold_out(runs, above=1e30)


def test_state_law():
    """P* = k M^-0.28 with M = 5 sqrt(N) and a k for each architecture, put in and found again."""
    fits = {}
    for arch, k in [("one", 40.0), ("two", 30.0)]:
        N, D, _ = exact_parabolas()
        C = 6 * N * D / 1e18
        best = 2e7 * C ** 0.46
        loss = np.log(k * (5 * best ** 0.5) ** -0.28) + 0.05 * np.log(N / best) ** 2
        fits[arch] = scaling.fit_isoflop(N, D, loss, state=5 * N ** 0.5, bootstrap=100)
    out = scaling.state_law(fits)
    assert out["c"] == pytest.approx(-0.28) and out["intervals"]["c"] == pytest.approx([-0.28] * 2)
    assert out["k"] == pytest.approx(dict(one=40, two=30))
    assert out["separate"]["two"]["c"] == pytest.approx(-0.28)
    with pytest.raises(scaling.FitError, match="no architecture has a positive state"):
        scaling.state_law(dict(x=scaling.fit_isoflop(N7, D7, GOOD, bootstrap=0)))


def test_overtraining_and_the_bias_of_parabolas():
    fit = scaling.fit_variable_projection(N7, D7, GOOD, bootstrap=0)
    N, D, loss = fit.optimum(1e19)
    excess = scaling.overtraining({}, fit, 1e19)["law"]
    for ratio in (0.25, 0.5, 2, 4):                      # the same budget, another size
        expected = law(ratio * N, D / ratio, **LAW) - loss
        assert excess[f"{ratio:g}"] == pytest.approx(expected) and expected > 0
    bias = scaling.parabola_bias(fit, scaling.clean(N7, D7, GOOD))   # on exact runs it is all there
    iso = scaling.fit_isoflop(N7, D7, GOOD, bootstrap=0)             # is between the two methods
    assert bias["a"] == pytest.approx(iso.a - fit.a, abs=1e-8) and 1e-5 < abs(bias["a"]) < 0.01
    assert bias["N_factor"] == pytest.approx(iso.target["N"] / fit.target["N"])


@pytest.mark.parametrize("method", [scaling.Huber, scaling.Projection])
def test_gradients_equal_finite_differences(method, h=1e-6):
    N, D, loss = noisy_runs()
    fitter, rng = method(scaling.clean(N, D, loss * 1.02)), np.random.default_rng(1)
    w = rng.integers(0, 3, (1, len(N))).astype(float)
    theta = (rng.normal([0, 0, 0.5, 0.35, 0.35], 0.05, (20, 5)) if method is scaling.Huber else
             np.log(rng.uniform(0.2, 0.8, (20, 2))))
    value, gradient, curvature = fitter(theta, w)
    for i in range(theta.shape[1]):
        step = h * np.eye(theta.shape[1])[i]
        (up, gu, _), (down, gd, _) = fitter(theta + step, w), fitter(theta - step, w)
        scale = np.abs(gradient).max(1)
        assert (np.abs((up - down) / (2 * h) - gradient[:, i]) < 1e-5 * scale + 1e-9).all()
        if method is scaling.Huber:                      # Newton's: exact where no run is at a kink
            wrong = np.abs((gu - gd) / (2 * h) - curvature[:, i])
            assert np.median(wrong.max(1) / np.abs(curvature).max((1, 2))) < 1e-4


def test_the_objective_is_the_published_one_and_its_minimum_is_found():
    """
    240 points about Chinchilla's law as re-extracted (the points themselves are not shipped), its
    sum of Huber losses by a plain loop, and no random start that ends lower.
    """
    rng = np.random.default_rng(0)
    N, D = 10 ** rng.uniform(7.8, 10.2, 240), 10 ** rng.uniform(8.9, 11.8, 240)
    loss = law(N, D, **LAW) * np.exp(rng.standard_t(3, 240) * 0.004)
    fit = scaling.fit_parametric(N, D, loss, bootstrap=0)

    def objective(q):
        total = 0.0
        for n, d, l in zip(N, D, loss):
            r = abs(math.log(law(n, d, *q)) - math.log(l))
            total += r * r / 2 if r <= 1e-3 else 1e-3 * (r - 1e-3 / 2)
        return total
    best = np.array([getattr(fit, k) for k in scaling.LAW])
    assert fit.objective == pytest.approx(objective(best), rel=1e-9)
    assert fit.objective < objective(list(LAW.values())) and abs(fit.alpha - LAW["alpha"]) < 0.03
    for _ in range(100):                                 # a minimum in every direction ...
        assert objective(best * (1 + 1e-4 * rng.normal(size=5))) > fit.objective
    fitter = scaling.Huber(scaling.clean(N, D, loss))    # ... and lower than what others reach
    starts = rng.uniform([-2, -2, -2, 0, 0], [3, 3, 2, 2, 2], (300, 5))
    reached = scaling.minimise(fitter, starts, np.ones((1, 240)))[1]
    assert reached.min() > fit.objective * (1 - 1e-9)
    assert (reached < fit.objective * (1 + 1e-6)).mean() > 0.3


def test_problems_solved_together_equal_problems_solved_alone():
    fitter = scaling.Projection(scaling.clean(*noisy_runs()))
    starts, w = fitter.starts()[::12], np.ones((1, 25))
    together = scaling.minimise(fitter, starts, w)[1]
    alone = [scaling.minimise(fitter, s[None], w)[1][0] for s in starts]
    assert together == pytest.approx(np.array(alone), rel=1e-6)


# -------------------------------------------------------------------------------------------------
# Their commands


@pytest.fixture(scope="module")
def runs_csv(tmp_path_factory):
    """Three architectures, the second 3% better, the third 6%; three budgets of five sizes."""
    N, D = sizes_of(BUDGETS[::2], 5)
    parts = [dict(N=N, D=D, loss=law(N, D, **LAW) * (1 - 0.03 * i), arch=np.repeat(arch, len(N)),
                  state=(i + 1) * N ** 0.5) for i, arch in enumerate(("one", "two", "three"))]
    return write_csv(tmp_path_factory.mktemp("runs") / "runs.csv",
                     **{k: np.concatenate([p[k] for p in parts]) for k in parts[0]})


def test_fit_prints_one_json_object(runs_csv, tmp_path, capsys):
    few = tmp_path / "one.csv"
    few.write_text("".join(runs_csv.read_text().splitlines(True)[:16]))
    options = ["--bootstrap", "30", "--target", "1e21", "--draws", str(tmp_path / "draws.npz")]
    assert not scaling.main(["fit", str(few), "--json", *options])
    text = capsys.readouterr().out
    out = json.loads(text)
    assert text.count("\n") == 1 and {"a", "b", "intervals"} <= out["isoflop"].keys()
    for name in ("parametric", "variable_projection"):
        assert {"E", "A", "B", "alpha", "beta", "objective", "rss",
                "intervals"} <= out[name].keys()
        assert out[name]["alpha"] == pytest.approx(LAW["alpha"], rel=1e-6)
        assert out[name]["target"]["C"] == 1e21 and len(out[name]["intervals"]["E"]) == 2
    assert out["archs"].keys() == {"one"} and out["state_law"]["c"] < 0 and out["hold_out"]
    assert out["parabola_bias"]["parametric"]["a_parabola_less_law"] == pytest.approx(
        out["isoflop"]["a"] - out["parametric"]["a"])
    draws = np.load(tmp_path / "draws.npz")
    assert draws["one/parametric/alpha"].shape == (30,)


def test_fit_reports_every_architecture(runs_csv, capsys, few_starts):
    assert not scaling.main(["fit", str(runs_csv), "--bootstrap", "20"])
    text = capsys.readouterr().out
    for word in ("one  runs 15", "three  runs 15", "all together  runs 45", "state_law", "hold_out",
                 "! 3 architectures pooled as if they were one", "alpha 0.347", "overtraining"):
        assert word in text


def test_compare_ranks_architectures(runs_csv, tmp_path, capsys):
    scores = tmp_path / "mad.json"
    scores.write_text(json.dumps(dict(one=0.5, two=dict(mean=0.6), three=0.7, other=0.9)))
    assert not scaling.main(["compare", "--mad", str(scores), "--runs", str(runs_csv), "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [r["rho"] for r in rows] == pytest.approx([-1] * 3) and rows[0]["n"] == 3
    assert rows[0]["p"] == pytest.approx(1 / 3) and rows[-1]["C"] == pytest.approx(1e20)
    assert rows[0]["loss"]["three"] < rows[0]["loss"]["one"] and rows[0]["flags"] == []
    assert not scaling.main(["compare", "--mad", str(scores), "--runs", str(runs_csv)])
    assert "rho -1" in capsys.readouterr().out


def test_plot_writes_an_image(runs_csv, tmp_path):
    pytest.importorskip("matplotlib")
    scores, image = tmp_path / "mad.csv", tmp_path / "plots.png"
    scores.write_text("arch,mean\none,0.5\ntwo,0.6\nthree,0.7\n")
    assert not scaling.main(["plot", str(runs_csv), "--out", str(image), "--mad", str(scores)])
    assert image.read_bytes().startswith(b"\x89PNG") and image.stat().st_size > 50_000


@pytest.mark.parametrize("csv, args, message", [
    (None, [], "No such file"), ("", [], "no rows"), ("N,D\n1,2\n", [], "no column loss in N, D"),
    ("N,D,loss\n1,2,three\n", [], "line 2, loss: 'three' is not a number"),
    ("N,D,loss\n1e8,1e9,3\n", [], "power laws need two budgets"),
    ("N,D,loss\n1e8,1e9,\n", [], "no usable run"), ("N,D,loss\n1,2,3\n", ["--target", "-1"], "-1"),
    ("N,D,loss\n1,2,3\n", ["--bootstrap", "few"], "few")])
def test_mistakes_with_runs_end_in_one_line(csv, args, message, tmp_path, capsys):
    path = tmp_path / "runs.csv"
    if csv is not None:
        path.write_text(csv)
    try:
        status = scaling.main(["fit", str(path), *args])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and message in error and "Traceback" not in error
    assert error.splitlines()[-1].startswith("scaling.py") or "error:" in error.splitlines()[-1]


# -------------------------------------------------------------------------------------------------
# Sweeps and plans


MICRO = dict(E=1.5, A=64, B=330, alpha=0.4, beta=0.4)    # its optimum: about 60 tokens a parameter


@pytest.fixture
def trained(monkeypatch):
    """train.py's runs without the training: the configs that were really trained, in order."""
    configs, results = [], {}

    def fake(config, say):
        if config.name not in results:
            if config.name in fail:
                raise FloatingPointError("the loss is nan\nat step 7")
            if len(configs) == fake.stop:
                raise train.Interrupted("stopped at step 3 of 9", signal.SIGINT)
            configs.append(config)
            loss = law(6 * len(config.layers.split()) * config.dim ** 2,
                       config.steps * config.batch_size * config.context, **MICRO)
            results[config.name] = dict(val_loss=loss, bits_per_byte=loss / math.log(2),
                                        wall_s=2.0, corpus=dict(training_tokens=10_000_000))
        return results[config.name]

    fail, fake.stop = set(), None
    monkeypatch.setattr(train, "train", fake)
    monkeypatch.setattr(train, "TrainConfig", lambda **fields: argparse.Namespace(**fields))
    monkeypatch.setattr(train, "find_folder", lambda config: None)
    monkeypatch.setattr(tasks, "load_tokens", lambda data, tokenizer: None)
    return argparse.Namespace(configs=configs, fail=fail, train=fake)


SWEEP = ["sweep", "--archs", "transformer,hybrid", "--budgets", "1e12,1e13"]


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_sweep_trains_isoflop_groups_that_fit_reads(trained, few_starts, tmp_path, capsys):
    out = tmp_path / "sweep"
    assert not scaling.main([*SWEEP, "--out", str(out), "--seed", "3"])
    rows, configs = read_rows(out / "runs.csv"), trained.configs
    assert len(rows) == len(configs) == 2 * 2 * 7 and "28 of 28 runs" in capsys.readouterr().out
    for row, config in [*zip(rows, configs)][::3]:
        budget, N, D, C = (float(row[k]) for k in ("budget", "N", "D", "C"))
        m = model.Model(config.layers, 256, config.dim, config.context)
        entries = model.ledger(m, 128)                   # a step is what C can be off by
        per_token = 3 * model.total(entries).flops / 128
        assert D == config.steps * config.batch_size * 128 and C == pytest.approx(per_token * D)
        assert abs(C - budget) <= per_token * config.batch_size * 128 / 2 * 1.001
        assert N == sum(p.numel() for p in m.parameters()) - 2 * 256 * config.dim
        assert int(row["N_total"]) == sum(p.numel() for p in m.parameters())
        assert float(row["state"]) == model.total(entries).nominal
        assert config.steps >= scaling.LEAST_STEPS and 0.008 <= config.warmup / config.steps < 0.051
        assert config.lr == pytest.approx(3e-3 * (64 / config.dim) ** 0.5, rel=1e-3)
        assert (config.clip, config.beta2, config.weight_decay, config.seed) == (1, 0.95, 0.1, 3)
        assert config.task == "text" and float(row["epochs"]) == pytest.approx(D / 1e7, abs=1e-4)
    for arch, budget in itertools.product(("transformer", "hybrid"), (1e12, 1e13)):
        group = [r for r in rows if r["arch"] == arch and float(r["budget"]) == budget]
        sizes = [float(r["N"]) * (6 * 60 / budget) ** 0.5 for r in group]      # N / N*
        assert len({r["N"] for r in group}) >= 5 and len({r["batch"] for r in group}) == 1
        assert 0.15 < min(sizes) < 0.4 and 2.5 < max(sizes) < 5
    batches = [int(r["batch"]) for r in rows]
    assert batches == sorted(batches) and batches[0] < batches[-1]
    shapes = {a: [(r["width"], r["depth"]) for r in rows if r["arch"] == a] for a in
              ("transformer", "hybrid")}
    assert shapes["transformer"] == shapes["hybrid"]
    assert set(scaling.read_runs(out / "runs.csv")) == {"transformer", "hybrid"}
    assert not scaling.main(["fit", str(out / "runs.csv"), "--bootstrap", "5"])
    text = capsys.readouterr().out
    assert "hybrid  runs 14" in text and text.count("isoflop  failed 0  a 0.") == 3


def test_sweep_goes_on_and_loses_nothing(trained, tmp_path, capsys):
    args = [*SWEEP[:-1], "1e12", "--sizes", "5", "--out", str(tmp_path)]
    trained.train.stop = 3
    assert scaling.main(args) == 128 + signal.SIGINT and len(read_rows(tmp_path / "runs.csv")) == 3
    assert "stopped at step 3 of 9; finished runs, if any, are in" in capsys.readouterr().err
    trained.train.stop = None
    trained.fail.add(bad := "hybrid_1e+12_64x2_seed0")
    assert scaling.main(args) == 1
    said = capsys.readouterr()
    assert "9 of 10 runs" in said.out and f"failed: {bad}: the loss is nan at step 7" in said.err
    rows = read_rows(tmp_path / "runs.csv")
    assert len(rows) == 10 and [r["loss"] == "" for r in rows].count(True) == 1
    assert scaling.read_runs(tmp_path / "runs.csv")["hybrid"].dropped == dict(loss=1)
    assert len({c.name for c in trained.configs}) == len(trained.configs) == 9   # each trained once
    trained.fail.clear()
    assert not scaling.main(args) and len(trained.configs) == 10
    before = read_rows(tmp_path / "runs.csv")
    assert not scaling.main(["sweep", "--archs", "mamba", *args[3:]])   # another sweep, same CSV
    rows = read_rows(tmp_path / "runs.csv")
    assert rows[:10] == before and [r["arch"] for r in rows[10:]] == ["mamba"] * 5
    assert {p.name for p in tmp_path.iterdir()} == {"runs.csv"}         # no temporary file


def test_ratios_of_attention_are_exact_at_the_same_shapes(trained, tmp_path):
    ratios = {"0": 0, "8.3": 1 / 12, "25": 1 / 4, "50": 1 / 2, "100": 1}
    archs = ",".join(f"mh-hyena@{r}" for r in ratios)
    assert not scaling.main(["sweep", "--archs", archs, "--budgets", "1e13", "--out",
                             str(tmp_path)])
    rows = read_rows(tmp_path / "runs.csv")
    for ratio, share in ratios.items():
        mine = [(c.layers, c.dim) for c, r in zip(trained.configs, rows)
                if r["arch"] == f"mh-hyena@{ratio}"]
        for layers_, _ in mine:
            mixers = [name for name, _ in model.parse_pattern(layers_)][::2]
            assert mixers.count("mh-attention") == share * len(mixers) and len(mixers) % 12 == 0
        assert [w for _, w in mine] == [c.dim for c in trained.configs[:7]] and len(mine) == 7
    assert scaling.family("mamba@50") == ("mamba mamba mh-attention swiglu", 2)
    assert scaling.family("hyena-moe@50")[0] == model.ARCHS["striped-hyena-moe"]


def test_runs_of_too_few_steps_are_left_out(trained, tmp_path, capsys):
    assert not scaling.main(["sweep", "--budgets", "2e10", "--out", str(tmp_path)])
    said = capsys.readouterr().out.splitlines()
    left = [line for line in said if line.startswith("left out: ")]
    assert left and len(left) + len(trained.configs) == 14 and "fewer than 50" in left[0]
    assert min(c.steps for c in trained.configs) >= 50


@pytest.mark.parametrize("arch", model.ARCHS)
def test_every_architecture_is_priced_and_built_at_every_kind_of_width(arch):
    unit, blocks = scaling.family(arch)
    for width in (16, 24, 40, 48, 176, 512, 2304, 4096):
        pattern = scaling.at_width(f"{unit} {unit}", width)
        price = scaling.price(pattern, width, 64, 100)
        assert blocks == 2 and price["N"] > 0 and price["token_flops"] > 6 * 100 * width
        if width == 48:                                  # the same as counted on real numbers
            m = model.Model(pattern, 100, width, 64)
            assert price["N_total"] == sum(p.numel() for p in m.parameters())
            assert price["state"] == model.total(model.ledger(m, 64)).nominal
            assert price["token_flops"] == pytest.approx(
                3 * model.total(model.ledger(m, 64)).flops / 64)
    assert scaling.at_width(unit, 128).count("heads=16") == 0 or "mh-" in unit


def test_plan_adds_up(capsys):
    """One row worked by hand: the transformer of 24 blocks of width 1024, context 2048, GPT-2."""
    assert not scaling.main(["plan", "--archs", "transformer", "--budgets", "8e19", "--card",
                             "A100", "--utilisation", "0.5"])
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.split()[2:4] == ["1024", "24"]).split()
    inner = model.Model("swiglu", 16, 1024).blocks[0].layer
    mlp = sum(p.numel() for p in inner.parameters())
    N = 24 * (4 * 1024 ** 2 + mlp + 2 * 1024) + 1024     # with a norm before each layer and the last
    total = N + 2 * 50257 * 1024
    assert row[4:6] == [f"{N / 1e6:,.1f}", f"{total / 1e6:,.1f}"]
    forward = 24 * (8 * 1024 ** 2 + 2 * mlp + 2 * 1024 * 2049) + 2 * 1024 * 50257
    D = 8e19 / (3 * forward)
    assert float(row[6]) * 1e9 == pytest.approx(D, rel=2e-2) and row[7] == "256"   # 524,288 tokens
    assert int(row[8].replace(",", "")) == pytest.approx(D / 2 ** 19, rel=2e-2)
    GB = (16 * total + 34 * 2048 * 1024 * 24 + 10 * 2048 * 50257) / 1e9
    assert float(row[10]) == pytest.approx(GB, abs=0.051)
    assert float(row[11]) == pytest.approx(8e19 / (312e12 * 0.5) / 3600, abs=0.06)
    assert "recalled, not checked" in text and "7 runs, 5.6" in text and "context 2048" in text
    assert [scaling.batch_tokens(C) for C in (4e18, 8e18, 2e19, 4e19, 8e19)] == \
        [2 ** 17, 2 ** 17, 2 ** 18, 2 ** 18, 2 ** 19]
    big = scaling.price(scaling.at_width(" ".join([model.ARCHS["hybrid"]] * 16), 4096), 4096, 2048,
                        50257)
    assert scaling.SHAPES[-1] == (4096, 32) and 6.5e9 < big["N_total"] < 7.5e9   # the paper's 7B
    assert not scaling.main(["plan", "--budgets", "8e19", "--card", "RTX4090"])
    assert "!" in capsys.readouterr().out                # 24 GB are not enough for all of them


@pytest.mark.parametrize("args, message", [
    (["sweep", "--archs", "hybird"], "Did you mean hybrid"), (["plan", "--archs", ""], "unknown"),
    (["plan", "--archs", "mh-hyena@33"], "0, 8.3, 25, 50, 100%"),
    (["plan", "--archs", "transformer@25"], "other than attention"),
    (["plan", "--budgets", "1e18,-1"], "1e18,-1"), (["sweep", "--sizes", "4"], "4"),
    (["plan", "--card", "H1000"], "H1000"), (["sweep", "--tokenizer", "bites"], "bites"),
    (["plan", "--utilisation", "0"], "0"), (["sweep", "--budgets", "1e6"], "no run"),
    (["sweep", "--data", "nowhere.txt"], "nowhere.txt")])
def test_mistakes_with_sweeps_end_in_one_line(args, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = scaling.main(args)
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and message in error.splitlines()[-1] and not list(tmp_path.iterdir())


def test_scaling_as_a_program_and_its_help(runs_csv, capsys):
    done = subprocess.run([sys.executable, str(HERE / "scaling.py"), "compare", "--mad", runs_csv,
                           "--runs", runs_csv], text=True, capture_output=True, timeout=300)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no column mean" in done.stderr
    commands = ("fit", "compare", "plot", "sweep", "plan")
    for args in ([], *([name] for name in commands)):
        with pytest.raises(SystemExit) as stop:
            scaling.main([*args, "-h"])
        text = capsys.readouterr().out
        assert stop.value.code == 0 and "usage: " in text and "%%" not in text
        assert all(name in text for name in commands if not args)
        assert ("mh-hyena@25" in text) == (args in (["sweep"], ["plan"]))


# =================================================================================================
# train.py
# =================================================================================================


def command(*args, cwd=None, **env):
    return subprocess.run([sys.executable, str(HERE / "train.py"), *map(str, args)], text=True,
                          capture_output=True, cwd=cwd, timeout=300, env={**os.environ, **env})


SMALL = dict(task="in-context-recall", seq_len=32, num_train=1024, dim=64, batch_size=64, steps=30,
             compile="off", dtype="float32", device="cpu", layers="mh-attention(heads=4) swiglu")


def small(tmp_path, **changes):
    return train.TrainConfig(**{**SMALL, "out": str(tmp_path), **changes})


def quiet(*_):
    pass


def logged(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def test_the_hybrid_learns_recall(tmp_path):
    """A short run gets at least 0.5 above chance (1/8); attention alone does not, as in the paper."""
    accuracy = {}
    for arch in ("hybrid", "transformer"):
        config = train.TrainConfig(arch=arch, seq_len=64, num_train=6400, steps=180, lr=2e-3,
                                   batch_size=64, compile="off", out=str(tmp_path), device="cpu")
        accuracy[arch] = train.train(config, quiet)["test_accuracy"]
    assert accuracy["hybrid"] > 0.125 + 0.5 > accuracy["transformer"] + 0.1


def test_schedule_is_really_applied(tmp_path):
    result = train.train(small(tmp_path, lr=1e-3), quiet)
    rates = {line["step"]: line["lr"] for line in logged(result["folder"]) if "lr" in line}
    for step, rate in rates.items():                     # logged after `step` steps: of the last one
        expected = 1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * (step - 1) / 30)) / 2
        assert rate == pytest.approx(expected)
    assert len(rates) >= 3 and rates[30] < 1e-5
    result = train.train(small(tmp_path, schedule="constant"), quiet)
    assert {x["lr"] for x in logged(result["folder"]) if "lr" in x} == {1e-3}


def test_optimizer_is_the_protocols(tmp_path):
    config = small(tmp_path, weight_decay=0.1)
    folder, _ = train.find_folder(config)
    run = train.Run(config, folder, quiet)
    assert run.optimizer.defaults["betas"] == (0.9, 0.98)
    decays = [g["weight_decay"] for g in run.optimizer.param_groups]
    assert decays == [0.1, 0.0]
    assert {id(p) for p in run.optimizer.param_groups[0]["params"]} == \
        {id(p) for p in model.decayed(run.model)}


def test_run_folder_and_repetition(tmp_path):
    said = []
    first = train.train(small(tmp_path), said.append)
    folder = Path(first["folder"])
    assert {p.name for p in folder.iterdir()} == {"config.json", "log.jsonl", "result.json",
                                                 "ckpt.pt"}
    result = json.loads((folder / "result.json").read_text())
    for key in ("test_accuracy", "macro_accuracy", "test_loss", "chance", "steps", "tokens_per_s",
                "wall_s", "config", "versions", "data_sha256", "git", "machine", "train_flops"):
        assert key in result
    assert any(s.startswith("device   cpu") for s in said) and result["steps"] == 30
    before = {p: p.read_bytes() for p in folder.iterdir()}
    again = train.train(small(tmp_path), said.append)    # finished: shown again, nothing rewritten
    assert again == first and "finished" in said[-1]
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    with pytest.raises(ValueError, match="lr 0.001 -> 0.0005.*choose another --name"):
        named = dict(name=folder.name, out=str(tmp_path))
        train.train(small(tmp_path, lr=5e-4, **named), quiet)
    other = train.train(small(tmp_path, seed=1), quiet)
    assert other["test_loss"] != first["test_loss"] and other["data_sha256"] != first["data_sha256"]


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path):
    whole = train.train(small(tmp_path / "whole"), quiet)
    config = small(tmp_path / "parts")
    folder, _ = train.find_folder(config)
    before = 0
    for stop in (7, 10, 16, 23):                         # 10: a log line is due; 16: a test
        run = train.Run(config, folder, quiet)
        assert run.step == before
        batch = run.data.batch
        run.data.batch = lambda step: (setattr(run, "signal", signal.SIGTERM)
                                       if step + 1 >= stop else None, batch(step))[1]
        assert not run.go() and run.step == stop
        before = stop
        with open(folder / "log.jsonl", "a") as log:     # as if killed before the next checkpoint
            log.write('{"step": 99}\n')
    parts = train.train(config, quiet)
    a, b = (torch.load(Path(r["folder"]) / "ckpt.pt", weights_only=True) for r in (whole, parts))
    assert a["step"] == b["step"] == 30
    for n, p in a["model"].items():
        assert torch.equal(p, b["model"][n])
    strip = lambda lines: [{k: v for k, v in x.items() if k != "tokens_per_s"} for x in lines]
    assert strip(logged(whole["folder"])) == strip(logged(parts["folder"]))


def test_macro_accuracy_is_torchmetrics():
    """Mean recall over the classes that occur; worked by hand: 1/2, 1/1, 0 and a class said only."""
    said, right = torch.tensor([0, 3, 1, 1]), torch.tensor([0, 0, 1, 2])
    assert train.macro_accuracy(said, right, 9) == pytest.approx((1 / 2 + 1 + 0 + 0) / 4)


def test_partial_batches_are_tested_whole(tmp_path):
    data = train.TaskData(dataclasses.replace(tasks.BASELINES["in-context-recall"], num_train=300,
                                              num_test=150), 128, 0, "cpu")
    batches = list(data.test_batches())
    assert [len(x) for x, _ in batches] == [128, 128] and data.epoch_steps == 2
    scored_rows = sum(int((y != -100).any(1).sum()) for _, y in batches)
    assert scored_rows == 150
    seen = torch.cat([data.batch(s)[0] for s in range(2)])
    assert len(seen.unique(dim=0)) == 256                # an epoch repeats no sequence
    assert not torch.equal(data.batch(0)[0], data.batch(2)[0])


@pytest.mark.parametrize("args, message", [
    (["--arhc", "mamba"], "did you mean --arch"), (["--arch", "mambo"], "Did you mean mamba"),
    (["--task", "incontext-recall"], "did you mean in-context-recall"),
    (["--layers", "mh-attenton swiglu"], "did you mean 'mh-attention'"),
    (["--lr", "-1"], "lr is -1.0"), (["--lr", "nan"], "lr is nan"), (["--steps", "0"], "at least 1"),
    (["--seq-len", "127"], "even number"), (["--device", "tpu9"], "try --device cpu"),
    (["--steps", "ten"], "invalid"), (["--compile", "maybe"], "on, off"), (["--name", "//"], "name")])
def test_mistakes_on_the_command_line_end_in_one_line(args, message, tmp_path):
    done = command(*args, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())                  # and leave nothing behind


def test_help_and_a_run_from_the_command_line(tmp_path):
    done = command("-h")
    assert done.returncode == 0 and all("--" + f.name.replace("_", "-") in done.stdout
                                        for f in dataclasses.fields(train.TrainConfig))
    done = command("--arch", "mamba", "--task", "compression", "--seq-len", 16, "--num-train", 256,
                   "--steps", 4, "--dim", 32, "--eval-every", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("device", "dtype", "compile", "decay", "total", "test accuracy", "chance", "next:"):
        assert word in done.stdout
    assert "test_acc" in done.stderr and "tokens_s" in done.stderr


@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_task_runs(task, tmp_path):
    change = dict(num_tokens_to_copy=4) if task == "selective-copying" else {}
    result = train.train(small(tmp_path, task=task, seq_len=64, vocab_size=None, steps=3,
                               num_train=256), quiet)
    assert 0 <= result["test_accuracy"] <= 1 and math.isfinite(result["test_loss"])


def test_without_a_compiler_it_says_so_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert train.has_compiler() is None
    yes, why = train.choose_compile("auto", "cpu", 10 ** 6, 1.0)
    assert not yes and "no C++ compiler" in why


@pytest.mark.skipif(train.has_compiler() is None, reason="torch.compile on a CPU needs g++")
def test_compiled_run_equals_plain_run(tmp_path):
    results = [train.train(small(tmp_path, compile=c, steps=10), quiet) for c in ("off", "on")]
    losses = [[x["loss"] for x in logged(r["folder"]) if "loss" in x] for r in results]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", *sys.argv[1:]]))
