"""
Every claim of the README and the docstrings, as a test: `python test_all.py`, or pytest. A new line
in LAYERS, TASKS or ARCHS is tested by what is parametrized over them.
"""
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import layers
import model
import scaling
import tasks
import train
from layers import LAYERS, LOOPS, build_layer
from model import ARCHS, Model
from tasks import IGNORE, UserError
from train import Config

@pytest.fixture(autouse=True, scope="session")
def signals_as_in_a_terminal():
    """A job in the background ignores some, and so would the programs that tests start."""
    for name in {"SIGINT", "SIGHUP"} & set(dir(signal)):
        if signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
            signal.signal(getattr(signal, name), signal.SIG_DFL)

HERE = Path(model.__file__).parent

def script(*words, cwd=HERE, **env):
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True,
                          cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", **env})

RECALL, FUZZY, NOISY, COPYING, COMPRESSION, MEMORIZATION, *_ = tasks.TASKS

def tasks_setting(task, **change):
    return dataclasses.replace(tasks.BASELINES[task], **change)

SIX = [*tasks.BASELINES.values()][:6]
HARD = [tasks_setting(task, **change) for task, change in (
    (RECALL, dict(vocab_size=7, seq_len=4)), (RECALL, dict(seq_len=512)),
    (FUZZY, dict(vocab_size=128, seq_len=257)), (FUZZY, dict(vocab_size=7, seq_len=12)),
    (FUZZY, dict(vocab_size=8, max_motif=1)), (NOISY, dict(frac_noise=0.99, seq_len=16)),
    (NOISY, dict(frac_noise=0.8, vocab_size=144)),
    (COPYING, dict(num_tokens_to_copy=127, seq_len=255)),
    (COMPRESSION, dict(vocab_size=3, seq_len=2)), (MEMORIZATION, dict(vocab_size=8191)))]
SETTINGS = [*tasks.BASELINES.values(), *HARD]

