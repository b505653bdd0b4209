"""
What is learned: the six synthetic tasks of MAD (Poli et al. 2024, arXiv 2403.17844), and text.

Each task tests one ability of a sequence model; a setting is one of its difficulties. Data are
drawn, not stored: generate(setting, n, seed, split) -> inputs, targets, where targets[:, t] is the
right answer at position t, or -100 if it is not scored.

  B batch   T time   M vocabulary, ids in [0, M)   P pairs   L longest motif

  python tasks.py      one instance of each task, and what its score is read against: a guess
                       (chance), the rule (oracle: 1.000), the most a model can get (ceiling)
"""
import argparse
import difflib
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
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

IGNORE = -100        # torch's cross_entropy skips this target by default

class UserError(ValueError):
    """A wrong option, pattern, setting or data file: one line, with what is permitted."""

def unknown(kind, name, known):
    close = difflib.get_close_matches(str(name), known, 1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return UserError(f"{kind} is {name!r}; permitted: {', '.join(known)}{hint}")

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)

def run_main(main):
    """Runs a file's main. Exit codes: 2 UserError, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP."""
    def stop(number, frame):
        raise KeyboardInterrupt(128 + number)

    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) == signal.SIG_DFL:       # nohup ignores SIGHUP
            signal.signal(number, stop)
    sys.stderr = sys.stderr or open(os.devnull, "w")         # the shell may have closed it
    sys.stdout.reconfigure(errors="replace")                 # the console may know ASCII only
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        sys.exit(stopped.args[0] if stopped.args else 130)
    except BrokenPipeError:                                  # `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)         # Python flushes once more at its end

# -------------------------------------------------------------------------------------------------
# Settings, and random numbers that are the same on every machine

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
        if self.task not in TASKS:
            raise unknown("task", self.task, TASKS)
        task, noisy, many = TASKS[self.task], "noisy" in self.task, 2 ** 31
        most = (self.seq_len - 1) // 2 if "copying" in self.task else many
        for field, low, high, step in (
                ("num_train", 1, many, 1), ("num_test", 1, many, 1), ("max_motif", 1, 3, 1),
                ("noise_vocab_size", int(noisy), noisy * many, 1),
                ("vocab_size", task.least[0] + self.noise_vocab_size, many, 1),
                ("seq_len", task.least[1], many, 1 + task.even),
                ("num_tokens_to_copy", 1, most, 1)):
            value = getattr(self, field)
            if not low <= value <= high or value % step:
                even = "even, " * (step - 1)
                raise UserError(f"{field} is {value}; permitted: {even}{low} to {high}")
        if not 0 <= self.frac_noise < 1 or self.frac_noise and not noisy:
            raise UserError(f"frac_noise is {self.frac_noise}; permitted: [0, 1) in noisy recall, "
                            f"0 elsewhere")

    @property
    def length(self):
        """Positions of inputs and targets."""
        return generate(self, 1, 0, "test")[0].shape[1]

def halves(setting):
    """Number of keys, ids [0, keys), and of values, ids [keys, keys + values)."""
    M = setting.vocab_size - setting.noise_vocab_size    # noise has the last ids
    if setting.task == "memorization":                   # M/2 facts; id M-1 is the insert token
        return M // 2, M - 1 - M // 2
    M -= "fuzzy" in setting.task                         # id M-1 pads
    return M // 2, M - M // 2

BLOCK = 256          # sequences drawn from one stream: their arrays fit the processor's cache

