"""
What is claimed, as tests: each claim of the README and of the docstrings has one here.

  tasks     the data are what mad.md says, bit for bit; oracles are right wherever there is an answer
  layers    for every entry of LAYERS, so that a new layer inherits them: fast path = plain loop with
            gradients, causal, step = forward, counted state and FLOPs, bfloat16, compilation
  model     patterns, ledgers, generation
  train     the command line, the schedule, a run that learns, a run that is stopped and goes on,
            text: windows, bits a byte, samples, several processes

  python test_all.py            all of it, about two minutes on two cores
  python test_all.py -k mamba   what names mamba
"""
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
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

RECALL, FUZZY, NOISY, COPYING, COMPRESSION, MEMORIZATION, *_ = tasks.TASKS
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
    assert {task: sums[task] for task in [*tasks.TASKS][:6]} == {
        "in-context-recall": "f7480da092c9", "fuzzy-in-context-recall": "2f393e3edde4",
        "noisy-in-context-recall": "e9a72ede7b57", "selective-copying": "86d6655f7505",
        "compression": "97b51e1b727a", "memorization": "c0a7e355d7ea"}


def test_mad_settings():
    assert [len(tasks.mad_settings(t)) for t in [*tasks.TASKS][:6]] == [11, 11, 14, 13, 11, 6]
    every = [s for t in [*tasks.TASKS][:6] for s in tasks.mad_settings(t)]
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
@pytest.mark.parametrize("cached", [1, 500, layers.CACHED])       # a step, some, all in a stretch
def test_selective_scan_equals_its_loop(cached, T, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(layers, "CACHED", cached)
    x, B, C = normal(2, T, 6, dtype=dtype), *(normal(2, T, 3, dtype=dtype, seed=i) for i in (1, 2))
    for rate in (0.1, 1.0, 20.0):                        # log decays from -0.05 to -20 a step
        dt = normal(2, T, 6, seed=3).detach().sigmoid().to(dtype).requires_grad_()
        A = -rate * normal(6, 3, seed=4).detach().sigmoid().to(dtype)
        agree(layers.selective_scan, layers.selective_scan.reference,
              (x, dt, A.requires_grad_(), B, C), tolerance)


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


def test_mixing_shows_what_a_layer_reads():
    picture = lambda name: layers.mixing(make(name), torch.randn(1, 40, D))
    t, s = torch.arange(40)[:, None], torch.arange(40)
    seen = {"mlp": s == t, "rwkv6-channel-mixer": (s == t) | (s == t - 1), "mh-attention": s <= t,
            "sliding-attention": (s <= t) & (s > t - 32), "mamba": s <= t}
    for name, expected in seen.items():
        assert ((picture(name) > 0) == expected).all(), name
    lines = layers.draw(picture("mlp")).split("\n")
    assert len(lines) == 40 and all(len(line) == 2 * i + 2 and line[:2 * i].isspace() or i == 0
                                    for i, line in enumerate(lines))


def test_show_draws_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    layers.show(["mamba", "hyena"], tmp_path / "two.png", T=16)
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")


# =================================================================================================
# The museum of faults: famous mistakes kept alive, each failing as it did, next to the right way
# =================================================================================================


def test_museum_an_fft_without_padding_wraps_the_future_into_the_past():
    u, h = normal(1, 64, 1), normal(1, 64)
    wrapped = torch.fft.irfft(torch.fft.rfft(u[..., 0]) * torch.fft.rfft(h), 64)[..., None]
    future = lambda y: torch.autograd.grad(y[0, 0, 0], u)[0][0, 1:].abs().max()
    assert future(wrapped) > 0.1 and future(layers.long_conv(u, h, method="fft")) < 1e-12


def test_museum_dividing_by_cumulative_products_explodes():
    """mamba-tiny's scans.py: h = p cumsum(b / p), p = cumprod(a). At a = 0.5, 0.5^256 = 1e-77."""
    a, b = torch.full((1, 256, 1), 0.5), torch.ones(1, 256, 1)
    p = a.cumprod(1)
    assert not (p * (b / p).cumsum(1)).isfinite().all()
    assert torch.allclose(layers.linear_scan(a, b)[:, -1], torch.tensor(2.0))


def test_museum_elu_plus_one_is_zero_in_bfloat16():
    """flash-linear-attention issue 1261: phi = elu + 1 rounds to 0, and so does its denominator."""
    x = torch.full((4,), -7.0, dtype=torch.bfloat16)
    assert ((F.elu(x) + 1) == 0).all() and (F.softplus(x) > 0).all()


def test_museum_a_router_that_masks_before_its_softmax_turns_nobody_off():
    """mad-lab's mlp.py: scores outside the top k become 0, and exp(0) = 1 is a vote."""
    router, x = layers.Router(D, 8, 2), torch.randn(50, D)
    score = router.score(x)
    kept = torch.where(score >= score.topk(2).values[:, -1:], score, 0.0)
    assert (kept.softmax(-1) > 0).sum(-1).eq(8).all() and router(x)[0].shape == (50, 2)


def test_museum_a_parent_that_initialises_everything_overwrites_mambas_dt():
    """mad-lab issue 3 and pull request 4: a loop over modules, after Mamba had set its bias."""
    layer = make("mamba")
    step = lambda: F.softplus(layer.dt_bias.detach())
    assert 0.0009 < step().min() and step().max() < 0.11
    for name, p in layer.named_parameters():
        if "bias" in name:
            nn.init.zeros_(p)
    assert step().min() > 0.69                           # a memory of one token instead of 1000


def test_museum_a_cosine_schedule_that_never_runs():
    """mad-lab's pl_model_wrapper.py hands its schedule over under a key that nobody reads."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    configured = dict(optimizer=optimizer, scheduler=cosine)
    for _ in range(10):
        optimizer.step()
        if "lr_scheduler" in configured:
            configured["lr_scheduler"].step()
    config = train.TrainConfig(lr=1e-3)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert train.learning_rate(config, 10, 10) == pytest.approx(1e-6)


def test_museum_macro_accuracy_is_not_token_accuracy():
    """mad-lab's metrics.py reports the mean over classes: always saying 0 is 90% right, or 50%."""
    targets = torch.tensor([0] * 90 + [1] * 10)
    said = torch.zeros_like(targets)
    assert (said == targets).float().mean() == pytest.approx(0.9)
    assert train.macro_accuracy(said, targets, 16) == pytest.approx(0.5)


def test_museum_a_test_split_from_the_train_stream_is_the_training_data():
    s = tasks.BASELINES["in-context-recall"]
    draw = lambda: np.random.default_rng(0).integers(s.vocab_size, size=(100, 128))
    rows = lambda x: {row.tobytes() for row in x}
    assert rows(draw()) == rows(draw())                  # one seed for both: the same sequences
    ours = (rows(tasks.generate(s, 100, 0, split)[0]) for split in ("train", "test"))
    assert not set.intersection(*ours)


# =================================================================================================
# README.md: the layer and the task that it adds
# =================================================================================================


def snippet(start):
    """The README's Python block that begins with `start`."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    return next(b for b in blocks if b.startswith(start))


@pytest.mark.parametrize("file, start, before, name, options", [
    ("layers.py", "class Retention", "def build_layer(", "retention",
     ("--layers", "retention swiglu")),
    ("tasks.py", "def reversal", "CHANGES = {", "reversal",
     ("--layers", "mlp", "--task", "reversal"))])
def test_readme_snippet_passes_the_generic_tests(file, start, before, name, options, tmp_path):
    """In a copy of the project with the snippet put where the README says."""
    for path in HERE.glob("*.py"):
        shutil.copy(path, tmp_path)
    source = (tmp_path / file).read_text()
    assert source.count("\n" + before) == 1
    (tmp_path / file).write_text(source.replace("\n" + before,
                                                f"\n{snippet(start)}\n\n{before}"))
    run = lambda *command: subprocess.run([sys.executable, *command], cwd=tmp_path, text=True,
                                          capture_output=True, timeout=300)
    tested = run("test_all.py", "-k", name + " and not readme")
    passed = int(re.search(r"(\d+) passed", tested.stdout)[1]) if tested.returncode == 0 else 0
    assert passed >= {"retention": 9, "reversal": 3}[name], tested.stdout[-2000:]
    trained = run("train.py", *options, "--steps", "2", "--num-train", "128", "--compile", "off")
    assert trained.returncode == 0, trained.stderr


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


# -------------------------------------------------------------------------------------------------
# Text

SUMS = "".join(f"{a} plus {b} is {a + b}.\n" for a in range(40) for b in range(40))     # 28 kB
TINY = dict(task="text", layers="mh-hyena(heads=2) swiglu mh-attention(heads=2) swiglu", dim=32,
            context=32, batch_size=8, compile="off", dtype="float32", device="cpu")


def text(tmp_path, **changes):
    """A small run of text."""
    (tmp_path / "sums.txt").write_text(SUMS)
    return train.TrainConfig(**{**TINY, "data": str(tmp_path / "sums.txt"), "steps": 20,
                                "name": "run", "out": str(tmp_path / "out"), **changes})


def data_of(config, rank=0, count=1):
    ranks = train.Ranks("text")
    ranks.rank, ranks.count, ranks.largest = rank, count, lambda number: number
    return train.TextData(dataclasses.replace(config), ranks, "cpu")


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """The result of a run that has learned a little."""
    folder = tmp_path_factory.mktemp("writer")
    return train.train(text(folder, steps=150, lr=5e-3, warmup=10), quiet)


def test_it_learns_text(writer):
    """Below the 2.24 nats that the frequency of each byte allows, and what it reports adds up."""
    counts = np.bincount(np.frombuffer(SUMS.encode(), np.uint8)) / len(SUMS)
    entropy = -sum(p * math.log(p) for p in counts if p)
    assert writer["val_loss"] < 1.0 < 2.2 < entropy
    assert writer["val_accuracy"] > 0.6 and writer["best"]["val_loss"] <= writer["val_loss"]
    assert writer["bits_per_byte"] == pytest.approx(writer["val_loss"] / math.log(2))
    assert writer["corpus"] == dict(name="sums.txt", tokens=len(SUMS), bytes=len(SUMS),
                                    sha256=hashlib.sha256(SUMS.encode()).hexdigest(),
                                    training_tokens=len(SUMS) * 9 // 10, bytes_per_token=1.0)
    m = model.Model(TINY["layers"], 256, 32, 32)
    assert writer["train_flops"] == 3 * 150 * 8 * model.total(model.ledger(m, 32)).flops
    assert writer["parameters"] == sum(p.numel() for p in m.parameters())


def test_windows_of_text(tmp_path):
    """Drawn from the first nine tenths, tested on the last; a function of seed and step alone."""
    np.save(tmp_path / "count.npy", np.arange(3000))     # each token is its own position
    config = text(tmp_path, data=str(tmp_path / "count.npy"), tokenizer="gpt2", context=16)
    data = data_of(config)
    drawn = [data.batch(step) for step in range(300)]
    for tokens, targets in drawn:
        assert tokens.shape == (8, 16) and (targets == tokens + 1).all()
    seen = torch.cat([t for t, _ in drawn]).unique()
    assert seen.min() < 20 and 2660 < seen.max() and max(y.max() for _, y in drawn) == 2699
    tested = [(x[y[:, 0] >= 0], y[y[:, 0] >= 0]) for x, y in data.test_batches(10)]
    starts = torch.cat([x[:, 0] for x, _ in tested]).tolist()
    assert len(starts) == 10 and starts[0] == 2700 and starts[-1] == 3000 - 17
    assert set(np.diff(starts)) == {31, 32}              # at even distances
    assert len(list(data.test_batches(9999))) == 3 and len(data.scored_tokens()) == 18 * 16
    assert torch.equal(data_of(config).batch(7)[0], drawn[7][0])
    other = data_of(dataclasses.replace(config, seed=1))
    assert not torch.equal(other.batch(7)[0], drawn[7][0]) and data.sha256 == other.sha256
    halves = [data_of(config, rank, 2) for rank in (0, 1)]
    for step in (0, 5):                                  # processes and parts: the same windows
        both = torch.stack([h.batch(step)[0] for h in halves], 1).flatten(0, 1)
        assert torch.equal(both, drawn[step][0])
        parts = list(data_of(dataclasses.replace(config, accumulate=4)).parts(step))
        assert [len(x) for x, _ in parts] == [2] * 4
        assert torch.equal(torch.cat([x for x, _ in parts]), drawn[step][0])
    shares = [torch.cat([x[y[:, 0] >= 0, 0] for x, y in h.test_batches(10)]) for h in halves]
    assert sorted(torch.cat(shares).tolist()) == starts


def test_accumulated_gradients_equal_one_batch(tmp_path):
    runs = []
    for n in (1, 4):
        config = text(tmp_path, accumulate=n, clip=1.0, name=f"run{n}")
        runs.append(train.Run(config, Path(config.out) / config.name, quiet))
        losses = [float(runs[-1].one_step()[1]) for _ in range(3)]
        runs[-1].losses = losses
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-6)
    for p, q in zip(*(run.model.parameters() for run in runs)):
        assert (p - q).abs().max() < 2e-5                # (of a step: 1e-3)


def test_bits_a_byte_of_tokens(tmp_path, toy, monkeypatch):
    """The loss of a token is divided by the bytes that the tested tokens stand for."""
    config = text(tmp_path, tokenizer="gpt2", dim=16, steps=1,
                  layers="mh-attention(heads=2) swiglu")
    result = train.train(config, quiet)
    data = data_of(config)
    scored = toy("gpt2").decode_bytes(data.scored_tokens().tolist())
    ratio = len(scored) / len(data.scored_tokens())
    assert ratio > 1.02 and result["corpus"]["bytes_per_token"] == ratio
    assert result["bits_per_byte"] == pytest.approx(result["val_loss"] / math.log(2) / ratio)
    written = train.SampleConfig(sample=result["folder"], prompt=" the", tokens=3)
    assert len(train.sample(written, quiet)[0]) == 3
    assert train.token_bytes("gpt2")(50000) == "\ufffd".encode()       # an unused id

    def offline(name):
        raise ValueError("cannot get tiktoken's gpt2")
    monkeypatch.setattr(tasks, "get_encoding", offline)  # the tokens are cached, their bytes not
    said = []
    result = train.train(dataclasses.replace(config, name="offline"), said.append)
    assert result["bits_per_byte"] is None and any("no bits a byte" in line for line in said)


def test_warmup_and_lowest_learning_rate(tmp_path):
    config = text(tmp_path, lr=1e-2, min_lr=1e-3, warmup=4)
    rates = [train.learning_rate(config, step, 24) for step in range(25)]
    assert rates[:5] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 1e-2]) and rates[5] < 1e-2
    assert rates[14] == pytest.approx(5.5e-3) and rates[24] == pytest.approx(1e-3)


def test_greedy_sample_equals_the_parallel_forward(writer):
    shown = []
    config = train.SampleConfig(sample=writer["folder"], prompt="2 plus ", tokens=24, temperature=0,
                                device="cpu")
    ids, line = train.sample(config, shown.append)
    assert "".join(shown) == "2 plus " + bytes(ids).decode() + "\n"
    m, tokenizer = train.load_run(writer["folder"], "cpu")
    out = torch.tensor([[*b"2 plus ", *ids]])
    with torch.no_grad():
        assert (m(out)[:, 6:-1].argmax(-1) == out[:, 7:]).all()
    assert tokenizer == "bytes" and "tokens a second" in line and "longer than all" not in line
    state = m.init_state(1)
    for token in out[0]:
        state = m.step(token[None], state)[1]
    assert f"31 tokens is {sum(map(layers.count_state, state)):,} numbers" in line
    again = dataclasses.replace(config, temperature=2.0, tokens=40)
    drawn = [train.sample(dataclasses.replace(again, seed=s), quiet) for s in (1, 1, 2)]
    assert drawn[0][0] == drawn[1][0] != drawn[2][0] and "longer than all" in drawn[0][1]


def test_text_from_the_command_line(writer, tmp_path):
    done = command("--sample", writer["folder"], "--prompt", "1 plus ", "--tokens", 30)
    assert done.returncode == 0 and done.stdout.startswith("1 plus "), done.stderr
    assert "tokens a second" in done.stdout
    done = command("--task", "text", "--data", writer["config"]["data"], "--layers", TINY["layers"],
                   "--dim", 32, "--context", 32, "--steps", 2, "--compile", "off", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("sums.txt, 27,945 tokens", "vocabulary 256", "validation loss", "bits a byte",
                 "--sample", "tokens a second on"):
        assert word in done.stdout


@pytest.mark.parametrize("change, message", [
    (dict(seq_len=64), "seq_len is 64, but --task text has no use"), (dict(vocab_size=9), "no use"),
    (dict(epochs=5), "only the MAD tasks"), (dict(early_stop=0.5), "early_stop"),
    (dict(task="compression"), "only --task text take"), (dict(context=0), "at least 1"),
    (dict(tokenizer="gpt-2"), "did you mean gpt2"), (dict(accumulate=0), "accumulate is 0"),
    (dict(accumulate=3), "multiple of 3"), (dict(warmup=20), "less than the run's 20"),
    (dict(warmup=-1), "warmup"), (dict(min_lr=0.5), "at most lr, 0.001"),
    (dict(data="nowhere.txt"), "nowhere.txt does not exist"),
    (dict(context=9999), "27,945.*10 x 10000 are needed: lower --context")])
def test_mistakes_with_text(change, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        train.train(text(tmp_path, **change), quiet)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_mistakes_with_samples(writer, tmp_path):
    from shutil import copytree
    mad = train.train(small(tmp_path, steps=1), quiet)["folder"]
    cut = Path(copytree(writer["folder"], tmp_path / "cut")) / "ckpt.pt"
    cut.write_bytes(cut.read_bytes()[:5000])
    other = Path(copytree(writer["folder"], tmp_path / "other")) / "config.json"
    other.write_text(other.read_text().replace('"dim": 32', '"dim": 16'))
    copytree(writer["folder"], tmp_path / "list")
    (tmp_path / "list" / "config.json").write_text("[]")
    good = writer["folder"]
    for change, message in [
            (dict(sample=str(tmp_path / "no")), "does not exist: --sample takes"),
            (dict(sample=mad), "run of in-context-recall: only"), (dict(sample=good), "empty"),
            (dict(sample=good, prompt="a\udcff"), "not text"), (dict(temperature=-1.0), "at least"),
            (dict(temperature=1e-9), "from 0.001"), (dict(top_k=0), "top_k is 0"),
            (dict(tokens=0), "tokens is 0"), (dict(sample=str(cut.parent)), "can't be|be read"),
            (dict(sample=str(other.parent)), "be read"),
            (dict(sample=str(tmp_path / "list")), "be read")]:
        with pytest.raises(ValueError, match=message) as error:
            train.sample(train.SampleConfig(**{"prompt": "", **change}), quiet)
        assert "\n" not in str(error.value)


def torchrun(config, processes=2):
    """The run under torchrun, under way."""
    args = [f"--{f.name.replace('_', '-')}={getattr(config, f.name)}"
            for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
         str(processes), str(HERE / "train.py"), *args], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


def losses_of(folder):
    return [[x["step"], x.get("loss", x.get("val_loss"))] for x in logged(folder)]


def test_two_processes_equal_one(tmp_path):
    config = text(tmp_path, accumulate=2, clip=1.0, eval_every=10)
    run = torchrun(config)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert out.count("device   cpu") == out.count("validation loss") == 1   # one speaks and writes
    folder = Path(config.out) / "run"
    two = json.loads((folder / "result.json").read_text())
    assert two["machine"]["processes"] == 2 and {p.name for p in folder.iterdir()} >= {
        "config.json", "log.jsonl", "result.json", "ckpt.pt"}
    one = train.train(dataclasses.replace(config, name="one", accumulate=1), quiet)
    assert [s for s, _ in losses_of(folder)] == [10, 10, 20, 20]
    assert np.abs(np.array(losses_of(folder)) - losses_of(one["folder"])).max() < 1e-5
    for key in ("val_loss", "val_accuracy", "bits_per_byte"):
        assert two[key] == pytest.approx(one[key], abs=1e-5)


def test_processes_that_are_killed_or_stopped(tmp_path):
    """A dead one ends the job with an error; what two have saved goes on as one process."""
    config = text(tmp_path, steps=150)
    folder = Path(config.out) / "run"

    def start():
        run = torchrun(config)
        while not (folder / "log.jsonl").exists() or not logged(folder):
            assert run.poll() is None
            time.sleep(0.05)
        return run

    run = start()
    workers = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True)
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
    _, err = run.communicate(timeout=60)
    assert run.returncode != 0 and "another process of this run has ended" in err
    assert not (folder / "result.json").exists()
    (folder / "log.jsonl").unlink()
    run = start()
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=60)
    assert run.returncode != 0 and err.count("the same command goes on") == 1, err
    said = []
    train.train(config, said.append)
    assert any("resume   from step" in line for line in said)
    whole = train.train(dataclasses.replace(config, name="whole"), quiet)
    assert np.abs(np.array(losses_of(folder)) - losses_of(whole["folder"])).max() < 1e-4


def test_mistakes_with_several_processes(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="batch_size is 9; permitted: a multiple of 2"):
        data_of(text(tmp_path, batch_size=9), 0, 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="not one of compression: start this one with python"):
        train.run_and_report(["--task", "compression"])
    ranks = train.Ranks("text")
    assert (ranks.rank, ranks.count) == (0, 2) and train.Ranks("compression").count == 1
    with pytest.raises(ValueError, match="--device cpu"):
        ranks.connect("mps")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="process 0 of this machine finds 0 GPUs"):
        ranks.connect("cuda")
    ranks.largest = lambda number: abs(number)           # another process has another number
    with pytest.raises(ValueError, match="differ in the corpus"):
        ranks.check_same("the corpus", -5)


@pytest.mark.skipif(train.has_compiler() is None, reason="torch.compile on a CPU needs g++")
def test_compiled_run_equals_plain_run(tmp_path):
    results = [train.train(small(tmp_path, compile=c, steps=10), quiet) for c in ("off", "on")]
    losses = [[x["loss"] for x in logged(r["folder"]) if "loss" in x] for r in results]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# -------------------------------------------------------------------------------------------------
# The MAD protocol


GRID24 = train.Preset(settings=tuple((setting(t, num_train=128, num_test=64), 4) for t in tasks.TASKS),
                    epochs=None, batch_size=32, lrs=(1e-4, 1e-3), weight_decays=(0.0, 0.1),
                    eval_every=2)


def mad(tmp_path, **changes):
    return train.MadConfig(**{**dict(layers="swiglu", dim=16, preset="tiny", compile="off",
                                     device="cpu", dtype="float32", out=str(tmp_path / "out"),
                                     results=str(tmp_path / "results")), **changes})


def score(config):
    said = []
    return train.mad_score(config.label, config.preset, config, said.append) | dict(said=said[0])


@pytest.fixture
def tiny(monkeypatch):
    """A preset of 24 runs whose test data are small: 64 sequences can't be asked for by options."""
    monkeypatch.setitem(train.PRESETS, "tiny", GRID24)
    for task in tasks.TASKS:
        monkeypatch.setitem(tasks.BASELINES, task, setting(task, num_test=64))


@pytest.fixture
def fake(tiny, monkeypatch):
    """Runs that take no time. fake.accuracy(config) is one's accuracy, or raises."""
    made = types.SimpleNamespace(runs=[], accuracy=lambda c: 0.5)

    def train_(config, say, shared):
        made.runs.append(config)
        a, folder = made.accuracy(config), train.folder_of(config)
        one = dict(test_accuracy=a, macro_accuracy=a / 2)
        folder.mkdir(parents=True, exist_ok=True)
        train.write_json(folder / "result.json", dict(
            **one, least_loss={k: v / 2 for k, v in one.items()}, steps=4, ended="all steps done",
            wall_s=1.0, config=train.identity(config), machine={}, versions={}))
    monkeypatch.setattr(train, "train", train_)
    return made


def test_full_preset_is_the_protocol():
    grid = train.grid_of(train.MadConfig(preset="full"))
    runs = [run for runs in grid.values() for run in runs]
    assert len(grid) == 66 and set(grid) == set(tasks.mad_settings())
    assert len(runs) == 396 == len({run.name for run in runs})
    assert {(r.lr, r.weight_decay) for r in runs} == \
        {(lr, w) for lr in (1e-4, 5e-4, 1e-3) for w in (0.0, 0.1)}
    for s, some in grid.items():
        assert all(r.setting == s and r.epochs == 200 and r.batch_size == 128 for r in some)
        assert [r.lr for r in some] == sorted((r.lr for r in some), reverse=True)
        # Any of them can be run by hand: its command makes the same run.
        again = train.parse_args(shlex.split(train.command_of(some[0]))[2:])
        assert train.identity(again) == train.identity(some[0])
    shapes = [(s.length, s.vocab_size, s.backbone) for s in grid]
    changes = sum(a != b for a, b in zip(shapes, shapes[1:]))
    assert changes == len(set(shapes)) - 1               # each shape is compiled once


def test_score_is_best_of_runs_and_mean_of_means(fake, tmp_path, monkeypatch):
    extra = (setting(RECALL, num_train=64, num_test=64), 4)
    monkeypatch.setitem(train.PRESETS, "tiny",
                        dataclasses.replace(GRID24, settings=(*GRID24.settings, extra)))
    fake.accuracy = lambda c: 0.9 - 100 * c.lr - c.weight_decay + 0.1 * (c.num_train == 64)
    got = score(mad(tmp_path))
    one = pytest.approx(0.89)                            # lr 1e-4, no decay
    assert got["tasks"][COMPRESSION]["token"] == one and len(fake.runs) == 28
    assert got["tasks"][RECALL]["token"] == pytest.approx((0.89 + 0.99) / 2)
    assert got["mean"] == pytest.approx((5 * 0.89 + 0.94) / 6)
    assert got["macro_mean"] == pytest.approx(got["mean"] / 2)
    assert all(s["best"] == dict(lr=1e-4, weight_decay=0.0) for s in got["settings"])
    recorded = json.loads(Path(got["file"]).read_text())
    assert recorded["mean"] == got["mean"] and Path(got["file"]).name == "swiglu_seed0_dim=16_" \
        "dtype=float32.json"
    half = score(mad(tmp_path, select="best-loss"))      # the same runs, read another way
    assert half["mean"] == pytest.approx(got["mean"] / 2) and half["counts"]["reused"] == 28
    assert half["file"] != got["file"] and len(fake.runs) == 28
    part = score(mad(tmp_path, tasks=f"{RECALL},{COPYING}", settings="baseline"))
    assert part["counts"]["runs"] == 8 and part["mean"] is None and part["file"] is None
    assert "not all settings" in part["said"] and part["tasks"][RECALL]["token"] == one


def test_runs_of_a_solved_setting_are_skipped(fake, tmp_path):
    fake.accuracy = lambda c: 0.999 if c.task == COPYING else 0.5
    got = score(mad(tmp_path))
    assert got["counts"] | dict(trained=21, skipped=3) == got["counts"] and got["file"]
    assert [c.lr for c in fake.runs if c.task == COPYING] == [1e-3]
    every = score(mad(tmp_path, no_skip=True))
    assert len(fake.runs) == 24
    assert every["counts"] | dict(reused=21, trained=3, skipped=0) == every["counts"]


def test_failed_runs(fake, tmp_path):
    def fail(c):
        if c.lr == 1e-3 and c.task == NOISY:
            raise RuntimeError("the disk is on fire")
        return 0.5
    fake.accuracy = fail
    got = score(mad(tmp_path))
    assert got["counts"] | dict(trained=22, failed=2, open=0) == got["counts"]
    assert got["mean"] == 0.5 and got["file"] is None and "tries them again" in got["said"]
    where = [c for c in fake.runs if c.lr == 1e-3 and c.task == NOISY]
    error = train.folder_of(where[0]) / "error.txt"
    assert "Traceback" in error.read_text() and str(error.parent) in got["said"]

    def diverge(c):
        if c.task == NOISY and c.lr == 1e-3 or c.task == RECALL and c.seed == 1:
            raise FloatingPointError("the loss is nan")
        return 0.5
    fake.accuracy = diverge                              # tried again; now the others count
    got = score(mad(tmp_path))
    assert got["counts"] | dict(reused=22, failed=2) == got["counts"] and got["file"]
    none = score(mad(tmp_path, seed=1))                  # no run of recall is left: no mean
    assert none["mean"] is None and none["tasks"][RECALL]["token"] is None and not none["file"]
    assert "missing" in none["said"] and none["counts"]["of_other_options"] == 22
    fake.accuracy = lambda c: 0.5
    assert score(mad(tmp_path))["counts"]["failed"] == 0 and not error.exists()


def test_key_of_a_run(monkeypatch):
    base = train.TrainConfig()
    key = train.run_key(base)
    assert key == train.run_key(dataclasses.replace(base, out="elsewhere", name="x"))
    for change in (dict(lr=5e-4), dict(seed=1), dict(num_train=6400), dict(layers="swiglu"),
                   dict(task=COPYING), dict(early_stop=2.0)):
        assert train.run_key(dataclasses.replace(base, **change)) != key, change
    monkeypatch.setitem(tasks.BASELINES, RECALL, setting(RECALL, num_test=64))
    assert train.run_key(base) != key
    monkeypatch.undo()
    monkeypatch.setattr(train, "code_version", lambda: "other")
    assert train.run_key(base) != key
    source = Path(train.__file__).read_text()
    same = source.replace('"""One run, ', '"""A run, ').replace("# file systems", "# some systems")
    assert same != source and train.meaning(same) == train.meaning(source)
    other = source.replace("LOG_EVERY, SAVE_SECONDS = 10", "LOG_EVERY, SAVE_SECONDS = 11")
    assert other != source and train.meaning(other) != train.meaning(source)


def test_results_of_other_code_are_not_reused(fake, tmp_path, monkeypatch):
    score(mad(tmp_path))
    monkeypatch.setattr(train, "code_version", lambda: "other")
    got = score(mad(tmp_path))
    assert got["counts"] | dict(reused=0, trained=24, of_other_code=24) == got["counts"]
    assert "24 results of other code" in got["said"]


def test_mad_mistakes(tmp_path, monkeypatch):
    for args, message in [(["--preset", "quik"], "did you mean quick"),
                          (["--tasks", "compresion"], "did you mean compression"),
                          (["--arch", "mambo"], "Did you mean mamba"),
                          (["--workers", "0"], "at least 1"), (["--lr", "0.1"], "option is '--lr'"),
                          (["--device", "tpu9"], "try --device cpu"),
                          (["--dim", "20"], "divide"), (["--select", "first"], "best-loss")]:
        with pytest.raises(ValueError, match=message):
            train.run_and_report(["--task", "mad", "--out", str(tmp_path), *args])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun has started 2"):
        train.run_and_report(["--task=mad", "--out", str(tmp_path), "--workers", "2"])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="only selective-copying"):
        train.TrainConfig(num_tokens_to_copy=8)


