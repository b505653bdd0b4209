"""
What is learned: the six synthetic tasks of MAD (Poli et al. 2024, arXiv 2403.17844), and text.

Each task tests one ability of a sequence model; a setting is one of its difficulties. Data are
drawn, not stored: generate(setting, n, seed, split) -> inputs, targets, where targets[:, t] is the
right answer at position t, or -100 if it is not scored.

  B batch   T time   M vocabulary, ids in [0, M)   P pairs   L longest motif

  python tasks.py     one instance of each task; accuracy of chance, of its oracle, its ceiling
"""
import argparse
import functools
import glob
import hashlib
import os
import re
import signal
import sys
import tempfile
from collections import namedtuple
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

IGNORE = -100        # torch's cross_entropy skips this target by default
BLOCK = 256          # sequences drawn from one stream: their arrays fit the processor's cache

class UserError(ValueError):
    """A wrong option, pattern, setting or data file: one line, with what is permitted."""

def unknown(kind, name, known):
    return UserError(f"{kind} is {name!r}; permitted: {', '.join(known)}")

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)

def run_main(main):
    """Runs a file's main. Exit codes: 2 UserError, OSError, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP."""
    def stop(number, frame):
        raise KeyboardInterrupt(128 + number)
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) == signal.SIG_DFL:       # nohup ignores SIGHUP
            signal.signal(number, stop)
    sys.stdout, sys.stderr = (s or open(os.devnull, "w") for s in (sys.stdout, sys.stderr))
    sys.stdout.reconfigure(errors="replace")                 # the console may know ASCII only
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:                                  # `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)         # Python flushes once more at its end
    except (UserError, OSError) as error:                    # OSError names the file at fault
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        sys.exit(stopped.args[0] if stopped.args else 130)

# ===================== Settings, and random numbers alike on every machine =======================

@dataclass(frozen=True)
class Setting:
    """One difficulty of one task. The defaults are in-context recall's baseline."""
    task: str
    vocab_size: int = 16             # all ids, with special tokens and noise
    seq_len: int = 128               # T, before the shift that takes one position from recall
    num_train: int = 12_800
    num_test: int = 1_280
    noise_vocab_size: int = 0        # noisy recall: how many of the ids are noise
    frac_noise: float = 0.0          # noisy recall: probability that a pair is noise
    num_tokens_to_copy: int = 16     # selective copying
    max_motif: int = 3               # fuzzy recall

    def __post_init__(self):
        (M, T, step), noise = TASKS[self.task].least, self.noise_vocab_size
        most = (self.seq_len - 1) // 2 if "copying" in self.task else 2 ** 31
        for field, fine, permitted in (
                ("vocab_size", self.vocab_size >= M + noise, f"{M + noise} or more"),
                ("seq_len", self.seq_len in range(T, 2 ** 31, step), f"{T}, {T + step} and so on"),
                ("num_tokens_to_copy", 1 <= self.num_tokens_to_copy <= most, f"1 to {most}"),
                ("frac_noise", 0 <= self.frac_noise < (1 if noise else 1e-9), "0; noisy: [0, 1)")):
            if not fine:
                raise UserError(f"{field} is {getattr(self, field)}; permitted: {permitted}")

def halves(setting):
    """How many keys (ids from 0 on) and values (next); then come noise, a pad or insert token."""
    M = setting.vocab_size - setting.noise_vocab_size - ("fuzzy" in setting.task)
    return M // 2, M - M // 2 - (setting.task == "memorization")