def dice(setting, seed, *label):
    """A function draw(high, *shape) -> (BLOCK, *shape) int64, uniform in [0, high), high <= 2^32.
    Its stream depends on the fields that are not at their defaults, but for the numbers of data."""
    changed = [f"{f.name}={getattr(setting, f.name)}" for f in fields(setting)
               if getattr(setting, f.name) != f.default and f.name not in ("num_train", "num_test")]
    name = " ".join(map(str, (*changed, seed, *label)))
    digest = hashlib.sha256(name.encode()).digest()      # hash() differs between processes
    bits = np.random.PCG64(np.random.SeedSequence(int.from_bytes(digest, "big")))

    def draw(high, *shape):
        # numpy promises that these raw bits stay the same, not that Generator.integers does.
        count = BLOCK * int(np.prod(shape))
        raw = bits.random_raw((count + 1) // 2).astype("<u8", copy=False).view("<u4")[:count]
        # x * high / 2^32 is biased by at most high / 2^32 (2e-6 for 8192 ids), and never retries.
        scaled = np.multiply(raw, high, dtype=np.uint64) >> np.uint64(32)
        return scaled.view(np.int64).reshape(BLOCK, *shape)

    return draw

def first_shown(codes):
    """codes (B, P) -> (B, P), for each place the first place of its row that has the same code."""
    rows, P = codes.shape
    apart = codes + (np.ptp(codes) + 1) * np.arange(rows)[:, None]       # rows share no code
    _, first, which = np.unique(apart, return_index=True, return_inverse=True)
    return first[which].reshape(rows, P) % P

# -------------------------------------------------------------------------------------------------
# The tasks: (setting, draw, split, seed) -> inputs, targets of one block, and their oracles

def motifs(draw, num_tokens, L, P):
    """(B, P, L) motifs without a repeated token."""
    motif = draw(num_tokens, P, 1)
    for p in range(1, L):
        rank, used = draw(num_tokens - p, P, 1), np.sort(motif, 2)       # rank among the unused
        token = rank + (used - np.arange(p) <= rank).sum(2, keepdims=True)
        motif = np.concatenate([motif, token], 2)
    return motif

def recall(setting, draw, split, seed):
    """key value key value ... key value: a key has one value, drawn anew for each sequence, and the
    last pair repeats one before it. Trained on every next token, tested on the values of keys shown
    before. Noisy: some pairs are two tokens of noise. Fuzzy: keys and values are motifs of 1 to L
    tokens (a test's keys of L) after some pads; a key ends where a value, of other tokens, begins,
    but only its earlier appearance tells where a value ends."""
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

    fits = (pair >= 0).sum((2, 3)).cumsum(1) <= T - 2 * L                # room for the last pair
    used = fits.sum(1, keepdims=True)                                    # (B, 1)
    last = np.where(fits & ~noise, draw(2 ** 32, P), -1).argmax(1)       # the highest die
    order = np.where(slot < used, slot, last[:, None])                   # (B, P)
    pair = np.take_along_axis(pair, order[..., None, None], 1)
    exists = (pair >= 0) & (slot <= used)[..., None, None]
    answer = np.full(pair.shape, split == "train")
    again = first_shown(np.take_along_axis(code, order, 1)) < slot
    answer[:, :, 1] |= again[..., None]

    # Row by row, the tokens that exist are, in this order, the end of the sequence.
    end = np.arange(T) >= T - exists.sum((1, 2, 3))[:, None]             # (B, T)
    tokens, scored = np.full((BLOCK, T), setting.vocab_size - 1), np.zeros((BLOCK, T), bool)
    tokens[end], scored[end] = pair[exists], answer[exists]
    return tokens[:, :-1], np.where(scored, tokens, IGNORE)[:, 1:]       # the next token

def recall_oracle(setting, inputs, seed):
    """The rule of induction heads: what followed this key, and this much of a value, before?"""
    (keys, values), L = halves(setting), setting.max_motif if "fuzzy" in setting.task else 1
    answers = np.full_like(inputs, -1)
    for row, answer in zip(inputs.tolist(), answers):
        following, context, previous = {}, (), keys
        for t, token in enumerate(row):
            following.setdefault(context, token if keys <= token < keys + values else -1)
            context = (token,) if token < keys <= previous else context + (token,)
            # A key of less than L tokens may go on, until a token of its value is read.
            if len(context) >= L or token >= keys:
                answer[t] = following.get(context, -1)
            previous = token
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
    """The map from keys to values belongs to setting and seed: both splits share it."""
    keys, values = halves(setting)
    facts = keys + dice(setting, seed, "facts")(values, -(-keys // BLOCK)).ravel()
    answers = np.full_like(inputs, -1)
    answers[:, 1::2] = facts[inputs[:, 0::2]]
    return answers

# -------------------------------------------------------------------------------------------------
# The table. To add a task: its function, its oracle, a line here and its baseline below.

@dataclass(frozen=True)
class Task:
    about: str                 # the question that it asks
    make: callable             # (setting, draw, split, seed) -> inputs, targets (B, T) of one block
    oracle: callable           # (setting, inputs, seed) -> right answers (B, T), -1 where open
    least: tuple               # vocab_size without noise, seq_len
    chance: callable = lambda setting: 1 / halves(setting)[1]            # one of the values
    even: bool = False         # seq_len must be
    backbone: str = "lm"       # the kind of model (model.py) that it needs

TASKS = {
    "in-context-recall": Task(
        "which value came with this key?", recall, recall_oracle, (4, 4), even=True),
    "fuzzy-in-context-recall": Task(
        "the same with names of several tokens", recall, recall_oracle, (7, 12)),
    "noisy-in-context-recall": Task(
        "the same among noise", recall, recall_oracle, (4, 4), even=True),
    "selective-copying": Task(
        "repeat the tokens, skip the blanks", selective_copying, copying_oracle, (4, 3),
        lambda s: 1 / (s.vocab_size - 2)),
    "compression": Task(
        "the vector at the last position must hold the whole sequence", compression,
        lambda setting, inputs, seed: inputs, (3, 2),    # the last of T tokens is no guess
        lambda s: (1 + (s.seq_len - 1) / (s.vocab_size - 1)) / s.seq_len, backbone="autoencoder"),
    "memorization": Task(
        "which value has this key in the task's one fixed map?", memorization, memorization_oracle,
        (5, 2), even=True),
}

BASELINES = {s.task: s for s in (
    Setting("in-context-recall"),
    Setting("fuzzy-in-context-recall"),
    Setting("noisy-in-context-recall", vocab_size=32, noise_vocab_size=16, frac_noise=0.2),
    Setting("selective-copying", seq_len=256),
    Setting("compression", seq_len=32),
    Setting("memorization", vocab_size=256, seq_len=32, num_train=256))}

RECALL = {"vocab_size": (32, 64, 128), "seq_len": (256, 512, 1024),
          "num_train": (6400, 3200, 1600, 800)}
CHANGES = {          # what makes a task harder, one variable at a time
    "in-context-recall": RECALL,
    "fuzzy-in-context-recall": RECALL,
    "noisy-in-context-recall": {**RECALL, "vocab_size": (48, 80, 144), "frac_noise": (.4, .6, .8)},
    "selective-copying": {**RECALL, "seq_len": (512, 1024), "num_tokens_to_copy": (32, 64, 96)},
    "compression": {**RECALL, "seq_len": (64, 128, 256)},
    "memorization": {"vocab_size": (512, 1024, 2048, 4096, 8192)}}

def mad_settings(task=None):
    """The protocol's 66 settings, or those of one task; a baseline comes before its changes."""
    if task and task not in BASELINES:
        raise unknown("task", task, BASELINES)
    return [replace(BASELINES[name], **change) for name in ([task] if task else CHANGES)
            for change in [{}, *({field: value} for field, values in CHANGES.get(name, {}).items()
                                 for value in values)]]

def generate(setting, n, seed, split):
    """inputs, targets: int64 (n, T), of recall (n, T - 1), the same on every machine, and the first
    n of more. The splits "train" and "test" come from independent streams."""
    blocks = [TASKS[setting.task].make(setting, dice(setting, seed, split, i), split, seed)
              for i in range(0, n, BLOCK)]
    return tuple(np.concatenate(arrays)[:n] for arrays in zip(*blocks))

def oracle(setting, inputs, seed=0):
    """Right answers by a rule that reads inputs[:, :t+1] (compression: all); -1 where open."""
    return TASKS[setting.task].oracle(setting, inputs, seed)

def chance(setting):
    """Expected test accuracy of a blind guess: 1 in the number of possible answers."""
    return TASKS[setting.task].chance(setting)

def ceiling(setting):
    """Expected test accuracy of a perfect memory: 1, or the share of facts in the training data."""
    draws = setting.num_train * setting.seq_len // 2
    return 1 - (1 - 1 / halves(setting)[0]) ** draws if setting.task == "memorization" else 1.0

def accuracy(predictions, targets):
    """Share of the scored positions that are right."""
    return float((predictions == targets)[targets != IGNORE].mean())

# -------------------------------------------------------------------------------------------------
# Text: arrays of token ids

SIZES = {"bytes": 256, "gpt2": 50257, "r50k_base": 50257, "cl100k_base": 100277,
         "o200k_base": 200019}                           # without tiktoken's download
SHARDS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}    # llm.c's magic and version: type of ids
# A piece of text ends between a letter or digit and a newline: no tokenizer's token reaches across.
PIECE = re.compile(r"(?s).{1,4000000}(?:(?<=[^\W_])(?=\r?\n)|\Z)|.{1,4000000}")
NOT_CORPUS = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
Text = namedtuple("Text", "train val name vocab_size sha256")            # of load_text

@functools.cache
def get_encoding(name):
    """tiktoken's encoding. The first use of one downloads it, which could wait for ever."""
    import tiktoken
    if name not in tiktoken.list_encoding_names():
        raise unknown("tokenizer", name, ["bytes", *tiktoken.list_encoding_names()])
    try:
        with ThreadPool(1) as pool:
            return pool.apply_async(tiktoken.get_encoding, [name]).get(20)
    except Exception as error:                           # whatever happens on a network in 20 s
        reason = " ".join(f"{type(error).__name__} {error}".split())[:120]
        raise UserError(f"tokenizer {name} can't be loaded ({reason}): use --tokenizer bytes, or "
                        f"copy tiktoken's cache here and set TIKTOKEN_CACHE_DIR to it") from None

def vocab_size(tokenizer):
    return SIZES.get(tokenizer) or get_encoding(tokenizer).n_vocab

def encode(text, tokenizer):
    """Ids of a text; what looks like a special token is text like any other."""
    if tokenizer == "bytes":
        return list(text.encode())
    if re.search(r"(^|\S)\s{500000}", text):
        raise UserError("text with 500,000 spaces in a row is too much for tiktoken: shorten them")
    return get_encoding(tokenizer).encode_ordinary(text)

def token_bytes(token, tokenizer):
    """The text of a token: none of a special one, U+FFFD of an id without a token."""
    if tokenizer == "bytes":
        return bytes([token])
    try:
        text = get_encoding(tokenizer).decode_single_token_bytes(token)
    except KeyError:
        return "\ufffd".encode()
    special = text.decode(errors="replace") in get_encoding(tokenizer).special_tokens_set
    return b"" if special else text

def bytes_per_token(targets, tokenizer):
    """Mean bytes of text of a target; None if tiktoken's table is out of reach."""
    ids, counts = np.unique(targets, return_counts=True)
    try:
        sizes = [len(token_bytes(token, tokenizer)) for token in ids.tolist()]
    except UserError:
        return None
    return float(counts @ sizes / counts.sum())

def tokenize(files, tokenizer):
    """Ids of text files, from a cache on disk if files of this content were tokenized before."""
    from tqdm import tqdm
    if tokenizer == "bytes" and len(files) == 1:
        return np.memmap(files[0], np.uint8, "r")
    home = os.path.expanduser("~")
    cache = Path(home if os.access(home, os.W_OK) else tempfile.gettempdir(), ".cache", "nanomad")
    cache = Path(os.environ.get("NANOMAD_CACHE") or cache)
    digest = hashlib.sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files))
    path = cache / f"{digest.hexdigest()}-{tokenizer}.bin"
    dtype = np.min_scalar_type(vocab_size(tokenizer) - 1)                # uint8, uint16 or uint32
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            with open(Path(folder, "ids"), "wb") as out:
                for file in tqdm(files, f"{tokenizer} tokens", unit="file"):
                    for piece in PIECE.findall(read_text(file)):
                        np.array(encode(piece, tokenizer), dtype).tofile(out)
            os.replace(out.name, path)
    return np.memmap(path, dtype, "r")