@pytest.mark.parametrize("s", SETTINGS, ids=str)
def test_the_oracle_is_right_and_answers_all_that_is_tested(s):
    oracle = tasks.TASKS[s.task].oracle
    for split in ("train", "test"):
        x, y = tasks.generate(s, 300, 5, split)
        p = oracle(s, x, 5)
        assert x.shape == y.shape == p.shape and x.dtype == y.dtype == np.int64
        assert x.shape == (300, s.seq_len - ("recall" in s.task))
        assert 0 <= x.min() and x.max() < s.vocab_size and ((y != -100).sum(1) > 0).all()
        assert ((p == y) | (p == -1) | (y == -100)).all() and (p[y != -100] != -1).any()
        assert split == "train" or (p == y)[y != -100].all()
        if s.task != COMPRESSION:                        # it reads the past: cut the future off
            answers = np.flatnonzero((p >= 0).any(0))
            t = answers[len(answers) // 2]
            past = np.where(np.arange(x.shape[1]) <= t, x, 0)
            assert (oracle(s, past, 5)[:, t] == p[:, t]).all()

@pytest.mark.parametrize("s", [s for s in SETTINGS if "recall" in s.task], ids=str)
def test_recall_asks_for_every_value_that_was_shown(s):
    (keys, values), fuzzy = tasks.halves(s), "fuzzy" in s.task
    x, y = tasks.generate(s, 512, 1, "test")
    assert ((tasks.recall_oracle(s, x, 1) >= 0) == (y >= 0)).all() and (y[:, -1] >= 0).all()
    x, y = tasks.generate(s, 512, 1, "train")
    pad = s.vocab_size - 1 if fuzzy else -1
    assert (y[:, :-1] == np.where(x[:, 1:] == pad, -100, x[:, 1:])).all()
    assert (np.diff(x == pad) <= (x == pad)[:, :-1]).all() and (x == pad).sum(1).max() < 4 * 3
    noise = (x >= keys + values) & (x != pad)
    assert noise[:, :-2].mean() == pytest.approx(s.frac_noise * (1 - 2 / s.seq_len), abs=0.15)
    assert (noise[:, :-1:2] == noise[:, 1::2]).all() and (~noise[:, :-1].all(1)).all()
    rows = ["".join("k" if token < keys else " " for token in row[:-1]) for row in x.tolist()]
    lengths = {len(key) for row in rows for key in row[:row.rfind(" ") + 1].split()}
    assert lengths == (set(range(1, s.max_motif + 1)) if fuzzy else {1})

def test_copying_compression_and_memorization():
    s = tasks_setting(COPYING, num_tokens_to_copy=9, seq_len=100)
    x, y = tasks.generate(s, 2000, 0, "train")
    assert (x[:, 90] == 15).all() and (x[:, 91:] == 14).all() and (x[:, :90] < 15).all()
    assert (y[:, :-9] == -100).all() and (x[x < 14].reshape(2000, 9) == y[:, -9:]).all()
    gaps = np.diff(np.nonzero(x < 14)[1].reshape(2000, 9), prepend=-1) - 1
    assert abs(gaps.mean(0) - 9).max() < 0.4 and abs(gaps.var(0) - 8).max() < 1     # multinomial
    x, y = tasks.generate(tasks_setting(COMPRESSION), 500, 0, "test")
    assert (x == y).all() and (x[:, -1] == 15).all() and set(x[:, :-1].flat) == set(range(15))
    s = tasks_setting(MEMORIZATION)
    x, y = np.concatenate([tasks.generate(s, 256, 4, split) for split in ("train", "test")], 1)
    key, value = x[:, 0::2], y[:, 1::2]                  # of both splits
    assert (x[:, 1::2] == 255).all() and (y[:, 0::2] == -100).all()
    assert set(key.flat) == set(range(128)) and 128 <= value.min() and value.max() < 255
    assert len(set(zip(key.flat, value.flat))) == 128    # one map
    assert (tasks.generate(s, 9, 5, "train")[1] != y[:9]).any()

def test_draws_are_uniform():
    drawn = tasks.dice(SETTINGS[0], 0, "x")(2 ** 32, 800) / 2 ** 32
    assert abs(np.histogram(drawn, 3, (0, 1))[0] / drawn.size - 1 / 3).max() < 0.005
    motif = tasks.motifs(tasks.dice(SETTINGS[0], 0, "m"), 4, 3, 100).reshape(-1, 3) @ [16, 4, 1]
    counts = np.unique(motif, return_counts=True)[1]
    assert len(counts) == 24 and abs(counts / len(motif) - 1 / 24).max() < 0.006

def test_data_depend_on_setting_seed_and_split_alone():
    sums = []
    for s in SIX:
        x, y = tasks.generate(s, 300, 0, "train")
        sums.append(hashlib.sha256(np.stack([x, y]).astype("<i8").tobytes()).hexdigest()[:8])
        again = tasks.generate(dataclasses.replace(s, num_train=7, num_test=8), 290, 0, "train")
        assert (again[0] == x[:290]).all() and (again[1] == y[:290]).all()
        others = [tasks.generate(s, 300, 1, "train")[0], tasks.generate(s, 300, 0, "test")[0]]
        rows = {row.tobytes() for row in x}
        assert len(rows) == 300 and not rows & {row.tobytes() for other in others for row in other}
    assert sums == "07f3386d 33c23b54 da1c67da 5e4c84f9 03d4533f 41932adc".split()  # on any machine
    new = dataclasses.make_dataclass("New", [("field", int, 0)], bases=(type(s),), frozen=True)
    assert (tasks.generate(new(**dataclasses.asdict(s)), 300, 0, "train")[1] == y).all()

def test_the_66_settings():
    every = tasks.mad_settings()
    assert len(set(every)) == 66 and {s.num_test for s in every} == {1280}
    assert [len(tasks.mad_settings(t)) for t in [*tasks.TASKS][:6]] == [11, 11, 14, 13, 11, 6]
    for s in every:                                      # one variable at a time
        base = dataclasses.asdict(tasks.BASELINES[s.task])
        assert sum(v != base[k] for k, v in dataclasses.asdict(s).items()) <= 1
    assert {s.vocab_size for s in tasks.mad_settings(NOISY)} == {32, 48, 80, 144}
    assert {s.num_train for s in tasks.mad_settings(FUZZY)} == {12800, 6400, 3200, 1600, 800}

@pytest.mark.parametrize("task, field, value", [
    (RECALL, "seq_len", 127), (RECALL, "seq_len", 2), (RECALL, "vocab_size", 3),
    (RECALL, "frac_noise", 0.2), (FUZZY, "vocab_size", 6), (FUZZY, "seq_len", 11),
    (NOISY, "frac_noise", 1.0), (NOISY, "frac_noise", float("nan")), (NOISY, "vocab_size", 19),
    (COPYING, "num_tokens_to_copy", 128), (COPYING, "vocab_size", 3),
    (COMPRESSION, "seq_len", 1), (COMPRESSION, "vocab_size", 2), (MEMORIZATION, "vocab_size", 4),
    (MEMORIZATION, "seq_len", 31)])
def test_impossible_settings(task, field, value):
    with pytest.raises(tasks.UserError, match=f"^{field} is {value}; permitted[^\n]*$"):
        tasks_setting(task, **{field: value})

@pytest.mark.parametrize("s", [*tasks.BASELINES.values(), HARD[2]], ids=str)
def test_chance_and_ceiling(s):
    y = np.concatenate([tasks.generate(s, 1500, seed, "test")[1] for seed in range(4)])
    rng, guess = np.random.default_rng(0), np.full_like(y, -1)
    for column, answers in enumerate(y.T):
        possible = np.unique(answers[answers >= 0])      # in this column
        guess[:, column] = rng.choice(possible, len(y)) if len(possible) else -1
    chance = tasks.TASKS[s.task].chance(s)
    assert abs((guess == y)[y >= 0].mean() - chance) < 5 * (chance / (y >= 0).sum()) ** 0.5
    assert tasks.ceiling(s) == pytest.approx(1.0)

def test_ceiling_of_memorization():
    hard = tasks.mad_settings(MEMORIZATION)
    assert np.mean([tasks.ceiling(s) for s in hard]) == pytest.approx(0.913, abs=5e-4)
    train, test = (tasks.generate(hard[-1], n, 0, split)[0][:, 0::2]
                   for n, split in ((256, "train"), (1280, "test")))
    assert abs(np.isin(test, train).mean() - tasks.ceiling(hard[-1])) < 0.015

def test_the_file_shows_each_task():
    done = script("tasks.py")
    assert done.stdout.count("oracle 1.000") == len(tasks.TASKS)
    done = subprocess.run(f"{sys.executable} {tasks.__file__} | head -1", shell=True,
                          capture_output=True, text=True)
    assert done.stdout.startswith(RECALL) and done.stdout.count("\n") == 1 and not done.stderr

@pytest.mark.parametrize("body, code", [
    ("raise KeyboardInterrupt", 130), ("os.kill(os.getpid(), 15)", 143),
    ("os.kill(os.getpid(), 1)", 129), ("print('é')", 0), ("1 / 0", 1),
    ("sys.stderr.write('')", 0), ("raise tasks.UserError('no')", 2), ("raise OSError('no')", 2)])
def test_how_a_program_ends(body, code):
    closed = {0: "sys.stderr = None", 2: "sys.stdout = None"}.get(code, "")
    done = script("-c", f"import os, sys, tasks\n{closed}\ndef main():\n  {body}\n"
                  "tasks.run_main(main)", PYTHONIOENCODING="ascii")
    assert done.returncode == code and ("Traceback" in done.stderr) == (code == 1)
    assert done.stderr == "error: no\n" or code != 2

# ==== tasks.py: text =============================================================================

@pytest.fixture
def toy(monkeypatch, tmp_path):
    """tiktoken's encodings without a download: their pattern, few merges, no <|endoftext|>."""
    ranks = [*(bytes([i]) for i in range(256)), b"\n\n", b".\n", b" \n", b"th", b" t"]
    ranks = {text: i for i, text in enumerate(ranks)} | {b" th": 2000}
    word = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    get = lambda name: tiktoken.Encoding(name, pat_str=word, special_tokens={"<|bos|>": 300},
                                         mergeable_ranks=ranks)
    monkeypatch.setattr(tiktoken, "get_encoding", get)
    monkeypatch.setattr(tasks.tempfile, "gettempdir", lambda: str(tmp_path))
    for cached in (tasks.get_encoding, tasks.token_table):
        monkeypatch.setattr(tasks, cached.__name__, functools.cache(cached.__wrapped__))
    return get

def tasks_files(folder, contents):
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

def tasks_shard(ids, head=(20240520, 1), count=None):
    header = np.zeros(256, "<i4")
    header[:3] = *head, len(ids) if count is None else count
    return header.tobytes() + ids.tobytes()

def tasks_npy(array):
    np.save(file := io.BytesIO(), array, allow_pickle=True)
    return file.getvalue()

def test_text_files_become_tokens_once(tmp_path, toy, monkeypatch):
    text = "the end<|bos|>.\r\n\n the théa \n\n then\n  日本語 😀\nab\n\n\n" * 20
    a, b = text[:250], text[250:]
    tasks_files(tmp_path, {"d/b.txt": b, "d/a.txt": a, "d/.no/x": "no", "d/.x": "no",
                           "d/e": "", "one": text})
    short = tasks.PIECE.pattern.replace("400000", "60")
    monkeypatch.setattr(tasks, "PIECE", tasks.re.compile(short))
    assert len(tasks.PIECE.findall(text)) > 10           # and yet the same tokens:
    tokens, whole = tasks.load_tokens(tmp_path / "one", "gpt2"), toy("gpt2").encode_ordinary
    assert isinstance(tokens, np.memmap) and tokens.tolist() == whole(text)
    assert tokens.tolist() == tasks.encode(text, "gpt2")
    table = tasks.token_table("gpt2")
    assert b"".join(table[t] for t in tokens.tolist()) == text.encode() and 300 not in table
    assert tasks.bytes_per_token(tokens, "gpt2") == pytest.approx(len(text.encode()) / len(tokens))
    assert tasks.bytes_per_token(np.array([65, 300]), "gpt2") == 0.5
    few, table = tasks.load_tokens(tmp_path / "one", "gpt2:1000"), tasks.token_table("gpt2:1000")
    assert b"".join(table[t] for t in few.tolist()) == text.encode() and few.max() < 1000
    assert tokens.max() == 2000 and tasks.vocab_size("gpt2:1000") == 261
    for name in ("d", "one"):
        assert tasks.load_tokens(tmp_path / name).tobytes() == text.encode()
    tasks.load_tokens(tmp_path / "d", "gpt2")
    monkeypatch.setattr(tasks, "encode", None)           # from the cache now
    assert tasks.load_tokens(str(tmp_path / "d/*.txt"), "gpt2").tolist() == whole(a) + whole(b)

def test_a_million_spaces(tmp_path, toy):
    tasks_files(tmp_path, {"gap": "a" + " " * 1_000_000 + "b"})
    tokens, table = tasks.load_tokens(tmp_path / "gap", "gpt2"), tasks.token_table("gpt2")
    assert b"".join(table[t] for t in tokens.tolist()) == b"a" + b" " * 1_000_000 + b"b"

IDS = np.arange(50_000, 50_100)
U2, U4 = (np.arange(100, 2100).astype(kind) for kind in ("<u2", "<u4"))

@pytest.mark.parametrize("name, content, tokenizer", [
    ("raw.bin", IDS.astype("<u2").tobytes(), "gpt2"), ("a.npy", tasks_npy(IDS), "gpt2"),
    ("wide.bin", IDS.astype("<u4").tobytes(), "cl100k_base"),
    ("gpt2.bin", tasks_shard(IDS.astype("<u2")), "gpt2"),
    ("llama.bin", tasks_shard(IDS.astype("<u4"), (20240801, 7)), "o200k_base")])
def test_files_of_tokens(name, content, tokenizer, tmp_path):
    tasks_files(tmp_path, {name: content})
    tokens = tasks.load_tokens(tmp_path / name, tokenizer)
    assert isinstance(tokens, np.memmap) and tokens.tolist() == IDS.tolist()

@pytest.mark.parametrize("name, content, tokenizer", [
    ("wide.bin", U4.tobytes(), "gpt2"), ("int64.bin", U4.astype("<i8").tobytes(), "cl100k_base"),
    ("head.bin", tasks_shard(U2, (1234, 1)), "gpt2"),
    ("new.bin", tasks_shard(U4, (20240801, 8)), "o200k_base"),
    ("cut.bin", tasks_shard(U2, count=9), "gpt2"), ("odd.bin", b"123", "gpt2"),
    ("characters.bin", (U2 % 65).tobytes(), "bytes"), ("big.bin", U2.tobytes(), "bytes"),
    ("float.npy", tasks_npy(np.ones(3)), "gpt2"), ("bad.npy", b"no", "gpt2"),
    ("square.npy", tasks_npy(np.ones((2, 2), int)), "gpt2"),
    ("empty.npy", tasks_npy(U2[:0]), "gpt2"), ("negative.npy", tasks_npy(np.array([-1])), "gpt2"),
    ("object.npy", tasks_npy(np.array([{}], object)), "gpt2"), ("latin.txt", b"\xe9", "gpt2"),
    ("meta.pkl", bytes(range(256)) * 9, "bytes"), ("empty.txt", "", "bytes"),
    ("gpt-2", "ab", "gpt-2")])
def test_data_that_are_refused(name, content, tokenizer, tmp_path, toy):
    tasks_files(tmp_path, {name: content})
    with pytest.raises(tasks.UserError, match=rf"^[^\n]*{name}[^\n]*$"):
        tasks.load_tokens(tmp_path / name, tokenizer)

def test_whole_files_are_for_training_or_validation(tmp_path):
    tasks_files(tmp_path, {"one.txt": "x" * 90 + "y" * 10, "few/a": "aa", "few/b": "bb",
                           **{f"many/{i // 9}/{i:02}": f"<{i:02}>" for i in range(30)},
                           **{f"names/{name}": name for name in (
                               "train/1", "val_2.txt", "x-train.txt", "interval", "val/train_3")},
                           **{f"shards/{kind}_{i}.bin": tasks_shard(U2 + i) for i in range(2)
                              for kind in ("fineweb_train", "fineweb_val")}})
    load = lambda name, tokenizer="bytes": tasks.load_text(tmp_path / name, tokenizer)
    text = load("one.txt")
    assert (text.train == ord("x")).all() and text.val.tobytes() == b"y" * 10
    assert text.sha256 == hashlib.sha256(b"x" * 90 + b"y" * 10).hexdigest()
    assert text[2:4] == ("one.txt", 256)
    assert {load("few").train.tobytes(), load("few").val.tobytes()} == {b"aa", b"bb"}
    many, train = load("many").val.tobytes(), load("many").train.tobytes().split(b"<")[1:]
    assert len(many) == 3 * 4 and len(train) == 27 and train == sorted(train)
    os.rename(tmp_path / "many", tmp_path / "moved")     # names below the folder decide
    assert load("moved").val.tobytes() == many
    text = load("names")
    assert text.train.tobytes() == b"train/1val/train_3x-train.txt"
    assert text.val.tobytes() == b"val_2.txt"
    for name in ("shards", "shards/*.bin"):
        text = load(name, "gpt2")
        assert len(text.train) == 4000 and (text.val == np.concatenate([U2, U2 + 1])).all()
    tasks_files(tmp_path, {"shards/meta.pkl": "x"})
    for name in ("shards", "missing"):
        with pytest.raises(tasks.UserError, match=name):
            load(name, "gpt2")

def test_the_default_corpus():
    text = tasks.load_text(None)
    assert "Python 3" in text.name and b"import unittest.mock" not in text.val.tobytes()
    assert 5e6 < len(text.train) and 0.05 < len(text.val) / len(text.train) < 0.2

def test_windows():
    tokens = np.arange(300)
    x, y = np.moveaxis([tasks.text_batch(tokens, 16, 8, 0, i) for i in range(300)], 1, 0)
    assert x.dtype == np.int64 and (y == x + 1).all() and x.min() == 0 and y.max() == 299
    assert (tasks.text_batch(tokens, 16, 8, 0, 7)[0] == x[7]).all() and (x[8] != x[7]).any()
    assert (tasks.text_batch(tokens, 16, 8, 1, 7)[0] != x[7]).any()
    for most, count in ((5, 5), (999, 18)):
        starts = tasks.val_starts(tokens, 16, most)
        assert len(starts) == count and np.diff(starts).min() >= 16 and np.ptp(np.diff(starts)) <= 1
        assert starts[0] == 0 and tasks.text_windows(tokens, starts, 16)[1][-1, -1] == 299
    with pytest.raises(tasks.UserError, match="--context"):
        tasks.text_batch(tokens, 300, 8, 0, 0)

def test_without_a_network(toy, monkeypatch):
    def fetch(name):
        raise OSError("captive\nportal")
    monkeypatch.setattr(tiktoken, "get_encoding", fetch)
    with pytest.raises(tasks.UserError, match="^[^\n]*captive.*TIKTOKEN_CACHE_DIR"):
        tasks.encode("a", "gpt2")
    assert tasks.bytes_per_token(np.arange(5), "gpt2") is None and tasks.vocab_size("gpt2") == 50257

# ==== layers.py ==================================================================================

WIDTH = 128                                              # of the layers below
every_layer = pytest.mark.parametrize("name", LAYERS)

def layers_gap(a, b, floor=1e-12):
    return ((a - b).abs().max() / b.abs().max().clamp(min=floor)).item()

def layers_normal(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

def layers_agree(fast, slow, inputs, tolerance=1e-9):
    """Outputs, and gradients of all inputs for one random direction, agree."""
    y, z = fast(*inputs), slow(*inputs)
    assert y.shape == z.shape and layers_gap(y, z, 1e-3) < tolerance
    g, leaves = layers_normal(*y.shape, seed=9).to(y.dtype), [x for x in inputs if x is not None]
    grads = [torch.autograd.grad((out * g).sum(), leaves, materialize_grads=True) for out in (y, z)]
    largest = float(max(b.abs().max() for b in grads[1]))
    for a, b in zip(*grads):                             # (a gradient of 0 has no relative error)
        assert layers_gap(a, b, 1e-2 * largest + 1e-12) < tolerance

def layers_make(name, dtype=torch.float32, max_len=300, **settings):
    torch.manual_seed(0)
    return build_layer(name, WIDTH, max_len, **settings).to(dtype)

def layers_steps(layer, x, state=None):
    state, ys = layer.init_state(len(x), dtype=x.dtype) if state is None else state, []
    with torch.no_grad():
        for x_t in x.unbind(1):
            y, state = layer.step(x_t, state)
            ys.append(y)
    return torch.stack(ys, 1), state

def layers_recurrences(T, decay):
    """(name, inputs) of the scans; decay: the largest -log a in a token."""
    rate = lambda *shape, seed: (decay * layers_normal(*shape, seed=seed).detach().sigmoid())
    q, k, v = (layers_normal(2, 3, T, n, seed=n) for n in (5, 5, 4))
    log_a, shared = (-rate(2, 3, T, n, seed=6).requires_grad_() for n in (5, 1))
    for decays in (log_a, shared, None):
        for bonus in (None, layers_normal(3, 5, seed=7)):
            yield "gated_linear_scan", (q, k, v, decays, bonus)
    unit = lambda seed: F.normalize(layers_normal(2, 3, T, 5, seed=seed).detach(), dim=-1)
    k, r, beta = unit(2).requires_grad_(), unit(3), rate(2, 3, T, 1, seed=4) / decay
    for decays in (log_a, shared, None):
        yield "delta_scan", (q, k, v, beta.requires_grad_(), decays)
    c = (rate(2, 3, T, 5, seed=5) / decay * r).requires_grad_()
    yield "delta_scan", (q, k, v, beta, log_a, r.requires_grad_(), c)         # as RWKV-7
    a = (-rate(2, T, 3, 1, seed=8)).exp().requires_grad_()
    yield "linear_scan", (a, layers_normal(2, T, 3, 5))                       # a is broadcast
    x, dt = layers_normal(2, T, 6), rate(2, T, 6, seed=3).requires_grad_()
    A = -layers_normal(6, 3, seed=4).detach().sigmoid()
    B, C = (layers_normal(2, T, 3, seed=i) for i in (1, 2))
    yield "selective_scan", (x, dt, A.requires_grad_(), B, C)

def layers_convolutions(T):
    q, k, v = (layers_normal(2, 3, T, 4, seed=i) for i in range(3))
    yield "long_conv", (layers_normal(4, T, 6), layers_normal(6, T + 3)), {}
    yield "short_conv", (layers_normal(2, T, 6), layers_normal(6, 3)), {}
    yield "toeplitz_attention", (q, k, v, layers_normal(3, T)), {}            # a mask up to 256
    for window in (None, 1, 5, 64):
        yield "causal_attention", (q, k, v), dict(window=window)

@pytest.mark.parametrize("T", [1, 2, 7, 64, 127, 257])
@pytest.mark.parametrize("decay", [0.1, 40.0, 1e4])
@pytest.mark.parametrize("parts, parallel", [            # of the batch, or of time, in the cache;
    (1 << 30, False), (3, False), (3, True)])            # as on a GPU
def test_fast_paths_equal_their_loops(T, decay, parts, parallel, monkeypatch):
    monkeypatch.setattr(layers, "cached", lambda *_: parts)
    if parallel:
        monkeypatch.setattr(layers, "scan", layers.parallel_scan)
    cases = [*layers_convolutions(T), *((*case, {}) for case in layers_recurrences(T, decay))]
    for name, inputs, named in cases:
        layers_agree(functools.partial(getattr(layers, name), **named),
                     functools.partial(LOOPS[name], **named), inputs)
    assert {name for name, *_ in cases} == set(LOOPS)

def test_a_state_keeps_growing_in_bfloat16():
    """Sums of ones in bfloat16 end at 256; the states of both recurrences are float32."""
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    h, S = 0 * one[None], 0 * one[None, None]                        # (B, N, C), (B, H, K, V)
    for _ in range(300):
        _, h = layers.selective_step(h, one, one, 0 * one, one, one)
        _, S = layers.gated_linear_step(S, *[one[None]] * 3)
    assert h.item() == S.item() == 300

def test_attention_on_a_gpu_gets_what_its_fused_kernels_take(monkeypatch):
    """The last dimension contiguous, or torch falls back on T x T scores (no card needed here)."""
    given, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *qkv, **k: given.extend(qkv) or fused(*qkv, **k))
    layer = layers_make("mh-attention").to("meta")
    assert layer(torch.randn(2, 64, WIDTH, device="meta")).shape == (2, 64, WIDTH)
    assert len(given) == 3 and all(p.stride(-1) == 1 for p in given)

@pytest.mark.parametrize("name", [name for name in LAYERS if not re.search(
    "hyena|moe|deltanet|rwkv7-time", name)])    # (these ask for autocast's device, or loop: delta)
def test_on_a_gpu_no_layer_but_the_delta_rules_has_a_loop_over_time(name):
    """As traced on tensors without data. A scan takes log2 T rounds, 9 or 10 over tokens."""
    layer, counts = layers_make(name, max_len=1000).to("meta"), []

    def count(graph, _):
        counts.append(sum(len(m.graph.nodes) for m in graph.modules() if hasattr(m, "graph")))
        return graph.forward
    for T in (320, 960):
        torch._dynamo.reset()
        x = torch.randn(2, T, WIDTH, device="meta")
        torch.compile(layer, backend=count, fullgraph=True, dynamic=False)(x)
    assert 2 < counts[0] <= counts[1] <= counts[0] + 20                       # one round more

@pytest.mark.parametrize("T", [1, 37])
def test_a_gpus_mamba_compiles_to_the_loops_gradients(T, monkeypatch):
    """In a checkpoint, with torch's associative_scan A had none and dt wrong ones, or it failed."""
    monkeypatch.setattr(layers, "scan", layers.parallel_scan)
    *_, (_, inputs) = layers_recurrences(T, 1.0)
    kept = functools.partial(torch.utils.checkpoint.checkpoint, layers.selective_scan)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: kept(*x, use_reentrant=False), backend="aot_eager")
    layers_agree(compiled, layers.selective_scan_reference, inputs)

