"""
What is claimed, as tests: each claim of the README and of the docstrings has one here.

  tasks     the data are what the paper's appendix says, bit for bit; oracles are right
            wherever there is an answer
  layers    for every entry of LAYERS, so that a new layer inherits them: fast path = plain loop,
            gradients, causal, step = forward, counted state and FLOPs, bfloat16, compilation
  model     patterns, ledgers, generation
  train     the command line, the schedule, a run that learns, a run that is stopped and goes on,
            text: windows, bits a byte, samples, several processes
            the MAD protocol: its arithmetic, what is reused, processes that share, die and go on

  python test_all.py            all of it, about four minutes on two cores
  python test_all.py -k mamba   what names mamba
"""
import argparse
import collections
import csv
import dataclasses
import errno
import hashlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import tiktoken
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


def refused(message, act, *args, error=ValueError, **options):
    """act(*args, **options) ends in an error of one line, which matches; returns that line."""
    with pytest.raises(error, match=message) as caught:
        act(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def started(*args, cwd=None, **env):
    """A Python process of one thread, under way."""
    return subprocess.Popen([sys.executable, *map(str, args)], cwd=cwd, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def ended(process, timeout=300):
    """What it has come to: returncode, stdout and stderr."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


# =================================================================================================
# tasks.py
# =================================================================================================

RECALL, FUZZY, NOISY, COPYING, COMPRESSION, MEMORIZATION, *_ = tasks.TASKS


def setting(task, **change):
    return dataclasses.replace(tasks.BASELINES[task], **change)


HARD = [setting(RECALL, vocab_size=128, seq_len=512), setting(RECALL, vocab_size=7, seq_len=4),
        setting(FUZZY, vocab_size=128, seq_len=257), setting(NOISY, frac_noise=0.99, seq_len=16),
        setting(FUZZY, vocab_size=9, seq_len=300, max_motif=4),
        setting(FUZZY, vocab_size=6, seq_len=4, max_motif=1),
        setting(NOISY, frac_noise=0.8, vocab_size=144),
        setting(COPYING, num_tokens_to_copy=127, seq_len=255),
        setting(COMPRESSION, vocab_size=3, seq_len=2), setting(MEMORIZATION, vocab_size=8191)]
SETTINGS = [*tasks.BASELINES.values(), *HARD]


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
    said = refused(permitted, setting, task, **{field: value})
    assert f"{field} is {value!r}" in said or field == "max_motif"


def test_bad_arguments_of_generate():
    for args in ((4, 0, "valid"), (0, 0, "test"), (2.0, 0, "test"), (4, -1, "test")):
        refused("permitted", tasks.generate, SETTINGS[0], *args)
    refused("'selective-coping'.*did you mean selective-copying", tasks.Setting, "selective-coping")
    refused("memorization", tasks.mad_settings, "recall")
    refused("max_motif is 20; permitted: a whole number, 1 to 9",    # it would not fit an int64
            setting, FUZZY, vocab_size=100, max_motif=20)


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
    out = ended(started(tasks.__file__)).stdout
    assert out.count("oracle 1.000") == 6 and max(map(len, out.splitlines())) <= 100
    assert tasks.chance(tasks.BASELINES[NOISY]) == 0.125 and "chance 0.125" in out


# -------------------------------------------------------------------------------------------------
# Text


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """tiktoken's gpt2 and o200k_base without a download: their word patterns, few merges."""
    ranks = [*(bytes([i]) for i in range(256)), b"\n\n", b".\n", b" \n", b"th", b" t", b" th"]
    word = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    get = lambda name: tiktoken.Encoding(
        name, pat_str=word, special_tokens={"<|endoftext|>": 300},
        mergeable_ranks={b: i for i, b in enumerate(ranks)})
    monkeypatch.setattr(tiktoken, "get_encoding", get)
    monkeypatch.setenv("NANOMAD_CACHE", str(tmp_path / "cache"))
    return get


def shard(version, tokens, count=None, magic=20240520):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + tokens.tobytes()


def npy(array):
    np.save(file := io.BytesIO(), array, allow_pickle=True)
    return file.getvalue()


def test_load_tokenized(tmp_path):
    ids = np.arange(50000, 50100)
    for name, content in [("raw.bin", ids.astype("<u2").tobytes()), ("a.npy", npy(ids)),
                          ("gpt2.bin", shard(1, ids.astype("<u2")))]:
        (tmp_path / name).write_bytes(content)
        tokens = tasks.load_tokens(tmp_path / name, "gpt2")
        assert isinstance(tokens, np.memmap) and (tokens == ids).all() and len(tokens) == 100
    (tmp_path / "llama.bin").write_bytes(shard(7, (2 * ids).astype("<u4"), magic=20240801))
    assert (tasks.load_tokens(str(tmp_path / "llama.bin"), "o200k_base") == 2 * ids).all()


def test_load_text(tmp_path, toy, monkeypatch):
    text = "the end.\n\nthe théa \n\n then\n  日本語\nab\n\n\n" * 20
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for name, content in [("folder/b.txt", text[250:]), ("folder/a.txt", text[:250]),
                          ("folder/.hidden", "no"), ("one.txt", text)]:
        (tmp_path / name).write_bytes(content.encode())
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
    bad = Mock(encode_ordinary=Mock(side_effect=ValueError("broken")))
    monkeypatch.setattr(tasks, "get_encoding", lambda name: bad)
    refused("broken", tasks.load_tokens, folder, "cl100k_base")
    assert len(list((tmp_path / "cache").iterdir())) == 4              # no half of a file is left


def test_text_is_not_cut_where_a_token_may_reach_across(tmp_path):
    for name, text in (("a", ".\n"), ("b", "\nx\n")):
        (tmp_path / name).write_text(text)
    assert list(filter(None, tasks.read_text([tmp_path / "a", tmp_path / "b"]))) == [".\n\nx", "\n"]


def test_bad_data(tmp_path, toy):
    ids, square, unread = np.arange(10, dtype="<u2"), npy(np.ones((2, 2), int)), "readable .npy"
    for folder in ("empty", "shards"):
        (tmp_path / folder).mkdir()
    for name, content, message in [
            ("float.npy", npy(np.ones(3)), "integers"), ("square.npy", square, r"\(n,\)"),
            ("negative.npy", npy(np.array([3, -1])), "-1 to 3"), ("cut.npy", square[:-8], unread),
            ("object.npy", npy(np.array([{}], object)), unread), ("empty.npy", b"", unread),
            ("odd.bin", b"123", "3 bytes"), ("empty.bin", b"", "0 bytes"),
            ("empty.txt", b"", "no text"), ("x.parquet", b"", "not text: .* as .txt"),
            ("latin.txt", "é".encode("latin-1"), "UTF-8"), ("half.txt", b"\xc3", "UTF-8"),
            ("empty", None, "without files"), ("shards/s.bin", shard(1, ids), None),
            ("shards", None, "its own path"), ("cut.bin", shard(1, ids, 11), "truncated"),
            ("version.bin", shard(2, ids), "version 2"), ("none.bin", shard(1, ids[:0]), "says"),
            ("big.bin", shard(1, ids + 300), "beyond the 256"),
            ("head.bin", shard(1, ids)[:6], "version 0")]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        if message:
            assert name in refused(message, tasks.load_tokens, tmp_path / name)
    refused("missing.txt does not exist", tasks.load_tokens, tmp_path / "missing.txt",
            error=FileNotFoundError)
    refused("did you mean gpt2", tasks.load_tokens, tmp_path / "latin.txt", "gpt-2")


@pytest.mark.parametrize("seconds, message", [(0, "Error: captive portal"), (2, "20 seconds")])
def test_no_network(seconds, message, monkeypatch, tmp_path):
    def fetch(name):
        time.sleep(seconds)
        raise OSError("captive\nportal")
    monkeypatch.setattr(tiktoken, "get_encoding", fetch)
    join = threading.Thread.join                         # 20 seconds are 0.2 here
    monkeypatch.setattr(threading.Thread, "join",
                        lambda self, timeout: join(self, timeout and timeout / 100))
    (tmp_path / "a.txt").write_text("hello")
    monkeypatch.setenv("NANOMAD_CACHE", str(tmp_path / "cache"))
    refused(f"{message}.*--tokenizer bytes.*TIKTOKEN_CACHE_DIR",
            tasks.load_tokens, tmp_path / "a.txt", "gpt2")
    assert tasks.token_stats(np.arange(5), "gpt2") == (5, 5, None)
    assert not list((tmp_path / "cache").iterdir())


def test_standard_library(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOMAD_CACHE", str(tmp_path))
    data = tasks.load_tokens(None)
    assert "Python 3" in tasks.LIBRARY and data.dtype == np.uint8 and len(data) > 5e6
    files = [f.as_posix() for f in tasks.library_files()]
    assert any(f.endswith("/json/decoder.py") for f in files)
    assert not any("/test/" in f or "/tests/" in f or "site-packages" in f for f in files)
    assert files == sorted(files)
    assert data.tobytes() == b"".join(f.read_bytes() for f in tasks.library_files())


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
every_length = pytest.mark.parametrize("T, dtype, tolerance",
                                       [(T, *p) for T in LENGTHS for p in PRECISIONS])


@every_length
@pytest.mark.parametrize("cached", [1, layers.CACHED])     # one sequence a piece, or all of them
def test_convolutions_equal_their_loops(cached, T, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(layers, "CACHED", cached)
    u, h, w = normal(2, T, 6, dtype=dtype), normal(6, T + 3, dtype=dtype), normal(6, 3, dtype=dtype)
    for method in ("fft", "toeplitz", "auto"):
        agree(lambda u, h: layers.long_conv(u, h, method=method), layers.long_conv.reference,
              (u, h), tolerance)
    for fast in (layers.short_conv, lambda x, w: layers.short_conv(x.mT, w, 1).mT):
        agree(fast, layers.short_conv.reference, (normal(2, 6, T, dtype=dtype), w), tolerance)
    q, k, v = (normal(2, 3, T, 4, dtype=dtype, seed=i) for i in range(3))
    for method in ("mask", "fft", "auto"):
        agree(lambda *x: layers.toeplitz_attention(*x, method=method),
              layers.toeplitz_attention.reference, (q, k, v, normal(3, T, dtype=dtype)), tolerance)


@every_length
@pytest.mark.parametrize("decay", [0.0, -0.1, -20.0])
def test_recurrences_equal_their_loops(decay, T, dtype, tolerance):
    log_a = decay * normal(2, 3, T, 5).detach().abs().to(dtype)
    log_a = log_a.clamp(min=-20).requires_grad_()
    shared = log_a[:1, :, :, :1].detach().requires_grad_()           # one decay a head
    q, k, v = (normal(2, 3, T, n, dtype=dtype, seed=n) for n in (5, 5, 4))
    u = normal(3, 5, dtype=dtype)
    scan, loop = layers.gated_linear_scan, layers.gated_linear_scan.reference
    for decays, bonus in itertools.product((log_a, shared, None), (None, u)):
        agree(scan, loop, (q, k, v, decays, bonus), tolerance)
    with torch.no_grad():
        assert (scan(0 * q, k, v, log_a) == 0).all() and (scan(q, 0 * k, v, log_a, u) == 0).all()
    a, b = log_a.detach().mT.exp().requires_grad_(), normal(2, 3, 5, T, dtype=dtype)
    agree(layers.linear_scan, layers.linear_scan.reference, (a, b), tolerance)
    for reverse in (False, True):                                    # what a GPU runs
        ways = [scan(a.detach()[:, 0].mT, b.detach()[:, 0].mT, reverse)
                for scan in (layers._scan_blocks, layers._scan_loop)]
        assert gap(*ways, 1e-3) < tolerance
    turning = lambda scan: lambda a, angle, b: torch.view_as_real(           # complex a and b
        scan(torch.polar(a, angle), torch.complex(b, angle)))
    agree(turning(layers.linear_scan), turning(layers.linear_scan.reference),
          (a, normal(2, 3, 5, T, dtype=dtype), b), tolerance)


@every_length
@pytest.mark.parametrize("cached", [1, 500, layers.CACHED])       # a step, some, all in a stretch
def test_selective_scan_equals_its_loop(cached, T, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(layers, "CACHED", cached)
    x, B, C = normal(2, T, 6, dtype=dtype), *(normal(2, T, 3, dtype=dtype, seed=i) for i in (1, 2))
    for rate in (0.1, 1.0, 20.0):                        # log decays from -0.05 to -20 a step
        dt = normal(2, T, 6, seed=3).detach().sigmoid().to(dtype).requires_grad_()
        A = -rate * normal(6, 3, seed=4).detach().sigmoid().to(dtype)
        for scan in (layers.selective_scan, layers.selective_scan_whole):        # CPU's and GPU's
            agree(scan, layers.selective_scan.reference, (x, dt, A.requires_grad_(), B, C),
                  tolerance)


@every_length
def test_attention_equals_its_loop(T, dtype, tolerance):
    q, k, v = (normal(2, 3, T, 4, dtype=dtype, seed=i) for i in range(3))
    for window in (None, 1, 5, 64):
        agree(lambda *x: layers.causal_attention(*x, window),
              lambda *x: layers.causal_attention.reference(*x, window), (q, k, v), tolerance)


def test_attention_on_a_gpu_gets_what_its_fused_kernels_take(monkeypatch):
    """The last dimension contiguous, or torch falls back on T x T scores (no card needed here)."""
    given, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *qkv, **k: given.extend(qkv) or fused(*qkv, **k))
    layer = make("mh-attention").to("meta")
    assert layer(torch.randn(2, 64, D, device="meta")).shape == (2, 64, D)
    assert len(given) == 3 and all(p.stride(-1) == 1 for p in given)


def test_ways_that_are_not_there_are_refused():
    x = torch.randn(1, 2, 8, 4)
    for chunk in (0, -4, 48):
        refused(f"chunk={chunk}; permitted: a power of 2", layers.gated_linear_scan, x, x, x,
                chunk=chunk)
    refused("method='ftt'; permitted: auto, toeplitz", layers.long_conv, x[0], x[0, 0].T,
            method="ftt")
    refused("make both complex or none", layers.linear_scan, x + 0j, x)


def test_a_state_keeps_growing_in_bfloat16():
    """Sums of ones in bfloat16 end at 256; the states of both recurrences are float32."""
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    h, S = 0 * one[None], 0 * one[None, None]                        # (B, N, C), (B, H, K, V)
    for _ in range(300):
        _, h = layers.selective_step(h, one, one, 0 * one, one, one)
        _, S = layers.gated_linear_step(S, *[one[None]] * 3)
    assert h.item() == S.item() == 300


def test_short_convolution_adds_its_bias_to_channels():
    short = layers.ShortConv(6, 3, bias=True)
    nn.init.normal_(short.bias)
    x = torch.randn(2, 6, 6)                                         # B, C, T: both could pass
    agree(short, lambda x: short(x.mT, time=1).mT, [x.requires_grad_()], 1e-5)


# =================================================================================================
# layers.py: every layer of the table
# =================================================================================================

every_variant = pytest.mark.parametrize("name, settings", [
    *(pytest.param(name, {}, id=name) for name in LAYERS),
    *(pytest.param(name, dict(filter="modal"), id=f"{name}-modal") for name in LAYERS
      if "hyena" in name)])


def make(name, dtype=torch.float32, max_len=300, **settings):
    torch.manual_seed(0)
    return build_layer(name, D, max_len, **settings).to(dtype)


def run_steps(layer, x, state=None):
    state, ys = layer.init_state(len(x), dtype=x.dtype) if state is None else state, []
    with torch.no_grad():
        for x_t in x.unbind(1):
            y, state = layer.step(x_t, state)
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
    counts, state = [], layer.init_state(3)
    for t in range(40):
        state = layer.step(torch.randn(3, D), state)[1]
        counts.append(layers.count_state(state))
    growth = 0 if settings else GROWS.get(name, 0)
    assert counts == [counts[0] + t * growth for t in range(40)]
    assert counts[-1] == model.state_after(layer, D, 40)
    if not growth and not settings:
        assert counts[0] == layer.nominal(40) + EXTRA.get(name, 0)


def test_nominal_state_of_mad_architectures():
    expected = dict.fromkeys(("hyena", "mh-hyena", "hyena-experts", "mamba", "mh-gla", "rwkv5",
                              "rwkv6"), 4096) | {
        "mh-linear-attention": 2048, "sliding": 2 * 2 * D * 32, "linear-attention": 2 * D * D,
        "gla": 2 * D * D, "transformer": 2 * 2 * D * 128}
    for arch, state in expected.items():
        m = model.Model(model.ARCHS[arch], 16, D, 128)
        assert state == sum(b.layer.nominal(128) for n, b in zip(m.names, m.blocks)
                            if "channel-mixer" not in n), arch


@pytest.mark.parametrize("name", LAYERS)
def test_flops_are_those_that_torch_counts(name):
    from torch.utils.flop_counter import FlopCounterMode
    layer, x = make(name), torch.randn(1, 48, D)
    with FlopCounterMode(display=False) as counter, layers.plain_loops():
        layer(x)
    counted = counter.get_total_flops()
    if name == "moe-mlp":                                # its definition computes all experts
        counted -= 2 * 48 * 6 * (D * 32 + 16 * D)
    if isinstance(layer, layers.LinearAttention):        # multiplies weights, once a batch
        counted -= 8 * layer.width * D ** 2
    assert counted == layer.matmul_flops(48) <= layer.flops(48)
    assert layer.flops(96) >= 2 * layer.flops(48) - 1    # (rounded to whole ones)


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
    """Inputs of scale 1 give outputs between 1/300 and 30, and no row's gradient is lost."""
    layer = make(name, **settings)
    y = layer(torch.randn(4, 128, D))
    assert 1 / 300 < y.std() < 30
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    if hasattr(layer, "mix"):
        assert (layer.mix.grad[:, 1:].abs().sum(1) > 0).all()


def test_plain_loops_keep_the_meaning_of_keywords():
    q, k, v = (normal(1, 1, 9, 4, seed=i) for i in range(3))
    log_a = -normal(1, 1, 9, 4, seed=4).detach().abs()
    for f, named in ((layers.causal_attention, dict(window=2)),
                     (layers.gated_linear_scan, dict(log_a=log_a, chunk=4))):
        fast = f(q, k, v, **named)
        with layers.plain_loops():
            assert gap(f(q, k, v, **named), fast, 1e-3) < 1e-4
            assert gap(f(q, k, v), fast, 1e-3) > 1e-2


def test_mamba_dt_survives_in_a_model():
    for backbone in ("lm", "autoencoder"):
        m = model.Model(model.ARCHS["mamba"], 16, D, 64, backbone)
        for block in m.blocks:
            dt = F.softplus(block.layer.dt_bias)
            assert 0.00099 < dt.min() < 0.003 and 0.03 < dt.max() < 0.101
            assert torch.allclose(block.layer.A_log.exp(), torch.arange(1.0, 5.0).expand(256, 4))


def test_routing_is_the_same_under_autocast():
    torch.manual_seed(0)
    router, x = layers.Router(16, 8, 2), torch.randn(2000, 16)
    with torch.autocast("cpu", torch.bfloat16):
        weight, chosen = router(x)
    assert torch.equal(chosen, router(x)[1]) and torch.equal(weight, router(x)[0])


def test_routing_is_sparse_and_weights_sum_to_one():
    router, x = layers.Router(D, 8, 2), torch.randn(50, D)
    refused("top_k=1; permitted: 2 to the 8", layers.Router, D, 8, 1)     # scores' gradient: 0
    weight, chosen = router(x)
    assert torch.allclose(weight.sum(-1), torch.ones(50)) and weight.shape == (50, 2)
    assert (chosen == router.score(x).topk(2).indices).all()
    layer = make("hyena-experts")                        # an expert that no token picks is unread
    y = torch.randn(1, 50, D, requires_grad=True)
    layer.readout(y, x[None]).sum().backward()
    off = y.grad[0].unflatten(-1, (8, 16)).abs().sum(-1) == 0
    assert (off.sum(-1) == 6).all()


@pytest.mark.parametrize("pile", ["even", "one expert", "few tokens"])
def test_experts_equal_their_loop(pile):
    n = 3 if pile == "few tokens" else 500
    x, w_in, w_out, weight = normal(n, 8), normal(4, 8, 10), normal(4, 5, 8), normal(n, 2)
    chosen = normal(n, 4).topk(2).indices
    if pile == "one expert":
        chosen = torch.tensor([[2, 0]]).expand(n, 2)
    agree(lambda x, weight, *w: layers.expert_glu(x, weight, chosen, *w, block=16),
          lambda x, weight, *w: layers.expert_glu.reference(x, weight, chosen, *w),
          (x, weight, w_in, w_out), 1e-9)


def test_mamba_equals_an_implementation_by_others():
    mamba = pytest.importorskip("mambapy.mamba")
    theirs = mamba.MambaBlock(mamba.MambaConfig(16, n_layers=1, d_state=4, dt_rank=8)).double()
    ours, names = build_layer("mamba", 16, 64).double(), dict(
        xz="in_proj", dt_B_C="x_proj", dt_up="dt_proj", out="out_proj")
    ours.load_state_dict({
        **{f"{our}.weight": getattr(theirs, their).weight for our, their in names.items()},
        "dt_bias": theirs.dt_proj.bias, "A_log": theirs.A_log, "D": theirs.D,
        "short.taps": theirs.conv1d.weight[:, 0].flip(1), "short.bias": theirs.conv1d.bias})
    x = torch.randn(2, 37, 16, dtype=torch.float64)
    assert (ours(x) - theirs(x)).abs().max() < 1e-10


def test_layer_errors_name_the_way_out():
    for message, name, dim, settings in [
            ("did you mean mamba.*rwkv6-time-mixer", "mamab", D, {}),
            ("no setting 'heads'; it has: expand", "mamba", D, dict(heads=2)),
            ("choose one of implicit, modal", "hyena", D, dict(filter="fir")),
            ("heads=16", "mh-attention", 100, {}), ("experts=8", "hyena-experts", 100, {})]:
        refused(message, build_layer, name, dim, 8, **settings)
    refused("length 8", layers.long_conv, torch.ones(1, 9, 2), torch.ones(2, 8))


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


@pytest.mark.parametrize("file, start, before, name, least, options", [
    ("layers.py", "class Retention", "def build_layer(", "retention", 9, ()),
    ("tasks.py", "def reversal", "CHANGES = {", "reversal", 3, ("--task", "reversal"))])
def test_readme_snippet_passes_the_generic_tests(file, start, before, name, least, options,
                                                 tmp_path):
    """In a copy of the project with the snippet, a block of the README, put where it says."""
    for path in HERE.glob("*.py"):
        shutil.copy(path, tmp_path)
    readme, source = (HERE / "README.md").read_text(), (tmp_path / file).read_text()
    block = re.search(rf"```python\n({start}.*?)```", readme, re.DOTALL)[1]
    assert source.count("\n" + before) == 1
    (tmp_path / file).write_text(source.replace("\n" + before, f"\n{block}\n\n{before}"))
    tested = ended(started("test_all.py", "-k", name + " and not readme", cwd=tmp_path))
    passed = re.search(r"(\d+) passed", tested.stdout)
    assert tested.returncode == 0 and int(passed[1]) >= least, tested.stdout[-2000:]
    trained = ended(started("train.py", "--layers", "mlp" if options else name, *options, "--steps",
                            2, "--num-train", 128, "--compile", "off", cwd=tmp_path))
    assert trained.returncode == 0, trained.stderr


def recorded_times(name):
    """{layer: its line's numbers} of tables that layers.py printed; of two the faster one."""
    best = {}
    for line in (HERE / "results" / name).read_text().split("\n"):
        layer, *numbers = line.split() or [""]
        if layer in LAYERS and float(numbers[2]) < float(best.get(layer, [0, 0, "inf"])[2]):
            best[layer] = numbers
    return best


def test_readme_shows_what_is_recorded():
    readme = (HERE / "README.md").read_text()
    quoted = re.findall(r"\(results/([\w.-]+)[^`]*```text\n(.*?)```", readme, re.DOTALL)
    assert quoted
    for name, block in quoted:
        lines = (HERE / "results" / name).read_text().split("\n")
        assert [line for line in block.split("\n") if line not in lines] == [], name
    eager, compiled, long = (recorded_times(f"layers{kind}.txt")
                             for kind in ("", "-compiled", "-long"))
    table = re.findall(r"\| `([\w-]+)` \|[^|]*\| ([^|]*) \| ([\d.]+) \| ([\d.]+) \| ?([\d.]*) "
                       r"\| ([\d.]+) \| ([\d.]+) \| (\d+) \| ?(\d*) \|", readme)
    assert {row[0] for row in table} == set(LAYERS)
    for name, state, flops, units, faster, power, power_long, memory, memory_compiled in table:
        layer = layers.build_layer(name, 128, 1024)
        assert f"{layer.flops(1024) / 1024e6:.3f}" == flops, name
        grows = 2 * 128 * 1024 if state == "2·128 T" else 0
        assert layer.nominal(1024) == (grows or int(state.replace(",", ""))), name
        assert [units, power, memory] == eager[name][2:5] and power_long == long[name][3]
        assert [faster, memory_compiled] == compiled.get(name, 5 * [""])[2:5:2]
    recorded = (HERE / "results" / "mad" / "table.md").read_text().split("\n")
    assert [line for line in recorded if line and line not in readme] == []
    losses = collections.defaultdict(list)
    for line in (HERE / "results" / "shakespeare.jsonl").read_text().splitlines():
        run = json.loads(line)
        losses[run["name"].partition("-")[0]].append(run["val_loss"])
    for runs in losses.values():
        assert f"{np.mean(runs):.3f} ± {np.std(runs, ddof=1):.3f}" in readme and len(runs) == 3
    assert set(re.findall(r"results/([\w-]+\.\w+)", readme)) <= {
        path.name for path in (HERE / "results").iterdir()}


def test_readme_counts_the_lines_of_the_files():
    readme = (HERE / "README.md").read_text()
    counted = re.findall(r"lines of `(\w+\.py)` \| \d+ \| ([\d,]+) \|", readme)
    for name, lines in counted:
        there = len((HERE / name).read_text().split("\n"))
        assert int(lines.replace(",", "")) == pytest.approx(there, rel=0.05)
    assert {name for name, _ in counted} == {path.name for path in HERE.glob("*.py")}


def test_recorded_mad_tables_are_those_of_the_records(says):
    mad, readme = HERE / "results" / "mad", (HERE / "README.md").read_text()
    assert says("table", "--mad", mad / "quick").out == (mad / "table.md").read_text()
    said = says("compare", "--mad", mad / "quick", "--runs", HERE / "results" / "mad-loss.csv").out
    assert said == (HERE / "results" / "mad-loss.txt").read_text()
    rho, p, n = re.search(r"rho (\S+)  p (\S+)  n (\d+)", said).groups()
    assert f"score and loss is {float(rho):.2f}, n = {n}, p = {float(p):.2g}" in readme
    for line in (mad / "experiments.jsonl").read_text().splitlines():
        run = json.loads(line)
        row = next(r for r in readme.splitlines() if r.startswith(f"| {run['arch']}, "))
        records = [json.loads(p.read_text()) for p in sorted(
            (mad / "quick").glob(f"{run['arch']}_seed?.json"))]
        seeds = ", ".join(f"{100 * r['tasks'][run['task']]['macro']:.1f}" for r in records)
        assert f" {100 * run['macro']:.1f} ({seeds}) |" in row


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
                         ("hyena( mlp", "bracket"), ("hyena)", "bracket"),
                         ("hyena (order=4)", "bracket"), ("swigul", "did you mean")]:
        refused(message, model.Model, bad, 16)
    refused("did you mean hybrid", model.find_pattern, "hibrid")
    for word, shown in (("hibrid", "error: unknown arch.*mean hybrid"), ("mlp", "mlp *131")):
        done = ended(started(HERE / "model.py", word))   # an architecture, or a layer
        assert re.search(shown, done.stdout + done.stderr) and done.stderr.count("\n") < 2


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
    refused("autoencoder", model.Model("mlp", 16, backbone="autoencoder").generate,
            torch.zeros(1, 1).long(), 1)


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
    other = re.compile("A_log|[.]D|bias|norm|taps|bonus|log_rate|mix")
    assert not any(yes for n, yes in names.items()
                   if other.search(n) and not n.endswith("mix_down.weight"))
    assert names["embed.weight"] and names["blocks.0.layer.xz.weight"]
    assert names["blocks.4.layer.w_in.weight"] and len(set(names.values())) == 2


# =================================================================================================
# Scaling laws
# =================================================================================================

LAW = dict(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)   # Besiroglu et al. 2024
BUDGETS = np.geomspace(1e18, 1e20, 5)
layers.tune_allocator()                                  # as the commands do: faster fits


def law(N, D, E, A, B, alpha, beta):
    return E + A / N ** alpha + B / D ** beta


def sizes_of(budgets=BUDGETS, sizes=7, spread=4.0):
    """N and D of IsoFLOP groups at C = 6ND, `spread` either way of 20 tokens a parameter."""
    C = np.repeat(budgets, sizes)
    N = np.tile(np.geomspace(1 / spread, spread, sizes), len(budgets)) * np.sqrt(C / 120)
    return N, C / 6 / N


def exact_parabolas():
    """Runs whose loss is 3 (C / 1e18)^-0.07 + 0.05 (log N - log N*)^2, N* = 2e7 (C / 1e18)^0.46."""
    N, D = sizes_of(sizes=5, spread=8.0)
    C = 6 * N * D / 1e18
    return N, D, 3 * C ** -0.07 + 0.05 * np.log(N / (2e7 * C ** 0.46)) ** 2


def noisy_runs(seed=0, sizes=5):
    N, D = sizes_of(sizes=sizes)
    noise = np.random.default_rng(seed).normal(0, 0.003, len(N))
    return N, D, law(N, D, **LAW) * np.exp(noise)


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
        refused("two different x", scaling.fit_power_law, x, y, error=scaling.FitError)


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
    iso = scaling.fit_isoflop(*runs, bootstrap=300)      # each budget's own optimum
    for row, draws in zip(iso.parabolas, np.exp(iso.optima["logN"][1:].T)):
        low, high = row["intervals"]["N"]
        assert [low, high] == pytest.approx(np.nanpercentile(draws, [2.5, 97.5]))
        assert low < row["N"] < high and row["failed"] == np.isnan(draws).sum()
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
    fits = [scaling.fit_variable_projection(*noisy_runs(seed, 6), bootstrap=60)
            for seed in range(20)]
    assert 15 <= sum(f.intervals["alpha"][0] <= LAW["alpha"] <= f.intervals["alpha"][1]
                     for f in fits)


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
    for x, y in ([], []), ([1, 2], [1, 2]), ([1, 2, 3], [1, 1, 1]):      # no order to compare
        found = rank(x, y)
        assert math.isnan(found.rho) and math.isnan(found.p) and found.n == len(x)
    for x, y in ([1, 2, np.nan], [1, 2, 3]), ([1, 2, 3], [1, 2]):
        refused("one length, of finite values", rank, x, y, error=scaling.FitError)


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
        refused(why, fit, N, D, loss, bootstrap=0, error=scaling.FitError)


def flags_of(fit, *runs, **options):
    return "; ".join(fit(*runs, bootstrap=0, **options).flags)


def test_doubtful_runs_are_flagged(few_starts):
    iso, projection = scaling.fit_isoflop, scaling.fit_variable_projection
    assert flags_of(iso, N7, D7, GOOD) == flags_of(projection, N7, D7, GOOD) == ""
    bad = GOOD.copy()
    bad[[0, 9, 11]] = np.nan, np.inf, -1
    N = np.append(N7[:-1], np.nan)                       # bad rows are dropped, and the rest is
    assert flags_of(projection, N, D7, bad).startswith("1 of the rows dropped: N is missing")
    assert "3 of the rows dropped: loss is missing, infinite" in flags_of(iso, N, D7, bad)
    for fit in (iso, projection):                        # fitted as if they were not there
        keep = np.isfinite(N) & np.isfinite(bad) & (bad > 0)
        a, b = (fit(*(c[m] for c in (N, D7, bad)), bootstrap=0) for m in (keep, N7 > 0))
        assert a.a == b.a and a.target == b.target
    twice = [np.append(c, c[:4]) for c in (N7, D7, GOOD)]
    assert "4 of the rows repeat another exactly" in flags_of(iso, *twice)
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
    noisy = GOOD.copy()                                  # one size alone bends the first parabola
    noisy[:7] = 3 - 0.1 * np.eye(7)[3]
    assert re.search(r"budget 1e\+18: [2-9]\d of 99 resamples have no optimum",
                     " ".join(iso(N7, D7, noisy, bootstrap=99).flags))
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
    refused("both sides", scaling.hold_out, runs, error=scaling.FitError, above=1e30)


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
    stateless = dict(x=scaling.fit_isoflop(N7, D7, GOOD, bootstrap=0))
    refused("no architecture has a positive state", scaling.state_law, stateless,
            error=scaling.FitError)


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
    """
    Three architectures, the second 3% better, the third 6%; three budgets of five sizes. Beside it
    mad.csv: their MAD scores.
    """
    path, (N, D) = tmp_path_factory.mktemp("runs") / "runs.csv", sizes_of(BUDGETS[::2], 5)
    rows = [(n, d, loss * (1 - 0.03 * i), arch, (i + 1) * n ** 0.5)
            for i, arch in enumerate(("one", "two", "three"))
            for n, d, loss in zip(N, D, law(N, D, **LAW))]
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in
                            [("N", "D", "loss", "arch", "state"), *rows]))
    path.with_name("mad.csv").write_text("arch,mean\none,0.5\ntwo,0.6\nthree,0.7\nother,0.9\n")
    return path


@pytest.fixture
def says(capsys):
    """What a command of scaling.py prints, in this process, if it ends with `status`."""
    def run(*args, status=0):
        try:
            ended = scaling.main([*map(str, args)])
        except SystemExit as stop:
            ended = stop.code
        assert (ended or 0) == status
        return capsys.readouterr()
    return run


def test_fit_prints_one_json_object(runs_csv, tmp_path, says):
    few, draws = tmp_path / "one.csv", tmp_path / "draws.npz"
    few.write_text("".join(runs_csv.read_text().splitlines(True)[:16]))
    text = says("fit", few, "--json", "--bootstrap", 30, "--target", "1e21", "--draws", draws).out
    out = json.loads(text)
    assert text.count("\n") == 1 and {"a", "b", "intervals"} <= out["isoflop"].keys()
    for name in ("parametric", "variable_projection"):
        assert {"A", "B", "beta", "objective", "rss", "intervals"} <= out[name].keys()
        assert out[name]["alpha"] == pytest.approx(LAW["alpha"], rel=1e-6)
        assert out[name]["target"]["C"] == 1e21 and len(out[name]["intervals"]["E"]) == 2
        assert out[name]["E"] == pytest.approx(LAW["E"], rel=1e-6)
    assert out["archs"].keys() == {"one"} and out["state_law"]["c"] < 0 and out["hold_out"]
    assert out["parabola_bias"]["parametric"]["a_parabola_less_law"] == pytest.approx(
        out["isoflop"]["a"] - out["parametric"]["a"])
    assert np.load(draws)["one/parametric/alpha"].shape == (30,)


def test_fit_reports_every_architecture(runs_csv, says, few_starts):
    text = says("fit", runs_csv, "--bootstrap", 20).out
    for word in ("one  runs 15", "three  runs 15", "all together  runs 45", "state_law", "hold_out",
                 "! 3 architectures pooled as if they were one", "alpha 0.347", "overtraining"):
        assert word in text


def test_fit_reports_rows_it_dropped(runs_csv, tmp_path, says, few_starts):
    head, first, second, *rest = runs_csv.read_text().splitlines()
    (path := tmp_path / "runs.csv").write_text("\n".join([
        head, first.replace(first.split(",")[2], ""), "-" + second, *rest]))
    flags = [f"1 of the rows dropped: {c} is missing, infinite or not positive"
             for c in ("N", "loss")]
    out = json.loads(says("fit", path, "--bootstrap", 20, "--json").out)
    assert out["archs"]["one"]["flags"] == flags == out["flags"][:2]
    assert {f"  ! {flag}" for flag in flags} <= set(scaling.report("one", out["archs"]["one"]))
    assert "pooled" in out["flags"][2] and "flags" not in out["archs"]["two"]


def test_compare_ranks_architectures(runs_csv, says):
    args = ["compare", "--mad", runs_csv.with_name("mad.csv"), "--runs", runs_csv]
    rows = json.loads(says(*args, "--json").out)
    assert [r["rho"] for r in rows] == pytest.approx([-1] * 3) and rows[0]["n"] == 3
    assert rows[0]["p"] == pytest.approx(1 / 3) and rows[-1]["C"] == pytest.approx(1e20)
    assert rows[0]["loss"]["three"] < rows[0]["loss"]["one"]
    assert rows[0]["flags"] == ["other: a score, but no runs"]
    assert "rho -1" in says(*args).out


def test_plot_writes_an_image(runs_csv, tmp_path, says):
    pytest.importorskip("matplotlib")
    scores, image, one = runs_csv.with_name("mad.csv"), tmp_path / "all.png", tmp_path / "one.png"
    says("plot", runs_csv, "--out", image, "--mad", scores)
    assert image.read_bytes().startswith(b"\x89PNG") and image.stat().st_size > 50_000
    says("compare", "--mad", scores, "--runs", runs_csv, "--plot", one)
    assert struct.unpack(">II", one.read_bytes()[16:24]) == (5 * 130, 4 * 130)     # one panel


@pytest.mark.parametrize("csv, line, message", [
    (None, "fit runs.csv", "No such file"), ("", "fit runs.csv", "no rows"),
    ("N,D\n1,2\n", "fit runs.csv", "no column loss in N, D"),
    ("N,D,loss\n1,2,three\n", "fit runs.csv", "line 2, loss: 'three' is not a number"),
    ("N,D,loss\n1e8,1e9,3\n", "fit runs.csv", "power laws need two budgets"),
    ("N,D,loss\n1e8,1e9,\n", "fit runs.csv", "no usable run"),
    ("N,D,loss\n1,2,3\n", "fit runs.csv --target -1", "-1 must be"),
    ("N,D,loss\n1,2,3\n", "fit runs.csv --bootstrap few", "invalid int value: 'few'")] + [
    (None, line, message) for line, message in [
        ("sweep --archs hybird", "did you mean hybrid"), ("plan --archs ''", "unknown"),
        ("plan --archs mh-hyena@33", "0, 8.3, 25, 50, 100%"), ("sweep --sizes 4", "above 4"),
        ("plan --archs transformer@25", "other than attention"), ("sweep --budgets 1e6", "no run"),
        ("plan --budgets 1e18,-1", "-1 must be"), ("plan --utilisation 0", "0 must be"),
        ("plan --card H1000", "'RTX 3090'"), ("sweep --tokenizer bites", "did you mean bytes"),
        ("plan --sizes 58", "23 sizes to choose from, 7.1e+07 to 6.4e+09"),
        ("sweep --sizes 99", "--sizes 99: there are only 57 sizes"),
        ("sweep --data nowhere.txt", "nowhere.txt does not exist")]])
def test_mistakes_with_commands_end_in_one_line(csv, line, message, tmp_path, says, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if csv is not None:
        (tmp_path / "runs.csv").write_text(csv)
    error = says(*shlex.split(line), status=2).err
    last = error.splitlines()[-1]
    assert message in last and "Traceback" not in error
    assert last.startswith("scaling.py") or "error:" in last
    assert {p.name for p in tmp_path.iterdir()} <= {"runs.csv"}          # nothing is left behind


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


def test_sweep_trains_isoflop_groups_that_fit_reads(trained, few_starts, tmp_path, says):
    path, archs = tmp_path / "sweep" / "runs.csv", ("transformer", "hybrid")
    assert "28 of 28 runs" in says(*SWEEP, "--out", path.parent, "--seed", 3).out
    rows, configs = read_rows(path), trained.configs
    assert len(rows) == len(configs) == 2 * 2 * 7
    for row, config in [*zip(rows, configs)][::3]:
        budget, N, D, C = (float(row[k]) for k in ("budget", "N", "D", "C"))
        m = model.Model(config.layers, 256, config.dim, config.context)
        entries = model.ledger(m, 128)                   # a step is what C can be off by
        per_token = 3 * model.total(entries).flops / 128
        assert D == config.steps * config.batch_size * 128 and C == pytest.approx(per_token * D)
        assert abs(C - budget) <= per_token * config.batch_size * 128 / 2 * 1.001
        assert int(row["N_total"]) == N + 2 * 256 * config.dim == sum(
            p.numel() for p in m.parameters())
        assert float(row["state"]) == model.total(entries).nominal
        assert config.steps >= scaling.LEAST_STEPS and 0.008 <= config.warmup / config.steps < 0.051
        assert config.lr == pytest.approx(3e-3 * (64 / config.dim) ** 0.5, rel=1e-3)
        assert (config.clip, config.beta2, config.weight_decay, config.seed) == (1, 0.95, 0.1, 3)
        assert config.task == "text" and float(row["epochs"]) == pytest.approx(D / 1e7, abs=1e-4)
    for arch, budget in itertools.product(archs, (1e12, 1e13)):
        group = [r for r in rows if r["arch"] == arch and float(r["budget"]) == budget]
        sizes = [float(r["N"]) * (6 * 60 / budget) ** 0.5 for r in group]      # N / N*
        assert len({r["N"] for r in group}) >= 5 and len({r["batch"] for r in group}) == 1
        assert 0.15 < min(sizes) < 0.4 and 2.5 < max(sizes) < 5
    batches = [int(r["batch"]) for r in rows]
    assert batches == sorted(batches) and batches[0] < batches[-1]
    shapes = [[(r["width"], r["depth"]) for r in rows if r["arch"] == a] for a in archs]
    assert shapes[0] == shapes[1] and set(scaling.read_runs(path)) == set(archs)
    text = says("fit", path, "--bootstrap", 5).out
    assert "hybrid  runs 14" in text and text.count("isoflop  failed 0  a 0.") == 3


def test_sweep_goes_on_and_loses_nothing(trained, tmp_path, says):
    path = tmp_path / "runs.csv"
    args = [*SWEEP[:-1], "1e12", "--sizes", "5", "--out", tmp_path]
    trained.train.stop = 3
    error = says(*args, status=128 + signal.SIGINT).err
    assert "stopped at step 3 of 9; finished runs, if any, are in" in error
    assert len(read_rows(path)) == 3
    trained.train.stop = None
    trained.fail.add(bad := "hybrid_1e12_64x2_seed0")
    said = says(*args, status=1)
    assert "9 of 10 runs" in said.out and f"failed: {bad}: the loss is nan at step 7" in said.err
    losses = [r["loss"] for r in read_rows(path)]
    assert len(losses) == 10 and losses.count("") == 1
    assert scaling.read_runs(path)["hybrid"].dropped == dict(loss=1)
    assert len({c.name for c in trained.configs}) == len(trained.configs) == 9   # each trained once
    assert "holds runs of context 128, not 64: choose" in says(*args, "--context", 64, status=2).err
    trained.fail.clear()
    says(*args)
    before = read_rows(path)
    assert len(trained.configs) == 10
    says("sweep", "--archs", "mamba", *args[3:])         # another sweep, the same CSV
    rows = read_rows(path)
    assert rows[:10] == before and [r["arch"] for r in rows[10:]] == ["mamba"] * 5
    assert {p.name for p in tmp_path.iterdir()} == {"runs.csv"}         # no temporary file


def test_ratios_of_attention_are_exact_at_the_same_shapes(trained, tmp_path, says):
    ratios = {"0": 0, "8.3": 1 / 12, "25": 1 / 4, "50": 1 / 2, "100": 1}
    says("sweep", "--archs", ",".join(f"mh-hyena@{r}" for r in ratios), "--budgets", "1e13",
         "--out", tmp_path)
    rows = read_rows(tmp_path / "runs.csv")
    for ratio, share in ratios.items():
        mine = [c for c, r in zip(trained.configs, rows) if r["arch"] == f"mh-hyena@{ratio}"]
        for c in mine:
            mixers = [name for name, _ in model.parse_pattern(c.layers)][::2]
            assert mixers.count("mh-attention") == share * len(mixers) and len(mixers) % 12 == 0
        assert [c.dim for c in mine] == [c.dim for c in trained.configs[:7]]
    assert scaling.family("mamba@50") == ("mamba mamba mh-attention swiglu", 2)
    assert scaling.family("hyena-moe@50")[0] == model.ARCHS["striped-hyena-moe"]


def test_runs_of_too_few_steps_are_left_out(trained, tmp_path, says):
    said = says("sweep", "--budgets", "2e10", "--out", tmp_path).err.splitlines()
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


def test_plan_adds_up(says):
    """One row worked by hand: the transformer of 24 blocks of width 1152, context 2048, GPT-2."""
    text = says("plan", "--archs", "transformer", "--budgets", "8e19", "--card", "A100",
                "--utilisation", 0.5).out
    row = next(line for line in text.splitlines() if line.split()[2:4] == ["1152", "24"]).split()
    W = 1152
    mlp = sum(p.numel() for p in model.Model("swiglu", 16, W).blocks[0].layer.parameters())
    N = 24 * (4 * W ** 2 + mlp + 2 * W) + W     # norms before each layer and last
    total = N + 2 * 50257 * W
    assert row[4:6] == [f"{N / 1e6:,.1f}", f"{total / 1e6:,.1f}"]
    forward = 24 * (8 * W ** 2 + 2 * mlp + 2 * W * 2049) + 2 * W * 50257
    D = 8e19 / (3 * forward)
    assert float(row[6]) * 1e9 == pytest.approx(D, rel=2e-2) and row[7] == "256"   # 524,288 tokens
    assert int(row[8].replace(",", "")) == pytest.approx(D / 2 ** 19, rel=2e-2)
    GB = (16 * total + 34 * 2048 * W * 24 + 10 * 2048 * 50257) / 1e9
    assert float(row[10]) == pytest.approx(GB, abs=0.051)
    assert float(row[11]) == pytest.approx(8e19 / (312e12 * 0.5) / 3600, abs=0.06)
    assert "recalled, not checked" in text and "7 runs, 5.6" in text and "context 2048" in text
    said = says("plan", "--budgets", "8e19", "--card", "RTX 4090")
    assert "!" in said.out and not said.err              # 24 GB are not enough for all of them
    said = says("plan", "--archs", "transformer", "--budgets", "4e18", "--sizes", 23)
    # More than there are at that budget: said, but none beyond the paper's sizes.
    assert "! 5 of 23 sizes lie beyond 7e+07 to 1.6e+09" in said.err
    assert said.out.splitlines()[1].split()[4] == "72.9"             # the smallest, in millions


def test_sizes_and_batches_of_the_paper():
    batches = {1e12: 11, 3e18: 17, 4e18: 17, 8e18: 17, 2e19: 18, 4e19: 18, 8e19: 19}
    assert {C: math.log2(scaling.batch_tokens(C)) for C in batches} == batches
    hybrid = scaling.at_width(" ".join([model.ARCHS["hybrid"]] * 16), 4096)      # of 7B
    assert 6.5e9 < scaling.price(hybrid, 4096, 2048, 50257)["N_total"] < 7.5e9
    N = [r["N"] for r in scaling.isoflop_runs(["transformer"], [4e18, 8e19], 2048, 50257, reach=9,
                                              limits=scaling.PAPER_SIZES)[0]]
    assert scaling.SHAPES[-1] == (4096, 32) and 7e7 < min(N) < 7.5e7 and 6.5e9 < max(N) < 7e9


def test_a_sweep_leaves_the_folder_of_another_run_alone(tmp_path, says):
    (folder := tmp_path / "transformer_1e12_64x2_seed0").mkdir()
    (folder / "config.json").write_text("{}")
    (tmp_path / "text.txt").write_text("to be or not to be, " * 2000)
    error = says("sweep", "--archs", "transformer", "--budgets", "1e12", "--out", tmp_path,
                 "--data", tmp_path / "text.txt", status=2).err
    assert re.search("64x2_seed0 holds another run.*choose another --out", error)
    assert {p.name for p in tmp_path.iterdir()} == {folder.name, "text.txt"}


def test_two_sweeps_do_not_share_a_csv(trained, tmp_path, says):
    with train.claim(tmp_path / "out"):
        error = says(*SWEEP, "--out", tmp_path / "out", status=2).err
    assert re.search("in use by another process.*choose another --out", error)
    assert not trained.configs


def test_a_sweep_under_torchrun_is_refused(trained, tmp_path, says, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = says(*SWEEP, "--out", tmp_path, status=2).err
    assert "not with torchrun" in error and error.count("\n") == 1 and not trained.configs


def test_scaling_as_a_program_and_its_help(runs_csv, says):
    done = ended(started(HERE / "scaling.py", "compare", "--mad", runs_csv, "--runs", runs_csv))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no column mean" in done.stderr
    commands = ("fit", "compare", "plot", "sweep", "plan")
    for args in ([], *([name] for name in commands)):
        text = says(*args, "-h").out
        assert "usage: " in text and "%%" not in text
        assert all(name in text for name in commands if not args)
        assert ("mh-hyena@25" in text) == (args in (["sweep"], ["plan"]))


# =================================================================================================
# train.py
# =================================================================================================


def command(*args, cwd=None):
    return ended(started(HERE / "train.py", *args, cwd=cwd))


SMALL = dict(task="in-context-recall", seq_len=16, num_train=512, dim=16, batch_size=128,
             steps=40, eval_every=12, lr=1e-2, layers="mh-attention(heads=2) swiglu",
             compile="off", dtype="float32", device="cpu")
SUMS = "".join(f"{a} plus {b} is {a + b}.\n" for a in range(40) for b in range(40))     # 28 kB


def short(tmp_path, **changes):
    return train.TrainConfig(**{**SMALL, "out": str(tmp_path), **changes})


def quiet(*_):
    pass


def logged(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def files_in(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def stopped(config, step):
    """The folder of a run that a signal ended after `step` steps."""
    folder, _ = train.find_folder(config)
    run = train.Run(config, folder, quiet)
    parts = run.data.parts

    def parts_and_signal(i):
        run.asked_to_stop = signal.SIGTERM if i + 1 >= step else 0
        return parts(i)
    run.data.parts = parts_and_signal
    assert not run.go() and run.step == step
    return folder


def same_bytes(a, b):
    """Two folders' parameters, optimizer, best parameters and log lines, less the speeds."""
    for name in ("ckpt.pt", "best.pt"):
        x, y = (torch.load(Path(f) / name, weights_only=True) for f in (a, b))
        for t, key in itertools.product((x, y), ("train_seconds", "wall_s", "log_bytes")):
            t.pop(key, None)                             # (a speed's digits vary in number)
        one, other = (json.dumps(t, default=lambda v: v.numpy().tobytes().hex()) for t in (x, y))
        if one != other:
            return False
    lines = [[{k: v for k, v in x.items() if k != "tokens_per_s"} for x in logged(f)]
             for f in (a, b)]
    return lines[0] == lines[1]


def test_the_hybrid_learns_recall(tmp_path):
    """A short run gets at least 0.5 above chance (1/8); attention alone does not."""
    accuracy = {}
    for arch in ("hybrid", "transformer"):
        config = train.TrainConfig(arch=arch, seq_len=64, num_train=6400, steps=200, lr=3e-3,
                                   batch_size=32, eval_every=100, compile="off",
                                   out=str(tmp_path), device="cpu")
        accuracy[arch] = train.train(config, quiet)["test_accuracy"]
    assert accuracy["hybrid"] > 0.125 + 0.5 > accuracy["transformer"] + 0.1


def test_schedule_is_really_applied(tmp_path):
    result = train.train(short(tmp_path, lr=1e-3), quiet)
    rates = {line["step"]: line["lr"] for line in logged(result["folder"]) if "lr" in line}
    for step, rate in rates.items():                     # logged after `step` steps
        expected = 1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * (step - 1) / 40)) / 2
        assert rate == pytest.approx(expected)
    assert len(rates) >= 3 and rates[40] < 1e-5
    result = train.train(short(tmp_path, schedule="constant"), quiet)
    assert {x["lr"] for x in logged(result["folder"]) if "lr" in x} == {1e-2}


def test_optimizer_is_the_protocols(tmp_path):
    run = train.Run(short(tmp_path, weight_decay=0.1), tmp_path / "run", quiet)
    assert run.optimizer.defaults["betas"] == (0.9, 0.98)
    with_, without = run.optimizer.param_groups
    assert (with_["weight_decay"], without["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in with_["params"]} == {id(p) for p in model.decayed(run.model)}
    every = train.Run(short(tmp_path, decay="all"), tmp_path / "all", quiet).optimizer
    assert [len(g["params"]) for g in every.param_groups] == [len([*run.model.parameters()]), 0]


def test_run_folder_and_repetition(tmp_path, monkeypatch):
    said = []
    first = train.train(short(tmp_path), said.append)
    folder = Path(first["folder"])
    assert {p.name for p in folder.iterdir()} == {"config.json", "log.jsonl", "result.json",
                                                 "ckpt.pt", "best.pt"}
    result = json.loads((folder / "result.json").read_text())
    for key in ("test_accuracy", "macro_accuracy", "test_loss", "chance", "steps", "tokens_per_s",
                "wall_s", "config", "versions", "data_sha256", "git", "machine", "train_flops"):
        assert key in result
    assert any(s.startswith("device   cpu") for s in said) and result["steps"] == 40
    before = files_in(folder)
    assert train.train(short(tmp_path), None) == first
    again = train.train(short(tmp_path), said.append)    # finished: shown again, nothing rewritten
    assert again == first and "finished" in said[-1] and files_in(folder) == before
    refused("lr 0.01 -> 0.0005.*choose another --name", train.train,
            short(tmp_path, lr=5e-4, name=folder.name), quiet)
    with monkeypatch.context() as patch:                 # other code: another folder, one a code
        patch.setattr(train, "code_version", lambda: "other")
        second, note = train.find_folder(short(tmp_path))
        assert second.name == f"{folder.name}-{train.run_key(short(tmp_path))[:8]}" and note
        assert train.find_folder(short(tmp_path))[0] == second
        second.mkdir()
        (second / "config.json").write_text("{}")
        refused("holds another run .*code None -> 'other'", train.find_folder, short(tmp_path))
        shutil.rmtree(second)
    other = train.train(short(tmp_path, seed=1), quiet)
    assert other["test_loss"] != first["test_loss"] and other["data_sha256"] != first["data_sha256"]


def test_a_run_that_is_to_be_silent_is(tmp_path, capfd):
    train.train(short(tmp_path, steps=2), quiet)
    assert "2/2" in capfd.readouterr().err
    config = short(tmp_path, steps=2, seed=1)
    (folder := train.find_folder(config)[0]).mkdir()     # of another run, of which there is a note
    (folder / "config.json").write_text("{}")
    train.train(config, None)
    assert capfd.readouterr() == ("", "") and "holds another run" in train.find_folder(config)[1]


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    real, said = layers.SwiGLU.forward, []               # with a layer that draws random numbers
    monkeypatch.setattr(layers.SwiGLU, "forward", lambda self, x: F.dropout(real(self, x), 0.1))
    whole = train.train(short(tmp_path / "whole"), quiet)["folder"]
    for step in (7, 10, 12, 23):                         # 10: a log line is due; 12: a test
        folder = stopped(short(tmp_path / "parts"), step)
        with open(folder / "log.jsonl", "a") as log:     # as if killed before the next checkpoint
            log.write('{"step": 99}\n')
    train.train(short(tmp_path / "parts"), said.append)
    assert same_bytes(whole, folder) and any("resume   from step 23 of 40" in x for x in said)


def test_a_signal_during_a_test_ends_the_run_one_step_later(tmp_path, monkeypatch):
    run, evaluate = train.Run(short(tmp_path), tmp_path / "run", quiet), train.evaluate

    def evaluate_and_signal(*args):
        run.asked_to_stop = signal.SIGTERM
        return evaluate(*args)
    monkeypatch.setattr(train, "evaluate", evaluate_and_signal)
    assert not run.go() and run.step == 13 and run.signal == signal.SIGTERM


def test_macro_accuracy_is_torchmetrics():
    """Mean recall over the classes that occur; worked by hand: 1/2, 1/1, 0, one said only."""
    said, right = torch.tensor([0, 3, 1, 1]), torch.tensor([0, 0, 1, 2])
    assert train.macro_accuracy(said, right, 9) == pytest.approx((1 / 2 + 1 + 0 + 0) / 4)


def test_partial_batches_are_tested_whole():
    data = train.TaskData(setting(RECALL, num_train=300, num_test=150), 128, 0, "cpu")
    batches = list(data.test_batches())
    assert [len(x) for x, _ in batches] == [128, 128]
    assert data.epoch_steps == 2 * data.test_every == 2  # by default a test each half epoch
    assert sum(int((y != -100).any(1).sum()) for _, y in batches) == 150      # rows that score
    seen = torch.cat([data.batch(s)[0] for s in range(2)])
    assert len(seen.unique(dim=0)) == 256                # an epoch repeats no sequence
    assert not torch.equal(data.batch(0)[0], data.batch(2)[0])


@pytest.mark.parametrize("line, message", [
    ("--arhc mamba", "did you mean --arch"), ("--arch mambo", "did you mean mamba"),
    ("--task incontext-recall", "did you mean in-context-recall"), ("--lr nan", "lr is nan"),
    ("--layers 'mh-attenton swiglu'", "did you mean mh-attention"), ("--lr -1", "lr is -1.0"),
    ("--steps 0", "at least 1"), ("--steps ten", "invalid"), ("--steps", "expected one argument"),
    ("--seq-len 127", "even number"), ("--device tpu9", "try --device cpu"),
    ("--compile maybe", "on, max-autotune, off"), ("--name //", "at least one letter or digit"),
    ("--num-tokens-to-copy 8", "only selective-copying"), ("--clip 0", "permitted: above 0"),
    ("--arch mamba --layers mlp", "one or the other"), ("--steps 9 --epochs 7", "one or the other"),
    ("--schedule constant --min-lr 1e-5", "min_lr is 1e-05, but a constant"),
    ("--benchmark --dim 64", "option is '--dim'"), ("--benchmark --device tpu9", "--device cpu"),
    ("--task compression --data sums.txt", "is for --task text only")] + [
    (f"--task text --data sums.txt --dtype float32 {more}", message) for more, message in [
        ("--seq-len 64", "seq_len is 64, but --task text has no use"), ("--vocab-size 9", "no use"),
        ("--epochs 5", "for the MAD tasks only"), ("--early-stop 0.5", "early_stop is 0.5, but"),
        ("--context 0", "at least 1"), ("--tokenizer gpt-2", "did you mean gpt2"),
        ("--accumulate 0", "accumulate is 0"), ("--accumulate 3", "multiple of 3"),
        ("--steps 20 --warmup 20", "less than the run's 20"), ("--warmup -1", "warmup is -1"),
        ("--min-lr 0.5", "at most lr, 0.001"), ("--data nowhere.txt", "nowhere.txt does not exist"),
        ("--context 9999", "27,945.*10 x 10000 are needed: lower --context")]] + [
    (f"--task mad {more}", message) for more, message in [
        ("--preset quik", "did you mean quick"), ("--tasks compresion", "did you mean compression"),
        ("--arch mambo", "did you mean mamba"), ("--tasks text", "tasks is 'text'; permitted: in-"),
        ("--workers 0", "at least 1"), ("--lr 0.1", "option is '--lr'"), ("--dim 20", "divide"),
        ("--device tpu9", "try --device cpu"), ("--select first", "best-loss"),
        ("--warmup 600", "less than the run's 500")]])
def test_mistakes_on_the_command_line_end_in_one_line(line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums.txt").write_text(SUMS)
    monkeypatch.setattr(sys, "argv", ["train.py", *shlex.split(line)])
    assert train.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and re.search(message, error)
    assert [p.name for p in tmp_path.iterdir()] == ["sums.txt"]          # nothing is left behind


def test_help_and_a_run_from_the_command_line(tmp_path):
    done = command("-h")
    assert done.returncode == 0 and all("--" + f.name.replace("_", "-") in done.stdout
                                        for f in dataclasses.fields(train.TrainConfig))
    done = command("--arhc", "mamba")
    assert done.returncode == 2 and re.fullmatch("error: .*\n", done.stderr)
    done = command("--arch", "mamba", "--task", "compression", "--seq-len", 16, "--num-train", 256,
                   "--steps", 4, "--dim", 32, "--eval-every", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("device", "dtype", "compile", "decay", "total", "test accuracy", "chance", "next"):
        assert word in done.stdout
    assert "test_acc" in done.stderr and "tokens_s" in done.stderr


def test_benchmark_as_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    generated = []
    monkeypatch.setattr(train, "benchmark_generation", generated.append)
    monkeypatch.setattr(train, "benchmark_runs", lambda config, device: [
        ("tiny", short(tmp_path, steps=1000, dtype=config.dtype, compile=config.compile))])
    monkeypatch.setattr(sys, "argv", shlex.split(
        "train.py --benchmark --device cpu --dtype float32 --compile off"))
    assert train.main() == 0 and generated == ["cpu"] and not list(tmp_path.iterdir())
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert [row[0], row[2], row[7], row[9]] == ["tiny", "1,920", "n/a", "no"]
    ms, rate = float(row[3]), float(row[5].replace(",", ""))
    assert rate == pytest.approx(1920 / ms * 1e3, rel=0.1) and float(row[8]) > 0


def test_suggested_commands_keep_the_options():
    result = collections.defaultdict(int, folder="a b", ended="")
    commands = lambda **options: [line.strip().removeprefix("python train.py ") for line in
                                  train.summary(train.TrainConfig(**options), result).splitlines()
                                  if line.startswith("  ")]
    assert commands() == ["--arch transformer", "--show 'a b'", "--arch hybrid --epochs 200"]
    assert commands(arch="transformer", task=COPYING, seq_len=64, steps=9) == [
        f"--arch hybrid --task {COPYING} --steps 9 --seq-len 64", "--show 'a b'",
        f"--arch transformer --task {COPYING} --epochs 200 --seq-len 64"]
    assert commands(arch="transformer", steps=900, warmup=800)[2] == (    # 200 epochs of 4 steps
        "--arch transformer --epochs 200")
    assert commands(layers="mlp", task="text", tokenizer="gpt2", context=64, name="x") == [
        "--sample 'a b' --prompt 'def '",
        "--arch transformer --task text --tokenizer gpt2 --context 64"]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_task_runs(task, tmp_path):
    change = dict(num_tokens_to_copy=4) if task == "selective-copying" else {}
    result = train.train(short(tmp_path, task=task, seq_len=64, vocab_size=None, steps=3,
                               num_train=256), quiet)
    assert 0 <= result["test_accuracy"] <= 1 and math.isfinite(result["test_loss"])


def test_without_a_compiler_it_says_so_and_goes_on(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert train.has_compiler() is None
    yes, why = train.choose_compile("auto", "cpu", 10 ** 6, 1.0)
    assert not yes and "no C++ compiler" in why


def test_a_compiler_that_is_gone(tmp_path, monkeypatch):
    """A run that was compiled goes on without it; one that asks for it ends in one line."""
    config, said = short(tmp_path, compile="auto"), []
    path = stopped(config, 23) / "ckpt.pt"
    train.write_checkpoint(path, dict(train.read_checkpoint(path, "cpu"), compiled=True))
    fails = Mock(side_effect=RuntimeError("No working C++ compiler found\nTraceback"))
    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    result = train.train(config, said.append)
    assert "compile  off: it failed here (RuntimeError: No working C++ compiler found)" in said
    assert result["steps"] == 40 and result["machine"]["compiled"] is False
    refused(r"^compile is 'on', but .* found\); try --compile off$",
            train.train, short(tmp_path, compile="on"), quiet)


# -------------------------------------------------------------------------------------------------
# Text

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
    runs = [train.Run(text(tmp_path, accumulate=n, clip=1.0), tmp_path / str(n), quiet)
            for n in (1, 4)]
    losses = [[float(run.one_step()[1]) for _ in range(3)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for p, q in zip(*(run.model.parameters() for run in runs)):
        assert (p - q).abs().max() < 2e-5                # (of a step: 1e-3)


def test_bits_a_byte_of_tokens(tmp_path, toy, monkeypatch):
    """The loss of a token is divided by the bytes that the tested tokens stand for."""
    config, said = text(tmp_path, tokenizer="gpt2", layers="mlp", dim=16, steps=1), []
    result, scored = train.train(config, quiet), data_of(config).scored_tokens()
    ratio = len(toy("gpt2").decode_bytes(scored.tolist())) / len(scored)
    assert ratio > 1.02 and result["corpus"]["bytes_per_token"] == ratio
    assert result["bits_per_byte"] == pytest.approx(result["val_loss"] / math.log(2) / ratio)
    written = train.SampleConfig(sample=result["folder"], prompt=" the", tokens=3)
    assert len(train.sample(written, quiet)[0]) == 3
    assert train.token_bytes("gpt2")(50000) == "\ufffd".encode()       # an unused id
    offline = Mock(side_effect=ValueError("cannot get tiktoken's gpt2"))
    monkeypatch.setattr(tasks, "get_encoding", offline)  # the tokens are cached, their bytes not
    result = train.train(dataclasses.replace(config, name="offline"), said.append)
    assert result["bits_per_byte"] is None and any("no bits a byte" in line for line in said)


def test_warmup_and_lowest_learning_rate(tmp_path):
    config = text(tmp_path, lr=1e-2, min_lr=1e-3, warmup=4)
    rates = [train.learning_rate(config, step, 24) for step in range(25)]
    assert rates[:5] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 1e-2]) and rates[5] < 1e-2
    assert rates[14] == pytest.approx(5.5e-3) and rates[24] == pytest.approx(1e-3)


def test_greedy_sample_equals_the_parallel_forward(writer):
    config, shown = train.SampleConfig(sample=writer["folder"], prompt="2 plus ", tokens=24,
                                       temperature=0, device="cpu"), []
    ids, line = train.sample(config, shown.append)
    assert "".join(shown) == "2 plus " + bytes(ids).decode() + "\n"
    _, m = train.load_run(writer["folder"], "cpu")
    out, state = torch.tensor([[*b"2 plus ", *ids]]), m.init_state(1)
    with torch.no_grad():
        assert (m(out)[:, 6:-1].argmax(-1) == out[:, 7:]).all()
    assert "tokens a second" in line and "longer than all" not in line
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


def test_mistakes_with_samples(writer, tmp_path):
    mad, good = train.train(short(tmp_path, steps=1), quiet)["folder"], writer["folder"]
    cut, other, list_ = (shutil.copytree(good, tmp_path / name) for name in ("cut", "oth", "list"))
    (cut / "ckpt.pt").write_bytes((cut / "ckpt.pt").read_bytes()[:5000])
    saved = (other / "config.json").read_text()
    (other / "config.json").write_text(saved.replace('"dim": 32', '"dim": 16'))
    (list_ / "config.json").write_text("[]")
    for message, change in [
            ("does not exist: give the folder", dict(sample=tmp_path / "no")),
            ("run of in-context-recall: only", dict(sample=mad)), ("empty", dict(sample=good)),
            ("not text", dict(sample=good, prompt="a\udcff")), ("top_k is 0", dict(top_k=0)),
            ("at least 0", dict(temperature=-1.0)), ("from 0.001", dict(temperature=1e-9)),
            ("tokens is 0", dict(tokens=0)), ("truncated or altered", dict(sample=cut)),
            ("be read", dict(sample=other)), ("no JSON object", dict(sample=list_))]:
        options = {"prompt": "", **change, "sample": str(change.get("sample", good))}
        refused(message, lambda: train.sample(train.SampleConfig(**options), quiet))


def torchrun(config):
    """The run under way, of two processes."""
    args = [f"--{f.name.replace('_', '-')}={getattr(config, f.name)}"
            for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]
    return started("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2,
                   HERE / "train.py", *args)


def losses_of(folder):
    return [[x["step"], x.get("loss", x.get("val_loss"))] for x in logged(folder)]


def test_two_processes_equal_one(tmp_path):
    config = text(tmp_path, accumulate=2, clip=1.0, eval_every=10)
    run = ended(torchrun(config))
    assert run.returncode == 0, run.stderr
    for said in ("device   cpu", "validation loss"):     # one speaks and writes
        assert run.stdout.count(said) == 1
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
    config, said = text(tmp_path, steps=150), []
    folder = Path(config.out) / "run"

    def begun():
        run = torchrun(config)
        while not (folder / "log.jsonl").exists() or not logged(folder):
            assert run.poll() is None
            time.sleep(0.05)
        return run
    run = begun()
    workers = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True)
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
    run = ended(run)
    assert run.returncode != 0 and "another process of this run has ended" in run.stderr
    assert not (folder / "result.json").exists()
    (folder / "log.jsonl").unlink()
    run = begun()
    run.send_signal(signal.SIGTERM)
    run = ended(run)
    assert run.returncode != 0 and run.stderr.count("the same command goes on") == 1, run.stderr
    train.train(config, said.append)
    assert any("resume   from step" in line for line in said)
    whole = train.train(dataclasses.replace(config, name="whole"), quiet)
    assert np.abs(np.array(losses_of(folder)) - losses_of(whole["folder"])).max() < 1e-4


def test_mistakes_with_several_processes(tmp_path, monkeypatch):
    refused("is 9; permitted: a multiple of 2", data_of, text(tmp_path, batch_size=9), 0, 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    refused("not one of compression: start this one with python",
            train.run_and_report, ["--task", "compression"])
    refused("torchrun has started 2", train.run_and_report,
            ["--task=mad", "--workers", "2", "--out", str(tmp_path)])
    ranks = train.Ranks("text")
    assert (ranks.rank, ranks.count) == (1, 2) and train.Ranks("compression").count == 1
    refused("--device cpu", ranks.connect, "mps")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refused("process 0 of this machine finds 0 GPUs", ranks.connect, "cuda")
    ranks.largest = abs                                  # another process has another number
    refused("differ in the corpus", ranks.check_same, "the corpus", -5)


def test_one_compilation_serves_steps_rates_and_tests(tmp_path, monkeypatch):
    compiled, graphs = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled(
        f, dynamic=False, fullgraph=True, backend=lambda graph, _: (graphs.append(1), graph)[1]))
    torch._dynamo.reset()
    train.train(short(tmp_path, compile="on", steps=12, eval_every=5), quiet)
    assert len(graphs) == 1


def test_nothing_in_a_step_waits_for_the_device(tmp_path, monkeypatch):
    run = train.Run(short(tmp_path, clip=1.0), tmp_path / "run", quiet)
    waits = Mock(side_effect=AssertionError("the step looks at a number on the device"))
    for name in ("item", "cpu", "numpy", "tolist", "__float__", "__bool__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, waits)
    monkeypatch.setattr(run.ranks, "largest", waits)     # nor for other processes' signals
    refused("looks at a number", float, torch.ones(1), error=AssertionError)
    for _ in range(3):
        run.one_step()


needs_compiler = pytest.mark.skipif(train.has_compiler() is None,
                                    reason="torch.compile on a CPU needs g++")


# -------------------------------------------------------------------------------------------------
# The MAD protocol


def small_baselines():
    return {task: setting(task, num_test=64) for task in list(tasks.TASKS)[:6]}


GRID24 = train.Preset(
    settings=tuple((dataclasses.replace(s, num_train=128), 4) for s in small_baselines().values()),
    epochs=None, batch_size=32, lrs=(1e-4, 1e-3), weight_decays=(0.0, 0.1), eval_every=2)


def mad(tmp_path, **changes):
    return train.MadConfig(**{**dict(layers="swiglu", dim=16, preset="tiny", compile="off",
                                     device="cpu", dtype="float32", out=str(tmp_path / "out"),
                                     results=str(tmp_path / "results")), **changes})


def score(config, **counts):
    """A grid's score and what was said of it, after a look at some of its counts."""
    said = []
    got = train.mad_score(config.label, config.preset, config, said.append)
    assert got["counts"] | counts == got["counts"]
    return got | dict(said=said[0])


@pytest.fixture
def fake(monkeypatch):
    """
    The preset "tiny", of 24 runs that take no time. fake.accuracy(config) is one's accuracy, or
    raises. (Test data of 64 sequences can't be asked for by options.)
    """
    made = types.SimpleNamespace(runs=[], accuracy=lambda c: 0.5)
    monkeypatch.setitem(train.PRESETS, "tiny", GRID24)
    monkeypatch.setattr(tasks, "BASELINES", tasks.BASELINES | small_baselines())

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


def test_full_preset_is_the_protocol(monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "own", tasks.TASKS["compression"])      # a task that is added
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
    got, one = score(mad(tmp_path)), pytest.approx(0.89)             # lr 1e-4, no decay
    assert got["tasks"][COMPRESSION]["token"] == one and len(fake.runs) == 28
    assert got["tasks"][RECALL]["token"] == pytest.approx((0.89 + 0.99) / 2)
    assert got["mean"] == pytest.approx((5 * 0.89 + 0.94) / 6)
    assert got["macro_mean"] == pytest.approx(got["mean"] / 2)
    assert all(s["best"] == dict(lr=1e-4, weight_decay=0.0) for s in got["settings"])
    path = Path(got["file"])
    assert json.loads(path.read_text())["mean"] == got["mean"]
    assert path.name == "swiglu_seed0_dim=16_dtype=float32.json"
    half = score(mad(tmp_path, select="best-loss"), reused=28)       # the same, read another way
    assert half["mean"] == pytest.approx(got["mean"] / 2)
    assert half["file"] != got["file"] and len(fake.runs) == 28
    part = score(mad(tmp_path, tasks=f"{RECALL},{COPYING}", settings="baseline"), runs=8)
    assert part["mean"] is None and part["file"] is None
    assert "not all settings" in part["said"] and part["tasks"][RECALL]["token"] == one


def test_runs_of_a_solved_setting_are_skipped(fake, tmp_path):
    fake.accuracy = lambda c: 0.999 if c.task == COPYING else 0.5
    assert score(mad(tmp_path), trained=21, skipped=3)["file"]
    assert [c.lr for c in fake.runs if c.task == COPYING] == [1e-3]
    score(mad(tmp_path, no_skip=True), reused=21, trained=3, skipped=0)
    assert len(fake.runs) == 24


def test_failed_runs(fake, tmp_path):
    def failing(error, which):
        def accuracy(c):
            if which(c):
                raise error
            return 0.5
        return accuracy
    noisy = lambda c: c.task == NOISY and c.lr == 1e-3
    fake.accuracy = failing(RuntimeError("the disk is on fire"), noisy)
    got = score(mad(tmp_path), trained=22, failed=2, open=0)
    assert got["mean"] == 0.5 and got["file"] is None and "tries them again" in got["said"]
    error = train.folder_of(next(filter(noisy, fake.runs))) / "error.txt"
    for name, text in (("stray", "{}"), ("broken", "{")):            # of no code that can be told
        (error.parents[1] / name).mkdir()
        (error.parents[1] / name / "result.json").write_text(text)
    assert "Traceback" in error.read_text() and str(error.parent) in got["said"]
    fake.accuracy = failing(FloatingPointError("the loss is nan"),
                            lambda c: noisy(c) or c.task == RECALL and c.seed == 1)
    assert score(mad(tmp_path), reused=22, failed=2)["file"]         # now the others count
    # No run of recall, so no mean.
    none = score(mad(tmp_path, seed=1), of_other_options=22, of_other_code=2)
    assert none["mean"] is None and none["tasks"][RECALL]["token"] is None and not none["file"]
    assert "missing" in none["said"]
    fake.accuracy = lambda c: 0.5
    assert score(mad(tmp_path), failed=0) and not error.exists()


def test_key_of_a_run(monkeypatch):
    base = train.TrainConfig()
    key = train.run_key(base)
    assert key == train.run_key(dataclasses.replace(base, out="elsewhere", name="x"))
    for change in (dict(lr=5e-4), dict(seed=1), dict(num_train=6400), dict(layers="swiglu"),
                   dict(task=COPYING), dict(early_stop=2.0)):
        assert train.run_key(dataclasses.replace(base, **change)) != key, change
    with monkeypatch.context() as patch:
        patch.setitem(tasks.BASELINES, RECALL, setting(RECALL, num_test=64))
        assert train.run_key(base) != key
    monkeypatch.setattr(train, "code_version", lambda: "other")
    assert train.run_key(base) != key
    code = '"""A."""\nclass X:\n    """B."""\n    def f():\n        """C."""\n        return 1  # D'
    bare = "class X:\n def f(): return 1"                # what is said of it is free to change
    assert train.meaning(code) == train.meaning(bare) != train.meaning(bare.replace("1", "2"))


def test_the_version_of_the_code_is_that_of_four_files(tmp_path, monkeypatch):
    for path in HERE.glob("*.py"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    versions = [train.code_version.__wrapped__()]
    for name in ("tasks", "layers", "model", "train", "scaling", "test_all"):
        with open(tmp_path / f"{name}.py", "a") as file:
            file.write("\nanother_line = True\n")
        versions.append(train.code_version.__wrapped__())
    assert len(set(versions[:5])) == 5 and set(versions[4:]) == {versions[4]}


def test_what_has_no_say_is_no_part_of_a_run():
    key = lambda **options: train.run_key(train.TrainConfig(**options))
    base = tasks.BASELINES[RECALL]
    assert key(seq_len=base.seq_len, num_train=base.num_train) == key() != key(steps=9)
    assert train.TrainConfig(vocab_size=base.vocab_size).run_name == train.TrainConfig().run_name
    assert key(weight_decay=0) == key(weight_decay=0.0) and key(lr=1e30) != key(lr=1e-30)
    assert "lr=1e+30" in train.TrainConfig(lr=1e30).run_name
    layer, arch = train.MadConfig(layers="mh-hyena"), train.MadConfig(arch="mh-hyena")
    assert layer.label == "mh-hyena()" and arch.label == "mh-hyena"          # not the same model
    assert train.size_of(layer)["pattern"] == "mh-hyena"
    assert train.record_path(layer) != train.record_path(arch)


def test_a_signal_in_a_runs_last_step_ends_its_grid(tmp_path, monkeypatch):
    """The run is done, and its result is there; but the next one must not begin."""
    config, test = short(tmp_path, num_train=128, steps=2), train.Run.test

    def test_and_signal(run):
        run.asked_to_stop = signal.SIGTERM
        return test(run)
    monkeypatch.setattr(train.Run, "test", test_and_signal)
    with pytest.raises(train.Interrupted) as stop:
        train.train(config, None)
    assert stop.value.args[1] == signal.SIGTERM
    assert (train.find_folder(config)[0] / "result.json").exists()


def test_a_signal_before_a_fault_ends_its_grid(tmp_path, monkeypatch):
    def signal_and_fault(run):
        run.asked_to_stop = signal.SIGTERM
        raise FloatingPointError("the loss is nan")
    monkeypatch.setattr(train.Run, "one_step", signal_and_fault)
    with pytest.raises(train.Interrupted, match="had failed .the loss is nan"):
        train.train(short(tmp_path), None)
    with pytest.raises(FloatingPointError):              # on its own, its fault is told
        train.train(short(tmp_path), quiet)


def test_results_of_other_code_are_not_reused(fake, tmp_path, monkeypatch):
    score(mad(tmp_path))
    monkeypatch.setattr(train, "code_version", lambda: "other")
    got = score(mad(tmp_path), reused=0, trained=24, of_other_code=24)
    assert "24 results of other code" in got["said"]


# train.py with the preset GRID24, which notes each run that it trains, and pauses before it.
PROGRAM = """
import sys; sys.path.insert(0, {here!r})
import tasks, test_all, time, train
tasks.BASELINES.update(test_all.small_baselines())
train.PRESETS["tiny"] = test_all.GRID24
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


def program(tmp_path, *args, pause=0.0, **env):
    path = tmp_path / f"program{pause}.py"
    if not path.exists():            # written again, it might be read half by one that starts now
        path.write_text(PROGRAM.format(here=str(HERE), log=str(tmp_path / "log"), pause=pause))
    return started(path, "--task", "mad", "--preset", "tiny", "--layers", "swiglu", "--dim", 16,
                   "--compile", "off", "--device", "cpu", "--dtype", "float32", *args,
                   cwd=tmp_path, **env)


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
    ends = [ended(p) for p in (*both, program(tmp_path), program(tmp_path))]
    assert [e.returncode for e in ends] == [0] * 4, ends
    assert len(noted(tmp_path)) == 24 == len(set(noted(tmp_path)))
    assert "MAD score" in ends[0].stdout and not ends[1].stdout and "24/24" in ends[0].stderr
    (file,) = (tmp_path / "out" / "scores" / "tiny").iterdir()
    runs = [r for s in json.loads(file.read_text())["settings"] for r in s["runs"]]
    assert {r["folder"] for r in runs} == set(noted(tmp_path))
    for r in runs:
        result = json.loads((tmp_path / "out/mad/swiglu" / r["folder"] / "result.json").read_text())
        assert (r["token"], r["macro"]) == (result["test_accuracy"], result["macro_accuracy"])
    assert not list(tmp_path.glob("out/mad/*/*/lock"))


def test_workers_that_are_killed_and_stopped(tmp_path):
    """kill -9 of a worker: the others take its run over. SIGTERM: all stop; what is done stays."""
    first = program(tmp_path, "--workers", 2, pause=0.5)
    noted(tmp_path, 2)
    workers = subprocess.run(["pgrep", "-f", "-P", str(first.pid), "spawn_main"], text=True,
                             capture_output=True).stdout.split()
    os.kill(int(workers[0]), signal.SIGKILL)
    noted(tmp_path, 6)
    first.terminate()
    first = ended(first)
    assert first.returncode == 128 + signal.SIGTERM and not first.stdout
    assert "the same command goes on" in first.stderr and "Traceback" not in first.stderr
    done = len(list(tmp_path.glob("out/mad/*/*/result.json")))
    assert 3 <= done < 24
    second = ended(program(tmp_path))
    assert second.returncode == 0, second.stderr
    assert f"24: {done} reused, {24 - done} trained" in second.stdout
    assert not list(tmp_path.glob("out/mad/*/*/lock"))


def test_locks(tmp_path):
    folder = tmp_path / "a" / "b"
    lock = folder / "lock"
    with train.claim(folder):
        refused("b is in use by another process", train.claim(folder).__enter__, error=train.InUse)
    assert not (tmp_path / "a").exists()                 # nothing was put there
    with train.claim(folder):
        (folder / "run").touch()
        lock.unlink()                                    # as when a holder ends while we wait
        with train.claim(folder):
            pass
    assert [p.name for p in folder.iterdir()] == ["run"]
    with open(lock, "a") as waiting:                     # opened before its holder removed it
        lock.unlink()
        lock.touch()
        assert not train.hold(waiting)
    with open(lock) as file:
        assert train.hold(file)


def test_many_processes_claim_a_folder_once_and_a_killed_one_frees_it(tmp_path):
    code = "\n".join([f"import pathlib, sys; sys.path.insert(0, {str(HERE)!r}); import train",
                      "print('ready', flush=True); input()",
                      f"try:\n with train.claim(pathlib.Path({str(tmp_path)!r})):",
                      "  print('mine', flush=True); input()",
                      "except train.InUse:\n print('refused', flush=True)"])
    some = [started("-c", code) for _ in range(3)]
    assert all(p.stdout.readline() == "ready\n" for p in some)
    for p in some:
        p.stdin.write("\n")
        p.stdin.flush()
    said = {p.stdout.readline(): p for p in some}
    assert sorted(said) == ["mine\n", "refused\n"]
    refused("in use", train.claim(tmp_path).__enter__, error=train.InUse)
    said["mine\n"].kill()
    for p in some:
        ended(p)
    with train.claim(tmp_path):
        pass


def test_a_run_in_use_is_refused(tmp_path):
    config = short(tmp_path / "out", num_train=128, steps=2)
    with train.claim(train.find_folder(config)[0]):
        refused("in use by another process.*--name", train.train, config, quiet)
    assert train.train(config, quiet)["steps"] == 2


@pytest.mark.parametrize("compiled", ["off", pytest.param("on", marks=needs_compiler)])
def test_runs_that_share_a_model_equal_lone_ones(compiled, tmp_path, monkeypatch):
    compilations, compile_, made = [], torch.compile, collections.defaultdict(list)
    monkeypatch.setattr(torch, "compile",
                        lambda *a, **k: compilations.append(1) or compile_(*a, **k))
    for shared in (train.Shared(), None):
        for lr, T in [(1e-3, 32), (1e-2, 32)] + [(1e-2, 16)] * (compiled == "off"):
            config = short(tmp_path / str(shared is None), layers="swiglu", steps=4, lr=lr,
                           seq_len=T, num_train=128, batch_size=64, compile=compiled)
            path = Path(train.train(config, quiet, shared)["folder"]) / "ckpt.pt"
            made[lr, T].append(train.read_checkpoint(path, "cpu")["model"])
        assert len(compilations) == (compiled == "on") or not shared
    for a, b in made.values():
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_runs_that_share_a_model_keep_their_own_dtype(tmp_path, monkeypatch):
    config = short(tmp_path, dtype="auto")
    monkeypatch.setattr(train, "fastest_dtype", lambda _: (torch.bfloat16, "measured"))
    folder = stopped(config, 23)
    monkeypatch.setattr(train, "fastest_dtype", lambda _: (torch.float32, "measured"))
    shared = train.Shared()
    for run_config, dtype in ((short(tmp_path, seed=1), torch.float32), (config, torch.bfloat16)):
        run = train.Run(run_config, train.find_folder(run_config)[0], quiet, shared)
        assert run.score.args == (shared.model, dtype)


def test_mad_table_shows_what_is_recorded(fake, tmp_path, says):
    folder = tmp_path / "results" / "tiny"
    means = dict(transformer=0.8, hyena=0.6, mamba=0.7)              # published: 74.5, 66.0, 69.3
    for (arch, a), seed in itertools.product(means.items(), (0, 1)):
        fake.accuracy = lambda c: a + 0.02 * seed + 0.1 * (c.task == COPYING)
        score(mad(tmp_path, arch=arch, layers=None, dim=32, dtype="auto", seed=seed))
    assert len(list(folder.iterdir())) == 6 and (folder / "mamba_seed1_dim=32.json").exists()
    for path in folder.iterdir():                        # as if of the paper's width
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(options={})))
    out = says("table", "--mad", folder).out
    rows = {r.split("|")[1].strip(): [x.strip() for x in r.split("|")[2:-1]]
            for r in out.splitlines() if r.startswith("|")}
    assert list(rows)[2:] == ["transformer", "*paper*", "mamba", "*rerun*", "hyena"]
    fuzzy, copying, macro, token = (rows["hyena"][i] for i in (1, 5, 6, 7))
    assert (fuzzy, copying) == ("30.5 ±0.5", "35.5 ±0.5")              # macro: half of 0.61, 0.71
    records = [json.loads(p.read_text()) for p in folder.glob("hyena*")]
    assert macro == f"{100 * np.mean([r['macro_mean'] for r in records]):.1f} ±0.5"
    assert token == f"{100 * np.mean([r['mean'] for r in records]):.1f} ±1.0"
    assert rows["hyena"][-1] == f"{records[0]['parameters']:,}"
    assert "1.00, n = 3, permutation p = 0.33" in out
    assert scaling.read_scores(folder) == {a: scaling.mad_mean(records) for a, records in
                                           scaling.read_records(folder).items()}
    refused("train.py --task mad", scaling.read_records, tmp_path, error=scaling.FitError)
    (folder / "half.json").write_text('{"arch": "hyena", "options": {}}')
    refused("half.json: no MAD score .*macro_mean", scaling.read_records, folder,
            error=scaling.FitError)


# =================================================================================================
# Nothing lost
# =================================================================================================


def kill_at(owner, name, n, delay=None, after=False):
    """owner.name's n-th call kills this process: before it, after it, or while it goes on."""
    real, calls = getattr(owner, name), itertools.count(1)
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)

    def call(*args, **options):
        here = next(calls) == n
        if here and delay is not None:
            threading.Thread(target=lambda: (time.sleep(delay), die())).start()
        elif here and not after:
            die()
        result = real(*args, **options)
        return die() if here and after else result
    setattr(owner, name, call)


def half_writer(then):
    """A file for open(): of what is written it takes half, before then()."""
    class Half(io.FileIO):
        def write(self, data):
            super().write(data[:len(data) // 2])
            then()
    return Half


def write_half_and_die(n):
    """In the n-th opening of a file for a checkpoint."""
    opened, half = itertools.count(1), half_writer(lambda: os.kill(os.getpid(), signal.SIGKILL))
    train.open = lambda path, mode: (
        half if "ckpt.pt" in str(path) and next(opened) == n else open)(path, mode)


def kill_points(seed=0):
    """Ten moments: five in the life of a file, in a test, and four anywhere."""
    rng = np.random.default_rng(seed)
    anywhere = [(int(n), float(d)) for n, d in zip(rng.integers(1, 37, 4), rng.random(4) / 50)]
    return [lambda: kill_at(train, "macro_accuracy", 25),            # in the third test
            lambda: write_half_and_die(4),
            lambda: kill_at(os, "fsync", 5),                         # whole, but not in place
            lambda: kill_at(os, "replace", 7),
            lambda: kill_at(os, "replace", 8),
            lambda: kill_at(train.Run, "log", 4, after=True)] + [
        lambda n=n, d=d: kill_at(train.Run, "one_step", n, delay=d) for n, d in anywhere]


def kill_ten_runs(out):
    """In a process of its own: a run in a fork for each moment, killed there, then resumed."""
    import torch._dynamo                                 # once, as the optimizer imports it
    torch.set_num_threads(1)
    train.SAVE_SECONDS = 0

    def fork(act):
        process = multiprocessing.get_context("fork").Process(target=act)
        process.start()
        process.join()
        return process.exitcode
    codes = [fork(lambda: train.train(short(out, name="whole"), quiet))]
    for i, kill in enumerate(kill_points()):
        run = lambda: train.train(short(out, name=f"killed{i}"), quiet)
        codes.append([fork(lambda: (kill(), run())), fork(run)])
    print(json.dumps(codes))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_runs_killed_at_ten_moments_end_with_the_same_bytes(tmp_path):
    code = f"import test_all; test_all.kill_ten_runs({str(tmp_path)!r})"
    done = ended(started("-c", code, cwd=HERE))
    assert json.loads(done.stdout) == [0] + [[-9, 0]] * 10, done.stderr
    for i in range(10):
        folder = tmp_path / f"killed{i}"
        assert same_bytes(tmp_path / "whole", folder), i
        assert {p.name for p in folder.iterdir()} == {"config.json", "log.jsonl", "ckpt.pt",
                                                     "best.pt", "result.json"}


@needs_compiler
def test_compiled_runs_of_two_threads_equal_each_other_to_the_byte_and_a_plain_one(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        a, b, plain = (train.train(short(tmp_path / name, compile=c, steps=12), quiet)["folder"]
                       for name, c in (("a", "on"), ("b", "on"), ("plain", "off")))
    finally:
        torch.set_num_threads(threads)
    losses = [[x["loss"] for x in logged(f) if "loss" in x] for f in (a, plain)]
    assert same_bytes(a, b) and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_same_command_same_bytes_other_seed_other_run(tmp_path):
    a, b = (Path(train.train(short(tmp_path / x, seed=3, steps=15), quiet)["folder"]) for x in "ab")
    assert same_bytes(a, b) and (a / "best.pt").read_bytes() == (b / "best.pt").read_bytes()
    one, other = (train.Run(short(tmp_path, seed=s), tmp_path / str(s), quiet) for s in (3, 4))
    assert not torch.equal(one.data.train, other.data.train)
    [run.data.batch(0) for run in (one, other)]
    assert not torch.equal(one.data.order, other.data.order)
    for p, q in zip(one.model.parameters(), other.model.parameters()):
        assert p.std() == 0 or not torch.equal(p, q)     # ones and zeros are no draws


def test_resume_takes_the_options_of_the_folder(tmp_path, monkeypatch):
    whole, said = train.train(short(tmp_path / "whole"), quiet)["folder"], []
    folder = stopped(short(tmp_path / "parts"), 23)
    refused("leave out --lr", train.parse_args, ["--resume", str(folder), "--lr", "0.5"])
    refused("holds another run.*steps 40 -> None",
            train.train, train.TrainConfig(resume=str(folder)), quiet)
    refused("config.json does not exist", train.parse_args, ["--resume", str(tmp_path)],
            error=FileNotFoundError)
    moved = folder.rename(tmp_path / "moved")
    monkeypatch.setattr(train, "code_version", lambda: "other")
    config = train.parse_args(["--resume", str(moved)])
    assert config.out == str(tmp_path)                   # so what it suggests next stays there
    result = train.train(config, said.append)
    assert result["folder"] == str(moved) and same_bytes(whole, moved)
    assert "other code began this run" in said[0] and any("from step 23" in x for x in said)


def test_resume_keeps_what_was_measured_and_notices_other_data(tmp_path, monkeypatch):
    config, said = short(tmp_path, compile="auto", dtype="auto"), []

    def measures(compiled, dtype):
        monkeypatch.setattr(train, "choose_compile", lambda *_: (compiled, "measured"))
        monkeypatch.setattr(train, "fastest_dtype", lambda _: (dtype, "measured"))
    measures(False, torch.float32)
    folder = stopped(config, 23)
    measures(True, torch.bfloat16)
    run = train.Run(config, folder, said.append)
    assert run.step == 23 and run.compiled is False and run.dtype == torch.float32
    assert "compile  off: as before this run was stopped" in said and run.wall_s() > run.earlier > 0
    build = train.Run.build
    monkeypatch.setattr(train.Run, "build",
                        lambda run: (build(run), setattr(run.data, "sha256", "0" * 64)))
    refused("the data have changed since", train.Run, config, folder, quiet)


def test_damaged_checkpoints_are_named_and_the_one_before_is_used(tmp_path):
    whole = train.train(short(tmp_path / "whole"), quiet)["folder"]
    folder = stopped(short(tmp_path / "parts"), 23)
    good = (folder / "ckpt.pt").read_bytes()
    weights = torch.load(folder / "ckpt.pt", weights_only=True)["model"]["embed.weight"]
    at = good.index(weights.numpy().tobytes()) + 40      # torch.load alone would not notice
    flipped = good[:at] + bytes([good[at] ^ 1]) + good[at + 1:]
    for i, bad in enumerate((b"", good[:1000], good[:-1], flipped, None)):
        copy, said = Path(shutil.copytree(folder, tmp_path / f"copy{i}")), []
        (copy / "ckpt.pt").unlink() if bad is None else (copy / "ckpt.pt").write_bytes(bad)
        train.train(train.parse_args(["--resume", str(copy)]), said.append)
        said = [x for x in said if x.startswith(("damaged", "resume"))]
        assert "ckpt.previous.pt" in said[-1] and same_bytes(whole, copy)
        if bad is not None:
            assert "ckpt.pt is truncated or altered" in said[0]
            assert (copy / "ckpt.damaged.pt").read_bytes() == bad
    for name in ("ckpt.pt", "ckpt.previous.pt"):
        (folder / name).write_bytes(good[:500])
    before = files_in(folder)
    refused("ckpt.pt is trunc.*ckpt.previous.pt is trunc.*move",
            train.train, short(tmp_path / "parts"), quiet)
    assert files_in(folder) == before


def test_a_log_that_lost_lines_is_noticed(tmp_path):
    folder, said = stopped(short(tmp_path), 23), []
    (folder / "log.jsonl").write_text("")
    train.train(short(tmp_path), said.append)             # the one before is from step 0: no lines
    assert any("log.jsonl has lost lines" in x for x in said)
    assert [x["step"] for x in logged(folder)] == [10, 12, 12, 20, 24, 24, 30, 36, 36, 40, 40]


def test_the_log_is_on_the_disk_before_the_checkpoint_that_counts_it(tmp_path, monkeypatch):
    run, synced, real = train.Run(short(tmp_path), tmp_path / "run", quiet), [], os.fsync
    run.log(loss=1.0)
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd)), real(fd)))
    run.save()
    files = [(run.folder / name).stat() for name in ("log.jsonl", "ckpt.pt")]
    assert [(s.st_ino, s.st_size) for s in synced] == [(s.st_ino, s.st_size) for s in files]


@dataclasses.dataclass
class Malicious:
    """Unpickled, it writes a file."""
    path: str

    def __reduce__(self):
        return open, (self.path, "w")


def test_no_code_is_run_from_files(tmp_path, writer):
    mark = tmp_path / "executed"
    bad = Malicious(str(mark))
    pickle.loads(pickle.dumps(bad)).close()
    assert mark.exists() and mark.unlink() is None       # it would, if it could
    folder = stopped(short(tmp_path), 5)
    (folder / "ckpt.previous.pt").unlink(missing_ok=True)
    text_run = Path(shutil.copytree(writer["folder"], tmp_path / "text"))
    for path, *use in [(folder / "ckpt.pt", train.train, short(tmp_path), quiet),
                       (text_run / "ckpt.pt", train.load_run, text_run, "cpu")]:
        path.write_bytes(pickle.dumps(bad))
        refused("ckpt.pt is truncated or altered", *use)
        train.write_checkpoint(path, bad)                # its checksum is right
        refused("ckpt.pt is refused", *use)
    for name, data in [("tokens.npy", npy(np.array([bad], object))), ("a.npy", pickle.dumps(bad)),
                       ("tokens.bin", pickle.dumps(bad) + b" ")]:
        (tmp_path / name).write_bytes(data)
        refused(name, tasks.load_tokens, tmp_path / name)
    kept = (folder / "config.json").read_bytes()
    for name in ("config.json", "result.json"):
        for data in (b"\xff\xfe", pickle.dumps(bad), b"[1]", b"{", b"[" * 100_000):
            (folder / name).write_bytes(data)
            refused(f"{name} (can't be read|holds no)", train.train, short(tmp_path), quiet)
            (folder / "result.json").unlink(missing_ok=True)
            (folder / "config.json").write_bytes(kept)
    assert not mark.exists()


def test_a_full_disk_destroys_nothing(tmp_path, monkeypatch):
    folder = stopped(short(tmp_path), 23)
    before = files_in(folder)
    full = half_writer(Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with monkeypatch.context() as patch:
        patch.setattr(train, "open", lambda path, mode: (full if "w" in mode else open)(path, mode),
                      raising=False)
        refused(r"(best|ckpt).pt can't be written \(No space left", train.train, short(tmp_path),
                quiet, error=OSError)
    after = files_in(folder)
    assert after.keys() == before.keys()
    assert [path.name for path in before if after[path] != before[path]] in ([], ["log.jsonl"])
    run = train.Run(short(tmp_path), folder, quiet)
    assert run.step == 23
    if os.path.exists("/dev/full"):
        run.log_path = Path("/dev/full")
        refused(r"/dev/full can't be written \(No space left", run.log, error=OSError, loss=1.0)


def test_an_unwritable_place_is_refused_before_training(tmp_path, monkeypatch):
    new, used = tmp_path / "new", shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        refused("is not writable: choose another --out", train.train, short(new), quiet,
                error=OSError)
    numbers = train.train(short(tmp_path / "before"), quiet)["parameters"]
    for copies in (0, 3 * 3):        # of the parameters: room for three checkpoints isn't enough,
        free = 4 * copies * numbers + 1000               # the best parameters come on top
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: used._replace(free=free))
        refused("MB free.*need 0.1 MB: make room", train.train, short(new), quiet, error=OSError)
    (tmp_path / "file").write_text("")
    refused("file", train.train, short(tmp_path / "file"), quiet, error=(OSError, ValueError))
    assert not new.exists()


def spoil(monkeypatch, at, number=math.inf):
    """The swiglu of a Run gives `number` in the step after step `at`."""
    real, here = layers.SwiGLU.forward, {}
    monkeypatch.setattr(layers.SwiGLU, "forward", lambda self, x: real(self, x) * (
        number if here["run"].step == at and torch.is_grad_enabled() else 1.0))
    build = train.Run.build
    monkeypatch.setattr(train.Run, "build", lambda run: (here.update(run=run), build(run))[1])


@pytest.mark.parametrize("detect", [False, True])
def test_a_number_that_is_not_finite_ends_the_run(detect, tmp_path, monkeypatch):
    spoil(monkeypatch, 13)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    refused(r"at step 14, learning rate 7.6e-03, .*the output of blocks.1.layer.* \(swiglu\)"
            r".*ckpt.pt is from before",
            train.train, short(tmp_path, detect=detect), quiet, error=FloatingPointError)
    (folder,) = tmp_path.iterdir()
    content = train.read_checkpoint(folder / "ckpt.pt", "cpu")
    assert content["step"] == 12 and logged(folder)[-1]["step"] == 12
    assert all(p.isfinite().all() for p in content["model"].values())
    assert not (folder / "result.json").exists()


def test_a_damaged_checkpoint_does_not_hide_a_fault(tmp_path):
    run = train.Run(short(tmp_path), tmp_path / "run", quiet)
    (tmp_path / "run" / "ckpt.pt").write_bytes(b"damaged")
    assert re.search(r"loss is nan. Its layer is unknown \(.*truncated or altered.* Try a lower",
                     str(run.fault("the loss is nan", 1)))


def test_detect_does_not_change_whether_the_run_is_compiled(tmp_path):
    config = short(tmp_path, steps=4, compile="auto")
    folder = stopped(config, 2)
    for detect in (False, True):
        run = train.Run(dataclasses.replace(config, detect=detect), folder, quiet)
        assert run.compiled is False and run.score is run.plain
    run.compiled = True                                  # as before it was stopped
    run.choose_graph()
    assert run.compiled and run.score is run.plain
    assert run.go() and not run.result()["machine"]["compiled"]
    assert train.read_checkpoint(folder / "ckpt.pt", "cpu")["compiled"]


def test_a_step_that_is_not_finite_is_skipped_by_option(tmp_path, monkeypatch):
    spoil(monkeypatch, 13, math.nan)
    result = train.train(short(tmp_path / "a", nonfinite="skip"), quiet)
    assert result["skipped"] == 1 and result["steps"] == 40
    skipped = [x["skipped"] for x in logged(result["folder"]) if "loss" in x]
    assert skipped == [0, 0] + [1] * (len(skipped) - 2)
    run = train.Run(short(tmp_path, nonfinite="skip"), tmp_path / "b", quiet)
    run.step, run.score = 13, run.plain
    before = {n: p.clone() for n, p in run.model.state_dict().items()}
    run.one_step()
    assert all(torch.equal(p, before[n]) for n, p in run.model.state_dict().items())
    assert run.step == 14 and not run.optimizer.state


def test_too_large_a_step_is_not_saved(tmp_path):
    first = "It first appeared in the .* of"
    for change, said in ((dict(), first), (dict(nonfinite="skip"), "No layer had .*ones aside"),
                         (dict(eval_every=1, schedule="constant"), first)):
        refused(rf"at step .*\. {said}.*ckpt.pt is from before", train.train,
                short(tmp_path, lr=1e30, **change), quiet, error=FloatingPointError)
    saved = [train.read_checkpoint(path, "cpu") for path in tmp_path.glob("*/*.pt")]
    assert len(saved) >= 3 and {content["step"] for content in saved} == {0}
    assert all(content["model"]["embed.weight"].abs().max() < 1 for content in saved)


def memory_growth(first, last):
    """
    Part by which the resident memory of a small run grows from step `first` to step `last`:

        python -c "import test_all; print(test_all.memory_growth(200, 2000))"
    """
    pages = {}

    class Watched(train.Run):
        def one_step(self):
            pages[self.step] = int(Path("/proc/self/statm").read_text().split()[1])
            return super().one_step()
    with tempfile.TemporaryDirectory() as out:
        config = short(Path(out), steps=last + 1, eval_every=25, early_stop=2.0)
        Watched(config, train.find_folder(config)[0], quiet).go()
    return pages[last] / pages[first] - 1


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_a_long_run_does_not_leak(monkeypatch):
    monkeypatch.setattr(train, "SAVE_SECONDS", 1)
    assert memory_growth(50, 400) < 0.02


# -------------------------------------------------------------------------------------------------
# Bad input, by the hundred: each case ends in success or in one readable line


JUNK = ["", " ", "0", "-1", "1", "2", "7", "1e9", "nan", "-inf", "1e400", "ten", "None", "..", "/",
        "~", "\u00e9\u4e2d", "a b", "((", "))", "=", ",", "--", "\x00", "'", "9" * 30, "x" * 5000]


def one_line(case, act, folder=None):
    """act() succeeds, or its error is one line of ordinary kind; the folder stays as it is."""
    before = folder and files_in(folder)
    try:
        act()
    except (ValueError, OSError) as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 12_000, (case, message)
        assert type(error) in {ValueError, OSError, FileNotFoundError, scaling.FitError,
                               PermissionError, NotADirectoryError, IsADirectoryError}, \
            (case, repr(error))
    except SystemExit as end:
        assert end.code in (0, 2), case
    except Exception as error:
        raise AssertionError(f"{case!r} ended in {error!r}") from error
    assert not folder or files_in(folder) == before, case


def dice(seed):
    """A function that draws one of its arguments' items."""
    rng = np.random.default_rng(seed)
    return rng, lambda items: items[rng.integers(len(items))]


@pytest.mark.parametrize("kind", [train.TrainConfig, train.SampleConfig, train.BenchmarkConfig])
def test_fuzz_of_options(kind, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng, pick = dice(1)
    names = ["--" + f.name.replace("_", "-") for f in dataclasses.fields(kind)] + ["--lrr", "-x"]
    values = JUNK + ["mamba", "compression", "text", "cuda", "on", "0.5", "16", "64", "hyena mlp"]
    for _ in range(150):
        argv = [part for _ in range(rng.integers(1, 5)) for part in (pick(names), pick(values))]
        one_line(argv, lambda: train.parse_args(argv, kind), tmp_path)
    assert not list(tmp_path.iterdir())


def test_fuzz_of_runs(tmp_path, monkeypatch):
    """Options that parse: the run ends well, or before its folder is made, or names its step."""
    rng, pick = dice(7)
    monkeypatch.setattr(tasks, "BASELINES", {k: dataclasses.replace(s, num_test=8)
                                             for k, s in tasks.BASELINES.items()})
    values = {int: ["0", "1", "2", "7", "60", "2147483647", "9" * 30, "x"],
              float: ["0", "0.5", "1", "5", "1e-30", "1e30", "1e308", "nan", "-1"],
              str: ["meta", "cpu:0", "cuda:9", "constant", "skip", "memorization", "text", "hyena",
                    "selective-copying", "compression", "bfloat16", "mamba", "mlp", "\u00e9"]}
    fields = [f for f in dataclasses.fields(train.TrainConfig) if f.name not in (
        "detect", "resume", "out", "name", "compile", "data", "tokenizer")]
    large = ("dim", "seq_len", "vocab_size", "num_train", "context", "steps", "epochs")
    few = dict(SMALL, num_train=4, batch_size=2, steps=3)
    for i in range(150):
        out = tmp_path / str(i)
        change = {f.name: pick([*f.metadata.get("choices", ()), *values[train.field_type(f)]])
                  for f in (pick(fields) for _ in range(rng.integers(1, 4)))}
        if any(change.get(name) == "2147483647" for name in large):
            continue                                     # it would really be tried
        argv = [f"--{k.replace('_', '-')}={v}" for k, v in {**few, "out": out, **change}.items()]

        def act():
            config = train.parse_args(argv)
            try:
                assert math.isfinite(train.train(config, quiet)["train_flops"])
            except FloatingPointError as error:
                assert "at step" in str(error) and "\n" not in str(error)
            except (ValueError, OSError):
                assert not out.exists()
                raise
        one_line(change, act)


def test_out_of_memory_is_one_line(monkeypatch, capsys):
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nmore"),
                  RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")):
        monkeypatch.setattr(train, "run_and_report", Mock(side_effect=error))
        assert train.main() == 2
        assert re.fullmatch("error: out of memory .*--batch-size.*\n", capsys.readouterr().err)
    monkeypatch.setattr(train, "run_and_report", lambda argv: 1 + None)
    with pytest.raises(TypeError):                       # any other error is a fault of the program
        train.main()


def test_fuzz_of_settings():
    rng, pick = dice(2)
    numbers = [-1, 0, 1, 2, 3, 4, 5, 7, 8, 16, 31, 64, 0.2, 0.5, 1.0, math.nan, math.inf, True,
               None, "8", [], 10 ** 12, np.int64(8), np.float32(0.5)]
    fields = [f.name for f in dataclasses.fields(tasks.Setting)][1:]

    def act(task, change):
        s = tasks.Setting(task, **change)
        if s.seq_len < 100 and s.vocab_size < 100:
            tasks.generate(s, pick([1, 2, 0, "2"]), pick([0, 3, -1, None]), pick(["train", "test"]))
    for _ in range(150):
        task = pick([*tasks.TASKS, "recall", "", None])
        change = {pick(fields): pick(numbers) for _ in range(rng.integers(0, 4))}
        one_line((task, change), lambda: act(task, change))


def test_fuzz_of_patterns():
    rng, pick = dice(3)
    names = [*LAYERS, *LAYERS, "mamab", "", "\u00e9"]
    values = ["1", "2", "3", "4", "8", "16", "0", "-1", "1.5", "None", "modal", "implicit", "'2'",
              "fir", "[1]", "(", "9" * 30, "True", "", "-" * 5000 + "1", "[" * 300]

    def settings(name):
        own = [*inspect.signature(LAYERS[name][0].__init__).parameters] if name in LAYERS else []
        keys = own[3:] * 3 + ["dim", "max_len", "self", "__class__", "", "name"]
        return ",".join(f"{pick(keys)}{pick(['=', '=', '=', '=', ''])}{pick(values)}"
                        for _ in range(rng.integers(0, 3)))

    def act(pattern):
        m = model.Model(pattern, 16, pick([16, 32, 128]), 8)
        m(torch.zeros(1, 8, dtype=torch.long))
    for _ in range(250):
        pattern = " ".join(f"{name}({settings(name)}{pick([')', ')', ')', ')', ''])}"
                           for name in (pick(names) for _ in range(rng.integers(1, 3))))
        one_line(pattern, lambda: act(pattern + pick(["", "", "", "", " )", "("])))


def test_fuzz_of_tables(tmp_path, capsys):
    rng, pick = dice(4)
    cells = ["", "1e6", "3e7", "2.9", "3.4", "nan", "inf", "-1", "0", "x", "1e400", '"', "\x00",
             "1,2"]
    for i in range(80):
        header = pick(["N,D,loss", "N,D,loss,C", "N,D,loss,arch,state", "D,loss", "", "N;D;loss",
                       "N,N,D,loss"])
        rows = [",".join(pick(cells) for _ in range(rng.integers(1, 6)))
                for _ in range(rng.integers(0, 8))]
        path = tmp_path / "runs.csv"
        ends = [b"", b"\n", b"\xff", b"\r"]
        path.write_bytes("\n".join([header, *rows]).encode() + pick(ends))
        mad = tmp_path / "mad.csv"
        mad.write_bytes(pick([b"arch,mean", b"arch,mean\nall,1", b"arch,mean\nall", b"\xff", b"",
                              b"arch,mean\nall,x", b"arch\nall", b"mean,arch\n,", b"[" * 100_000]))
        argv = pick([["fit", path], ["fit", path, "--json"], ["fit", tmp_path],
                     ["compare", "--runs", path, "--mad", mad], ["fit", tmp_path / "no.csv"]])
        argv = [*map(str, argv)] + (["--bootstrap", "30"] if argv[0] == "fit" else [])

        def act():
            assert scaling.main(argv) in (None, 0, 2)
            err = capsys.readouterr().err
            assert "Traceback" not in err and len(err.splitlines()) <= 1, err
        one_line((argv, path.read_bytes(), mad.read_bytes()), act, tmp_path)


def test_fuzz_of_corpora(tmp_path):
    rng, pick = dice(5)
    for i in range(80):
        path = tmp_path / f"x{i}{pick(['.bin', '.npy', '.txt', '', '.parquet'])}"
        body = rng.bytes(int(pick([0, 1, 2, 7, 64, 1024, 1200])))
        if path.suffix == ".npy":
            data = npy(np.zeros(pick([0, 3, (2, 2)]), pick(["u1", "f4", "i8", "U3"])))
            at = rng.integers(len(data))
            body = data[:at] + rng.bytes(1) + data[at + 1:]
        if path.suffix == ".bin" and pick([False, True]):
            count = pick([-1, 0, 32, 2 ** 31 - 1, len(body) // 2])
            body = shard(pick([0, 1, 2, 7]), np.frombuffer(body, np.uint8), count)
        path.write_bytes(body)
        known = path.suffix in (".bin", ".npy")
        tokenizer = pick(["bytes", "gpt2", "gpt3", ""]) if known else "bytes"
        one_line((path.name, tokenizer), lambda: tasks.load_tokens(path, tokenizer), tmp_path)


def test_fuzz_of_checkpoints(tmp_path):
    rng, pick = dice(6)
    folder = stopped(short(tmp_path), 5)
    (folder / "ckpt.previous.pt").unlink(missing_ok=True)
    good, config = (folder / "ckpt.pt").read_bytes(), (folder / "config.json").read_bytes()
    run = train.Run(short(tmp_path), folder, quiet)
    content = train.read_checkpoint(folder / "ckpt.pt", "cpu")
    for _ in range(100):
        if rng.random() < 0.4:                           # altered, with or without a right checksum
            data = bytearray(good[:-64])
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
            data = data[:pick([len(data), len(data) // 2, 100])]
            digest = hashlib.sha256(data).hexdigest().encode() if rng.random() < 0.7 else good[-64:]
            (folder / "ckpt.pt").write_bytes(bytes(data) + digest)
        else:
            key, value = pick([*content]), pick([None, -1, "x", [], {}, math.nan, torch.ones(2)])
            other = {k: value if k == key else v for k, v in content.items()}
            if rng.random() < 0.3:
                del other[key]
            train.write_checkpoint(folder / "ckpt.pt", pick([other, other, other, value, [other]]))
        one_line("checkpoint", lambda: run.restore(folder / "ckpt.pt"), folder)
    (folder / "ckpt.pt").write_bytes(good)
    for _ in range(60):
        text = bytearray(config)
        at = rng.integers(len(text))
        text[at:at + pick([1, 1, 20])] = pick([b"", b"9", b'"', b"\xff", b"{}", b"null"])
        (folder / "config.json").write_bytes(text)
        one_line(bytes(text), lambda: train.parse_args(["--resume", str(folder)]), folder)
        one_line(bytes(text), lambda: train.find_folder(short(tmp_path)), folder)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", *sys.argv[1:]]))