def dice(setting, seed, *label):
    """A function draw(high, *shape) -> (BLOCK, *shape) int64, uniform in [0, high), high <= 2^32.
    Its stream depends on the fields that are not at their defaults, except num_train, num_test."""
    changed = [f"{f.name}={getattr(setting, f.name)}" for f in fields(setting)
               if getattr(setting, f.name) != f.default and f.name not in ("num_train", "num_test")]
    digest = hashlib.sha256(" ".join(map(str, (*changed, seed, *label))).encode()).digest()
    bits = np.random.PCG64(np.random.SeedSequence(int.from_bytes(digest, "big")))

    def draw(high, *shape):
        # numpy promises that these raw bits stay the same, not that Generator.integers does.
        raw = bits.random_raw((BLOCK // 2, *shape)).astype("<u8", copy=False).view("<u4")
        scaled = np.multiply(raw, high, dtype=np.uint64) >> np.uint64(32)     # bias: high / 2^32
        return scaled.view(np.int64).reshape(BLOCK, *shape)
    return draw

def first_shown(codes):
    """codes (B, P) -> (B, P), for each place the first place of its row that has the same code."""
    apart = codes + (np.ptp(codes) + 1) * np.arange(len(codes))[:, None]      # rows share no code
    _, first, which = np.unique(apart, return_index=True, return_inverse=True)
    return first[which].reshape(codes.shape) % codes.shape[1]

# ============================= The tasks: data of one block, oracles =============================
# An oracle answers by a rule that reads inputs[:, :t+1] (compression: all); -1: not determined.

def motifs(draw, num_tokens, L, P):
    """(B, P, L) motifs without a repeated token."""
    motif = draw(num_tokens, P, 1)
    for p in range(1, L):
        rank, used = draw(num_tokens - p, P, 1), np.sort(motif, 2)       # rank among the unused
        token = rank + (used - np.arange(p) <= rank).sum(2, keepdims=True)
        motif = np.concatenate([motif, token], 2)
    return motif

def recall(setting, draw, split, seed):
    """3 12 7 9 5 11 7 9: keys before their values. A key has one value, drawn anew for a sequence;
    the last pair repeats one before it. Trained on every next token, tested on values of keys shown
    before. Noisy: some pairs are two tokens of noise. Fuzzy: after pads, keys and values are motifs
    of 1 to L tokens (in a test keys have L); where a value ends, its earlier appearance tells."""
    (keys, values), T, P = halves(setting), setting.seq_len, setting.seq_len // 2
    L, slot = setting.max_motif if "fuzzy" in setting.task else 1, np.arange(P)
    pair = np.stack([motifs(draw, keys, L, P), keys + motifs(draw, values, L, P)], 2)
    length = 1 + draw(L, P, 2, 1)
    if split != "train":
        length[:, :, 0] = L
    pair[np.arange(L) >= length] = -1                                    # (B, P, 2, L), -1: none
    noise = draw(2 ** 32, P) < setting.frac_noise * 2 ** 32              # (B, P)
    np.put_along_axis(noise, draw(P - 1, 1), False, 1)                   # one pair always stays
    # A key's tokens are the digits of its code. A key shown before takes the value it had then.
    code = np.where(noise, -1 - slot, (pair[:, :, 0] + 1) @ (keys + 1) ** np.arange(L))
    pair[:, :, 1] = np.take_along_axis(pair[:, :, 1], first_shown(code)[..., None], 1)
    pair[noise] = keys + values + draw(setting.noise_vocab_size, P, 2, 1)[noise]

    fits = (pair >= 0).sum((2, 3)).cumsum(1) <= T - 2 * L                # leaves room for the last
    used = fits.sum(1, keepdims=True)                                    # pairs before the last
    last = np.where(fits & ~noise, draw(2 ** 32, P), -1).argmax(1)       # the one that it repeats
    order = np.where(slot < used, slot, last[:, None])                   # 0 .. used-1, then last
    pair = np.take_along_axis(pair, order[..., None, None], 1)
    exists = (pair >= 0) & (slot <= used)[..., None, None]
    answer = exists & (split == "train")
    answer[:, :, 1] |= (first_shown(np.take_along_axis(code, order, 1)) < slot)[..., None]

    # Row by row, the tokens that exist fill the end of each sequence; pads come before them.
    end = np.arange(T) >= T - exists.sum((1, 2, 3))[:, None]             # (B, T)
    tokens, scored = np.full((BLOCK, T), setting.vocab_size - 1), np.zeros((BLOCK, T), bool)
    tokens[end], scored[end] = pair[exists], answer[exists]
    return tokens[:, :-1], np.where(scored, tokens, IGNORE)[:, 1:]       # the next token

def recall_oracle(setting, inputs, seed):
    """The rule of induction heads: what followed this key, and this much of a value, before?"""
    (keys, values), L = halves(setting), setting.max_motif if "fuzzy" in setting.task else 1
    answers = np.full_like(inputs, -1)
    for row, answer in zip(inputs.tolist(), answers):
        following, context = {}, ()
        for t, token in enumerate(row):
            following.setdefault(context, token if keys <= token < keys + values else -1)
            starts = token < keys and context[-1:] >= (keys,)            # a key's first token
            context = (token,) if starts else context + (token,)
            if len(context) >= L or token >= keys:                       # else the key may go on
                answer[t] = following.get(context, -1)
    return answers

def selective_copying(setting, draw, split, seed):
    """n tokens, T - 2n - 1 blanks among them, the copy token, n blanks where the n tokens are the
    targets. As in mad-lab each inserted blank picks the token it stands before."""
    n, T, M = setting.num_tokens_to_copy, setting.seq_len, setting.vocab_size
    token, owner = draw(M - 2, n), draw(n, T - 2 * n - 1)
    owner += n * np.arange(BLOCK)[:, None]                               # one histogram for all
    blanks = np.bincount(owner.ravel(), minlength=BLOCK * n).reshape(BLOCK, n)
    inputs, targets = np.full((BLOCK, T), M - 2), np.full((BLOCK, T), IGNORE)
    np.put_along_axis(inputs, blanks.cumsum(1) + np.arange(n), token, 1)
    inputs[:, T - n - 1] = M - 1
    targets[:, T - n:] = token
    return inputs, targets

def copying_oracle(setting, inputs, seed):
    n, answers = setting.num_tokens_to_copy, np.full_like(inputs, -1)
    blank = inputs >= setting.vocab_size - 2             # or the copy token; the others come first
    answers[:, -n:] = np.take_along_axis(inputs, blank.argsort(1, kind="stable")[:, :n], 1)
    return answers

def compression(setting, draw, split, seed):
    """T-1 random tokens and the compression token, which is a target too, as in mad-lab."""
    inputs = draw(setting.vocab_size - 1, setting.seq_len)
    inputs[:, -1] = setting.vocab_size - 1
    return inputs, inputs

def memorization(setting, draw, split, seed):
    """key insert key insert ...; at the insert token the target is the value, never shown."""
    inputs = draw(halves(setting)[0], setting.seq_len)
    inputs[:, 1::2] = setting.vocab_size - 1
    targets = memorization_oracle(setting, inputs, seed)
    return inputs, np.where(targets < 0, IGNORE, targets)

def memorization_oracle(setting, inputs, seed):
    """The map from keys to values, for both splits; mad-lab's is one-to-one and has a key less."""
    keys, values = halves(setting)
    facts = keys + dice(setting, seed, "facts")(values, -(-keys // BLOCK)).ravel()
    answers = np.full_like(inputs, -1)
    answers[:, 1::2] = facts[inputs[:, 0::2]]
    return answers

# ========================== The table, the settings, and what uses them ==========================

# least: vocab_size without noise, seq_len, its stride.  chance: accuracy of a blind guess.
Task = namedtuple("Task", "about make oracle least chance backbone", defaults=(
    lambda setting: 1 / halves(setting)[1], "lm"))

TASKS = {
    "in-context-recall": Task("which value came with this key?", recall, recall_oracle, (4, 4, 2)),
    "fuzzy-in-context-recall": Task("the same with keys and values of several tokens", recall,
                                    recall_oracle, (7, 12, 1)),
    "noisy-in-context-recall": Task("the same among noise", recall, recall_oracle, (4, 4, 2)),
    "selective-copying": Task("repeat the tokens, skip the blanks", selective_copying,
                              copying_oracle, (4, 3, 1), lambda s: 1 / (s.vocab_size - 2)),
    "compression": Task("the last position's vector must hold the whole sequence", compression,
                        lambda setting, inputs, seed: inputs, (3, 2, 1), lambda s:
                        (1 + (s.seq_len - 1) / (s.vocab_size - 1)) / s.seq_len, "autoencoder"),
    "memorization": Task("which value has this key in the task's one fixed map?", memorization,
                         memorization_oracle, (5, 2, 2))}

RECALL = {"vocab_size": (32, 64, 128), "seq_len": (256, 512, 1024),
          "num_train": (6400, 3200, 1600, 800)}
MAD = {              # each task's baseline, and what makes it harder, one variable at a time
    "in-context-recall": ({}, RECALL),
    "fuzzy-in-context-recall": ({}, RECALL),
    "noisy-in-context-recall": (dict(vocab_size=32, noise_vocab_size=16, frac_noise=0.2),
                                RECALL | dict(vocab_size=(48, 80, 144), frac_noise=(.4, .6, .8))),
    "selective-copying": (dict(seq_len=256), RECALL | dict(seq_len=(512, 1024),
                                                           num_tokens_to_copy=(32, 64, 96))),
    "compression": (dict(seq_len=32), RECALL | dict(seq_len=(64, 128, 256))),
    "memorization": (dict(vocab_size=256, seq_len=32, num_train=256),
                     dict(vocab_size=(512, 1024, 2048, 4096, 8192)))}
BASELINES = {task: Setting(task, **baseline) for task, (baseline, _) in MAD.items()}

def mad_settings(task=None):
    """The protocol's 66 settings, or those of one task; a baseline comes before its changes."""
    return [replace(BASELINES[name], **change) for name in ([task] if task else MAD) for change in
            [{}, *({field: value} for field in MAD[name][1] for value in MAD[name][1][field])]]

def generate(setting, n, seed, split):
    """inputs, targets: int64 (n, T), of recall (n, T - 1). A split is "train" or "test"."""
    blocks = [TASKS[setting.task].make(setting, dice(setting, seed, split, i), split, seed)
              for i in range(0, n, BLOCK)]
    return tuple(np.concatenate(arrays)[:n] for arrays in zip(*blocks))

def ceiling(setting):
    """Expected test accuracy of a perfect memory: 1, or the share of facts in the training data."""
    draws = setting.num_train * setting.seq_len // 2
    return 1 - (1 - 1 / halves(setting)[0]) ** draws if setting.task == "memorization" else 1.0

# ================================ Text: arrays of token ids (n,) =================================

SIZES = {"bytes": 256, "gpt2": 50257, "cl100k_base": 100277, "o200k_base": 200019}  # no download
SHARDS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}    # llm.c's magic and version: type of ids
# A text's pieces end between letter and newline, if they can: no token reaches across these.
PIECE = re.compile(r"(?s).{1,400000}(?:(?<=[^\W_])(?=\r?\n)|\Z)|.{1,400000}")
NOT_CORPUS = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
Text = namedtuple("Text", "train val name vocab_size sha256")            # of load_text

@functools.cache
def get_encoding(name):
    """tiktoken's, downloaded at first use; "gpt2:2048" has its first 2,048 tokens. UserError."""
    import tiktoken
    full, _, size = name.partition(":")
    if full not in tiktoken.list_encoding_names() or not re.fullmatch(r"([1-9]\d{3,})?", size):
        raise unknown("tokenizer", name, ["bytes", *tiktoken.list_encoding_names(), "gpt2:1000 .."])
    try:
        full = tiktoken.get_encoding(full)
    except Exception as error:                           # whatever happens on a network
        raise UserError(f"{name}: {error!r:.99}; use bytes, or set TIKTOKEN_CACHE_DIR") from None
    if not size:
        return full
    ranks = {token: i for token, i in full._mergeable_ranks.items() if i < int(size)}
    return tiktoken.Encoding(name, pat_str=full._pat_str, mergeable_ranks=ranks, special_tokens={})

def vocab_size(tokenizer):
    return SIZES.get(tokenizer) or get_encoding(tokenizer).n_vocab

def encode(text, tokenizer):
    """Ids of a text; what looks like a special token is text like any other."""
    if tokenizer == "bytes":
        return list(text.encode())
    return get_encoding(tokenizer).encode_ordinary(text)

@functools.cache
def token_table(tokenizer):
    """{id: bytes of its text}, without the special tokens."""
    if tokenizer == "bytes":
        return {i: bytes([i]) for i in range(256)}
    encoding = get_encoding(tokenizer)
    return {encoding.encode_single_token(text): text for text in encoding.token_byte_values()}

def bytes_per_token(targets, tokenizer):
    """Mean length of a target in bytes; None if tiktoken's table is out of reach."""
    try:
        table = token_table(tokenizer)
    except UserError:
        return None
    return float(np.mean([len(table.get(token, b"")) for token in targets.flat]))

def tokenize(file, tokenizer):
    """tiktoken's ids of a text, kept in a .npy of the temporary folder, whose path it returns."""
    raw = file.read_bytes()
    npy = Path(tempfile.gettempdir(), hashlib.sha256(tokenizer.encode() + raw).hexdigest() + ".npy")
    if not npy.exists():
        pieces = PIECE.findall(raw.decode())
        bar = tqdm(pieces, f"{file.name} to tokens", leave=False, disable=len(pieces) < 5)
        new = npy.with_suffix(f".{os.getpid()}.npy")
        np.save(new, np.concatenate([np.array(encode(p, tokenizer), "<u4") for p in bar]))
        os.replace(new, npy)
    return npy

def open_ids(file, tokenizer):
    """Ids of text, of a .npy, or of a .bin: llm.c's (256 int32, then ids) or ids alone."""
    if tokenizer != "bytes" and file.suffix not in (".bin", ".npy"):
        file = tokenize(file, tokenizer)
    M, head = vocab_size(tokenizer), np.fromfile(file, "<i4", 3).tolist()
    shard = SHARDS.get(tuple(head[:2]))
    raw = "u1" if file.suffix != ".bin" else "<u2" if M <= 2 ** 16 else "<u4"
    ids = (np.load(file, mmap_mode="r") if file.suffix == ".npy" else
           np.memmap(file, shard or raw, "r", 1024 * bool(shard)))
    for wrong, what in (
            (shard and len(ids) != head[2], f"{len(ids)} ids, but by its header {head[2:]}"),
            (file.suffix == ".bin" and not shard and not (ids[17:256:2] > 3).any(),
             f"another header, or ids not {raw[2:]} bytes wide: give their --tokenizer, or a .npy"),
            (ids.ndim > 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= M,
             f"{ids.dtype} that are not all ids below {M}: give the --tokenizer that made them"),
            (tokenizer == "bytes" and (ids[:10 ** 6] < 9).mean() > 0.01,
             "control characters, perhaps ids of other characters: give the text itself")):
        if wrong:
            raise ValueError(f"it has {what}")
    return ids

def load_tokens(path, tokenizer="bytes"):
    """Ids (n,) of a corpus or of a list of files; one is memory-mapped. Raises UserError."""
    parts = []
    for file in path if isinstance(path, list) else corpus(path):
        try:
            parts.append(open_ids(file, tokenizer))
        except (ValueError, EOFError) as error:
            raise UserError(f"{file} can't be read as {tokenizer}: {error}") from None
    return parts[0] if len(parts) == 1 else np.concatenate(parts)

def corpus(path):
    """The files of a corpus: one, those of a folder or a glob, Python's own if path is None."""
    root = Path(path or Path(os.__file__).parent)
    hidden = lambda name: name[0] == "." or not path and name in NOT_CORPUS
    files = [file for file in root.rglob("*" if path else "*.py")
             if not any(map(hidden, file.relative_to(root).parts))]
    files = files or [root] * root.is_file() or [Path(name) for name in glob.glob(str(path))]
    files = sorted(file for file in files if file.is_file() and file.stat().st_size)
    if len({file.suffix in (".bin", ".npy") for file in files}) != 1:
        raise UserError(f"--data {path}: {len(files)} files; permitted: all text, or all .bin/.npy")
    return files

def load_text(path, tokenizer="bytes"):
    """A corpus as Text. Validation takes, of one file, the last tenth; of several, those with `val`
    in their paths, if others have `train` (the rest is not used), else a tenth, by paths' hash."""
    files, M = corpus(path), vocab_size(tokenizer)
    root = os.path.commonpath([file.parent for file in files])
    names = [Path(os.path.relpath(file, root)).as_posix() for file in files]
    word = re.compile("(?<![a-z])(train|val)(?=ing|id|[^a-z]|$)")
    sides = [word.findall(name.lower())[-1:] for name in names]
    if ["train"] not in sides or ["val"] not in sides:
        hashes = [hashlib.sha256(os.fsencode(name)).digest() for name in names]
        last = sorted(hashes)[(len(files) - 1) // 10]
        sides = [["val"] if digest <= last else ["train"] for digest in hashes]
    if len(files) == 1:
        tokens = load_tokens(files, tokenizer)
        train, val = np.split(tokens, [len(tokens) * 9 // 10])
    else:
        train, val = (load_tokens([file for file, s in zip(files, sides) if s == [side]], tokenizer)
                      for side in ("train", "val"))
    sha = hashlib.sha256(train)
    sha.update(val)
    own = f"Python {sys.version.split()[0]} standard library"
    return Text(train, val, Path(os.path.abspath(path)).name if path else own, M, sha.hexdigest())

def text_windows(tokens, starts, T):
    """inputs, targets: int64 (B, T), the targets one token later; starts (B,)."""
    if len(tokens) <= T:
        raise UserError(f"--context is {T}; permitted: less than a split's {len(tokens)} tokens")
    rows = tokens[starts[:, None] + np.arange(T + 1)].astype(np.int64)   # (B, T + 1)
    return rows[:, :-1], rows[:, 1:]

def text_batch(tokens, T, B, seed, step):
    """B windows at random places, a function of seed and step."""
    bits = np.random.PCG64(np.random.SeedSequence((seed, step))).random_raw(B)
    return text_windows(tokens, (bits % np.uint64(max(len(tokens) - T, 1))).astype(np.int64), T)

def val_starts(tokens, T, most):
    """Starts of at most `most` windows, at even distances and without a common target."""
    return np.linspace(0, len(tokens) - 1 - T, min(most, (len(tokens) - 1) // T), dtype=np.int64)

def main():
    Parser(description="Show one short instance of each MAD task.").parse_args()
    for name, base in BASELINES.items():
        (x,), (y,) = generate(replace(base, seq_len=20, num_tokens_to_copy=5), 1, 0, "test")
        print(f"{name}: {TASKS[name].about}")
        for title, row in ("input", x), ("target", y):
            print(f"  {title:6}" + "".join(f"{cell:>4}" for cell in row).replace("-100", "   ."))
        x, y = generate(base, base.num_test, 0, "test")
        right = (TASKS[name].oracle(base, x, 0) == y)[y != IGNORE].mean()
        guess, memory = TASKS[name].chance(base), ceiling(base)
        print(f"  chance {guess:.3f}, oracle {right:.3f}, ceiling {memory:.3f}\n")

if __name__ == "__main__":
    run_main(main)