@every_layer
def test_layer_equals_its_loops(name):
    layer = layers_make(name, torch.float64)
    loops = mock.patch.dict(vars(layers), LOOPS)(lambda x, *_: layer(x))
    for T in (1, 7, 130):
        layers_agree(lambda x, *_: layer(x), loops,
                     (layers_normal(1, T, WIDTH), *layer.parameters()))

@every_layer
def test_layer_is_causal(name):
    layer, x = layers_make(name), layers_normal(1, 100, WIDTH).detach().float().requires_grad_()
    for t in (60, 0):
        grad, = torch.autograd.grad(layer(x)[0, t].square().sum(), x)
        leak = 1e-6 if "hyena" in name else 0            # an FFT mixes all times, to rounding
        assert grad[0, t + 1:].abs().max() <= leak * grad.abs().max()
        assert grad[0, t].abs().max() > 0

@every_layer
def test_step_equals_forward(name):
    layer, x = layers_make(name, torch.float64), layers_normal(2, 130, WIDTH).detach()
    whole = layer(x).detach()
    assert layers_gap(layers_steps(layer, x)[0], whole) < 1e-9
    prefix, state = layers_steps(layer, x[:, :70])       # a prefix, then on from its state
    assert layers_gap(prefix, layer(x[:, :70]).detach()) < 1e-9
    assert layers_gap(layers_steps(layer, x[:, 70:], state)[0], whole[:, 70:]) < 1e-9

LAYERS_GROW = {**dict.fromkeys(("attention", "mh-attention", "mh-hyena"), 2 * WIDTH),
               "hyena": 4 * WIDTH, "hyena-experts": WIDTH}                    # elements a token
LAYERS_EXTRA = {"linear-attention": WIDTH, "mh-linear-attention": WIDTH, "mamba": 3 * 256}

@every_layer
def test_state_is_counted(name):
    layer, counts = layers_make(name), []
    state = layer.init_state(3)
    for t in range(40):
        state = layer.step(torch.randn(3, WIDTH), state)[1]
        counts.append(layers.count_state(state))
    growth = LAYERS_GROW.get(name, 0)
    assert counts == [counts[0] + t * growth for t in range(40)]
    if not growth:
        tails = getattr(layer, "reads", 0) * WIDTH + LAYERS_EXTRA.get(name, 0)
        assert counts[0] == layer.nominal(40) + tails

LAYERS_PAPER = {**dict.fromkeys(("hyena", "mh-hyena", "hyena-experts", "rwkv6-time-mixer"), 2048),
                "mh-gated-linear-attention": 2048, "mamba": 1024, "mh-linear-attention": 1024,
                "mamba2": 1024, "deltanet": 2048, "gated-deltanet": 2048, "rwkv7-time-mixer": 2048,
                "linear-attention": WIDTH ** 2, "mh-attention": 2 * WIDTH * 64,
                "sliding-attention": 2 * WIDTH * 32, "mlp": 0}                # at T = 64
LAYERS_MIXING = {"mh-linear-attention": 4 * WIDTH * 9, "rwkv6-time-mixer": 5 * WIDTH * 16,
                 "mamba": 256 * (2 * 4 + 7 * 4 + 4), "hyena": 512 * (18 + 60 + 4),
                 "mh-hyena": 18 * WIDTH + 1024 * (60 + 6), "mh-attention": 0, # FLOPs a token
                 "deltanet": 9 * WIDTH * 16 + 24 * WIDTH, "mamba2": 5 * 256 * 4 + 8 * (256 + 8)}

def test_costs_are_those_of_their_formulas():
    assert {n: layers_make(n).nominal(64) for n in LAYERS_PAPER} == LAYERS_PAPER
    assert {n: layers_make(n).mixing_flops(64) / 64 for n in LAYERS_MIXING} == LAYERS_MIXING

@every_layer
def test_flops_are_those_that_torch_counts(name):
    layer, x = layers_make(name), torch.randn(1, 48, WIDTH)
    with FlopCounterMode(display=False) as counter, mock.patch.dict(vars(layers), LOOPS):
        layer(x)
    counted = counter.get_total_flops()
    if name == "moe-mlp":                                # it computes the other six experts, too
        counted -= 2 * 48 * 6 * (WIDTH * 32 + 16 * WIDTH)
    if isinstance(layer, layers.LinearAttention):        # multiplies weights, once a batch
        counted -= 8 * layer.width * WIDTH ** 2
    assert counted == layer.matmul_flops(48) <= layer.flops(48)

