"""
What is learned: the six synthetic tasks of MAD, their 66 settings, and text as the seventh task.

Each task is a unit test of one ability of a sequence model (the paper's section on MAD, tables in
its appendix): bring back what was shown (recall), in spite of noise or of names of several tokens,
copy in order, squeeze a sequence into one vector, know facts by heart. A setting is one difficulty
of one task. Data are drawn, not stored: generate(setting, n, seed, split) -> inputs, targets, where
targets[:, t] is the right answer at position t, and -100 marks a position that is not scored.

  n sequences   T length   M vocabulary, ids in [0, M)   P pairs   L longest motif   B of a block

Three numbers stand beside each task: what a guess gets (chance), what a program that knows the rule
gets (oracle), and what no model exceeds (ceiling).

  python tasks.py      prints one small instance of each task; every oracle gets 1.000
"""
import argparse
import dataclasses
import difflib
import hashlib
import math
import numbers
import os
import platform
import re
import sysconfig
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

IGNORE = -100        # torch's cross_entropy skips this target by default

# -------------------------------------------------------------------------------------------------
# Settings


def unknown(field, value, valid):
    close = difflib.get_close_matches(str(value), valid, 1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return ValueError(f"{field} is {value!r}; permitted: {', '.join(valid)}{hint}")


def whole(field, value, low, high=math.inf, even=False, given=""):
    """value as an int, or a ValueError that names the field, its value and the permitted range."""
    is_int = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if is_int and low <= value <= high and not (even and value % 2):
        return int(value)                    # numpy's integers become Python's: same repr and json
    kind = "an even" if even else "a whole"
    span = f"at least {low}" if high == math.inf else f"{low} to {high}"
    raise ValueError(f"{field} is {value!r}; permitted: {kind} number, {span}{given}")


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
    num_tokens_to_copy: int = 16     # of selective copying
    max_motif: int = 3               # of fuzzy recall

    def __post_init__(self):
        if self.task not in TASKS:
            raise unknown("task", self.task, TASKS)
        task, noisy = TASKS[self.task], self.task == "noisy-in-context-recall"
        for field in dataclasses.fields(self):
            if field.type is int:
                low = 1 if noisy or field.name != "noise_vocab_size" else 0
                value = whole(field.name, getattr(self, field.name), low)
                object.__setattr__(self, field.name, value)          # self is frozen
        f = self.frac_noise
        if isinstance(f, bool) or not isinstance(f, numbers.Real) or not 0 <= f < 1:
            raise ValueError(f"frac_noise is {f!r}; permitted: a number in [0, 1)")
        if not noisy and (f or self.noise_vocab_size):
            raise ValueError(f"frac_noise is {f!r}, noise_vocab_size is {self.noise_vocab_size}; "
                             f"permitted: 0 and 0, for only noisy-in-context-recall has noise")
        object.__setattr__(self, "frac_noise", float(f))
        M, T = self.vocab_size, self.seq_len
        least_M, least_T, given = task.least(self)
        whole("vocab_size", M, least_M, given=given)
        whole("seq_len", T, least_T, even=task.even, given=given)
        if self.task == "selective-copying":
            n, given = self.num_tokens_to_copy, f" (seq_len is {T})"
            whole("num_tokens_to_copy", n, 1, (T - 1) // 2, given=given)
        if self.task == "fuzzy-in-context-recall":       # a motif is numbered within an int64
            most, given = int(62 / math.log2(M)), f" (vocab_size is {M})"
            whole("max_motif", self.max_motif, 1, most, given=given)

    @property
    def backbone(self):
        """The kind of model (model.py) that the task needs."""
        return TASKS[self.task].backbone

    @property
    def length(self):
        """Positions of inputs and targets."""
        return self.seq_len - TASKS[self.task].shifted


def halves(setting):
    """Number of keys, ids [0, keys), and of values, ids [keys, keys + values)."""
    M = setting.vocab_size - setting.noise_vocab_size    # noise has the last ids
    if setting.task == "memorization":                   # M/2 facts; id M-1 is the insert token
        return M // 2, M - 1 - M // 2
    if setting.task == "fuzzy-in-context-recall":        # id M-1 pads
        M -= 1
    return M // 2, M - M // 2


# -------------------------------------------------------------------------------------------------
# Randomness. numpy promises for all machines and versions that PCG64's raw bits stay the same; it
# does not promise that of Generator.integers and its like. So the bits are all that we take.

B = 256              # sequences drawn from one stream: their arrays fit the processor's cache


def dice(setting, seed, *label):
    """
    A function draw(high, *shape) -> (B, *shape) int64, uniform in [0, high), high <= 2^32. Each
    (setting, seed, label) has its own stream, so a new field in Setting changes all data. Only
    num_train and num_test don't count: with less training data a task keeps its test data and the
    first of its training data.
    """
    task = dataclasses.replace(setting, num_train=1, num_test=1)
    name = repr((dataclasses.astuple(task), seed, label)).encode()
    digest = hashlib.sha256(name).digest()               # hash() differs between processes
    bits = np.random.PCG64(np.random.SeedSequence(int.from_bytes(digest, "big")))

    def draw(high, *shape):
        if high > 1 << 32:
            raise ValueError(f"{high:,} kinds of token, permitted: at most 2^32; lower vocab_size")
        count = B * int(np.prod(shape))
        raw = bits.random_raw((count + 1) // 2).astype("<u8", copy=False).view("<u4")[:count]
        # x * high / 2^32 is biased by at most high / 2^32 (2e-6 for 8192 ids), and never retries.
        scaled = np.multiply(raw, high, dtype=np.uint64) >> np.uint64(32)
        return scaled.view(np.int64).reshape(B, *shape)

    return draw


def first_shown(codes):
    """codes (n, P) -> (n, P), for each place the first place of its row that has the same code."""
    order = np.argsort(codes, axis=1, kind="stable")     # equal codes become neighbours, in order
    ranked = np.take_along_axis(codes, order, 1)
    fresh = np.diff(ranked, axis=1, prepend=ranked[:, :1] - 1) != 0
    start = np.maximum.accumulate(np.where(fresh, np.arange(codes.shape[1]), 0), 1)
    first = np.empty_like(order)
    np.put_along_axis(first, order, np.take_along_axis(order, start, 1), 1)
    return first


# -------------------------------------------------------------------------------------------------
# The tasks: (setting, draw, split, seed) -> inputs, targets of one block


def shift(tokens, scored):
    """Autoregressive: at each of T-1 positions the target is the next token, where it is scored."""
    return tokens[:, :-1], np.where(scored, tokens, IGNORE)[:, 1:]


def recall(setting, draw, split, seed):
    """
    key value key value ... key value, the last key drawn among those shown before. In-context
    recall is the case without noise. Training is on every next token, noise too; a test is not.
    """
    (keys, values), P = halves(setting), setting.seq_len // 2
    noise = draw(2 ** 32, P) < setting.frac_noise * 2 ** 32          # (B, P)
    np.put_along_axis(noise, draw(P - 1, 1), False, 1)               # one pair always stays,
    noise[:, -1] = False                                             # and the last one
    key = np.where(noise, -1, draw(keys, P))         # -1 is a last column below, replaced by junk
    shown = np.zeros((B, keys + 1), bool)
    np.put_along_axis(shown, key[:, :-1], True, 1)
    key[:, -1] = np.where(shown[:, :keys], draw(2 ** 32, keys), -1).argmax(1)    # the highest die
    value = np.take_along_axis(keys + draw(values, keys + 1), key, 1)    # one value a key, anew
    junk = keys + values + draw(setting.noise_vocab_size, P, 2)
    tokens = np.where(noise[..., None], junk, np.stack([key, value], 2)).reshape(B, 2 * P)
    scored = np.full(tokens.shape, split == "train")
    if split == "test":
        scored[:, 1::2] = (first_shown(key) < np.arange(P)) & ~noise
    return shift(tokens, scored)


def motifs(draw, num_tokens, L, P):
    """(B, P, L) motifs without a repeated token: the p-th skips the p tokens before it."""
    tokens = np.empty((B, P, L), np.int64)
    for p in range(L):
        token = draw(num_tokens - p, P)              # its rank among the unused
        used = np.sort(tokens[..., :p], axis=2)
        for q in range(p):
            token += token >= used[..., q]
        tokens[..., p] = token
    return tokens


def fuzzy_pairs(setting, draw, split):
    """More pairs than fit: (B, P, 2L), a key then its value, -1 for no token; codes of the keys."""
    (keys, values), L, T = halves(setting), setting.max_motif, setting.seq_len
    P = T // 2 if split == "train" else T // (L + 1)     # T / the shortest pair
    key, value = motifs(draw, keys, L, P), keys + motifs(draw, values, L, P)
    length = 1 + draw(L, 2, P)                           # (B, 2, P): of keys, of values
    if split == "test":
        length[:, 0] = L                                 # every key is whole
    key = np.where(np.arange(L) < length[:, 0, :, None], key, -1)
    value = np.where(np.arange(L) < length[:, 1, :, None], value, -1)
    code = (key + 1) @ (keys + 1) ** np.arange(L)        # (B, P), a key's tokens as digits
    # One value a key: a key that was drawn before takes the value drawn with it then.
    value = np.take_along_axis(value, first_shown(code)[..., None], 1)
    return np.concatenate([key, value], 2), code


def fuzzy_order(draw, size, T):
    """
    Sizes (B, P) -> which pair stands in which slot (B, P+1), and how many slots are used (B, 1).
    Pair 0 is the probe: it has the last slot and one drawn among all before, so that it is always
    in the context. (In mad-lab 1.6% of the training sequences end before it was placed.)
    """
    P = size.shape[1]
    others = (size[:, 1:].cumsum(1) + 2 * size[:, :1] <= T).sum(1, keepdims=True)    # that fit
    early = draw(2 ** 32, 1) * (others + 1) >> 32                                    # 0 ... others
    slot = np.arange(P + 1)
    order = slot + (slot < early)                        # the others, in turn, around the probe
    order[(slot == early) | (slot == others + 1)] = 0
    return np.minimum(order, P - 1), others + 2          # (unused slots stay in range)


def fuzzy_recall(setting, draw, split, seed):
    """
    pad ... pad, then pairs of motifs: key tokens, value tokens, key tokens, value tokens, ... Keys
    and values share no token, so a run of key tokens is one key and the run of value tokens after
    it its value. Where a value ends, only its earlier appearance tells.
    """
    L, T = setting.max_motif, setting.seq_len
    pair, code = fuzzy_pairs(setting, draw, split)
    order, used = fuzzy_order(draw, (pair >= 0).sum(2), T)           # (B, S), (B, 1)
    pair = np.take_along_axis(pair, order[..., None], 1)             # (B, S, 2L)
    slot = np.arange(order.shape[1])
    exists = (pair >= 0) & (slot < used)[..., None]
    answer = np.full(pair.shape, split == "train")
    if split == "test":
        again = first_shown(np.take_along_axis(code, order, 1)) < slot
        answer[..., L:] = again[..., None]
    # Row by row, the tokens that exist are, in this order, the end of the sequence.
    filled = np.arange(T) >= T - exists.sum((1, 2))[:, None]         # (B, T)
    tokens, scored = np.full((B, T), setting.vocab_size - 1), np.zeros((B, T), bool)
    tokens[filled], scored[filled] = pair[exists], answer[exists]
    return shift(tokens, scored)


def recall_oracle(setting, inputs, seed):
    """
    The rule of induction heads: what followed this context the first time? The context is the key,
    its tokens as digits of one number, and how many tokens of its value were read since.
    """
    keys, values = halves(setting)
    L = setting.max_motif if setting.task.startswith("fuzzy") else 1
    is_key, is_value = inputs < keys, (keys <= inputs) & (inputs < keys + values)
    key, read = np.zeros((2, len(inputs)), np.int64)
    context = np.empty_like(inputs)
    for t, token in enumerate(inputs.T):
        longer = np.where(read == 0, key, 0) * (keys + 1) + token + 1    # or another key begins
        key = np.where(is_key[:, t], longer, key)
        read = np.where(is_key[:, t], 0, read + 1)
        # A key of less than L tokens may go on (in training), until a token of its value is read.
        decided = np.where(is_key[:, t], key >= (keys + 1) ** (L - 1), is_value[:, t])
        context[:, t] = np.where(decided, key * (L + 1) + read, -1 - t)      # -1 - t: only here
    first = first_shown(context)
    following = np.roll(np.where(is_value, inputs, -1), -1, 1)       # -1 where the value has ended
    answer = np.take_along_axis(following, first, 1)
    return np.where(first < np.arange(inputs.shape[1]), answer, -1)


def selective_copying(setting, draw, split, seed):
    """
    n tokens, blanks among them, the copy token, n blanks at which the n tokens are the targets: T
    in all, so T - 2n - 1 blanks are inserted. As in mad-lab each picks the token it stands before.
    """
    n, T, M = setting.num_tokens_to_copy, setting.seq_len, setting.vocab_size
    token, owner = draw(M - 2, n), draw(n, T - 2 * n - 1)
    owner += n * np.arange(B)[:, None]                               # one histogram for all rows
    blanks = np.bincount(owner.ravel(), minlength=B * n).reshape(B, n)
    inputs, targets = np.full((B, T), M - 2), np.full((B, T), IGNORE)
    np.put_along_axis(inputs, blanks.cumsum(1) + np.arange(n), token, 1)
    inputs[:, T - n - 1] = M - 1
    targets[:, T - n:] = token
    return inputs, targets


def copying_oracle(setting, inputs, seed):
    n, answer = setting.num_tokens_to_copy, np.full_like(inputs, -1)
    blank = inputs >= setting.vocab_size - 2             # or the copy token; the others come first
    answer[:, -n:] = np.take_along_axis(inputs, blank.argsort(1, kind="stable")[:, :n], 1)
    return answer


def compression(setting, draw, split, seed):
    """T-1 random tokens and the compression token, which is a target too, as in mad-lab."""
    inputs = np.full((B, setting.seq_len), setting.vocab_size - 1)
    inputs[:, :-1] = draw(setting.vocab_size - 1, setting.seq_len - 1)
    return inputs, inputs


def facts(setting, seed):
    """The fixed map of memorization, (keys,): it belongs to setting and seed, not to a split."""
    keys, values = halves(setting)
    return keys + dice(setting, seed, "facts")(values, -(-keys // B)).ravel()[:keys]


def memorization(setting, draw, split, seed):
    """key insert key insert ...; at the insert token the target is the value, never shown."""
    T = setting.seq_len
    key = draw(halves(setting)[0], T // 2)
    inputs, targets = np.full((B, T), setting.vocab_size - 1), np.full((B, T), IGNORE)
    inputs[:, 0::2], targets[:, 1::2] = key, facts(setting, seed)[key]
    return inputs, targets


def memorization_oracle(setting, inputs, seed):
    answer = np.full_like(inputs, -1)
    answer[:, 1::2] = facts(setting, seed)[inputs[:, 0::2]]
    return answer


# -------------------------------------------------------------------------------------------------
# The table. To add a task: its functions, a line here and its baseline below.


@dataclass(frozen=True)
class Task:
    """What a task is, and what its scores are read against."""
    about: str                 # the question that it asks
    make: Callable             # (setting, draw, split, seed) -> inputs, targets (B, T) of one block
    oracle: Callable           # (setting, inputs (n, T), seed) -> right answers, -1 where open
    least: Callable            # setting -> least vocab_size, least seq_len, what they depend on;
                               # at least two keys, values or tokens: one leaves no choice
    chance: Callable = lambda setting: 1 / halves(setting)[1]        # one of the values
    even: bool = False         # T must be
    shifted: bool = False      # the next token is the target: T - 1 positions
    backbone: str = "lm"       # the kind of model (model.py) that it needs


TASKS = {
    "in-context-recall": Task(
        "which value came with this key?", recall, recall_oracle,
        lambda s: (4, 4, ""), even=True, shifted=True),
    "fuzzy-in-context-recall": Task(
        "the same, but keys and values are motifs of several tokens", fuzzy_recall, recall_oracle,
        # Each half of the ids holds a motif without repeats, and there is a pad.
        lambda s: (2 * max(s.max_motif, 2) + 1, 4 * s.max_motif, f" (max_motif is {s.max_motif})"),
        shifted=True),
    "noisy-in-context-recall": Task(
        "the same, but some pairs are replaced by noise", recall, recall_oracle,
        lambda s: (4 + s.noise_vocab_size, 4, f" (noise_vocab_size is {s.noise_vocab_size})"),
        even=True, shifted=True),
    "selective-copying": Task(
        "repeat the tokens, skip the blanks", selective_copying, copying_oracle,
        lambda s: (4, 3, ""), lambda s: 1 / (s.vocab_size - 2)),
    "compression": Task(
        "the vector at the last position must hold the whole sequence", compression,
        lambda setting, inputs, seed: inputs.copy(), lambda s: (3, 2, ""),
        # The last of T tokens is always the same: no guess.
        lambda s: (1 + (s.seq_len - 1) / (s.vocab_size - 1)) / s.seq_len, backbone="autoencoder"),
    "memorization": Task(
        "which value has this key in the task's one fixed map?", memorization, memorization_oracle,
        lambda s: (5, 2, ""), even=True),
}

BASELINES = {s.task: s for s in (
    Setting("in-context-recall"),
    Setting("fuzzy-in-context-recall"),
    Setting("noisy-in-context-recall", vocab_size=32, noise_vocab_size=16, frac_noise=0.2),
    Setting("selective-copying", seq_len=256),
    Setting("compression", seq_len=32),
    Setting("memorization", vocab_size=256, seq_len=32, num_train=256),
)}

_RECALL = {"vocab_size": (32, 64, 128), "seq_len": (256, 512, 1024),
           "num_train": (6400, 3200, 1600, 800)}
CHANGES = {          # what makes a task harder, one variable at a time
    "in-context-recall": _RECALL,
    "fuzzy-in-context-recall": _RECALL,
    "noisy-in-context-recall": {**_RECALL, "vocab_size": (48, 80, 144), "frac_noise": (.4, .6, .8)},
    "selective-copying": {**_RECALL, "seq_len": (512, 1024), "num_tokens_to_copy": (32, 64, 96)},
    "compression": {**_RECALL, "seq_len": (64, 128, 256)},
    "memorization": {"vocab_size": (512, 1024, 2048, 4096, 8192)},
}


def mad_settings(task=None):
    """The protocol's 66 settings, or those of one task; a baseline comes before its changes."""
    if task is not None and task not in TASKS:
        raise unknown("task", task, TASKS)
    return [dataclasses.replace(BASELINES[name], **change)
            for name in (CHANGES if task is None else [task])
            for change in [{}, *({field: value} for field, values in CHANGES.get(name, {}).items()
                                 for value in values)]]


def generate(setting, n, seed, split):
    """
    inputs, targets: int64 (n, setting.length), the same for the same arguments on every machine.
    The first n sequences of a larger n are the same ones. The splits "train" and "test" come from
    independent streams: they share a sequence only by chance, where few are possible.
    """
    if split not in ("train", "test"):
        raise unknown("split", split, ("train", "test"))
    n, seed = whole("n", n, 1), whole("seed", seed, 0)
    inputs, targets = np.empty((2, n, setting.length), np.int64)
    for i in range(0, n, B):
        x, y = TASKS[setting.task].make(setting, dice(setting, seed, split, i), split, seed)
        inputs[i:i + B], targets[i:i + B] = x[:n - i], y[:n - i]
    return inputs, targets


# -------------------------------------------------------------------------------------------------
# What a score is read against


def chance(setting):
    """Expected test accuracy of a blind guess: 1 in the number of possible answers."""
    return TASKS[setting.task].chance(setting)


def ceiling(setting):
    """
    Test accuracy that no model is expected to exceed: 1, but for memorization the part of the facts
    that the training data show (0.913 over its settings). Guessing the rest adds less than 0.0002.
    """
    if setting.task != "memorization":
        return 1.0
    draws = setting.num_train * (setting.seq_len // 2)
    return 1 - (1 - 1 / halves(setting)[0]) ** draws


def oracle(setting, inputs, seed=0):
    """
    The right answers, (n, T), by a rule; -1 where the task doesn't determine one. At position t it
    reads inputs[:, :t+1] only (compression: all); memorization has the facts of the data's seed.
    """
    return TASKS[setting.task].oracle(setting, inputs, seed)


def accuracy(predictions, targets):
    """Part of the scored positions that are right."""
    return float((predictions == targets)[targets != IGNORE].mean())


# -------------------------------------------------------------------------------------------------
# Text, the seventh task: one long array of token ids, memory-mapped, so that its size is no matter

PIECE = 1 << 22      # characters or tokens read at a time
SIZES = {"bytes": 256, "gpt2": 50257, "r50k_base": 50257, "cl100k_base": 100277,
         "o200k_base": 200019}                           # known without tiktoken's download
MAGICS = (20240520, 20240801)                            # of llm.c's shards, for gpt-2 and llama-3
SHARDS = {1: "<u2", 7: "<u4"}                            # their versions
LIBRARY = f"standard library of Python {platform.python_version()}"       # the default corpus
NOT_CORPUS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def get_encoding(name):
    """tiktoken's encoding. Its first use needs the network, for which tiktoken waits for ever."""
    import tiktoken
    if name not in tiktoken.list_encoding_names():
        raise unknown("tokenizer", name, ["bytes", *tiktoken.list_encoding_names()])
    found = {"error": "no answer in 20 seconds"}

    def fetch():
        try:
            found["encoding"] = tiktoken.get_encoding(name)
        except Exception as error:           # no network, proxy, a captive portal's wrong hash, ...
            found["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:120]

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(20)
    if "encoding" in found:
        return found["encoding"]
    raise ValueError(
        f"cannot get tiktoken's {name} ({found['error']}). Use --tokenizer bytes; or, on a machine "
        f"with network, run TIKTOKEN_CACHE_DIR=DIR python -c \"import tiktoken; tiktoken."
        f"get_encoding('{name}')\", copy DIR to this machine and set TIKTOKEN_CACHE_DIR to it")


def vocab_size(tokenizer):
    return SIZES.get(tokenizer) or get_encoding(tokenizer).n_vocab


def read_text(files):
    """
    The files as one text, in pieces. They end between a letter or digit and a newline, where no
    token of any tokenizer reaches across: encoded piece by piece the text has the same tokens
    (unless 4 million characters have no such place).
    """
    rest = ""
    for path in files:
        try:
            with open(path, encoding="utf-8", newline="") as file:
                while piece := file.read(PIECE):
                    rest += piece
                    cut = re.match(r".*[^\W_](?=\r?\n)", rest, re.DOTALL)   # the last such place
                    end = cut.end() if cut else len(rest) if len(rest) >= PIECE else 0
                    yield rest[:end]
                    rest = rest[end:]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error.reason}): convert it, or save its "
                             f"bytes as a uint8 .npy") from None
    yield rest


def tokenize(files, tokenizer):
    """Ids of the files' text, from the cache if this content was tokenized before."""
    from tqdm import tqdm
    digest, size = hashlib.sha256(), sum(f.stat().st_size for f in files)
    for text in read_text(files):                        # finds bad text before any work is done
        digest.update(text.encode())
    if not size:
        raise ValueError(f"{files[0]} holds no text")
    if tokenizer == "bytes" and len(files) == 1:
        return np.memmap(files[0], np.uint8, "r")
    dtype = np.min_scalar_type(vocab_size(tokenizer) - 1)            # uint8, uint16 or uint32
    folder = Path(os.environ.get("NANOMAD_CACHE") or Path.home() / ".cache" / "nanomad")
    path = folder / f"{digest.hexdigest()}-{tokenizer}.bin"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        encode = str.encode if tokenizer == "bytes" else get_encoding(tokenizer).encode_ordinary
        temporary = path.with_suffix(f".{os.getpid()}")
        try:
            with open(temporary, "wb") as file, tqdm(total=size, unit="B", unit_scale=True,
                                                     desc=f"{tokenizer} tokens") as bar:
                for text in read_text(files):
                    np.array(list(encode(text)), dtype).tofile(file)
                    bar.update(len(text.encode()))
            os.replace(temporary, path)                  # whole, or not at all
        finally:
            temporary.unlink(missing_ok=True)
    return np.memmap(path, dtype, "r")


def open_tokens(path):
    """.npy; llm.c's shards (a header of 256 int32: magic, version, count); nanoGPT's raw uint16."""
    if path.suffix == ".npy":
        try:
            tokens = np.lib.format.open_memmap(path, mode="r")
        except Exception as error:           # a damaged header ends in errors of many kinds
            raise ValueError(f"{path} is not a readable .npy of integers: {error}") from None
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not len(tokens):
            raise ValueError(f"{path} is {tokens.dtype} {tokens.shape}; needed: integers (n,)")
        return tokens
    size = path.stat().st_size
    magic, version, count = (np.fromfile(path, "<i4", 3).tolist() + [0, 0, 0])[:3]
    if magic in MAGICS:                                  # (as raw uint16 no token of gpt2's)
        if version not in SHARDS:
            raise ValueError(f"{path} is a shard of version {version}; known: {list(SHARDS)}")
        promised = 1024 + count * np.dtype(SHARDS[version]).itemsize
        if size != promised or count < 1:
            raise ValueError(f"{path} has {size} bytes, but its header says {promised}: truncated?")
        return np.memmap(path, SHARDS[version], "r", 1024)
    if not size or size % 2:
        raise ValueError(f"{path} has {size} bytes: neither a shard nor raw uint16 tokens")
    return np.memmap(path, "<u2", "r")


def library_files():
    """Every .py file of Python's standard library but its tests, in order of path."""
    root, files = Path(sysconfig.get_paths()["stdlib"]), []
    for folder, inside, names in os.walk(root):
        inside[:] = set(inside) - NOT_CORPUS             # os.walk skips what is removed here
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise ValueError(f"{root} has no .py files: this Python comes without sources; give --data")
    return sorted(files, key=lambda f: f.relative_to(root).as_posix())


def pieces(tokens):
    return (tokens[i:i + PIECE] for i in range(0, len(tokens), PIECE))


def load_tokens(path, tokenizer="bytes"):
    """
    Token ids (n,) of a UTF-8 text file, of a folder of them (in order of path, as one text), or of
    a .bin or .npy made with that tokenizer; of the default corpus if path is None. tokenizer is
    "bytes" or any of tiktoken's. What is wrong with the data is a ValueError of one line, a path
    that isn't there a FileNotFoundError.
    """
    M = vocab_size(tokenizer)                            # an unknown tokenizer is an error here
    if path is None:
        return tokenize(library_files(), tokenizer)
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.suffix in (".npy", ".bin") and path.is_file():
        tokens = open_tokens(path)
        ends = [end for piece in pieces(tokens) for end in (piece.min(), piece.max())]
        if min(ends) < 0 or max(ends) >= M:
            raise ValueError(f"{path} has token ids {min(ends)} to {max(ends)}, beyond the {M} of "
                             f"{tokenizer}: name the tokenizer it was made with, such as "
                             f"--tokenizer gpt2")
        return tokens
    hidden = lambda f: any(part.startswith(".") for part in f.relative_to(path).parts)
    files = [f for f in sorted(path.rglob("*")) if f.is_file() and not hidden(f)]
    files = [path] if path.is_file() else files
    if not files:
        raise ValueError(f"{path} is a folder without files")
    for f in files:
        if f.suffix in (".npy", ".bin", ".parquet"):
            raise ValueError(f"{f} is not text: give a .bin or .npy by its own path, and save the "
                             f"text of a .parquet as .txt")
    return tokenize(files, tokenizer)


def token_stats(tokens, tokenizer="bytes"):
    """(how many, the vocabulary they need, bytes of text a token or None if unknown: offline)."""
    n, least = len(tokens), int(tokens.max()) + 1
    if tokenizer == "bytes":
        return n, least, 1.0
    try:
        encoding = get_encoding(tokenizer)               # end-of-text tokens stand for no byte
        count = sum(len(encoding.decode_bytes(piece[piece != encoding.eot_token].tolist()))
                    for piece in pieces(tokens))
    except ValueError:
        return n, least, None
    except KeyError as error:                            # an id between the vocabulary's
        raise ValueError(f"these are not tokens of {tokenizer}: {error}") from None
    return n, least, count / n


# -------------------------------------------------------------------------------------------------
# What `python tasks.py` prints


def show(setting, seed):
    """One short test sequence, and the accuracies on the test data of the paper's baseline."""
    width = len(str(setting.vocab_size - 1)) + 1
    (x,), (y,) = generate(setting, 1, seed, "test")
    print(f"{setting.task}: {TASKS[setting.task].about}")
    rows = {"input": x, "target": ["." if t == IGNORE else t for t in y],
            "scored": ["" if t == IGNORE else "^" * len(str(t)) for t in y]}
    for name, cells in rows.items():
        print(f"  {name:8}" + "".join(f"{cell:>{width}}" for cell in cells))
    base = BASELINES[setting.task]
    inputs, targets = generate(base, base.num_test, seed, "test")
    print(f"  At baseline (M {base.vocab_size}, T {base.seq_len}, {base.num_test} tests): oracle "
          f"{accuracy(oracle(base, inputs, seed), targets):.3f}, chance {chance(base):.3f}, "
          f"ceiling {ceiling(base):.3f}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Show one small instance of each MAD task.")
    parser.add_argument("--task", choices=list(TASKS), metavar="TASK",
                        help=f"only this one of {', '.join(TASKS)}")
    parser.add_argument("--seed", type=int, default=0, help="of the data (default 0)")
    args = parser.parse_args()
    if args.seed < 0:
        parser.error(f"--seed is {args.seed}; permitted: at least 0")
    for task in [args.task] if args.task else TASKS:
        T = {"compression": 16, "memorization": 20}.get(task, 28)
        show(dataclasses.replace(BASELINES[task], seq_len=T, num_tokens_to_copy=6), args.seed)