# train.py with the preset GRID24, which notes each run that it trains, and pauses before it.
PROGRAM = """
import sys; sys.path.insert(0, {here!r})
import time, tasks, train
from dataclasses import replace
for task in tasks.TASKS:
    tasks.BASELINES[task] = replace(tasks.BASELINES[task], num_test=64)
train.PRESETS["tiny"] = train.Preset(
    settings=tuple((replace(s, num_train=128), 4) for s in tasks.BASELINES.values()), epochs=None,
    batch_size=32, lrs=(1e-4, 1e-3), weight_decays=(0.0, 0.1), eval_every=2)
go = train.Run.go
def noted(run):
    with open({log!r}, "a") as file:
        file.write(run.folder.name + "\\n")
    time.sleep({pause})
    return go(run)
train.Run.go = noted
if __name__ == "__main__":
    sys.exit(train.main())
"""
GRID_ARGS = ["--task", "mad", "--preset", "tiny", "--layers", "swiglu", "--dim", "16",
             "--compile", "off", "--device", "cpu", "--dtype", "float32"]


def program(tmp_path, args=GRID_ARGS, pause=0.0, **env):
    path = tmp_path / f"program{pause}.py"
    path.write_text(PROGRAM.format(here=str(HERE), log=str(tmp_path / "log"), pause=pause))
    return subprocess.Popen([sys.executable, str(path), *args], cwd=tmp_path, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def noted(tmp_path, at_least=0):
    """Names of the runs begun so far; waits until there are so many."""
    for _ in range(600):
        names = (tmp_path / "log").read_text().split() if (tmp_path / "log").exists() else []
        if len(names) >= at_least:
            return names
        time.sleep(0.1)
    raise TimeoutError(f"{len(names)} runs begun in a minute")


def test_four_processes_share_a_grid(tmp_path):
    """Two of torchrun, and two more that know nothing of these: each run is done exactly once."""
    both = [program(tmp_path, RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]
    both += [program(tmp_path), program(tmp_path)]
    ends = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0] * 4, ends
    assert len(noted(tmp_path)) == 24 == len(set(noted(tmp_path)))
    assert "MAD score" in ends[0][0] and not ends[1][0] and "24/24" in ends[0][1]
    (file,) = (tmp_path / "results" / "mad" / "tiny").iterdir()
    runs = [r for s in json.loads(file.read_text())["settings"] for r in s["runs"]]
    assert {r["folder"] for r in runs} == set(noted(tmp_path))
    for r in runs:
        result = json.loads((tmp_path / "out/mad/swiglu" / r["folder"] / "result.json").read_text())
        assert (r["token"], r["macro"]) == (result["test_accuracy"], result["macro_accuracy"])
    assert not list(tmp_path.glob("out/mad/*/*/lock"))


def test_workers_that_are_killed_and_stopped(tmp_path):
    """kill -9 of a worker: the others take its run over. SIGTERM: all stop; what is done stays."""
    first = program(tmp_path, [*GRID_ARGS, "--workers", "2"], 0.5)
    noted(tmp_path, 2)
    lock = next(tmp_path.glob("out/mad/*/*/lock"))
    killed = json.loads(lock.read_text())["pid"]
    os.kill(killed, signal.SIGKILL)
    noted(tmp_path, 6)
    first.terminate()
    out, err = first.communicate(timeout=60)
    assert first.returncode == 128 + signal.SIGTERM and not out
    assert "the same command goes on" in err and "Traceback" not in err
    done = len(list(tmp_path.glob("out/mad/*/*/result.json")))
    assert 3 <= done < 24
    second = program(tmp_path)
    out, err = second.communicate(timeout=60)
    assert second.returncode == 0 and f"24: {done} reused, {24 - done} trained" in out, err
    assert not list(tmp_path.glob("out/mad/*/*/lock"))


def test_locks(tmp_path):
    folder, lock = tmp_path / "a" / "b", tmp_path / "a" / "b" / "lock"
    with train.claim(folder):
        mine = json.loads(lock.read_text())
        assert mine["pid"] == os.getpid()
        with pytest.raises(train.InUse, match=f"b is in use by process {os.getpid()} on "):
            train.claim(folder).__enter__()
    assert not (tmp_path / "a").exists()                 # nothing was put there
    folder.mkdir(parents=True)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale = [dict(mine, pid=dead.pid), dict(mine, started="1")]      # the second: a pid used again
    for holder in stale if mine["started"] else stale[:1]:
        lock.write_text(json.dumps(holder))
        with train.claim(folder):
            assert json.loads(lock.read_text()) == mine
    lock.write_text("")                                  # in the making, or of a process long dead
    with pytest.raises(train.InUse):
        train.claim(folder).__enter__()
    os.utime(lock, (0, 0))
    with train.claim(folder):
        pass
    lock.write_text(json.dumps(dict(mine, host="elsewhere", pid=dead.pid)))
    with pytest.raises(train.InUse, match=f"{dead.pid} on elsewhere.*delete"):
        train.claim(folder).__enter__()
    train.remove_stale(lock, stale[0])                   # taken over meanwhile: it is put back
    assert json.loads(lock.read_text())["host"] == "elsewhere"
    assert [p.name for p in folder.iterdir()] == ["lock"]


def test_many_processes_take_a_stale_lock_over_once(tmp_path):
    (tmp_path / "lock").write_text(json.dumps(dict(host=platform.node(), pid=2 ** 30, started="1")))
    code = "\n".join([f"import pathlib, sys; sys.path.insert(0, {str(HERE)!r}); import train",
                      "print('ready', flush=True); input()",
                      f"try:\n with train.claim(pathlib.Path({str(tmp_path)!r})):",
                      "  print('mine', flush=True); input()",
                      "except train.InUse:\n print('refused')"])
    some = [subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True,
                             stdout=subprocess.PIPE) for _ in range(3)]
    assert all(p.stdout.readline() == "ready\n" for p in some)
    for p in some:
        p.stdin.write("\n")
        p.stdin.flush()
    assert sorted(p.stdout.readline() for p in some) == ["mine\n", "refused\n", "refused\n"]
    for p in some:
        p.communicate("\n", timeout=30)