@every_layer
@pytest.mark.parametrize("scale", [1, 30])
def test_bfloat16(name, scale):
    """Within 5% of float32 (rms; attention at scale 30: 30%); every parameter has a gradient."""
    layer, T = layers_make(name), 300 if name == "mh-hyena" else 100          # (there an FFT)
    x = (scale * torch.randn(2, T, WIDTH)).requires_grad_()
    exact = layer(x)                                     # float32
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    grads = torch.autograd.grad(y.float().square().mean(), [x, *layer.parameters()])
    assert y.isfinite().all() and all(g.isfinite().all() and g.abs().sum() > 0 for g in grads)
    assert scale > 1 or 1 / 300 < exact.std() < 30
    error = ((y - exact).square().mean() / exact.square().mean()).sqrt()
    assert error < (0.05 if scale == 1 or "attention" not in name else 0.3)

@pytest.mark.parametrize("name, backend", [
    *((name, "aot_eager") for name in LAYERS),
    pytest.param("mamba", "inductor", marks=pytest.mark.skipif(
        not shutil.which("g++"), reason="needs a C++ compiler"))])
def test_layer_compiles_without_graph_breaks(name, backend):
    layer, T = layers_make(name), 300 if name == "mh-hyena" else 100
    x = torch.randn(2, T, WIDTH, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=False)
    layers_agree(lambda x, *_: compiled(x), lambda x, *_: layer(x), (x, *layer.parameters()), 1e-4)

@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["attention", "mh-hyena"])
def test_compiled_gradients_in_bfloat16_are_those_of_eager(name):
    layer, x, grads = layers_make(name), torch.randn(4, 128, WIDTH), []
    torch._dynamo.reset()
    for f in (layer, torch.compile(layer, dynamic=False)):
        with torch.autocast("cpu", torch.bfloat16):
            y = f(x)
        grads.append(torch.autograd.grad(y.float().square().mean(), layer.qkv.weight)[0])
    assert layers_gap(*grads) < 0.05

def test_museum_a_router_that_masks_before_its_softmax_turns_nobody_off():
    """mad-lab's mlp.py: scores outside the top k become 0, and exp(0) = 1 is a vote."""
    router, x = layers.Router(WIDTH, 8, 2), torch.randn(500, WIDTH)
    score = router.score(x)
    kept = torch.where(score >= score.topk(2).values[:, -1:], score, 0.0)
    gates, chosen = router(x), score.topk(2).indices
    assert (kept.softmax(-1) > 0).all() and (gates > 0).sum(-1).eq(2).all()
    assert torch.allclose(gates.gather(-1, chosen).sum(-1), torch.ones(500))
    with torch.autocast("cpu", torch.bfloat16):          # the same choice
        assert torch.equal(router(x), gates)
    layer, y = layers_make("hyena-experts"), torch.randn(1, 50, WIDTH, requires_grad=True)
    layer.readout(y, x[None, :50]).sum().backward()      # what no token picks, nobody reads
    unread = y.grad[0].unflatten(-1, (8, 16)).abs().sum(-1) == 0
    assert (unread.sum(-1) == 6).all()

def test_experts_equal_their_loop():
    layer, x = layers_make("moe-mlp", torch.float64), layers_normal(3, 50, WIDTH)
    w_in, w_out, expected = layer.w_in.weight, layer.w_out.weight, 0
    for e, share in enumerate(layer.router(x).unbind(-1)):
        gate, up = (x @ w_in[e]).chunk(2, -1)
        expected += share[..., None] * ((F.gelu(gate) * up) @ w_out[e])
    assert layers_gap(layer(x), expected) < 1e-12

def test_mamba_equals_an_implementation_by_others():
    mamba = pytest.importorskip("mambapy.mamba")
    theirs = mamba.MambaBlock(mamba.MambaConfig(16, n_layers=1, d_state=4, dt_rank=8)).double()
    weights = theirs.state_dict()
    weights["conv1d.weight"] = weights["conv1d.weight"][:, 0].flip(1)
    ours, names = build_layer("mamba", 16, 64).double(), (
        "A_log D xz.weight short.taps short.bias dt_B_C.weight dt_up.weight dt_bias out.weight")
    ours.load_state_dict(dict(zip(names.split(), weights.values())))
    x = torch.randn(2, 37, 16, dtype=torch.float64)
    assert (ours(x) - theirs(x)).abs().max() < 1e-10

def test_rotary_positions_and_filters_fade():
    q, k, table = torch.randn(1, 1, 8, 1), torch.randn(1, 1, 8, 1), layers.rotary_table
    score = lambda t, s: (layers.rotate(q, table(torch.tensor([t]), 8)) *
                          layers.rotate(k, table(torch.tensor([s]), 8))).sum()
    assert abs(score(5, 2) - score(105, 102)) < 1e-4 < abs(score(5, 2) - score(5, 4))
    f = layers.ImplicitFilter(4, 100, 3)
    f.hidden[0].weight.data *= 0                         # no waves: the decay alone, from t = 1
    h = f(152) / f(152)[:, 1:2]
    assert abs(h[0, 151] - 0.01) < 1e-4 and abs(h[3, 31] - 0.01) < 1e-4

@pytest.mark.parametrize("name, dim, settings, named", [
    ("mamab", 128, {}, "mamba"), ("mamba", 128, dict(heads=2), "expand"),
    ("mamba", 128, dict(state=0), "state=0"), ("mlp", 128, dict(expand=1.5), "expand=1.5"),
    ("mh-attention", 100, {}, "heads=16"), ("mh-attention", 48, {}, "heads=16"),
    ("hyena-experts", 100, {}, "experts=8"), ("moe-mlp", 128, dict(top_k=1), "top_k=1"),
    ("moe-mlp", 128, dict(top_k=9), "top_k=9"), ("rwkv6-time-mixer", 100, {}, "heads=8")])
def test_mistakes_with_settings_name_them(name, dim, settings, named):
    with pytest.raises(UserError, match=named):
        build_layer(name, dim, 8, **settings)
    assert build_layer("gated-deltanet", 128, 8, gated=0).gate is None        # a switch may be 0

def test_mixing_shows_what_a_layer_reads(tmp_path, capsys):
    picture = lambda name: layers.mixing(layers_make(name), torch.randn(1, 40, WIDTH))
    t, s = torch.arange(40)[:, None], torch.arange(40)
    read = {"mlp": s == t, "rwkv6-channel-mixer": (s == t) | (s == t - 1), "mh-attention": s <= t,
            "sliding-attention": (s <= t) & (s > t - 32), "mamba": s <= t}
    for name, expected in read.items():
        assert ((picture(name) > 0) == expected).all(), name
    layers.show_mixing({"mlp": picture("mlp")})
    assert [*map(len, capsys.readouterr().out.split("\n")[1:41])] == [*range(2, 82, 2)]
    scaling.main(["mixing", "mlp", "mamba", "--out", str(tmp_path / "two.png")])
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")

def test_benchmark_shows_every_layer(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", "layers.py --layers mlp,mh-attention --shape 1 16 32".split())
    layers.main()
    out = capsys.readouterr().out
    assert "y = gelu(x W_1) W_2\nmlp" in out and out.count("its loop") == 1
    monkeypatch.setattr(layers, "time_layer", mock.Mock(side_effect=RuntimeError("no memory")))
    layers.main()                                        # a failing row says so, the others go on
    assert capsys.readouterr().out.count("no memory") == 3

def test_museum_an_fft_without_padding_wraps_the_future_into_the_past():
    u, h = layers_normal(1, 64, 1), layers_normal(1, 64)
    wrapped = torch.fft.irfft(torch.fft.rfft(u[..., 0]) * torch.fft.rfft(h), 64)[..., None]
    future = lambda y: torch.autograd.grad(y[0, 0, 0], u)[0][0, 1:].abs().max()
    assert future(wrapped) > 0.1 and future(layers.long_conv(u, h)) < 1e-12

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
    q, k, *_ = layers_make("linear-attention").project(torch.randn(2, 50, WIDTH))
    assert (q > 0).all() and (k > 0).all()

def test_weights_out_of_bounds_do_no_harm():
    """Decays of exp(-exp(1000)), and queries without any weight (a denominator of 0)."""
    for name, weight in (("rwkv6-time-mixer", "decay_up"), ("mh-linear-attention", "qkv")):
        layer = layers_make(name)
        getattr(layer, weight).weight.data *= 1e4
        layer(torch.randn(2, 50, WIDTH)).sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())

def test_museum_a_parent_that_initialises_everything_overwrites_mambas_dt():
    """mad-lab issue 3 and pull request 4: a loop over modules, after Mamba had set its bias."""
    layer = small("mamba", backbone="autoencoder").blocks[0].layer
    dt = lambda: F.softplus(layer.dt_bias.detach())
    assert 0.0009 < dt().min() < 0.003 and 0.03 < dt().max() < 0.11
    for name, p in layer.named_parameters():
        if "bias" in name:
            torch.nn.init.zeros_(p)
    assert dt().min() > 0.69                             # a memory of one token instead of 1000

# ==== model.py ===================================================================================

def small(pattern="hybrid", M=16, T=12, **more):
    torch.manual_seed(0)
    return Model(pattern, M, 32, T, **more)

@pytest.mark.parametrize("arch", ARCHS)
def test_architecture_trains_steps_and_has_a_ledger(arch):
    net, tokens = Model(arch, 16, 32, 12).double(), torch.randint(16, (2, 12))
    logits = net(tokens)
    logits.sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    stepped, state = layers_steps(net, tokens, net.init_state(2))
    torch.testing.assert_close(stepped, logits, rtol=1e-6, atol=1e-6)
    rows = model.ledger(net, 12)
    assert sum(r.parameters for r in rows) == sum(p.numel() for p in net.parameters())
    carried = [model.count_state(s) for s in state]
    assert [r.state for r in rows[:-1]] == carried             # two tokens tell the state after 12

def test_ledger_counts_the_flops_of_matrix_products():
    net = small("swiglu mlp")
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 12, dtype=torch.long))
    assert model.total(model.ledger(net, 12)).flops == counter.get_total_flops()

def test_stripe_has_the_papers_ratios():
    for every, share in ((1, 1.0), (2, 0.5), (4, 0.25), (12, 1 / 12), (0, 0.0)):
        names = model.stripe("hyena", "swiglu", 12, every).split()
        assert names.count("mh-attention") == 12 * share and names.count("swiglu") == 12
    assert ARCHS["hybrid"] == "mh-hyena swiglu mh-attention swiglu"
    assert model.stripe("mamba", "swiglu", 2, 2) == "mamba mamba mh-attention swiglu"