def read_text(file):
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error.reason}): convert it") from None

def open_tokens(path, tokenizer):
    """Ids of a .npy, of llm.c's shard (256 int32: magic, version, count; then ids), of raw ids."""
    M, head, npy = vocab_size(tokenizer), np.fromfile(path, "<i4", 256), path.suffix == ".npy"
    shard, raw = SHARDS.get(tuple(head[:2].tolist())), "<u4" if M > 2 ** 16 else "<u2"
    try:
        tokens = (np.load(path, mmap_mode="r") if npy else
                  np.memmap(path, shard or raw, "r", 1024 * bool(shard)))
        low, high = int(tokens.min()), int(tokens.max())
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} can't be read: {error}") from None
    for wrong, what in (
            (tokens.ndim > 1 or tokens.dtype.kind not in "iu", "no integers in one dimension"),
            (shard and len(tokens) != head[2], f"{len(tokens)} ids, but {head[2]} by its header"),
            (not npy and not shard and len(head) == 256 and not head[8:].any(),
             "a header of another kind than llm.c's token files"),
            (not npy and not (tokens[1:10000:2] > 3).any(),
             f"ids of more than {raw[2]} bytes: give the --tokenizer that made them, or a .npy"),
            (low < 0 or high >= M, f"ids {low} to {high}, but {tokenizer} has {M} tokens: give the "
                                   f"--tokenizer that made them")):
        if wrong:
            raise UserError(f"{path} has {what}")
    return tokens