def test_a_run_in_use_is_refused(tmp_path):
    config = small(tmp_path / "out", num_train=128, steps=2)
    folder, _ = train.find_folder(config)
    with train.claim(folder):
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on .*--name"):
            train.train(config, quiet)
    assert train.train(config, quiet)["steps"] == 2


@pytest.mark.parametrize("compiled", ["off", pytest.param("on", marks=pytest.mark.skipif(
    train.has_compiler() is None, reason="torch.compile on a CPU needs g++"))])
def test_runs_that_share_a_model_equal_lone_ones(compiled, tmp_path, monkeypatch):
    compilations, compile_ = [], torch.compile
    monkeypatch.setattr(torch, "compile",
                        lambda *a, **k: compilations.append(1) or compile_(*a, **k))
    shared, made = train.Shared(), {}
    for with_ in (shared, None):
        for lr, T in [(1e-3, 32), (1e-2, 32)] + [(1e-2, 16)] * (compiled == "off"):
            config = small(tmp_path / str(with_ is None), layers="swiglu", dim=16, steps=4, lr=lr,
                           seq_len=T, num_train=128, compile=compiled)
            folder = train.train(config, quiet, with_)["folder"]
            made.setdefault((lr, T), []).append(
                torch.load(Path(folder) / "ckpt.pt", weights_only=True)["model"])
        if with_:
            assert len(compilations) == (compiled == "on")
    for a, b in made.values():
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_mad_table_shows_what_is_recorded(fake, tmp_path, capsys):
    arch = ("transformer", "hyena", "mamba")             # published means 74.5, 66.0, 69.3
    for i, a in enumerate(arch):
        for seed in (0, 1):
            fake.accuracy = lambda c: (0.8, 0.6, 0.7)[i] + 0.02 * seed + 0.1 * (c.task == COPYING)
            score(mad(tmp_path, arch=a, layers=None, dim=32, dtype="auto", seed=seed))
    folder = tmp_path / "results" / "tiny"
    assert {p.name for p in folder.iterdir()} >= {"mamba_seed1_dim=32.json"} and \
        len(list(folder.iterdir())) == 6
    for path in folder.iterdir():                        # as if of the paper's width
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | dict(options={})))
    assert scaling.main(["table", "--mad", str(folder)]) is None
    out = capsys.readouterr().out
    rows = {r.split("|")[1].strip(): [x.strip() for x in r.split("|")[2:-1]]
            for r in out.splitlines() if r.startswith("|")}
    assert list(rows)[2:] == ["transformer", "*paper*", "mamba", "*rerun*", "hyena"]
    fuzzy, copying, mean = (rows["hyena"][i] for i in (1, 5, 6))
    assert (fuzzy, copying) == ("30.5 ±0.5", "35.5 ±0.5")              # macro: half of 0.61, 0.71
    records = [json.loads(p.read_text()) for p in folder.glob("hyena*")]
    assert mean == f"{100 * np.mean([r['macro_mean'] for r in records]):.1f} ±0.5"
    assert rows["hyena"][7] == f"{100 * np.mean([r['mean'] for r in records]):.1f} ±1.0"
    assert rows["hyena"][-1] == f"{records[0]['parameters']:,}"
    assert "1.00, n = 3, permutation p = 0.33" in out
    assert scaling.read_scores(folder) == {a: scaling.mad_mean(scaling.read_records(folder)[a])
                                           for a in arch}
    with pytest.raises(scaling.FitError, match="train.py --task mad"):
        scaling.read_records(tmp_path)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", *sys.argv[1:]]))