def test_patterns_are_read_and_mistakes_refused():
    assert model.parse_pattern(" mh-hyena(heads=4, order = 3)  swiglu ") == \
        [("mh-hyena", {"heads": 4, "order": 3}), ("swiglu", {})]
    assert model.parse_pattern("hybrid") == model.parse_pattern(ARCHS["hybrid"])
    for wrong in ("", "hyena(", "hyena)", "hyena(order)", "(order=2)", "hyena(order=2", "hybird",
                  "mlp(expand=45=3)", "mh-hyena swiglu " * 9 + "swiglu("):       # told at once
        with pytest.raises(UserError):
            model.parse_pattern(wrong)

def test_an_autoencoder_answers_from_its_last_position_alone():
    net = small("mh-attention swiglu", backbone="autoencoder")
    code = torch.randn(1, 12, 32)
    net.blocks = torch.nn.ModuleList()
    net.embed = torch.nn.Embedding.from_pretrained(torch.cat((code[0], torch.zeros(4, 32))))
    tokens = torch.arange(12)[None]
    other = tokens.flip(1).clone()
    other[0, -1] = tokens[0, -1]
    assert torch.equal(net(tokens), net(other))
    assert len(net(tokens)[0].unique(dim=0)) == 12                            # one per position
    assert not torch.equal(net(tokens), net(tokens.flip(1)))
    with pytest.raises(UserError):
        net.generate(tokens, 1)

def test_generate_is_greedy_at_temperature_0_and_draws_from_top_k():
    net, tokens = small(), torch.randint(16, (2, 3))
    net.unembed.weight.data *= 1e-6                                           # nearly ties
    out = net.generate(tokens, 6, temperature=0)
    assert torch.equal(out[:, :3], tokens) and out.shape == (2, 9)
    assert torch.equal(out[:, 3:], net(out[:, :-1]).argmax(-1)[:, 2:])
    drawn = net.generate(tokens.repeat(50, 1), 1, temperature=9.0, top_k=3)[:, 3:]
    best = net(tokens.repeat(50, 1))[:, -1].topk(3).indices
    assert (drawn == best).any(1).all() and len(drawn.unique()) > 1

def test_weight_decay_is_for_matrices():
    net = Model("hyena moe-mlp rwkv6-time-mixer mamba", 16, 32, 12)
    chosen, _ = model.make_optimizer(net, 1e-3, 0.1, 0.9).param_groups
    names = {n for n, p in net.named_parameters() if any(p is q for q in chosen["params"])}
    assert "embed.weight" in names and "blocks.1.layer.w_in.weight" in names
    assert not any(word in f"{n}." for n in names for word in (
        "norm", "filter", "taps", "A_log", "mix.", "mix_up", "bias", "bonus"))

def test_a_checkpoint_runs_no_code_and_a_damaged_one_is_named(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)
    torch.save(dict(step=1, x=Evil()), tmp_path / "evil.pt")
    (tmp_path / "half.pt").write_bytes(b"PK\x03\x04 and no more")
    for name in ("evil.pt", "half.pt", "none.pt"):
        with pytest.raises(UserError, match=name):
            model.load_checkpoint(tmp_path / name)
    assert not (tmp_path / "owned").exists()

# ==== train.py: the parts of a step ==============================================================