def corpus(path):
    """The files of a corpus: one, those of a folder or a glob, Python's own if path is None."""
    root, files = Path(path or Path(os.__file__).parent), []
    for folder, inside, names in os.walk(root):
        inside[:] = [name for name in inside if name[0] != "." and (path or name not in NOT_CORPUS)]
        files += [Path(folder, n) for n in names if n[0] != "." and (path or n.endswith(".py"))]
    files = files or [root] * root.is_file() or [Path(name) for name in glob.glob(str(path))]
    files = sorted(file for file in files if file.is_file() and file.stat().st_size)
    if len({file.suffix in (".bin", ".npy") for file in files}) != 1:
        raise UserError(f"--data {path} has {len(files)} files that hold something; permitted: a "
                        f"file, a folder or a glob of text, or of only .bin and .npy")
    return files

def split_files(files):
    """Training and validation files: by `train` and `val` in their paths, if both occur; else the
    tenth whose paths have the smallest hashes is for validation."""
    root = os.path.commonpath([file.parent for file in files])
    names = {file: Path(os.path.relpath(file, root)).as_posix() for file in files}
    kind = lambda file: re.findall("(?<![a-z])(train|val)(?:id|idation)?(?![a-z])",
                                   names[file].lower())[-1:]
    named = [[file for file in files if kind(file) == [word]] for word in ("train", "val")]
    if all(named):
        return named
    order = sorted(files, key=lambda file: hashlib.sha256(os.fsencode(names[file])).digest())
    cut = -(-len(files) // 10)
    return sorted(order[cut:]), sorted(order[:cut])

def load_tokens(path, tokenizer="bytes"):
    """Token ids (n,), memory-mapped if in one file: of UTF-8 text, or of .bin or .npy, made with
    this tokenizer ("bytes" or one of tiktoken's). path: a file, a folder, a glob, a list of
    files; None: Python's own sources. Raises UserError for unusable data."""
    files = path if isinstance(path, list) else corpus(path)
    if files[0].suffix not in (".bin", ".npy"):
        tokens = tokenize(files, tokenizer)
    else:
        shards = [open_tokens(file, tokenizer) for file in files]
        tokens = shards[0] if len(shards) == 1 else np.concatenate(shards)
    head = tokens[:1_000_000]
    if tokenizer == "bytes" and np.mean((head < 9) | (13 < head) & (head < 32)) > 0.01:
        raise UserError(f"{files[0]} is no text but control characters, perhaps ids of another "
                        f"vocabulary: give the text itself, or the --tokenizer that made them")
    return tokens

def load_text(path, tokenizer="bytes"):
    """A corpus as Text: whole files are for training or for validation, a tenth of a single one."""
    files = corpus(path)
    if len(files) == 1:
        tokens = load_tokens(files, tokenizer)
        train, val = np.split(tokens, [len(tokens) * 9 // 10])
    else:
        train, val = (load_tokens(part, tokenizer) for part in split_files(files))
    digest = hashlib.sha256(train)
    digest.update(val)
    name = Path(path).name if path else f"Python {sys.version.split()[0]} standard library"
    return Text(train, val, name, vocab_size(tokenizer), digest.hexdigest())

def text_windows(tokens, starts, T):
    """inputs, targets: int64 (B, T), the targets one token later; starts (B,)."""
    if len(tokens) <= T:
        raise UserError(f"--context is {T}, but the training or validation split has {len(tokens)} "
                        f"tokens: lower --context, or give more text")
    rows = tokens[starts[:, None] + np.arange(T + 1)].astype(np.int64)   # (B, T + 1)
    return rows[:, :-1], rows[:, 1:]

def text_batch(tokens, T, B, seed, step):
    """B windows at random places, a function of seed and step."""
    bits = np.random.PCG64(np.random.SeedSequence((seed, step))).random_raw(B)
    starts = bits % np.uint64(max(len(tokens) - T, 1))
    return text_windows(tokens, starts.astype(np.int64), T)

def val_starts(tokens, T, most):
    """Starts of at most `most` windows, at even distances and without a common target."""
    count = min(most, (len(tokens) - 1) // T)
    return np.linspace(0, len(tokens) - 1 - T, max(count, 0), dtype=np.int64)

def show(setting):
    """One short test sequence, and the accuracies on the test data of the paper's baseline."""
    width, base = len(str(setting.vocab_size - 1)) + 1, BASELINES[setting.task]
    (x,), (y,) = generate(setting, 1, 0, "test")
    print(f"{setting.task}: {TASKS[setting.task].about}")
    for name, row in ("input", x), ("target", y), ("scored", np.where(y == IGNORE, "", "^")):
        cells = ("." if cell == IGNORE else cell for cell in row.tolist())
        print(f"  {name:8}" + "".join(f"{cell:>{width}}" for cell in cells))
    inputs, targets = generate(base, base.num_test, 0, "test")
    print(f"  At baseline (M {base.vocab_size}, T {base.seq_len}): chance {chance(base):.3f}, "
          f"oracle {accuracy(oracle(base, inputs), targets):.3f}, ceiling {ceiling(base):.3f}\n")

def main():
    parser = Parser(description="Show one small instance of each MAD task.")
    parser.add_argument("--task", choices=list(TASKS), metavar="TASK", help="only this one")
    task = parser.parse_args().task
    for name in [task] if task else TASKS:
        T = {"compression": 16, "memorization": 20}.get(name, 28)
        show(replace(BASELINES[name], seq_len=T, num_tokens_to_copy=6))

if __name__ == "__main__":
    run_main(main)