def test_loss_in_pieces_and_padded_is_the_loss(monkeypatch):
    net, tokens, targets = small(), torch.randint(16, (3, 12)), torch.randint(16, (3, 12))
    targets[0, :5] = IGNORE
    grads, losses = [], []
    for elements in (1 << 26, 100):
        monkeypatch.setattr(train, "LOGITS", elements)
        losses.append(train.compute_loss(net, tokens, targets))
        grads.append(torch.autograd.grad(losses[-1], list(net.parameters())))
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    plain = F.cross_entropy(net(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    torch.testing.assert_close(losses[0], plain)
    with torch.no_grad():
        each, predictions = train.compute_loss(net, tokens, targets)
    assert each.shape == (3, 12) and (each[0, :5] == 0).all()
    torch.testing.assert_close(each.sum() / 31, plain)
    assert torch.equal(predictions, net(tokens).argmax(-1))

def test_recall_tokens_of_windows_made_by_hand():
    often = np.array([1, 2] * 100 + [3, 4] * 99 + [5])
    windows = np.array([[3, 4, 0, 3, 4, 1, 2, 1, 2, 7, 7, 7], [0, 7, 7, 4, 3, 8, 4, 3, 4, 3, 0, 4]])
    expected = np.zeros((2, 12), bool)
    expected[0, [4, 11]] = True                          # 3 4 and 7 7, not 1 2 nor 2 1: known
    expected[1, [7, 9]] = True                           # 4 3, 98 times in training, twice again
    assert (train.recall_tokens(often, windows, 2) == expected).all()
    assert train.recall_tokens(often, windows, 3).sum() == 0

def test_the_losses_of_a_test_by_kind_of_token():
    losses = torch.tensor([[1.0, 2, 3, 4], [5, 5, 0, 0]])
    labels, recall = torch.full((2, 4), 3), (losses > 2) & (losses < 5)
    labels[1, 2:] = IGNORE
    data = SimpleNamespace(facts={"bytes_per_token": 2}, tests=lambda _: [(labels, labels, recall)])
    assert train.evaluate(lambda *_: (losses, 3 * recall), data) == pytest.approx(dict(
        val_loss=20 / 6, val_accuracy=2 / 6, recall_loss=3.5, other_loss=13 / 4,
        bits_per_byte=20 / 12 / math.log(2)))
    recall[:] = False
    assert train.evaluate(lambda *_: (losses, labels), data)["recall_loss"] is None
    short = train.check(Config(**TEXT | dict(context=2, device="cpu")))
    assert len(next(train.load_data(short).tests(5))) == 3             # shorter than n-grams

def test_macro_accuracy_of_a_hand_made_case():
    targets = torch.tensor([0, 0, 0, 0, 1, 1])
    predictions = torch.tensor([0, 0, 0, 3, 1, 0])
    # class 0: 3 of 4, class 1: 1 of 2, class 3 was predicted and never right, class 2 never occurs
    assert train.macro_accuracy(predictions, targets, 5).item() == pytest.approx(1.25 / 3)

def test_schedule():
    config = Config(steps=100, warmup=10, lr=1e-2, min_lr=1e-3)
    rates = [train.schedule(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11) and max(rates) == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.1 + 0.9 / 2) and 0.1 < rates[99] < 0.102
    assert train.schedule(dataclasses.replace(config, schedule="constant"), 99) == 1.0

def test_a_groups_own_learning_rate_is_scaled_not_overwritten():
    config = train.check(Config(num_train=64, batch_size=16, steps=10, device="cpu"))
    data, net, optimizer, loss_fn = train.build(config)
    optimizer.param_groups[1]["initial_lr"] = 0.5
    train.one_step(config, 5, data, net, optimizer, loss_fn)
    factor = train.schedule(config, 5)
    assert [g["lr"] for g in optimizer.param_groups] == [config.lr * factor, 0.5 * factor]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]

def test_an_epoch_shows_every_sequence_once_its_last_batch_too():
    config = train.check(Config(num_train=50, batch_size=16, epochs=4, device="cpu"))
    data, (x, _) = train.load_data(config), tasks.generate(train.setting_of(config), 50, 0, "train")
    for first in (0, 4):
        rows, y = map(torch.cat, zip(*(data.batch(step) for step in range(first, first + 4))))
        scored = (y != tasks.IGNORE).any(1)              # rows that fill the last batch are not
        assert sorted(rows[scored].tolist()) == sorted(x.tolist())
    assert config.steps == 4 * 4 and not torch.equal(data.batch(0)[0], data.batch(4)[0])

# ==== train.py: runs =============================================================================

def tiny(out, **more):
    options = dict(arch="hybrid", dim=32, seq_len=16, num_train=64, batch_size=16, steps=24,
                   eval_every=8, dtype="float32", log_every=4, out=str(out))
    return Config(**{**options, **more})

def run(config):
    return train.train(config, verbose=False)

def parameters(folder):
    saved = model.load_checkpoint(Path(folder) / "ckpt.pt")
    return {k: v.numpy().tobytes() for k, v in saved["model"].items()}

@pytest.fixture
def small_tests(monkeypatch, one_thread):
    for name, setting in tasks.BASELINES.items():
        monkeypatch.setitem(tasks.BASELINES, name, dataclasses.replace(setting, num_test=64))

@pytest.fixture
def one_thread():
    """Two threads would add in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

def test_the_hybrid_learns_recall_and_the_run_is_recorded(tmp_path, small_tests):
    r = run(tiny(tmp_path, dim=64, vocab_size=8, seq_len=32, num_train=3200, batch_size=32, lr=3e-3,
                 steps=300, eval_every=50))
    assert r["test_accuracy"] > 0.95 > r["chance"] and r["macro_accuracy"] > 0.9
    folder = Path(r["folder"])
    lines = [json.loads(line) for line in (folder / "log.jsonl").open()]
    assert {"loss", "lr", "gradient_norm", "tokens_per_s"} <= lines[0].keys()
    assert lines[-1]["test_accuracy"] == r["test_accuracy"]
    assert json.loads((folder / "result.json").read_text())["steps"] == r["steps"]
    best = model.load_checkpoint(folder / "best.pt")
    assert best["best"]["score"] == r["best"]["score"]
    assert run(tiny(tmp_path, early_stop=0, name="early"))["steps"] == 8

@pytest.mark.parametrize("options", [{}, dict(task="compression", arch="mamba"),
                                     dict(task="text", context=16, seq_len=None, num_train=None)],
                         ids=["recall", "compression", "text"])
def test_a_stopped_run_ends_with_the_same_bytes(tmp_path, monkeypatch, small_tests, options):
    if options.get("task") == "text":
        options["data"] = str(HERE / "README.md")
    whole = run(tiny(tmp_path / "whole", **options))
    one_step, stops = train.one_step, [5, 8, 19]

    def interrupted(config, step, *rest):
        if step in stops:
            stops.remove(step)
            signal.raise_signal(signal.SIGTERM)
        return one_step(config, step, *rest)
    monkeypatch.setattr(train, "one_step", interrupted)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt) as stopped:
            run(tiny(tmp_path / "parts", **options))
        assert stopped.value.args == (143,)
        next((tmp_path / "parts").glob("*/log.jsonl")).open("a").write('{"half a line')
    parts = run(tiny(tmp_path / "parts", **options))
    assert parameters(whole["folder"]) == parameters(parts["folder"])
    keep = lambda r: [[(k, v) for k, v in json.loads(line).items() if k != "tokens_per_s"]
                      for line in Path(r["folder"], "log.jsonl").open()]
    assert [line for line in keep(parts) if line[0][1] % 4 == 0] == keep(whole)
    assert parts["best"] == whole["best"]

def test_a_killed_process_loses_nothing_that_was_saved(tmp_path, small_tests):
    whole = run(tiny(tmp_path / "whole"))
    kill = ("import dataclasses, os, tasks, torch, train\n"
            "for k, s in tasks.BASELINES.items():\n"
            "    tasks.BASELINES[k] = dataclasses.replace(s, num_test=64)\n"
            "torch.set_num_threads(1)\n"
            "f = train.save_checkpoint\n"
            "def save(path, *a, **s):\n    f(path, *a, **s)\n"
            "    if path.name == 'ckpt.pt' and s['step'] >= 8: os.kill(os.getpid(), 9)\n"
            "train.save_checkpoint = save\n"
            f"train.train(train.Config(**{dataclasses.asdict(tiny(tmp_path / 'parts'))}))")
    assert script("-c", kill).returncode == -9
    parts = run(tiny(tmp_path / "parts"))
    assert parameters(whole["folder"]) == parameters(parts["folder"])

def test_ctrl_c_and_resume_from_the_command_line(tmp_path):
    words = "train.py --num-train 640 --batch-size 8 --dim 32 --steps 100000 --log-every 1"
    process = subprocess.Popen(
        [sys.executable, *words.split(), "--compile=off", f"--out={tmp_path}"], cwd=HERE, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not any(tmp_path.glob("*/log.jsonl")) and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in errors and "Traceback" not in errors
    folder, = tmp_path.iterdir()
    config = train.parse_args(["--resume", str(folder), "--device", "cpu"])
    assert (config.steps, config.batch_size, config.device) == (100000, 8, "cpu")
    assert Path(config.out) / config.name == folder

def test_a_signal_is_kept_and_its_repetition_interrupts():
    with pytest.raises(KeyboardInterrupt, match="143"), train.catch_signals() as caught:
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

def test_a_folder_is_one_run(tmp_path, monkeypatch, small_tests):
    first = run(tiny(tmp_path, name="x"))
    monkeypatch.setattr(train, "one_step", None)
    assert run(tiny(tmp_path, name="x")) == first               # it has ended: nothing is trained
    with monkeypatch.context() as other_data, pytest.raises(UserError, match="data_sha256"):
        other_data.setattr(tasks, "generate", lambda *a, f=tasks.generate: f(*a[:2], 9, "test"))
        run(tiny(tmp_path, name="x"))
    with pytest.raises(UserError, match="lr is 0.002"):
        run(tiny(tmp_path, name="x", lr=4e-3))
    monkeypatch.setattr(train, "RESULTS_VERSION", -1)
    with pytest.raises(UserError, match="version"):
        run(tiny(tmp_path, name="x"))
    names = {train.run_name(tiny(tmp_path, **more)) for more in
             ({}, dict(lr=4e-3), dict(seed=1), dict(layers="mamba"), dict(seq_len=18))}
    assert len(names) == 5
    long = {train.run_name(Config(layers="字" * 90, seed=seed)).encode() for seed in (0, 1)}
    assert len(long) == 2 and max(map(len, long)) <= 200

def test_divergence_is_one_line_and_the_checkpoint_stays_good(tmp_path, small_tests):
    with pytest.raises(train.Diverged, match="step .*learning rate 1.0e\\+06"):
        run(tiny(tmp_path, lr=1e6, steps=400, eval_every=1, clip=None, layers="mlp mlp", seq_len=8))
    path, = tmp_path.glob("*/ckpt.pt")
    assert all(v.isfinite().all() for v in model.load_checkpoint(path)["model"].values())

@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ here")
def test_a_compiled_run_learns_the_same_and_is_shared(tmp_path, small_tests):
    options = dict(layers="mlp", early_stop=2)
    eager, compiled = (run(tiny(tmp_path, compile=c, **options)) for c in ("off", "on"))
    assert compiled["test_loss"] == pytest.approx(eager["test_loss"], abs=1e-3)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    again = run(tiny(tmp_path, compile="on", seed=1, **options))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs >= 2
    assert again["steps"] == 24 and again["test_loss"] != compiled["test_loss"]

def test_a_compiled_run_has_eagers_gradients_where_autocast_is_off(tmp_path, monkeypatch):
    compiling, grads = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiling(f, backend="aot_eager"))
    for choice in ("off", "on"):
        config = tiny(tmp_path, layers="hyena deltanet", dtype="bfloat16", compile=choice)
        data, net, _, loss_fn = train.build(train.check(dataclasses.replace(config, device="cpu")))
        grads.append(torch.autograd.grad(loss_fn(*data.batch(0)), [*net.parameters()]))
    assert all(map(torch.equal, *grads))

# ==== train.py: text =============================================================================

TEXT = dict(task="text", arch="hybrid", dim=32, context=32, batch_size=8, steps=60, dtype="float32",
            compile="off", data=str(HERE / "README.md"))

def test_text_is_learned_tested_and_written(tmp_path, small_tests):
    r = run(Config(out=str(tmp_path), lr=3e-3, **TEXT))
    assert 1.5 < r["val_loss"] < 4.5 < math.log(256)
    assert r["bits_per_byte"] == pytest.approx(r["val_loss"] / math.log(2))
    assert model.sample(r["folder"], "The ", n=20).startswith("The ")
    with pytest.raises(UserError, match="--prompt"):
        model.sample(r["folder"], "")
    config = train.check(Config(out=str(tmp_path), **TEXT))
    assert os.path.isabs(config.data)                           # resumed from any folder

def test_two_processes_train_as_one(tmp_path, small_tests):
    one = run(Config(out=str(tmp_path / "one"), **TEXT))
    words = [f"--{k.replace('_', '-')}={v}" for k, v in TEXT.items()]
    two = script("-m", "torch.distributed.run", "--nproc_per_node", 2, "train.py", *words, "--out",
                 tmp_path / "two")
    assert two.returncode == 0, two.stderr
    result = json.loads(next((tmp_path / "two").glob("*/result.json")).read_text())
    assert result["val_loss"] == pytest.approx(one["val_loss"], abs=0.01)

# ==== train.py: the MAD grid =====================================================================

@pytest.fixture
def preset(monkeypatch):
    """Two tiny settings with two runs each."""
    settings = [(tasks.Setting("in-context-recall", seq_len=8, num_train=32), 6),
                (tasks.Setting("selective-copying", seq_len=16, num_tokens_to_copy=2,
                               num_train=40), None)]
    monkeypatch.setitem(train.PRESETS, "quick", dict(
        settings=settings, epochs=2, batch_size=16, eval_every=3, lrs=(1e-2, 1e-3),
        weight_decays=(0.1,)))

def test_scores_do_not_depend_on_the_number_of_workers(tmp_path, preset, one_thread):
    options = dict(dim=32, dtype="float32", compile="off")
    one = train.mad_score("mh-hyena", config=Config(out=str(tmp_path / "1"), **options))
    two = train.mad_score("mh-hyena", config=Config(out=str(tmp_path / "2"), workers=2, **options))
    assert one["tasks"] == two["tasks"] and one["mean"] == two["mean"] is not None
    assert [len(s["runs"]) for s in one["settings"]] == [2, 2]
    best = [max(r["test_accuracy"] for r in s["runs"]) for s in one["settings"]]
    assert [s["token"] for s in one["settings"]] == best
    assert [r["steps"] for s in one["settings"] for r in s["runs"]] == [6, 6, 6, 6]
    assert any((tmp_path / "1" / "scores" / "quick").iterdir())

def test_a_setting_ends_with_the_run_that_solves_it(tmp_path, preset, monkeypatch):
    calls = []

    def fake(run, **_):
        calls.append((run.task, run.lr))
        if run.task == "selective-copying" and run.lr == 1e-2:
            raise train.Diverged("inf")
        return dict(test_accuracy=1.0, macro_accuracy=0.9, folder="f", steps=1, wall_s=1.0)
    monkeypatch.setattr(train, "train", fake)
    record = train.mad_score("mamba", config=Config(out=str(tmp_path)))
    assert calls == [("in-context-recall", 1e-2), ("selective-copying", 1e-2),
                     ("selective-copying", 1e-3)]
    assert record["mean"] == 1.0 and record["macro_mean"] == pytest.approx(0.9)
    monkeypatch.setattr(train, "train", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):                      # a bug is no score
        train.mad_score("mamba", config=Config(out=str(tmp_path)))

def test_a_killed_worker_ends_the_score(tmp_path, preset, monkeypatch):
    class Job:
        def __reduce__(self):                                   # who unpickles it is killed
            return exec, ("import os; os.kill(os.getpid(), 9)",)
    monkeypatch.setattr(train, "runs_of", lambda *_: Job())
    with pytest.raises(UserError, match="killed"):
        train.mad_score("mamba", config=Config(out=str(tmp_path), workers=2))

def test_shards_share_the_settings_and_one_may_be_empty(tmp_path, preset, monkeypatch):
    monkeypatch.setattr(train, "train", lambda run, **_: dict(
        test_accuracy=0.5, macro_accuracy=0.5, folder="f", steps=1, wall_s=1.0))
    shards = [train.mad_score("mamba", config=Config(out=str(tmp_path), shard=f"{i}/3"))
              for i in range(3)]
    assert [list(s["tasks"]) for s in shards] == [["in-context-recall"], ["selective-copying"], []]
    assert not (tmp_path / "scores").exists()

def test_presets():
    full = train.PRESETS["full"]
    runs = [r for job in full["settings"] for r in train.runs_of(Config(preset="full"), *job)]
    assert len(runs) == 396 and len({r.name for r in runs}) == 396
    assert {(r.lr, r.weight_decay) for r in runs} == {
        (lr, decay) for lr in (1e-4, 5e-4, 1e-3) for decay in (0, 0.1)}
    for job in sum((preset["settings"] for preset in train.PRESETS.values()), []):
        assert train.setting_of(train.runs_of(Config(), *job)[0]) == job[0]
    small = next(s for s, _ in full["settings"] if s.num_train == 800)
    assert train.check(train.runs_of(Config(preset="full"), small, None)[0]).steps == 1400

# ==== Mistakes: one line that names the option, exit code 2, nothing left behind =================

MISTAKES = [
    ("train.py", "--arch hybird", "hybrid"),
    ("train.py", "--layers hyena(order=two)", "order"),
    ("train.py", "--beta2 1", "beta2"),
    ("train.py", "--steps 0", "steps"),
    ("train.py", "--task text --epochs 2", "epochs"),
    ("train.py", "--task text --data none.txt", "none.txt"),
    ("train.py", "--resume nothing", "resume"),
    ("train.py", "--arch mamba --layers hyena", "--layers"),
    ("train.py", "--task mad --tasks text", "tasks"),
    ("train.py", "--num-tokens-to-copy 8", "num-tokens-to-copy"),
    ("train.py", "--task mad --shard 2/2", "shard"),
    ("train.py", "--task mad --lr 3e-4", "lr"),
    ("scaling.py", "plan --sizes 0", "sizes"),
    ("scaling.py", "plan --archs hybrid --depth 3", "depth"),
    ("scaling.py", "fit none.csv", "none.csv"),
    ("scaling.py", "plan --archs hyena(expand=2,order=4) --budgets 1e7", "budgets"),
    ("layers.py", "--shape 0 16 32", "shape"),
    ("tasks.py", "--task recall", "task"),
    ("model.py", "--show nothing", "nothing"),
]

@pytest.mark.parametrize("name, words, option", MISTAKES, ids=[f"{m[0]} {m[1]}" for m in MISTAKES])
def test_a_mistake_is_one_line(name, words, option, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, *words.split()])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        tasks.run_main(__import__(name[:-3]).main)
    errors = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and option in errors and "\n" not in errors
    assert not any(tmp_path.iterdir())

def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(train.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    config, quiet = Config(device="cpu", steps=10 ** 6), lambda line: None
    assert train.choose_machine(config, quiet).compile == "off"
    with pytest.raises(UserError, match="--compile"):
        train.choose_machine(dataclasses.replace(config, compile="on"), quiet)

def test_the_benchmark_of_one_architecture():
    done = script("train.py", "--benchmark", "--arch", "mamba", "--steps", 2, "--compile", "off")
    assert re.findall(r"^\w+", done.stdout, re.M) == ["model", "mamba"], done.stderr

@pytest.mark.parametrize("n, error", [(0, "RANK"), (3, "MASTER_ADDR"), (5, "--batch-size")])
def test_the_variables_of_torchrun_are_checked(n, error, monkeypatch):
    for i, name in enumerate(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")):
        monkeypatch.setenv(name, "2" if i < n else "")
    with pytest.raises(UserError, match=error):
        train.connect(Config(task="text", batch_size=3))

@pytest.mark.parametrize("name", ["tasks", "layers", "model", "train", "scaling"])
def test_help_works_without_docstrings(name):
    done = script("-OO", f"{name}.py", "-h")
    assert done.returncode == 0 and "usage" in done.stdout and not done.stderr

# ==== README.md ==================================================================================

README = (HERE / "README.md").read_text(encoding="utf-8")

def test_the_readmes_layer_works_as_pasted(tmp_path):
    layer, = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    place = "\ndef build_layer"
    for name in ("tasks", "layers", "model", "train"):
        source = (HERE / f"{name}.py").read_text(encoding="utf-8")
        (tmp_path / f"{name}.py").write_text(source.replace(place, "\n" + layer + place))
    done = script("train.py", "--layers", "retention swiglu", "--num-train", 320, "--dim", 32,
                  "--batch-size", 32, "--steps", 5, "--out", tmp_path, cwd=tmp_path)
    assert "test accuracy" in done.stdout and "100%" in done.stderr, done.stderr

def test_readme_names_only_options_and_files_that_exist():
    text = README.replace("\\\n", "").replace("scaling.py ", "scaling.py_")
    scripts = "train.py layers.py model.py scaling.py_sweep scaling.py_table scaling.py_mixing"
    for name in scripts.split():
        known = re.findall(r"--[\w-]+", script(*name.split("_"), "-h").stdout)
        for words in re.findall(rf"python {name} ([^`\n#]*)", text):
            assert {*re.findall(r"--[a-z][\w-]*", words)} <= {*known}, words
    for path in re.findall(r"\b(?:results|assets)/[\w./-]*\w", README):
        assert (HERE / path).exists(), path

def test_readme_shows_the_recorded_scores():
    assert scaling.table(*scaling.read_scores(HERE / "results" / "mad" / "quick")) in README

# ==== scaling.py =================================================================================

LAW = dict(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)   # Besiroglu et al. 2024
FITS = dict(isoflop=scaling.fit_isoflop, parametric=scaling.fit_parametric,
            projection=scaling.fit_variable_projection)
GOOD_CSV = "N,D,loss\n1e8,1e9,3\n2e8,1e9,2.9\n"

def scaling_law(N, D, E, A, B, alpha, beta):
    return E + A / N ** alpha + B / D ** beta

def isoflop_sizes(budgets=np.geomspace(1e18, 1e20, 5), sizes=7, spread=4.0):
    """N and D of IsoFLOP groups at C = 6ND, `spread` either way of 20 tokens a parameter."""
    C = np.repeat(budgets, sizes)
    N = np.tile(np.geomspace(1 / spread, spread, sizes), len(budgets)) * np.sqrt(C / 120)
    return N, C / 6 / N

def noisy_losses(N, D, seed=0):
    return scaling_law(N, D, **LAW) + np.random.default_rng(seed).normal(0, 0.01, len(N))

N7, D7 = isoflop_sizes()
EXACT = scaling_law(N7, D7, **LAW)

@pytest.mark.parametrize("fit", [scaling.fit_parametric, scaling.fit_variable_projection])
@pytest.mark.parametrize("law", [LAW, dict(E=0.9, A=30.0, B=9000.0, alpha=0.21, beta=0.52)])
def test_scaling_law_without_noise_is_recovered(fit, law):
    found = fit(N7, D7, scaling_law(N7, D7, **law), target=1e22, bootstrap=20)
    for name, v in law.items():
        assert [getattr(found, name), *found.intervals[name]] == pytest.approx([v] * 3, rel=1e-4)
    assert found.a / found.b == pytest.approx(found.beta / found.alpha) and found.rss < 1e-10
    sizes = np.geomspace(1e7, 1e13, 200_001)             # the optimum, by looking everywhere
    losses = scaling_law(sizes, 1e22 / 6 / sizes, **law)
    assert found.N_target == pytest.approx(sizes[losses.argmin()], rel=1e-3)

def test_scaling_recorded_sweep_is_fitted_as_published():
    """The sum of Huber losses, by a loop, rises all around; figures of scipy's optimizers."""
    archs = scaling.read_runs(HERE / "results" / "sweep.csv")
    N, D, loss, *_ = archs["transformer"]
    huber, squares = (FITS[k](N, D, loss, bootstrap=0) for k in ("parametric", "projection"))
    cost = lambda r: r * r / 2 if r <= 1e-3 else 1e-3 * (r - 1e-3 / 2)
    objective = lambda law: sum(cost(abs(math.log(scaling_law(n, d, *law) / l)))
                                for n, d, l in zip(N, D, loss))
    law, draw = np.array([getattr(huber, name) for name in LAW]), np.random.default_rng(0).normal
    assert huber.objective == pytest.approx(objective(law), rel=1e-9)
    assert all(objective(law * (1 + 1e-3 * draw(size=5))) > huber.objective for _ in range(50))
    assert [*law, huber.objective] == pytest.approx(
        [0.956175, 5.997598, 187.7400, 0.286302, 0.426675, 1.853755e-4], rel=1e-4)
    assert (squares.E, squares.rss) == pytest.approx((0.984447, 1.762095e-2), rel=1e-4)

def test_scaling_parabolas_without_noise_are_recovered():
    N, D = isoflop_sizes(sizes=5)
    N, D, C = N / 6, D * 6, 6 * N * D / 1e18
    loss = 3 * C ** -0.07 + 0.05 * np.log(N / (2e7 * C ** 0.46)) ** 2
    runs = scaling.make_runs(N, D, loss, state=5 * N ** 0.5)
    fit = scaling.fit_isoflop(*runs, target=1e21, bootstrap=50)
    assert (fit.a, fit.b, fit.loss_exponent, fit.curvature) == pytest.approx((.46, .54, .07, .05))
    assert fit.N_target == pytest.approx(2e7 * 1000 ** 0.46) and len(fit.intervals) == 7
    for row in fit.budgets:
        C = row["C"] / 1e18
        expected = 2e7 * C ** 0.46, row["C"] / 6 / row["N"], 5 * row["N"] ** 0.5, 3 * C ** -0.07
        assert [row[k] for k in ("N", "D", "state", "loss")] == pytest.approx(expected)
        assert row["best_loss"] >= row["loss"] and row["flag"] == ""
    found = scaling.analyse(runs, bootstrap=0)
    assert found["overtraining"][0.5] == pytest.approx(0.05 * math.log(2) ** 2)
    M, L = np.transpose([(row["state"], row["loss"]) for row in fit.budgets])
    assert found["state_law"].c == pytest.approx(np.polyfit(np.log(M), L, 1)[0])    # log P = L
    power, two = (scaling.fit_power_law(M[:n], 7 * M[:n] ** -0.28) for n in (5, 2))
    assert (power.k, power.c, two.c, *power.intervals["c"]) == pytest.approx((7, *[-0.28] * 4))
    assert two.intervals == {}                           # no residuals to draw from

def test_scaling_parabola_reads_the_runs_near_the_best_one():
    (N, D), loss = (sizes := isoflop_sizes([1e18], 9, 10.0)), scaling_law(*sizes, **LAW)
    far = np.abs(np.log(N / N[loss.argmin()])) > math.log(4)     # four of the nine
    tops = [scaling.vertex(scaling.make_runs(N, D, l))["loss"] for l in (loss, loss + far)]
    assert tops[0] == tops[1] == pytest.approx(loss.min(), abs=0.01)
    few = scaling.make_runs(10.0 ** np.arange(5), D[:5], [1, 2, 3, 4, 5])
    assert scaling.near_optimum(few).N.tolist() == [1, 10, 100, 1000]
    beyond = scaling.make_runs([1, 2, 4], [4, 2, 1], 1 + np.log(np.array([1, 2, 4]) / 8) ** 2)
    top = scaling.parabola(beyond, beyond.loss[None])[1]     # a resample's vertex is not cut there
    assert [*top["N"], *top["D"]] == pytest.approx([8, 0.5]) and scaling.vertex(beyond)["flag"]

@pytest.mark.parametrize("method, name", [("isoflop", "a"), ("projection", "alpha")])
def test_scaling_intervals_cover(method, name):
    """95% intervals hold the truth (a parabola's: that without noise) in most of 20 repetitions."""
    N, D = isoflop_sizes(sizes=5)
    truth = getattr(FITS[method](N, D, scaling_law(N, D, **LAW), bootstrap=0), name)
    fits = [FITS[method](N, D, noisy_losses(N, D, seed), bootstrap=60) for seed in range(20)]
    low, high = np.transpose([f.intervals[name] for f in fits])
    assert 16 <= ((low <= truth) & (truth <= high)).sum() and np.median(high - low) < 0.2
    draws = scaling.resample(np.arange(8.0), np.tile([-1.0, 1.0], 4), 4, 4000, 0)
    assert draws.std(0) == pytest.approx([math.sqrt(2)] * 8, rel=0.05)      # n / (n - parameters)

@pytest.mark.parametrize("x, y, rho, p", [
    ([1, 2, 3, 4, 5], [2, 1, 3, 4, 5], 0.9, 10 / 120), ([1, 2, 3], [9, 5, 1], -1, 2 / 6),
    (range(6), [1, 0, 2, 3, 5, 4], 0.8857, 24 / 720), (range(30), np.arange(30) ** 3, 1, 1e-4),
    ([1, 2, 2, 3], [1, 3, 2, 4], math.sqrt(0.9), 4 / 24)])
def test_scaling_rank_correlation_of_published_tables(x, y, rho, p):
    found = scaling.rank_correlation(x, y)
    assert (found.rho, found.p, found.n) == pytest.approx((rho, p, len(x)), rel=1e-4)
    assert math.isnan(scaling.rank_correlation(x, np.ones(len(x))).rho)

@pytest.mark.parametrize("method, N, D, loss, word", [
    ("isoflop", N7[:7], D7[:7], EXACT[:7], "budgets"), ("isoflop", N7, D7, 10 - EXACT, "minimum"),
    ("isoflop", N7, D7, -EXACT, "positive"), ("projection", N7, 20 * N7, EXACT, "line"),
    ("parametric", np.where(N7 > 1e9, 2e9, 1e9), D7, EXACT, "3 different")])
def test_scaling_refuses_runs_that_cannot_tell(method, N, D, loss, word):
    with pytest.raises(UserError, match=word):
        FITS[method](N, D, loss, bootstrap=0)

def test_scaling_methods_differ_where_they_should():
    loss = EXACT * np.where(np.arange(35) == 24, 1.3, 1)     # one run that diverged a little
    huber, squares = (FITS[k](N7, D7, loss, bootstrap=0) for k in ("parametric", "projection"))
    assert abs(huber.alpha - LAW["alpha"]) < 0.01 < abs(squares.alpha - LAW["alpha"])
    assert FITS["projection"](N7, D7, EXACT - 2.2, bootstrap=0).E == 0
    loss = EXACT + 0.1 * (np.arange(35) >= 28)               # the largest budget is held out below
    found = scaling.analyse(scaling.make_runs(N7 ** 1.03, D7, loss, 6 * N7 * D7), bootstrap=0)
    iso = scaling.fit_isoflop(N7, D7, loss, bootstrap=0)     # (C is not 6ND there)
    assert found["compute_N"]["isoflop"].a == pytest.approx(iso.a) == pytest.approx(1 - iso.b)
    assert found["isoflop"].a == pytest.approx(1.03 * iso.a, rel=1e-3)
    held = found["compute_N"]["hold_out"]
    for name, rel in (("isoflop", 0.03), ("parametric", 1e-3), ("variable_projection", 1e-3)):
        assert held[name]["loss"] == pytest.approx(held["measured"]["loss"] - 0.1, rel=rel)

def test_scaling_commands(tmp_path, capsys):
    (N, D), image = isoflop_sizes([1e18, 1e20], 5), tmp_path / "a.png"
    rows = [f"{n},{d},{loss * (1 - 0.03 * i)},{arch}\n" for i, arch in enumerate("abc")
            for n, d, loss in zip(N, D, noisy_losses(N, D))]
    path, mad = str(tmp_path / "runs.csv"), ["--mad", str(tmp_path / "mad.csv")]
    Path(path).write_text("N,D,loss,arch\n" + "".join(rows))
    Path(mad[1]).write_text("arch,mean\na,0.5\nb , 0.4\nb,0.8\nc,0.7\nother,1\n")
    scaling.main(["fit", path, "--json", "--target", "1e21"])
    out = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)      # NaN is no JSON
    assert {"a", "b", "intervals"} <= out["isoflop"].keys()
    for name, key in (("parametric", "objective"), ("variable_projection", "rss")):
        assert {*LAW, key} <= out[name].keys() and {*LAW} <= out[name]["intervals"].keys()
        assert out[name]["target"] == 1e21 and out["archs"]["a"][name] == out[name]
    scaling.main(["compare", path, "--json", *mad])
    assert [row["rho"] for row in json.loads(capsys.readouterr().out)["budgets"]] == [-1, -1]
    for options in ([], mad):
        scaling.main(["plot", path, "--out", str(image), *options])
        assert int.from_bytes(image.read_bytes()[16:20], "big") == 800         # pixels wide

@pytest.mark.parametrize("text, words", [
    ("\n \nN , D,loss \n1e8, 1e9,3\n\n2e8,1e9 ,2.9\n", ""), ("\ufeff" + GOOD_CSV, ""),
    (GOOD_CSV.replace(",", ";").replace(".", ","), "';'"), (GOOD_CSV.replace(",", "\t"), "\\t"),
    ("N,D,loss\n1e8,1e9,3\n\n\n2e8,1e9,oops\n", "line 5, loss oops"), ("N,D,loss\n1,2,\n", "loss"),
    ('N,D,loss\n"20,000","1e9",3\n', "line 2, N 20,000"), ("N,D,loss\n1,2,3,5\n", "line 2"),
    (GOOD_CSV.replace("2.9", "-1"), "positive"), ("", "column")])
def test_scaling_csv_as_people_export_it(text, words, tmp_path):
    (path := tmp_path / "runs.csv").write_text(text, encoding="utf-8")
    if not words:
        return np.testing.assert_array_equal(scaling.read_runs(path)["all"].loss, [3, 2.9])
    with pytest.raises(UserError) as error:
        scaling.read_runs(path)
    assert all(word in str(error.value) for word in words.split(" "))

def test_scaling_table_of_records(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "PUBLISHED", tmp_path / "published.csv")
    names = ",".join([*scaling.TASKS][:6])
    scaling.PUBLISHED.write_text(f"arch,source,{names},mean\nmamba,paper,1,2,3,4,5,6,69.3\n")
    for i, options in enumerate(({}, dict(seed=1), dict(dim=32))):       # two seeds, another width
        mean = dict(mean=0.5 + 0.02 * i, macro_mean=0.6 + 0.1 * (i % 2), preset="quick")
        mean["tasks"] = dict.fromkeys(names.split(","), dict(token=0.5, macro=mean["macro_mean"]))
        (tmp_path / f"{i}.json").write_text(json.dumps(dict(arch="mamba", options=options, **mean)))
    rows = [[cell.strip() for cell in line.strip("| ").split("|")]
            for line in scaling.table(*scaling.read_scores(tmp_path)).splitlines()]
    assert [rows[0][7], rows[3][0], rows[4][0]] == ["quick score", "*paper*", "mamba dim=32"]
    pytest.raises(UserError, scaling.table, {}, {})                      # a CSV without a row
    assert rows[2] == ["mamba", *["65.0 ±5.0"] * 7, "51.0 ±1.0", "4,096", "433,792"]

def test_scaling_sweep_trains_what_is_missing(tmp_path, monkeypatch, capsys):
    trained, errors = [], {40: KeyboardInterrupt(130), 48: train.Diverged("the loss is nan")}

    def fake(config, verbose):
        if config.dim in errors:
            raise errors[config.dim]
        trained.append(config)
        return dict(val_loss=2.0, bits_per_byte=2.9, recall_loss=3.0, other_loss=1.5, wall_s=1.0)
    monkeypatch.setattr(scaling, "train", fake)
    (data := tmp_path / "text.txt").write_text("to be or not to be, " * 2000)
    args = f"sweep --budgets 1e11,2e11 --sizes 5 --out {tmp_path} --data {data}".split()
    with pytest.raises(KeyboardInterrupt):
        scaling.main(args)
    assert [config.dim for config in trained] == [16, 24, 32]
    del errors[40]
    scaling.main(args)                                   # goes on, and tells what diverged
    text = (tmp_path / "runs.csv").read_text()
    assert len({c.name for c in trained}) == text.count("\n") - 1 == 16
    assert "the loss is nan" in capsys.readouterr().err
    scaling.main(args)                                   # nothing is missing
    assert len(trained) == 16 and (tmp_path / "runs.csv").read_text() == text
    data.write_text("not to be or to be, " * 2000)
    scaling.main(args)
    assert len({c.name for c in trained}) == 32          # another text: other runs, and fits
    assert len(scaling.read_runs(tmp_path / "runs.csv")) == 4

@pytest.mark.parametrize("arch", [*model.ARCHS, "mlp",
                                  "mh-hyena swiglu mh-attention(heads=4) swiglu"])
def test_scaling_sizes_and_costs_of_every_architecture(arch):
    for width in (24, 40, 448, 4096):
        pattern = scaling.pattern_at(arch, width, 4)
        with torch.device("meta"):
            assert len(model.Model(pattern, 100, width, 64).blocks) == 8
        assert pattern.count("mh-attention(heads=4)") == 2 or "(" not in arch
    plan = ["plan", "--budgets", "1e12", "--sizes", "1", "--context", "64", "--archs", arch]
    (run,) = scaling.isoflop_runs(scaling.parse_args(plan), 256)
    costs = model.total(model.ledger(model.Model(run["pattern"], 256, run["width"], 64), 64))
    assert (run["N_total"], run["state"]) == (costs.parameters, costs.nominal)
    assert run["C"] == 3 * costs.flops * run["batch"] * run["steps"] == pytest.approx(1e12, rel=.01)

def test_scaling_depth_batch_and_rate_of_a_plan():
    plan = "plan --budgets 1e12 --sizes 2 --depth 4 --batch 3 --lr 0.5 --archs mamba".split()
    for run in scaling.isoflop_runs(scaling.parse_args(plan), 256):
        assert (run["depth"], run["batch"], run["pattern"].count("mamba")) == (4, 3, 8)
        assert run["lr"] == pytest.approx(0.012 / run["width"] ** 0.5, rel=1e-3)

def test_the_trials_own_layer_renamed_text_and_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(HERE / "results")
    import trial
    net, x = layers.build_layer("conv-attention", 16, 12, heads=2), torch.randn(2, 12, 16)
    torch.testing.assert_close(layers_steps(net, x)[0], net(x))
    files = [tmp_path / f"{i}.py" for i in range(9)]
    for file in files:
        file.write_text("def f(x):\n    return x + len(x)  # x\n")
    monkeypatch.setattr(tasks, "corpus", lambda path: files)
    monkeypatch.setattr(trial, "LIBRARY", tmp_path)
    trial.rename(tmp_path / "new")
    texts = [(tmp_path / "new" / file.name).read_text() for file in files]
    assert len(set(texts)) > 2 and all(re.fullmatch(
        r"def \w+\((\w+)\):\n    return \1 \+ (?!\1)\w+\(\1\)  # x\n", text) for text in texts)
    monkeypatch.setattr(trial, "plot", lambda *_: None)
    trial.report(HERE / "results" / "trial")
    assert capsys.readouterr().out == (HERE / "results" / "trial" / "report.txt").read_text()

def test_learning_curves_are_drawn(tmp_path):
    log = tmp_path / "hybrid.jsonl"
    log.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "test_accuracy": 0.5}\n')
    ax, = scaling.plot_curves([log]).axes
    line, = ax.lines
    assert line.get_xydata().tolist() == [[2, 0.5]] and line.get_label() == "hybrid"

if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", *sys.argv[1:]]))
