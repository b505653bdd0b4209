"""
How a model learns: one run of one task, from the command line to a folder of results.

    python train.py --arch hybrid                       in-context recall, two minutes on a laptop
    python train.py --arch transformer                  the same steps: it stays near 0.3
    python train.py --arch mamba --task compression     any architecture, any of the six tasks
    python train.py --layers "hyena swiglu" --lr 5e-4   any pattern of layers.py
    python train.py --arch hybrid --task text           a language model of Python's own sources
    python train.py --sample out/hybrid_text --prompt "def "     what it writes
    torchrun --nproc_per_node 2 train.py --task text    the same run, shared by two processes
    python train.py --arch hybrid --task mad            the MAD score: a grid of runs, resumable
    python train.py -h                                  every option

Protocol (Poli et al. 2024, appendix): AdamW with betas (0.9, 0.98), cosine decay to 1e-6,
no warmup, no clipping, batch 128; a run may end at 99.9% test accuracy. The paper trains for 200
epochs (--epochs 200); the default is 4, enough to see what an architecture is good for.

A run's folder, out/NAME/, holds config.json, log.jsonl (an object a line), ckpt.pt, the one before
it while the run goes on (ckpt.previous.pt), best.pt (the parameters of the best test), result.json.
A run stopped at any moment goes on by the same command, or by --resume FOLDER, and on a CPU ends
with the same parameters and scores, bit for bit, as one that never stopped. (On a GPU, sums of
atomic additions differ in the last bits from run to run.)

How a model learns is in two chapters, "One step, one test" and "A run"; begin there with `scored`
and `Run.one_step`. How a score is made of runs is in "The MAD protocol". The others see to it that
a night of compute is not lost: options, machine, files, signals.

  B batch   T time   M vocabulary
"""
import argparse
import ast
import codecs
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import tasks
from layers import (LAYERS, count_state, fastest_dtype, mixing, peak_memory, present, seconds,
                    tune_allocator)
from model import (ARCHS, Model, decayed, find_pattern, ledger, parse_pattern, pick, show_ledger,
                   stripe, total)

# =================================================================================================
# The command line: a field is an option, its help text beside it
# =================================================================================================


def option(default, text, **more):
    """
    A field of Options. more:
      low, above, below   its range: low <= value, above < value, value < below
      choices             its values
      of                  "MAD" or "text", the only tasks
    that read it; how=True: it says how to run, not what, so it is no part of a run's identity.
    """
    return dataclasses.field(default=default, metadata=dict(help=text, **more))


def choice(default, *others, text):
    return option(default, f"{text} (one of {', '.join([default, *others])})",
                  choices=(default, *others))


@dataclass
class Options:
    """A command line. Raises ValueError naming a bad option, its value and the permitted range."""

    def __post_init__(self):
        for f in dataclasses.fields(self):
            check_field(f, value := getattr(self, f.name))
            if field_type(f) is float and value is not None:
                setattr(self, f.name, float(value))       # 0 and 0.0 are the same option


@dataclass
class Common(Options):
    """The options that a run shares with the MAD protocol, which is a grid of runs."""
    arch: str = option("hybrid", "architecture; `python model.py` shows them")
    layers: str | None = option(None, "pattern of layers instead of an architecture, such as "
                                "'mamba swiglu'")
    task: str = choice("in-context-recall", *[t for t in tasks.TASKS if t != "in-context-recall"],
                       "text", text="what to learn")
    dim: int = option(128, "width D of the model", low=1)
    seed: int = option(0, "seed of parameters, data and their order", low=0)
    device: str = option("auto", "cuda, mps or cpu; auto: the first of these that is there")
    dtype: str = choice("auto", "float32", "bfloat16", text="precision of matrix products; auto "
                        "measures which is faster. All else needs float32, so TF32 stays off")
    compile: str = choice("auto", "on", "max-autotune", "off", text="torch.compile; auto times a "
                          "step and compiles if the run is long enough for that to pay; "
                          "max-autotune also tries kernels for minutes, for long runs on a GPU")
    out: str = option("out", "folder for the runs' folders")
    schedule: str = choice("cosine", "constant", text="the learning rate's course")
    warmup: int = option(0, "steps in which the learning rate rises from 0", low=0)
    min_lr: float = option(1e-6, "learning rate at the end of the cosine", low=0.0)
    decay: str = choice("matrices", "all", text="what weight decay applies to; all: also norms, "
                        "biases, filters and Mamba's A and D")
    beta2: float = option(0.98, "AdamW's second beta (mad-lab really ran 0.999)", low=0.0,
                          below=1.0)
    clip: float | None = option(None, "scale gradients of a larger norm down to this one (the "
                                "default: never)", above=0.0)
    nonfinite: str = choice("stop", "skip", text="at a loss or gradient of inf or nan stop, or "
                            "skip the step (to know, the program then waits for every step)")
    early_stop: float = option(0.999, "stop at this test accuracy; above 1: never", low=0.0,
                               of="MAD")

    def __post_init__(self):
        super().__post_init__()
        if self.layers is not None and self.arch != Common.arch:
            raise ValueError(f"arch is {self.arch!r} and layers {self.layers!r}: one or the other")
        if self.schedule == "constant" and self.min_lr != Common.min_lr:
            raise ValueError(f"min_lr is {self.min_lr!r}, but a constant schedule has no end to "
                             f"fall to: leave it out")

    @property
    def label(self):
        return f"{self.layers}()" if self.layers in ARCHS else self.layers or self.arch


@dataclass
class TrainConfig(Common):
    """Train one architecture on one task."""
    lr: float = option(1e-3, "peak learning rate (the paper's grid: 1e-4 5e-4 1e-3)", low=0.0)
    weight_decay: float = option(0.1, "AdamW's weight decay (the paper's grid: 0 0.1)", low=0.0)
    batch_size: int | None = option(None, "sequences a step (the default: 128; text: 32)", low=1)
    accumulate: int = option(1, "compute a batch in so many parts, to save memory (text)", low=1,
                             of="text")
    steps: int | None = option(None, "optimizer steps, instead of epochs (text: 2000)", low=1)
    epochs: int = option(4, "passes over the training data (the paper: 200)", low=1, of="MAD")
    eval_every: int | None = option(None, "steps between tests (the default: half an epoch; text: "
                                    "a tenth of the run)", low=1)
    seq_len: int | None = option(None, "length T of the task's sequences (the default of this and "
                                 "the next four: the task's baseline)", low=1, of="MAD")
    vocab_size: int | None = option(None, "vocabulary of the task", low=1, of="MAD")
    num_train: int | None = option(None, "number of training sequences", low=1, of="MAD")
    frac_noise: float | None = option(None, "share of the pairs that are noise (noisy recall)",
                                      low=0.0, of="MAD")
    num_tokens_to_copy: int | None = option(None, "tokens to copy (selective copying)", low=1,
                                            of="MAD")
    data: str | None = option(None, "text file, folder of them, .bin or .npy of tokens (the "
                              "default: the sources of Python's standard library)", of="text")
    tokenizer: str = option("bytes", "bytes or one of tiktoken's, such as gpt2", of="text")
    context: int | None = option(None, "tokens in a window of text (the default: 128)", low=1,
                                 of="text")
    name: str | None = option(None, "name of the run's folder (the default: made from the options)")
    detect: bool = option(False, "watch every layer, which is slow, and stop at the first inf or "
                          "nan in an output or gradient", how=True)
    resume: str | None = option(None, "go on with the run in this folder, with its own options",
                                how=True)

    def __post_init__(self):
        super().__post_init__()
        if self.steps is not None and self.epochs != TrainConfig.epochs:
            raise ValueError(f"epochs is {self.epochs} and steps {self.steps}: one or the other")
        base = tasks.BASELINES.get(self.task)
        for f in dataclasses.fields(self):
            if getattr(self, f.name) is None:
                setattr(self, f.name, self.default(f))
            value = getattr(self, f.name)
            if f.name in SETTING_OPTIONS and base and value == getattr(base, f.name):
                setattr(self, f.name, None)   # the same run, by the same name
            check_use(f, getattr(self, f.name), self.task)
        if self.min_lr > max(self.lr, 1e-6):
            raise ValueError(f"min_lr is {self.min_lr!r}; permitted: at most lr, {self.lr!r}")
        self.pattern, self.setting, self.run_name     # looked at now, so that mistakes end here
        if self.warmup >= planned_steps(self):
            raise ValueError(f"warmup is {self.warmup}; permitted: less than the run's "
                             f"{planned_steps(self)} steps")

    def default(self, f):
        """The default of a field for this task."""
        own = TEXT_DEFAULTS if self.task == "text" else MAD_DEFAULTS
        return own.get(f.name, f.default)

    @property
    def pattern(self):
        pattern = find_pattern(self.arch) if self.layers is None else self.layers
        for name, _ in parse_pattern(pattern):
            if name not in LAYERS:
                raise tasks.unknown("layer", name, LAYERS)
        return pattern

    @property
    def setting(self):
        """The task's baseline setting, changed by the options; None for text."""
        if self.task == "text":
            return None
        changes = {k: getattr(self, k) for k in SETTING_OPTIONS if getattr(self, k) is not None}
        if self.task != "selective-copying" and "num_tokens_to_copy" in changes:
            raise ValueError(f"num_tokens_to_copy is {self.num_tokens_to_copy}, but --task "
                             f"{self.task} has no use for it: only selective-copying takes it")
        return dataclasses.replace(tasks.BASELINES[self.task], **changes)

    @property
    def run_name(self):
        """--name, or architecture and task and whatever else is not the default."""
        if self.name is not None:
            return safe_name(self.name)
        parts = [f"{name}={Path(value).name if name == 'data' else value}"
                 for name, value in self.changed()]
        return safe_name("_".join([self.label, self.task, *parts]))

    def changed(self):
        """[(option, value)] that are not this task's defaults, without names and folders."""
        return [(f.name.replace("_", "-"), getattr(self, f.name)) for f in dataclasses.fields(self)
                if getattr(self, f.name) != self.default(f) and not f.metadata.get("how")
                and f.name not in ("arch", "layers", "task", "out", "name")]


def shape_of(run):
    """What the shapes of a MAD run's tensors depend on, and so its model and compiled graph."""
    s = run.setting
    return (run.pattern, run.dim, s.backbone, s.length, s.vocab_size,
            min(s.num_train, run.batch_size))


def planned_steps(run):
    if run.steps is not None:
        return run.steps
    n = run.setting.num_train
    return run.epochs * (n // min(run.batch_size, n))


SETTING_OPTIONS = ("seq_len", "vocab_size", "num_train", "frac_noise", "num_tokens_to_copy")
MAD_DEFAULTS = dict(batch_size=128)
TEXT_DEFAULTS = dict(batch_size=32, context=128, steps=2000)      # minutes on two CPU cores


def field_type(f):
    """The type of a field without its None: int for `int | None`."""
    return f.type.__args__[0] if isinstance(f.type, types.UnionType) else f.type


def check_field(f, value):
    kind, low = field_type(f), f.metadata.get("low")
    if value is None and f.default is None:
        return
    fits = (isinstance(value, (int, float) if kind is float else kind)
            and isinstance(value, bool) == (kind is bool))        # to Python, True is an int
    if not fits or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{f.name} is {value!r}; it takes a {kind.__name__}")
    if low is not None and value < low:
        raise ValueError(f"{f.name} is {value!r}; permitted: at least {low}")
    above = f.metadata.get("above")
    if above is not None and value <= above:
        raise ValueError(f"{f.name} is {value!r}; permitted: above {above}")
    below = f.metadata.get("below", 1 << 31 if kind is int else None)    # what 32-bit indices hold
    if below is not None and value >= below:
        raise ValueError(f"{f.name} is {value!r}; permitted: below {below}")
    if "choices" in f.metadata and value not in f.metadata["choices"]:
        raise tasks.unknown(f.name, value, f.metadata["choices"])


def check_use(f, value, task):
    """An option that this task doesn't read is an error, unless it is left at its default."""
    of = f.metadata.get("of")
    if value != f.default and of and (of == "text") != (task == "text"):
        raise ValueError(f"{f.name} is {value!r}, but --task {task} has no use for it: it is for "
                         f"{'--task text' if of == 'text' else 'the MAD tasks'} only")


def safe_name(name):
    """A file name without separators: nothing is written outside --out by accident."""
    name = "".join(c if c.isalnum() or c in "-_.=,+" else "-" for c in name).strip(".-")
    if not name:
        raise ValueError("name: needs at least one letter or digit")
    if len(name) > 200:                   # file systems end at 255; what is cut still counts
        name = name[:190] + "-" + hashlib.sha256(name.encode()).hexdigest()[:8]
    return name


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)             # one line, as after any other mistake: no usage


def parse_args(argv=None, kind=TrainConfig):
    """
    argv -> TrainConfig (or other Options); a mistake ends in one line that names the way out, and
    exit code 2.
    """
    parser = Parser(
        description=kind.__doc__.strip().split("\n")[0], allow_abbrev=False,
        epilog=None if kind is not TrainConfig else "architectures: " + ", ".join(ARCHS)
        + ". Text from a run: train.py --sample out/RUN -h; its layers: --show out/RUN. The MAD "
        "protocol: train.py --task mad -h. Speed: train.py --benchmark -h")
    for f in dataclasses.fields(kind):
        shown = f.default is not None and f.default is not False and f.default != ""
        how = (dict(action="store_true") if field_type(f) is bool else
               dict(type=field_type(f), metavar=field_type(f).__name__.upper()))
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, **how,
                            help=f.metadata["help"] + f" (default {f.default})" * shown)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        valid = [o for a in parser._actions for o in a.option_strings]
        raise tasks.unknown("option", unknown[0], valid)
    config = kind(**vars(args))
    return resumed(config) if getattr(config, "resume", None) is not None else config


def resumed(config):
    """The options of the run in the folder config.resume; config may have none of its own."""
    fields, path = dataclasses.fields(config), Path(config.resume) / "config.json"
    own = [f.name for f in fields if not f.metadata.get("how")
           and getattr(config, f.name) != config.default(f)]
    if own:
        raise ValueError(f"--resume goes on with the options of {config.resume}: leave out "
                         f"--{own[0].replace('_', '-')}")
    kept = read_object(path)
    options = {f.name: kept.pop(f.name) for f in fields if f.name in kept}
    strange = set(kept) - {"pattern", "code", "setting", "command"}
    if strange:
        raise ValueError(f"{path} has {min(strange)!r}, which this code doesn't know")
    return TrainConfig(**{**options, "resume": config.resume, "detect": config.detect,
                          "out": str(Path(config.resume).parent)})


# =================================================================================================
# What this machine can do. Each choice comes with its reason, which is printed before training.
# =================================================================================================


def first_line(error):
    """The first line of an error's message, which may be empty."""
    return str(error).partition("\n")[0][:150]


def choose_device(wanted):
    """"cuda", "mps" or "cpu", and why."""
    if wanted != "auto":
        try:
            if wanted not in ("cuda", "mps", "cpu"):
                raise RuntimeError("it is none of cuda, mps, cpu (CUDA_VISIBLE_DEVICES chooses "
                                   "among cards)")
            torch.empty(1, device=wanted)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {wanted!r} is not available here: "
                             f"{first_line(error)}; try --device cpu") from None
        return wanted, "asked for"
    if torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return "mps", "Apple GPU"
    return "cpu", f"neither CUDA nor MPS is there; {torch.get_num_threads()} threads"


def has_compiler():
    """The name of a C++ compiler on the PATH, which torch.compile needs on a CPU, or None."""
    names = [os.environ.get("CXX"), "cl"] if platform.system() == "Windows" else \
            [os.environ.get("CXX"), "g++", "clang++"]
    return next((n for n in names if n and shutil.which(n)), None)


# The share of a step that compiling saves, and what it costs, as measured for the hybrid on two CPU
# cores. (On a GPU these are guesses.)
SAVED_BY_COMPILING, COMPILE_SECONDS = 0.28, 35


def choose_compile(wanted, device, steps, step_seconds):
    """Whether to compile, and why. step_seconds: one uncompiled step, measured."""
    if wanted != "auto":
        return wanted != "off", "asked for"
    if device == "mps":
        return False, "not tried on Apple GPUs"
    if device == "cpu" and not has_compiler():
        return False, "there is no C++ compiler on the PATH (install g++ to train faster)"
    saved, cost = steps * step_seconds * SAVED_BY_COMPILING, COMPILE_SECONDS
    about = f"{steps:,} steps of {step_seconds:.2f} s: it would save about {saved:.0f} s"
    return saved > cost, f"{about} and cost about {cost} s"


# Dense bfloat16 FLOPs a second (sums in float32) and GB of memory, from NVIDIA's data sheets; the
# key is a part of torch's name for the card.
CARDS = {"A100": (312e12, 80), "H100 PCIe": (756e12, 80), "H100": (989e12, 80),
         "H200": (989e12, 141), "L40S": (362e12, 48), "RTX 4090": (165e12, 24),
         "RTX 3090": (71e12, 24)}


def peak_flops(device, dtype):
    """Of this card in bfloat16; None in float32, and where the table lacks it (every CPU)."""
    known = device == "cuda" and dtype == torch.bfloat16
    name = torch.cuda.get_device_name() if known else ""
    return next((flops for part, (flops, _) in CARDS.items() if part in name), None)


def torchrun_place():
    """(rank, count) of this process among torchrun's; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Ranks:
    """
    The processes that share a text run: those that torchrun started, or this one alone.

    Each computes its rows of every batch, and one all_reduce takes the mean of all gradients. This
    is done by hand, not by DDP, which would wrap the model: so the compiled graph and the names in
    the checkpoint don't depend on the number of processes. The price: no gradient is sent while
    others are still being computed.
    """

    def __init__(self, task):
        self.rank, self.count = torchrun_place() if task == "text" else (0, 1)

    def connect(self, device):
        """Waits for the others. CPU tensors travel by gloo, those on a GPU by nccl."""
        if self.count == 1:
            return
        if device == "mps":
            raise ValueError("several processes can't share an Apple GPU; use --device cpu")
        if device == "cuda":
            local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            if local >= there:
                raise ValueError(f"process {local} of this machine finds {there} GPUs; start "
                                 f"torchrun with --nproc_per_node {there}")
            torch.cuda.set_device(local)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
                                    timeout=datetime.timedelta(minutes=10))

    def sum(self, tensor, op=dist.ReduceOp.SUM):
        """In place. ConnectionError if another process has died, or is silent for 10 minutes."""
        if self.count > 1:
            try:
                dist.all_reduce(tensor, op)
            except RuntimeError as error:
                raise ConnectionError(
                    f"another process of this run has ended or doesn't answer; the same command "
                    f"goes on from the last checkpoint ({first_line(error)})") from None
        return tensor

    def average(self, tensors):
        """In place, all of them in one message."""
        if self.count > 1:
            flat = self.sum(torch.cat([t.flatten() for t in tensors])) / self.count
            for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors])):
                tensor.copy_(mean.view_as(tensor))

    def largest(self, number):
        return self.sum(torch.tensor(number, dtype=torch.float64), dist.ReduceOp.MAX).item()

    def check_same(self, what, number):
        if self.largest(number) != -self.largest(-number):    # the latter is the least of all
            raise ValueError(f"the processes of this run differ in {what}: on several machines, "
                             f"--data and --out must be the same, shared files")


# =================================================================================================
# Data: a task's lies on the device as a few tensors, text stays in its file
# =================================================================================================


def pad_rows(tokens, targets, rows):
    """
    A batch filled up with rows that are not scored: tests use the shape of the training batches, so
    that no second graph is compiled for them.
    """
    fill = (0, 0, 0, rows - len(tokens))
    return F.pad(tokens, fill), F.pad(targets, fill, value=tasks.IGNORE)


def to_device(tensor, device):
    """The tensor on the device. To a GPU it is copied from pinned memory, without waiting."""
    return (tensor.pin_memory().to(device, non_blocking=True) if device == "cuda" else
            tensor.to(device))


class TaskData:
    """A MAD task: a fixed training set, shuffled anew each epoch, and a test set."""

    def __init__(self, setting, batch_size, seed, device):
        self.seed, self.device = seed, device
        arrays = [*tasks.generate(setting, setting.num_train, seed, "train"),
                  *tasks.generate(setting, setting.num_test, seed, "test")]
        self.sha256 = hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()
        self.train, self.targets, self.test, self.test_targets = (
            torch.from_numpy(a).to(device) for a in arrays)
        self.batch_size = min(batch_size, setting.num_train)
        # A last, partial batch is left out; every epoch it is of other sequences.
        self.epoch_steps, self.epoch = setting.num_train // self.batch_size, None
        self.test_every = max(1, self.epoch_steps // 2)
        self.length, self.vocab_size = setting.length, setting.vocab_size
        self.facts = dict(chance=tasks.chance(setting), ceiling=tasks.ceiling(setting),
                          data_sha256=self.sha256)

    def describe(self):
        return (f"{len(self.train):,} training and {len(self.test):,} test sequences of "
                f"{self.length} tokens, vocabulary {self.vocab_size}")

    def batch(self, step):
        """(tokens, targets) of a step, (B, T) each: a function of seed and step alone."""
        epoch, i = divmod(step, self.epoch_steps)
        if epoch != self.epoch:
            # (1,000,003 is more than all epochs: each seed and epoch has an order of its own.)
            draw = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.order = to_device(torch.randperm(len(self.train), generator=draw), self.device)
            self.epoch = epoch
        rows = self.order[i * self.batch_size:(i + 1) * self.batch_size]
        return self.train[rows], self.targets[rows]

    def parts(self, step):
        return [self.batch(step)]

    def test_batches(self):
        B = self.batch_size
        for i in range(0, len(self.test), B):
            yield pad_rows(self.test[i:i + B], self.test_targets[i:i + B], B)


# Windows of text that a test reads during training (15 batches of 32, so that tests take a small
# part of a run's time), and 8 times as many at its end; a corpus may have fewer.
TEST_WINDOWS, LAST_WINDOWS = 480, 3840


class TextData:
    """
    A corpus: windows of T + 1 tokens at random places of its first nine tenths, and at even
    distances in its last tenth, for validation. Tokens stay in their file, which may be larger than
    memory; it is read twice at the start, for the tokens' range and for their SHA-256.
    """

    def __init__(self, config, ranks, device):
        self.seed, self.device, self.ranks = config.seed, device, ranks
        self.batch_size, self.length = config.batch_size, config.context
        parts = ranks.count * config.accumulate
        if self.batch_size % parts:
            raise ValueError(f"batch_size is {self.batch_size}; permitted: a multiple of {parts} "
                             f"({ranks.count} processes x accumulate {config.accumulate})")
        self.rows = self.batch_size // parts              # of one forward pass
        self.name = Path(config.data).name if config.data else tasks.LIBRARY
        self.tokens = tokens = tasks.load_tokens(config.data, config.tokenizer)
        self.cut, self.vocab_size = len(tokens) * 9 // 10, tasks.vocab_size(config.tokenizer)
        self.room = (len(tokens) - self.cut - 1) // self.length       # windows side by side
        if self.room < 1:
            raise ValueError(f"{self.name} has {len(tokens):,} tokens; with a context of "
                             f"{self.length}, 10 x {self.length + 1} are needed: lower --context")
        self.test_every = max(1, config.steps // 10)
        self.sha256 = sha256_of(tokens)
        ranks.check_same("the corpus", int(self.sha256[:12], 16))
        self.bytes_per_token = tasks.token_stats(self.scored_tokens(), config.tokenizer)[2]
        self.facts = dict(data_sha256=self.sha256, corpus=dict(
            name=self.name, tokens=len(tokens), bytes=tokens.nbytes, sha256=self.sha256,
            training_tokens=self.cut, bytes_per_token=self.bytes_per_token))

    def describe(self):
        ratio = (f"{self.bytes_per_token:.2f} bytes of text each" if self.bytes_per_token else
                 "bytes of text each unknown, as tiktoken can't be loaded here: no bits a byte")
        return (f"{self.name}, {len(self.tokens):,} tokens ({ratio}), vocabulary "
                f"{self.vocab_size}; a step reads {self.batch_size} windows of {self.length}")

    def windows(self, starts):
        """(tokens, targets) (B, T) on the device."""
        rows = self.tokens[starts[:, None] + np.arange(self.length + 1)].astype(np.int64)
        both = torch.from_numpy(np.stack((rows[:, :-1], rows[:, 1:])))        # (2, B, T)
        return to_device(both, self.device).unbind(0)

    def batch(self, step):
        """This process' rows of a step's batch, which is a function of seed and step alone."""
        draw = np.random.PCG64(np.random.SeedSequence((self.seed, step)))
        starts = draw.random_raw(self.batch_size) % np.uint64(self.cut - self.length)
        return self.windows(starts.astype(np.int64)[self.ranks.rank::self.ranks.count])

    def parts(self, step):
        tokens, targets = self.batch(step)
        return zip(tokens.split(self.rows), targets.split(self.rows))

    def test_starts(self, most):
        return np.linspace(self.cut, len(self.tokens) - self.length - 1, min(most, self.room),
                           dtype=np.int64)

    def scored_tokens(self):
        """The targets of the last test, whose bytes its loss is divided by."""
        return np.concatenate([self.tokens[i + 1:i + self.length + 1]
                               for i in self.test_starts(LAST_WINDOWS)])

    def test_batches(self, most):
        """This process' share of the validation batches."""
        starts = self.test_starts(most)
        first, every = self.rows * self.ranks.rank, self.rows * self.ranks.count
        for i in range(first, len(starts), every):
            yield pad_rows(*self.windows(starts[i:i + self.rows]), self.rows)


def sha256_of(tokens):
    """Of the token ids as stored. For a text file read as bytes it is what sha256sum prints."""
    sha = hashlib.sha256()
    with tqdm(total=tokens.nbytes, unit="B", unit_scale=True, desc="SHA-256", delay=2) as bar:
        for piece in tasks.pieces(tokens):
            sha.update(np.ascontiguousarray(piece))
            bar.update(piece.nbytes)
    return sha.hexdigest()


# =================================================================================================
# One step, one test
# =================================================================================================


def scored(model, dtype, tokens, targets):
    """Mean loss over the scored positions, and the predicted tokens (B, T)."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(tokens)                                                # (B, T, M)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(),
                           ignore_index=tasks.IGNORE)
    return loss, logits.argmax(-1)


def macro_accuracy(predictions, targets, vocab_size):
    """
    Accuracy averaged over classes (torchmetrics' default, which mad-lab reports): the recall of
    each token that occurs as target or prediction. Both arguments: scored positions only.
    """
    count = lambda x: torch.bincount(x, minlength=vocab_size)
    right, wanted, said = (count(targets[predictions == targets]), count(targets),
                           count(predictions))
    return (right / wanted.clamp(min=1))[(wanted + said) > 0].mean()


MACRO_BATCH = 128       # sequences; the published macro accuracies are means over such batches


def evaluate(score, data):
    """
    Test loss, token accuracy and macro accuracy of a task. (Not under no_grad, although no gradient
    is taken: that would compile a second graph.)
    """
    loss, said, targets = 0.0, [], []
    for tokens, wanted in data.test_batches():
        batch_loss, predictions = score(tokens, wanted)
        loss = loss + batch_loss.detach() * (wanted != tasks.IGNORE).sum()
        said.append(predictions)
        targets.append(wanted)
    said, targets = torch.cat(said), torch.cat(targets)
    at = targets != tasks.IGNORE
    macro = [macro_accuracy(p[where], t[where], data.vocab_size) for p, t, where in
             zip(*(x.split(MACRO_BATCH) for x in (said, targets, at))) if where.any()]
    return dict(test_loss=float(loss / at.sum()),
                test_accuracy=float((said == targets)[at].sum() / at.sum()),
                macro_accuracy=float(torch.stack(macro).mean()))


def evaluate_text(score, data, most):
    """Validation loss per token, the same in bits per byte, and accuracy, over all ranks."""
    wide = torch.float32 if data.device == "mps" else torch.float64        # MPS has no float64
    loss = right = count = torch.zeros((), device=data.device, dtype=wide)
    for tokens, targets in data.test_batches(most):
        batch_loss, said = score(tokens, targets)
        n = (targets != tasks.IGNORE).sum()
        loss, count = loss + batch_loss.detach().to(wide) * n, count + n
        right = right + (said == targets).sum()
    loss, right, count = data.ranks.sum(torch.stack((loss, right, count))).tolist()
    bits = loss / count / math.log(2) / data.bytes_per_token if data.bytes_per_token else None
    return dict(val_loss=loss / count, bits_per_byte=bits, val_accuracy=right / count)


def learning_rate(config, step, steps):
    """Up from 0 in `warmup` steps; then cosine from lr to min_lr over the run, or constant."""
    if step < config.warmup:
        return config.lr * (step + 1) / (config.warmup + 1)
    if config.schedule == "constant":
        return config.lr
    low, part = min(config.min_lr, config.lr), (step - config.warmup) / (steps - config.warmup)
    return low + (config.lr - low) * (1 + math.cos(math.pi * part)) / 2


def make_optimizer(model, config):
    """AdamW, and how many numbers (do, don't) get weight decay: matrices alone, by default."""
    chosen = {id(p) for p in (model.parameters() if config.decay == "all" else decayed(model))}
    with_, without = ([p for p in model.parameters() if (id(p) in chosen) == yes]
                      for yes in (True, False))
    groups = [dict(params=with_, weight_decay=config.weight_decay),
              dict(params=without, weight_decay=0.0)]
    return (torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True),
            tuple(sum(p.numel() for p in ps) for ps in (with_, without)))


# =================================================================================================
# Files
# =================================================================================================


@contextlib.contextmanager
def disk_errors(path):
    """Adds to an OSError which file can't be written: that of a full disk doesn't say."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} can't be written ({error.strerror or error}); what it held before "
                      f"is kept. Mend that, and the same command goes on") from None


def write_atomically(path, write, previous=None):
    """
    write(file) into a temporary neighbour, which then replaces path: never half a file. What path
    held before is kept as `previous`, if that is given.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with disk_errors(path):
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if previous is not None and path.exists():
                os.replace(path, previous)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path, content):
    write_atomically(path, lambda f: f.write((json.dumps(content, indent=1) + "\n").encode()))


def read_object(path):
    """The JSON object in a file. FileNotFoundError, or a ValueError of one line."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be read ({error}); choose another --name or "
                         f"--out") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; choose another --name or --out")
    return content


# torch.save writes a zip archive, and torch.load does not check its checksums. So the SHA-256 of
# the archive follows it, in 64 hexadecimal digits, which readers of zip archives pass over.


def write_checkpoint(path, content, previous=None):
    buffer = io.BytesIO()                         # so that a full disk is an OSError, not torch's
    torch.save(content, buffer)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest().encode()
    write_atomically(path, lambda f: (f.write(buffer.getbuffer()), f.write(digest)), previous)


def read_checkpoint(path, device):
    """
    What write_checkpoint wrote. Nothing in the file is executed: it may hold tensors, numbers,
    strings, lists and dicts, and ValueError names a file that is damaged or holds anything else.
    """
    data = memoryview(path.read_bytes())
    if hashlib.sha256(data[:-64]).hexdigest().encode() != data[-64:]:
        raise ValueError(f"{path} is truncated or altered: it doesn't match its checksum")
    try:
        content = torch.load(io.BytesIO(data[:-64]), map_location=device, weights_only=True)
    except Exception as error:                    # whatever a forged archive makes the reader throw
        raise ValueError(f"{path} is refused: it is not a checkpoint of tensors and numbers "
                         f"({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is refused: it holds a {type(content).__name__}, not a dict")
    return content


def meaning(source):
    """Python source as its syntax tree, without comments, docstrings, spaces and line numbers."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and \
                ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return ast.dump(tree)


@functools.cache          # of the code that this process runs, even if the file is edited meanwhile
def code_version():
    """
    A hash of the four files that determine a result. Any edit counts as other code, but for those
    of comments, docstrings and spaces. (So may another version of Python, which may print the same
    syntax tree in another way.)
    """
    sources = [Path(__file__).with_name(n) for n in ("tasks.py", "layers.py", "model.py",
                                                     "train.py")]
    text = "\n".join(meaning(p.read_text(encoding="utf-8")) for p in sources)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def git_hash():
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                              cwd=Path(__file__).parent, timeout=5)
        return done.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def find_folder(config):
    """
    The run's folder: a new one, or one that holds the same run (same options, same code). A folder
    with another run is left alone: a run with a default name then adds its key to the name, one
    with --name stops, with a ValueError that shows the difference. Returns (folder, note or None)
    and creates nothing.
    """
    if config.resume is not None:
        return Path(config.resume), check_resumed(config)
    base = folder = Path(config.out) / config.run_name
    differ = other_run(folder, config)
    if differ and config.name is None:
        folder = base.with_name(f"{base.name}-{run_key(config)[:8]}")
        differ = other_run(folder, config)
    if differ:
        raise ValueError(f"{folder} holds another run ({differ}); choose another --name")
    return folder, (f"{base} holds another run, or one of other code: this one goes into {folder}"
                    if folder != base else None)


def differences(found, wanted):
    return {k: f"{k} {found.get(k)!r} -> {wanted.get(k)!r}" for k in {**wanted, **found}
            if k != "command" and found.get(k) != wanted.get(k)}


def other_run(folder, config):
    """What the run in a folder has other than this one, as a line; "" if nothing, or no run."""
    try:
        found = read_object(folder / "config.json")
    except FileNotFoundError:
        return ""
    return "; ".join(differences(found, identity(config)).values())


def check_resumed(config):
    """ValueError unless config.resume holds this run. Returns a note if other code began it."""
    found, wanted = read_object(Path(config.resume) / "config.json"), identity(config)
    differ = differences({**wanted, **found}, wanted)     # what older code didn't have is no matter
    code = differ.pop("code", None)
    if differ:
        raise ValueError(f"{config.resume} holds another run ({'; '.join(differ.values())})")
    return code and f"other code began this run ({code}): it need not end with the same numbers"


def identity(config):
    """
    All that determines a run's result, for JSON: not where it is written. --device, --dtype and
    --compile count as they were given; what their "auto" became is in result.json.
    """
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)
               if not f.metadata.get("how") and f.name not in ("out", "name")}
    return {**options, "pattern": config.pattern, "code": code_version(),
            "setting": dataclasses.asdict(config.setting) if config.setting else None}


def run_key(run):
    """A hash of a run's identity: its options, setting, seed and the code."""
    return hashlib.sha256(json.dumps(identity(run), sort_keys=True).encode()).hexdigest()[:16]


def command_of(config):
    """The command that makes this run, in a folder with a default name."""
    words = ["--arch", config.arch] if config.layers is None else ["--layers", config.layers]
    if config.task != TrainConfig.task:
        words += ["--task", config.task]
    for name, value in config.changed():
        words += ["--" + name, str(value)]
    return shlex.join(["python", "train.py", *words])


class InUse(ValueError):
    """Another process works in this folder."""


def hold(file):
    """
    Whether this process, and no other, now holds an open file; the system frees it when the process
    ends, however it ends. OSError where the file system knows no locks.
    """
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except (BlockingIOError, PermissionError, FileNotFoundError):
        return False                          # the last: who held it has just ended


@contextlib.contextmanager
def claim(folder):
    """
    One process at a time works in a folder, also where several machines share it: it holds
    `folder/lock`. Raises InUse if another one does. Folders made for this are removed again if they
    stay empty.
    """
    path, made = folder / "lock", [f for f in (folder, *folder.parents) if not f.exists()]
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "a")
        with file:
            with disk_errors(path):
                mine = hold(file)
            if not mine:
                raise InUse(f"{folder} is in use by another process; wait for it, stop it, or "
                            f"choose another --name")
            try:
                yield
            finally:
                with contextlib.suppress(OSError):        # Windows keeps a file that is open
                    path.unlink()
    finally:
        with contextlib.suppress(OSError):    # not empty: there is a run in it
            for f in made:
                f.rmdir()


# =================================================================================================
# Signals, and --detect
# =================================================================================================


@contextlib.contextmanager
def on_signals(stop):
    """stop(number, frame) at Ctrl-C and SIGTERM, where Python lets one: in the main thread."""
    main = threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


class Interrupted(KeyboardInterrupt):
    """
    A signal ended the run after it was saved; args: a line that says how to go on (None where
    another process says it), number.
    """


def interrupt(number, _):
    """
    The handler of signals outside of training. While a run trains, Run.asked handles them: the run
    is saved, then Interrupted is raised.
    """
    raise Interrupted(None, number)


class Watch:
    """
    Hooks on a model that note in `found` where the first inf or nan appeared: in the output of a
    module, the innermost first, or in a gradient on its way back. Each one waits for the device.
    """

    def __init__(self, model):
        self.found, self.layers = None, model.names
        self.hooks = [module.register_forward_hook(
            lambda m, x, y, name=name: self.output(name, y)) for name, module in
            model.named_modules()]
        self.hooks += [p.register_post_accumulate_grad_hook(
            lambda p, name=name: self.look(f"the gradient of {self.title(name)}", p.grad))
            for name, p in model.named_parameters()]

    def remove(self):
        for hook in self.hooks:
            hook.remove()

    def title(self, name):
        """blocks.1.layer -> blocks.1.layer (swiglu)."""
        parts = name.split(".")
        return f"{name} ({self.layers[int(parts[1])]})" if parts[0] == "blocks" and parts[1:] else \
            name or "the model"

    def look(self, what, tensor):
        if self.found is None and not bool(tensor.isfinite().all()):
            self.found = what

    def output(self, name, y):
        for t in y if isinstance(y, (tuple, list)) else (y,):
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                self.look(f"the output of {self.title(name)}", t.detach())
                if t.requires_grad:
                    t.register_hook(lambda g: self.look(
                        f"the gradient of the output of {self.title(name)}", g))


# =================================================================================================
# A run
# =================================================================================================

# Steps between log lines, at which the program waits for the device; seconds between checkpoints.
# A kill loses at most these seconds and the time of LOG_EVERY steps and a test.
LOG_EVERY, SAVE_SECONDS = 10, 30


class Shared:
    """What the runs of a grid share in a process: a model of the last shape, and its graphs."""

    def __init__(self):
        self.steps = 0                        # roughly what all runs of the shape still have to do
        self.shape = self.model = None
        self.graphs = {}                      # {dtype: (Run.score, whether it is compiled)}

    def model_for(self, shape, fresh):
        """A model with fresh's parameters: the last run's, so that its graph can be used again."""
        if shape == self.shape:
            self.model.load_state_dict(fresh.state_dict())
            self.model.zero_grad()            # a run that failed may have left gradients
        else:
            if any(compiled for _, compiled in self.graphs.values()):
                torch.compiler.reset()        # it keeps only a few graphs per function: make room
            self.shape, self.model, self.graphs = shape, fresh, {}
        return self.model


class Run:
    """
    A run under way: its model, optimizer and data, and their state on disk in `folder` (None: it
    is not to be saved).
    """

    def __init__(self, config, folder, say=print, shared=None):
        self.config, self.folder, self.ranks = config, folder, Ranks(config.task)
        self.shared = shared                  # what runs of a grid share in a process, or None
        self.silent, self.say = say is None, say or (lambda line: None)
        self.started, self.step, self.train_seconds = time.perf_counter(), 0, 0.0
        self.metrics, self.best, self.shown, self.ended, self.signal = {}, {}, {}, None, None
        self.asked_to_stop = 0                # the number of a signal that this process has got
        self.skipped, self.watch, self.compiled, self.earlier = 0, None, None, 0.0
        self.choose_machine()
        self.build()
        if folder is not None:                # (made now, after `build` has shown the options good)
            self.open()
        self.choose_graph()

    def choose_machine(self):
        self.device, reason = choose_device(self.config.device)
        self.say(f"device   {self.device}: {reason}")
        if self.device == "cpu":
            self.say(f"memory   the allocator {tune_allocator()}")
            torch.set_flush_denormal(True)        # numbers below 1e-38 cost 100 times the time
            # Otherwise a compiled graph's threads sum the embedding's gradient in any order. (This
            # mode would also fill all newly allocated memory, which is slow and not needed.)
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        self.dtype, reason = (fastest_dtype(self.device) if self.config.dtype == "auto" else
                              (getattr(torch, self.config.dtype), "asked for"))
        self.ranks.connect(self.device)
        if self.ranks.largest(self.dtype == torch.float32) and self.dtype != torch.float32:
            self.dtype, reason = torch.float32, "as another process measured"
        self.say(f"dtype    {str(self.dtype)[6:]}: {reason}")

    def build(self):
        """Data, model and optimizer."""
        config, setting = self.config, self.config.setting
        self.data = data = (TaskData(setting, config.batch_size, config.seed, self.device)
                            if setting else TextData(config, self.ranks, self.device))
        self.steps = planned_steps(config)
        self.eval_every = config.eval_every or data.test_every
        self.say(f"data     {config.task}: {data.describe()}")
        if self.ranks.count > 1:
            self.say(f"ranks    {self.ranks.count} processes share each batch")
        torch.manual_seed(config.seed)
        self.model = Model(config.pattern, data.vocab_size, config.dim, data.length,
                           setting.backbone if setting else "lm").to(self.device)
        if self.shared:
            self.model = self.shared.model_for(shape_of(config), self.model)
        self.random = torch.get_rng_state()   # training draws no numbers, but a new layer might
        self.optimizer, (yes, no) = make_optimizer(self.model, config)
        self.say(f"decay    {config.weight_decay} on {yes:,} parameters ({config.decay}), "
                 f"0 on {no:,}" + " (norms, biases, filters, decay rates)" * (no > 0))

    def choose_graph(self):
        """
        self.score: `scored`, compiled if that pays (choose_compile) within this run, or within the
        runs of its shape. --detect, a graph that is shared, and the checkpoint decide before that.
        """
        # It depends on nothing else of this run, so other runs of its shape can use it.
        self.plain = plain = functools.partial(scored, self.model, self.dtype)
        if self.shared and self.dtype in self.shared.graphs:
            self.score, self.compiled = self.shared.graphs[self.dtype]
            return
        self.score = plain
        if self.config.detect:                # what was chosen before holds again without --detect
            return self.say("compile  off: --detect watches layers, and a compiled graph has none")
        left = self.shared.steps if self.shared else self.steps - self.step
        wanted = self.config.compile
        if wanted == "auto" and self.compiled is not None:
            reason = "as before this run was stopped"
        else:
            measured = seconds(self.try_step, self.device, 1) if wanted == "auto" and left else 0
            self.compiled, reason = choose_compile(wanted, self.device, left,
                                                   self.ranks.largest(measured))
        self.say(f"compile  {'on' if self.compiled else 'off'}: {reason}")
        if self.compiled and self.step < self.steps:
            self.compile_score(plain)
        if self.shared:
            self.shared.graphs[self.dtype] = self.score, self.compiled

    def try_step(self):
        """Forward and backward of a step, without any effect on the run."""
        for part in self.data.parts(self.step):
            self.score(*part)[0].backward()
        self.optimizer.zero_grad()

    def compile_score(self, plain):
        """Compiles self.score, and uses it once, since torch compiles only then."""
        wanted = self.config.compile
        self.score = torch.compile(plain, dynamic=False,
                                   mode=wanted if wanted == "max-autotune" else None)
        try:
            self.try_step()
        except Exception as error:                # whatever torch.compile, or g++ below it, throws
            reason = f"failed here ({type(error).__name__}: {first_line(error)})"
            if wanted != "auto":
                raise ValueError(f"compile is {wanted!r}, but compiling {reason}; "
                                 f"try --compile off") from error
            self.score, self.compiled = plain, False
            self.say(f"compile  off: it {reason}")

    # -- disk ------------------------------------------------------------------------------------

    STATE = "step", "best", "metrics", "train_seconds", "skipped", "ended", "compiled"

    def open(self):
        """Make the folder, or go on from what is in it."""
        self.log_path = self.folder / "log.jsonl"
        self.check_disk()
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "config.json"
        if self.ranks.rank == 0 and not path.exists():
            write_json(path, {**identity(self.config), "command": command_of(self.config)})
        found = self.load()
        self.ranks.check_same("the checkpoint", self.step)       # (all have read it when this ends)
        if not found:
            self.save()                       # shows that it can; a fault is searched from here on

    def check_disk(self):
        """OSError if there is no room for two checkpoints, the next one and best.pt."""
        there = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        parameters = sum(p.numel() for p in self.model.parameters())
        have = sum(p.stat().st_size for p in self.folder.glob("*.pt"))
        # 4 bytes each: once in best.pt, and with AdamW's two moments in three checkpoints, one of
        # them half written.
        needed, free = 4 * (3 * 3 + 1) * parameters - have, shutil.disk_usage(there).free
        if free < needed:
            raise OSError(f"{there} has {free / 1e6:,.1f} MB free, and this run's checkpoints need "
                          f"{needed / 1e6:,.1f} MB: make room, or choose another --out")
        if not os.access(there, os.W_OK):
            raise OSError(f"{there} is not writable: choose another --out")

    def check_parameters(self):
        """Checked before they are saved: none is inf or nan, or so large that its square is."""
        parameters = [p.detach() for p in self.model.parameters()]
        if not math.isfinite(torch.nn.utils.get_total_norm(parameters)):
            raise self.fault("the norm of the parameters is not finite", self.step)

    def wall_s(self):
        """Seconds of this process and of the earlier ones that worked on this run."""
        return round(self.earlier + time.perf_counter() - self.started, 2)

    def save(self):
        self.check_parameters()
        if self.ranks.rank > 0:
            return
        with disk_errors(self.log_path), open(self.log_path, "ab") as log:
            os.fsync(log.fileno())            # or a power cut could leave it shorter than log_bytes
        content = dict({key: getattr(self, key) for key in self.STATE},
                       dtype=str(self.dtype)[6:], wall_s=self.wall_s(),
                       data_sha256=self.data.sha256, random=torch.get_rng_state(),
                       log_bytes=self.log_path.stat().st_size,
                       model=self.model.state_dict(), optimizer=self.optimizer.state_dict())
        write_checkpoint(self.folder / "ckpt.pt", content, self.folder / "ckpt.previous.pt")

    def keep_best(self):
        self.check_parameters()
        self.best = dict(self.metrics, step=self.step)
        if self.ranks.rank == 0:
            write_checkpoint(self.folder / "best.pt",
                             dict(self.best, model=self.model.state_dict()))

    def restore(self, path):
        """The state of a checkpoint. ValueError if it is damaged or another run's."""
        content = read_checkpoint(path, self.device)
        try:
            log_bytes = int(content["log_bytes"])
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.random, self.earlier = content["random"].cpu(), content["wall_s"]
            dtype = getattr(torch, content["dtype"])          # a new measurement might differ
            if dtype != self.dtype:
                self.say(f"dtype    {content['dtype']}: as before this run was stopped")
            self.dtype = dtype
            for key in self.STATE:
                setattr(self, key, content[key])
            if content["data_sha256"] != self.data.sha256:
                raise ValueError("the data have changed since")
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path} does not fit this run ({type(error).__name__}: "
                             f"{' '.join(str(error).split())[:120]})") from None
        if log_bytes > (self.log_path.stat().st_size if self.log_path.exists() else 0):
            raise ValueError(f"{self.log_path} has lost lines that {path} was saved after")
        return log_bytes

    def load(self):
        """
        Go on from the folder's checkpoint, if there is one, and drop the log lines after it. If it
        is damaged, say so and go on from the one before it. Returns whether there was one.
        """
        first = self.folder / "ckpt.pt"
        faults = []
        for path in (first, self.folder / "ckpt.previous.pt"):
            if not path.exists():
                continue
            try:
                log_bytes = self.restore(path)
            except ValueError as error:
                faults.append(str(error))
                self.say(f"damaged  {error}")
                continue
            if self.ranks.rank == 0:
                self.clean(log_bytes, first if faults else None)
            self.say(f"resume   from step {self.step:,} of {self.steps:,} ({path})")
            return True
        if faults:
            raise ValueError(f"{'; '.join(faults)}; there is no other checkpoint. To train anew, "
                             f"move {self.folder} away or choose another --name")
        if self.ranks.rank == 0:
            self.clean(0, None)
        return False

    def clean(self, log_bytes, damaged):
        """Remove what a kill or a fault left: half-written files, lines after the checkpoint."""
        for half in self.folder.glob(".*.pt.*"):
            half.unlink()
        if damaged:                           # out of the way of the next one, not deleted
            os.replace(damaged, damaged.with_name("ckpt.damaged.pt"))
        with disk_errors(self.log_path), open(self.log_path, "ab") as log:
            log.truncate(log_bytes)

    def log(self, **line):
        if self.ranks.rank == 0:
            with disk_errors(self.log_path), open(self.log_path, "a") as file:
                file.write(json.dumps(dict(step=self.step, **line)) + "\n")

    # -- the loop --------------------------------------------------------------------------------

    def one_step(self):
        """
        A step. Returns tokens, loss, gradient's norm. Nothing in it waits for the device, unless
        --nonfinite skip must know now.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step, self.steps)
        loss, n = 0.0, self.config.accumulate
        for tokens, targets in self.data.parts(self.step):
            part = self.score(tokens, targets)[0] / n
            part.backward()
            loss = loss + part.detach()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.ranks.average([loss, *gradients])
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.clip, norm)
        # (With "stop" this may spoil the parameters; check_steps raises before they are saved.)
        if self.config.nonfinite == "stop" or math.isfinite(loss + norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return self.data.batch_size * self.data.length, loss, norm

    def some_steps(self, bar):
        """
        Steps up to the next log line or test; then the loss is looked at, and whether any process
        got a signal. (A process on its own stops after the step in which it got one.)
        """
        start, tokens, seen = time.perf_counter(), 0, []
        next_one = lambda every: (self.step // every + 1) * every
        until = min(self.steps, next_one(LOG_EVERY), next_one(self.eval_every))
        stop = lambda: seen and self.asked_to_stop and self.ranks.count == 1
        while self.step < until and not stop():
            count, *numbers = self.one_step()
            seen.append(torch.stack(numbers))
            tokens += count
            bar.update()
            if self.watch and self.found():
                raise self.fault("--detect has found an inf or nan", self.step)
        loss, norm = self.check_steps(torch.stack(seen).tolist())
        self.signal = int(self.ranks.largest(self.asked_to_stop)) or None
        took = time.perf_counter() - start
        self.train_seconds += took
        if self.step < until:
            return
        rate, count = self.optimizer.param_groups[0]["lr"], dict(skipped=self.skipped)
        self.log(loss=loss if math.isfinite(loss) else None, lr=rate,
                 gradient_norm=norm if math.isfinite(norm) else None,
                 tokens_per_s=round(tokens / took),
                 **(count if self.config.nonfinite == "skip" else {}))
        self.shown |= dict(loss=f"{loss:.4f}", lr=f"{rate:.1e}", tokens_s=f"{tokens / took:,.0f}")

    def check_steps(self, numbers):
        """
        numbers: (loss, gradient's norm) of the last steps. Returns those of the last one; a pair
        with an inf or nan is a fault, or counted as skipped.
        """
        for step, pair in enumerate(numbers, self.step - len(numbers) + 1):
            if all(map(math.isfinite, pair)):
                continue
            if self.config.nonfinite == "stop":
                raise self.fault("the loss is {:.4g} and the gradient's norm {:.4g}".format(*pair),
                                 step)
            self.skipped += 1
        return numbers[-1]

    def test(self):
        """(Of text, the last test reads more windows; `best` may be of one that read fewer.)"""
        if self.config.task == "text":
            windows = LAST_WINDOWS if self.step == self.steps else TEST_WINDOWS
            self.metrics = m = evaluate_text(self.score, self.data, windows)
            loss, better = m["val_loss"], m["val_loss"] < self.best.get("val_loss", math.inf)
            self.shown |= dict(val_loss=f"{loss:.4f}")
        else:
            self.metrics = m = evaluate(self.score, self.data)
            loss, better = m["test_loss"], m["test_accuracy"] > self.best.get("test_accuracy", -1.0)
            self.shown |= dict(test_acc=f"{m['test_accuracy']:.3f}")
        if not math.isfinite(loss):
            raise self.fault(f"the loss of the test is {loss}", self.step)
        self.log(**m)
        if better:
            self.keep_best()
        if m.get("test_accuracy", 0.0) >= self.config.early_stop:
            self.ended = (f"stopped early at {100 * self.config.early_stop:g}% test accuracy, as "
                          f"the protocol allows")

    def asked(self, number, _):
        """
        The first Ctrl-C or SIGTERM ends the run after the step under way (of several processes: at
        their next log line or test); the second at once.
        """
        if self.asked_to_stop:
            raise KeyboardInterrupt
        self.asked_to_stop = number           # becomes self.signal when all processes know of it

    def go(self):
        """Train to the end, an early stop or a signal. Returns True unless it was a signal."""
        saved = time.perf_counter()
        torch.set_rng_state(self.random)
        self.watch = Watch(self.model) if self.config.detect else None
        with tqdm(total=self.steps, initial=self.step, unit="step", dynamic_ncols=True,
                  desc=self.config.label, disable=self.silent) as bar, \
                on_signals(self.asked):
            while self.ended is None and self.signal is None:
                self.some_steps(bar)
                if self.step % self.eval_every == 0 or self.step == self.steps:
                    self.test()
                if self.step == self.steps:
                    self.ended = self.ended or "all steps done"
                bar.set_postfix(self.shown)
                late = self.ranks.largest(time.perf_counter() - saved > SAVE_SECONDS)
                if self.ended or self.signal or late:
                    self.save()
                    saved = time.perf_counter()
        return self.ended is not None

    def step_flops(self):
        """FLOPs of an optimizer step: forward, and twice that for backward."""
        return 3 * self.data.batch_size * total(ledger(self.model, self.data.length)).flops

    # -- numbers that go wrong -------------------------------------------------------------------

    def fault(self, what, step):
        """A FloatingPointError that says what is wrong, at which step, rate and layer."""
        rate, path = learning_rate(self.config, step - 1, self.steps), self.folder / "ckpt.pt"
        where = self.found() if self.watch else path.exists() and self.find_fault(step)
        return FloatingPointError(
            f"at step {step}, learning rate {rate:.1e}, {what}. " + f"{where}. " * bool(where)
            + f"{path} is from before that. " * path.exists()
            + "Try a lower --lr, --clip 1, --dtype float32 or --nonfinite skip")

    def found(self):
        """Where the watches of this run's processes saw an inf or nan first; None if nowhere."""
        if self.ranks.largest(self.watch.found is not None):
            return f"It first appeared in {self.watch.found or 'a layer of another process'}"
        return None

    def find_fault(self, step):
        """Repeats the steps since the checkpoint, and one more, watching every layer."""
        found, self.watch = None, Watch(self.model)
        try:                                  # an error here must not take the fault's place
            self.restore(self.folder / "ckpt.pt")
            self.say(f"fault    looking for its layer in steps {self.step + 1:,} to {step:,}")
            torch.set_rng_state(self.random)
            self.score = self.plain           # a compiled graph has no layers to watch
            while self.step <= step and not found:
                _, loss, norm = self.one_step()
                if self.config.nonfinite == "skip" and not math.isfinite(loss + norm):
                    self.watch.found = None   # this step was skipped, and did no harm
                found = self.found()
        except (ValueError, OSError, RuntimeError) as error:
            return f"Its layer is unknown ({first_line(error)})"
        finally:
            self.watch.remove()               # other runs of a grid use this model
        return found or ("No layer had an inf or nan when the steps since were repeated"
                         + " (skipped ones aside)" * (self.config.nonfinite == "skip"))

    def result(self):
        """The contents of result.json."""
        tokens, flops = self.step * self.data.batch_size * self.data.length, self.step_flops()
        speed, peak = self.step * flops / self.train_seconds, peak_flops(self.device, self.dtype)
        loss = "val_loss" if self.config.task == "text" else "test_loss"
        with open(self.log_path) as log:
            tests = [line for line in map(json.loads, log) if loss in line]
        return dict(
            **self.metrics, best=self.best, least_loss=min(tests, key=lambda line: line[loss]),
            **self.data.facts, steps=self.step, planned_steps=self.steps, skipped=self.skipped,
            ended=self.ended, tokens_per_s=round(tokens / self.train_seconds),
            wall_s=self.wall_s(), train_flops=self.step * flops, flops_per_s=round(speed),
            mfu=peak and round(speed / peak / self.ranks.count, 4),
            parameters=sum(p.numel() for p in self.model.parameters()),
            config=identity(self.config), git=git_hash(),
            machine=dict(device=self.device, dtype=str(self.dtype)[6:],
                         compiled=bool(self.compiled) and not self.config.detect,
                         threads=torch.get_num_threads(), platform=platform.platform(),
                         processes=self.ranks.count),
            versions=dict(python=platform.python_version(), torch=torch.__version__,
                          numpy=np.__version__))


def train(config, say=print, shared=None):
    """
    One run, from where its folder stands to its end; with say=None silently and without a progress
    bar. Returns the contents of its result.json. Raises InUse, a ValueError, if another process
    works on it.
    """
    folder, note = find_folder(config)
    done, first = folder / "result.json", Ranks(config.task).rank == 0
    say = say if first else None
    if note and say:
        say(f"note     {note}")
    with claim(folder) if first else contextlib.nullcontext():
        if done.exists():
            if say:
                say(f"note     this run is finished; its result is shown again. To train once "
                    f"more, choose another --seed or --name")
            return read_object(done) | dict(folder=str(folder))
        run = Run(config, folder, say, shared)
        run.say("\n" + show_ledger(run.model, run.data.length) + "\n")
        try:
            whole = run.go()
        except Exception as error:
            if run.asked_to_stop and say is None:                 # the grid or sweep must end, too
                raise Interrupted(f"stopped when {folder} had failed ({first_line(error)})",
                                  run.asked_to_stop) from error
            raise
        if not whole:
            line = (f"stopped at step {run.step:,} of {run.steps:,}, saved in {folder}; the same "
                    f"command goes on from there, or --resume {shlex.quote(str(folder))}")
            raise Interrupted(line if first else None, run.signal)
        if not first:
            return dict(run.metrics, folder=str(folder))
        result = run.result()
        write_json(done, result)
        (folder / "ckpt.previous.pt").unlink(missing_ok=True)     # the last and the best stay
    if run.asked_to_stop and say is None:     # in its last step
        raise Interrupted(f"stopped when {folder} had ended", run.asked_to_stop)
    return result | dict(folder=str(folder))


def speed_of(r):
    mfu = f"{100 * r['mfu']:.0f}%" if r["mfu"] else "n/a"
    return (f"{r['wall_s']:.0f} s in all; in training {r['tokens_per_s']:,} tokens and "
            f"{r['flops_per_s'] / 1e9:,.0f} GFLOP a second (MFU {mfu})")


def summary(config, r):
    """What came out of a run, and what to try next."""
    config = dataclasses.replace(config, resume=None)
    out = f" --out {shlex.quote(config.out)}" * (config.out != TrainConfig.out)
    like_this = lambda **change: command_of(dataclasses.replace(config, **change)) + out
    of_folder = lambda *words: shlex.join(["python", "train.py", *words])
    other = like_this(arch="hybrid" if config.arch == "transformer" else "transformer", layers=None)
    if config.task == "text":
        bits = f", {r['bits_per_byte']:.4f} bits a byte" if r["bits_per_byte"] else ""
        tokens = r["steps"] * config.batch_size * config.context
        lines = [f"validation loss  {r['val_loss']:.4f} a token{bits}; "
                 f"{100 * r['val_accuracy']:.1f}% of tokens right",
                 f"training         {r['steps']:,} steps, {tokens:,} tokens, "
                 f"{r['train_flops']:.2e} FLOPs"]
        ideas = "more text from this model, the same corpus for another architecture"
        commands = [of_folder("--sample", r["folder"], "--prompt", "def "), other]
    else:
        lines = [f"test accuracy    {r['test_accuracy']:.4f} of tokens (chance {r['chance']:.3f}), "
                 f"{r['macro_accuracy']:.4f} averaged over classes",
                 f"training         {r['steps']:,} of {r['planned_steps']:,} steps ({r['ended']})"]
        ideas = "another architecture, what the layers learned to mix, the paper's protocol"
        paper = like_this(epochs=200, steps=None, warmup=0)
        commands = [other, of_folder("--show", r["folder"]), paper]
    return "\n".join([*lines, f"time             {speed_of(r)}",
                      f"saved in         {r['folder']}/ (config, log, checkpoint, result)", "",
                      f"next: {ideas}", *("  " + c for c in commands)])


# =================================================================================================
# The MAD protocol: a grid of runs
# =================================================================================================
#
# A setting's score is the best of its runs, a task's the mean over its settings, the MAD score the
# mean over tasks: once for token accuracy and once for macro accuracy, which is what was published.
# Each run is an ordinary run, in a folder named by a hash of all that determines it. These folders
# are all that the processes share: a run with a result is done, one whose lock is held is taken.


@dataclass(frozen=True)
class Preset:
    """All the numbers that define one way to score an architecture."""
    settings: tuple              # (Setting, steps of its runs or None: epochs), ...
    epochs: int | None
    batch_size: int
    lrs: tuple                   # the grid: every rate with every decay
    weight_decays: tuple
    eval_every: int              # steps between tests


PRESETS = {
    "full": Preset(                                          # the paper's: 396 runs
        settings=tuple((s, None) for s in tasks.mad_settings()), epochs=200, batch_size=128,
        lrs=(1e-4, 5e-4, 1e-3), weight_decays=(0.0, 0.1),
        eval_every=50),               # half an epoch of 12,800 sequences, several of a smaller set
    # One setting a task: the baseline, but for memorization, which all architectures solve there.
    # Tasks are learned in optimizer steps, so a small batch and a high rate cut the cost. Recall
    # lasts until attention learns it (results/transformer-longer.jsonl); the other tasks share what
    # minutes are left, and some are cut off while they are being learned.
    "quick": Preset(
        settings=((tasks.BASELINES["in-context-recall"], 1600),
                  (tasks.BASELINES["fuzzy-in-context-recall"], 800),
                  (tasks.BASELINES["noisy-in-context-recall"], 2400),
                  (tasks.BASELINES["selective-copying"], 500),
                  (tasks.BASELINES["compression"], 1600),
                  (dataclasses.replace(tasks.BASELINES["memorization"], vocab_size=4096), 1000)),
        epochs=None, batch_size=32, lrs=(3e-3,), weight_decays=(0.1,), eval_every=100),
}


@dataclass
class MadConfig(Common):
    """
    The MAD score of an architecture: every task of a preset, a grid of runs each.

    Finished runs are reused and interrupted ones go on, so that the same command resumes. Learning
    rates, decays, steps and batch size are the preset's.
    """
    task: str = choice("mad", text="the MAD protocol")
    preset: str = option("quick", f"one of {', '.join(PRESETS)}: full is the paper's, 396 runs; "
                         "quick has one run a task", choices=PRESETS)
    tasks: str | None = option(None, "only these tasks, with commas between")
    settings: str = choice("all", "baseline", text="each task's settings: all of the preset or the "
                           "first one")
    workers: int = option(1, "processes on this machine, which share its cores", low=1)
    no_skip: bool = option(False, "go on with a setting's runs after one has ended by early_stop")
    select: str = choice("last", "best-loss", text="score a run by its last test or, as in "
                         "mad-lab, by its test of the least loss")
    results: str | None = option(None, "folder for the scores (the default: scores in --out)")

    def __post_init__(self):
        super().__post_init__()
        there = list(dict.fromkeys(s.task for s, _ in PRESETS[self.preset].settings))
        for task in self.task_list:
            if task not in there:
                raise tasks.unknown("tasks", task, there)
        grid_of(self)                                        # so that mistakes end here

    @property
    def task_list(self):
        every = dict.fromkeys(s.task for s, _ in PRESETS[self.preset].settings)
        return list(every) if self.tasks is None else self.tasks.split(",")

    @property
    def score_options(self):
        """{option: value} of what differs from its default and changes scores beyond rounding."""
        names = {*PASSED_ON, "select", "no_skip"} - {"arch", "layers", "seed", "out", "device",
                                                     "compile"}
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                if f.name in names and getattr(self, f.name) != f.default}


PASSED_ON = tuple(f.name for f in dataclasses.fields(Common) if f.name != "task")


def runs_of(config, setting, steps):
    """A setting's runs as TrainConfigs, the largest learning rate first: it learns soonest."""
    preset = PRESETS[config.preset]
    options = {name: getattr(config, name) for name in PASSED_ON}
    options |= {k: getattr(setting, k) for k in SETTING_OPTIONS}
    options |= dict(task=setting.task, batch_size=preset.batch_size, eval_every=preset.eval_every,
                    out=str(Path(config.out) / "mad" / safe_name(config.label)))
    options |= dict(steps=steps) if steps else dict(epochs=preset.epochs)
    runs = [TrainConfig(**options, lr=lr, weight_decay=decay)
            for lr in sorted(preset.lrs, reverse=True) for decay in preset.weight_decays]
    assert all(run.setting == setting for run in runs), f"no options make {setting}"
    return [dataclasses.replace(run, name=run_key(run)) for run in runs]


def grid_of(config):
    """{setting: [TrainConfig]}, settings of one shape together: one compilation serves them."""
    preset = PRESETS[config.preset]
    chosen = {s: steps for s, steps in preset.settings if s.task in config.task_list}
    if config.settings == "baseline":
        firsts = {s.task: s for s in reversed(chosen)}
        chosen = {s: steps for s, steps in chosen.items() if firsts[s.task] == s}
    grid = {s: runs_of(config, s, steps) for s, steps in chosen.items()}
    seen = [shape_of(runs[0]) for runs in grid.values()]
    return dict(sorted(grid.items(), key=lambda item: seen.index(shape_of(item[1][0]))))


def folder_of(run):
    return Path(run.out) / run.name


class Grid:
    """
    The runs of a protocol and what has become of each, as their folders tell.

    Every process started with the same command makes the same Grid, and works on it.
    """

    def __init__(self, config):
        self.config, self.runs, self.started = config, grid_of(config), time.time()
        self.results = {}
        self.setting = {run.name: s for s, runs in self.runs.items() for run in runs}
        self.shared = Shared()
        self.look()
        self.reused = len(self.results)

    def all_runs(self):
        return [run for runs in self.runs.values() for run in runs]

    def look(self):
        """Read the results that have come since the last look."""
        for run in self.all_runs():
            if run.name not in self.results:
                with contextlib.suppress(FileNotFoundError):
                    self.results[run.name] = read_object(folder_of(run) / "result.json")

    def solved(self, setting):
        """
        Whether a run of it ended by early_stop: others could add at most 1 - early_stop of token
        accuracy.
        """
        return not self.config.no_skip and any(
            self.results[run.name]["test_accuracy"] >= self.config.early_stop
            for run in self.runs[setting] if run.name in self.results)

    def fate(self, run):
        """ended, skipped, open, or failed: since this command started, or it is tried again."""
        if run.name in self.results:
            return "ended"
        with contextlib.suppress(FileNotFoundError):
            if (folder_of(run) / "error.txt").stat().st_mtime >= self.started:
                return "failed"
        return "skipped" if self.solved(self.setting[run.name]) else "open"

    def of_fate(self, fate):
        self.look()
        return [run for run in self.all_runs() if self.fate(run) == fate]

    def attempt(self, run):
        """One run to its end, or to an error. Returns False if another process works on it."""
        error = folder_of(run) / "error.txt"
        try:
            train(run, None, self.shared)
            error.unlink(missing_ok=True)
        except InUse:
            return False
        except Exception:
            error.parent.mkdir(parents=True, exist_ok=True)
            error.write_text(traceback.format_exc())
            os.utime(error, (time.time(),) * 2)              # by the clock of self.started
        return True

    def work(self, worker, workers, show=lambda note="": None):
        """
        Runs until none is open. Each worker starts at a setting of its own: so they compile
        different shapes, and a setting's first run can spare the later ones.
        """
        settings = list(self.runs)
        first = len(settings) * worker // workers
        order = [run for s in settings[first:] + settings[:first] for run in self.runs[s]]
        while self.of_fate("open"):
            idle = True
            for run in order:
                self.look()
                if self.fate(run) == "open":
                    self.shared.steps = self.steps_like(run) // workers
                    idle = not self.attempt(run) and idle
                    show()
            if idle and (left := self.of_fate("open")):
                show(f"waiting for {len(left)} that others work on: {folder_of(left[0])}/lock")
                time.sleep(1)
        show()

    def steps_like(self, run):
        """Steps of all open runs of a run's shape."""
        shape = shape_of(run)
        return sum(planned_steps(r) for r in self.of_fate("open") if shape_of(r) == shape)

    # -- scores ----------------------------------------------------------------------------------

    def run_record(self, run):
        """What became of a run, as JSON."""
        record = dict(lr=run.lr, weight_decay=run.weight_decay, folder=run.name)
        fate = self.fate(run)
        if fate == "ended":
            result = self.results[run.name]
            scores = result if self.config.select == "last" else result["least_loss"]
            return record | dict(token=scores["test_accuracy"], macro=scores["macro_accuracy"],
                                 steps=result["steps"], ended=result["ended"],
                                 wall_s=result["wall_s"])
        if fate == "failed":
            error = (folder_of(run) / "error.txt").read_text()
            return record | dict(failed=error.strip().splitlines()[-1])
        return record | (dict(skipped=True) if fate == "skipped" else {})

    def setting_record(self, setting, runs):
        """A setting's score: the best of its runs in each kind of accuracy, or None."""
        records = [self.run_record(run) for run in runs]
        ended = [r for r in records if "token" in r]
        best = max(ended, key=lambda r: (r["token"], r["macro"]), default=None)
        return dict(setting=dataclasses.asdict(setting), chance=tasks.chance(setting),
                    token=best and best["token"],
                    macro=max((r["macro"] for r in ended), default=None),
                    best=best and {k: best[k] for k in ("lr", "weight_decay")}, runs=records)

    def score(self):
        """{"settings": [...], "tasks": {task: ...}, "mean": ..., "macro_mean": ...}."""
        settings = [self.setting_record(s, runs) for s, runs in self.runs.items()]
        of = lambda task: [r for r in settings if r["setting"]["task"] == task]
        found = [t for t in tasks.TASKS if of(t)]
        by_task = {t: {k: mean_of([r[k] for r in of(t)]) for k in ("token", "macro", "chance")}
                   for t in found}
        whole = set(found) == {s.task for s, _ in PRESETS[self.config.preset].settings}
        mean = lambda k: mean_of([v[k] for v in by_task.values()] if whole else [None])
        return dict(mean=mean("token"), macro_mean=mean("macro"), tasks=by_task, settings=settings)

    def counts(self):
        """What became of the runs, and how many results in their folder are of no run of it."""
        self.look()
        runs = self.all_runs()
        fates = Counter(map(self.fate, runs))
        strangers = [p for p in Path(runs[0].out).glob("*/result.json")
                     if p.parent.name not in self.setting]
        other_code = sum(code_of(p) != code_version() for p in strangers)
        return dict(runs=len(runs), reused=self.reused, trained=fates["ended"] - self.reused,
                    skipped=fates["skipped"], failed=fates["failed"], open=fates["open"],
                    of_other_code=other_code, of_other_options=len(strangers) - other_code)


def code_of(path):
    """The code that made a result.json; None where it doesn't tell."""
    try:
        return read_object(path)["config"]["code"]
    except (ValueError, OSError, KeyError, TypeError):
        return None


def mean_of(values):
    """None if one of them is missing: a mean over the rest would be another score."""
    return None if None in values else sum(values) / len(values)


def size_of(config):
    """Parameters and the paper's state, for in-context recall. ValueError if impossible."""
    run = TrainConfig(arch=config.arch, layers=config.layers, dim=config.dim)
    model = Model(run.pattern, run.setting.vocab_size, run.dim, run.setting.length)
    size = total(ledger(model, run.setting.length))
    return dict(pattern=run.pattern, parameters=size.parameters, state=size.nominal)


def record_of(grid, size):
    """The contents of the score's file."""
    config, preset = grid.config, PRESETS[grid.config.preset]
    counts = grid.counts()                    # looks once more; what follows is of this last look
    results = list(grid.results.values())
    numbers = {k: v for k, v in dataclasses.asdict(preset).items() if k != "settings"}
    numbers["steps"] = [steps for _, steps in preset.settings]
    return dict(arch=config.label, preset=config.preset, seed=config.seed,
                options=config.score_options, **size, **grid.score(), numbers=numbers,
                counts=counts, wall_s=round(sum(r["wall_s"] for r in results), 1),
                code=code_version(), git=git_hash(),
                machine=results[0]["machine"] if results else None,
                versions=results[0]["versions"] if results else None)


def record_path(config):
    options = [f"{k.replace('_', '-')}={v}" for k, v in config.score_options.items()]
    name = safe_name("_".join([config.label, f"seed{config.seed}", *options]))
    return Path(config.results or Path(config.out) / "scores") / config.preset / f"{name}.json"


def why_not_recorded(grid, record):
    """Why a score does not count as one of its preset, or None if it does."""
    failed = [r for s in record["settings"] for r in s["runs"] if "failed" in r]
    if record["counts"]["open"]:
        return f"{record['counts']['open']} runs are not finished; the same command goes on"
    if not all(r["failed"].startswith("FloatingPointError") for r in failed):
        return "runs failed; the same command tries them again"
    if len(grid.runs) < len(PRESETS[grid.config.preset].settings):
        return "not all settings of the preset were asked for"
    return "a setting has no run that ended" if record["mean"] is None else None


# -- processes -----------------------------------------------------------------------------------


def work_for_parent(grid, worker, workers, threads):
    """A worker process. Its parent hands Ctrl-C on to it, once; if the parent dies, it stops."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()

    def follow():
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(threads)
    choose_gpu(worker)
    try:
        with on_signals(interrupt):
            grid.work(worker, workers)
    except Interrupted as stop:
        sys.exit(128 + stop.args[1])


def choose_gpu(worker):
    if torch.cuda.is_available():
        torch.cuda.set_device(worker % torch.cuda.device_count())


def work_in_processes(grid, count, show):
    """Starts workers and waits for them. Returns a line on those that ended badly, or None."""
    threads = max(1, torch.get_num_threads() // count)
    context = multiprocessing.get_context("spawn")           # a fork can't use CUDA
    workers = [context.Process(target=work_for_parent, args=(grid, i, count, threads))
               for i in range(count)]
    try:
        for w in workers:
            w.start()
        while any(w.is_alive() for w in workers):
            time.sleep(0.3)
            show()
    finally:
        for w in workers:
            if w.is_alive():
                w.terminate()
        for w in workers:
            if w.pid:
                w.join()
    return ", ".join(f"worker {i} ended with code {w.exitcode}"
                     for i, w in enumerate(workers) if w.exitcode) or None


def work_on(grid, rank, ranks):
    """
    All runs: in this process, in workers, or shared by torchrun's. Returns a line about workers
    that died, or None.
    """
    config, runs = grid.config, grid.all_runs()
    done = lambda: len(runs) - len(grid.of_fate("open"))
    with tqdm(total=len(runs), initial=done(), unit="run", dynamic_ncols=True, smoothing=0,
              desc=f"{config.label}, {config.preset}", disable=rank > 0) as bar, \
            on_signals(interrupt):
        def show(note=""):
            bar.set_postfix_str(note, refresh=False)
            bar.update(done() - bar.n)
        try:
            if config.workers > 1:
                return work_in_processes(grid, config.workers, show)
            if ranks > 1:
                choose_gpu(int(os.environ.get("LOCAL_RANK", 0)))
            grid.work(rank, ranks, show)
        except Interrupted as stop:
            line = (f"stopped with {done()} of {len(runs)} runs done, those under way saved; the "
                    f"same command goes on")
            raise Interrupted(line if rank == 0 else None, stop.args[1]) from None


def mad_score(arch, preset="quick", config=None, say=print):
    """
    The MAD score of an architecture (a name of ARCHS or a pattern) by a preset of PRESETS.

    config: a MadConfig with the other choices. Returns what is recorded in `results` (record_of),
    and "file", where, or None and "why_not". Raises Interrupted at a signal, with everything saved.
    """
    which = dict(arch=arch, layers=None) if arch in ARCHS else \
        dict(arch=MadConfig.arch, layers=arch)
    config = dataclasses.replace(config or MadConfig(), preset=preset, **which)
    rank, ranks = torchrun_place()
    if ranks > 1 and config.workers > 1:
        raise ValueError(f"workers is {config.workers}, but torchrun has started {ranks} processes "
                         f"already; leave one of them out")
    choose_device(config.device)                             # a mistake must end before any run
    grid, size = Grid(config), size_of(config)
    ended = work_on(grid, rank, ranks)
    record = record_of(grid, size)
    why = why_not_recorded(grid, record)
    path = record_path(config)
    if why is None and rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
    record |= dict(file=None if why else str(path), why_not=why)
    if rank == 0:
        say(mad_summary(grid, record, ended))
    return record


def percent(value):
    return f"{'missing':>9}" if value is None else f"{100 * value:>9.1f}"


def mad_summary(grid, record, ended):
    """What came out of the runs, as text."""
    c, rows = record["counts"], list(record["tasks"].items())
    lines = ["", f"{'accuracy, %':<26}{'token':>9}{'chance':>9}{'macro':>9}"]
    lines += [f"{task:<26}" + "".join(percent(v[k]) for k in ("token", "chance", "macro"))
              for task, v in rows]
    if record["mean"] is not None:
        lines += [f"{'MAD score':<26}{percent(record['mean'])}{'':>9}"
                  f"{percent(record['macro_mean'])}"]
    lines += ["", f"runs     {c['runs']}: {c['reused']} reused, {c['trained']} trained, "
              f"{c['skipped']} skipped (another run of their setting reached "
              f"{100 * grid.config.early_stop:g}%), {c['failed']} failed, {c['open']} not finished"]
    if c["of_other_code"] or c["of_other_options"]:
        lines += [f"unused   {c['of_other_code']} results of other code and "
                  f"{c['of_other_options']} of other options in {grid.all_runs()[0].out}"]
    failed = [str(folder_of(run)) for run in grid.of_fate("failed")]
    if failed:
        lines += ["failed   error.txt says why in " + ", ".join(failed)]
    lines += [f"workers  {ended}"] if ended else []
    return "\n".join([*lines, f"recorded {record['file']}" if record["file"] else
                      f"recorded nothing: {record['why_not']}"])


# =================================================================================================
# How fast: `python train.py --benchmark`
# =================================================================================================


@dataclass
class BenchmarkConfig(Options):
    """Time whole optimizer steps and generation on this machine, without saving anything."""
    benchmark: bool = option(False, "this command")
    device: str = option("auto", "cuda, mps, cpu or auto: the first of these that is there")
    dtype: str = choice("auto", "float32", "bfloat16", text="precision of matrix products; auto "
                        "measures which is faster")
    compile: str = choice("auto", "on", "max-autotune", "off", text="torch.compile; auto: as in a "
                          "run of 1,000 steps")


def benchmark_runs(config, device):
    """(title, TrainConfig): MAD's baseline everywhere, and on a GPU language models, too."""
    change = functools.partial(TrainConfig, device=config.device, dtype=config.dtype,
                               compile=config.compile, steps=1000)
    for arch in ("transformer", "hybrid", "mamba"):
        yield arch, change(arch=arch)
    shapes = [(512, 6, 8), (768, 12, 12), (1024, 24, 16)] if device == "cuda" else []
    # 20, 85 and 302 M parameters without embeddings: 70, 160 and 410 M with gpt2's vocabulary.
    for width, depth, heads in shapes:
        for name, every in (("transformer", 1), ("hybrid", 4)):
            pattern = stripe(f"mh-hyena(heads={heads})", "swiglu", depth, every,
                             f"mh-attention(heads={heads})")
            yield (f"{name}, {depth} x {width}, T 2048",
                   change(task="text", layers=pattern, dim=width, context=2048, batch_size=16))


def benchmark(config, steps=20):
    """A line a model: the time of a whole optimizer step, and how far it uses this machine."""
    device, reason = choose_device(config.device)
    if device == "cpu":
        tune_allocator()
    a, b = torch.randn(2, 1024, 1024, device=device)
    unit = lambda: seconds(lambda: a @ b, device, 20)
    print(f"{device}: {reason}; torch {torch.__version__}\n"
          f"unit: a 1024^3 float32 product, {1e3 * unit():.2f} ms\n\n"
          f"{'model':<28}{'parameters':>12}{'tokens/step':>12}{'ms/step':>9}{'units':>7}"
          f"{'tokens/s':>10}{'GFLOP/s':>9}{'MFU':>7}{'step MB':>9}  compiled")
    for title, run_config in benchmark_runs(config, device):
        run = Run(run_config, None, say=None)

        def some(run=run):
            for _ in range(steps):
                run.one_step()
        took, now = seconds(some, device, 2) / steps, unit()
        memory, peak = peak_memory(some, device) or math.nan, peak_flops(device, run.dtype)
        tokens, flops = run.data.batch_size * run.data.length, run.step_flops()
        mfu = f"{flops / took / peak:.3f}" if peak else "n/a"
        print(f"{title:<28}{sum(p.numel() for p in run.model.parameters()):>12,}{tokens:>12,}"
              f"{1e3 * took:>9.1f}{took / now:>7.1f}{tokens / took:>10,.0f}"
              f"{flops / took / 1e9:>9,.0f}{mfu:>7}{memory:>9,.0f}  "
              f"{'yes' if run.compiled else 'no'}", flush=True)
        del run, some                         # their memory, and their graphs: torch keeps few
        torch.compiler.reset()


@torch.no_grad()
def benchmark_generation(device, steps=32):
    """A line a model and T: tokens a second of one sequence, and its state, after T tokens."""
    print(f"\n{'generation, D 128, float32':<28}{'T':>7}{'tokens/s':>10}{'state, kB':>11}")
    modal = ARCHS["hybrid"].replace("mh-hyena", "mh-hyena(filter=modal)")
    for arch, pattern in (*((a, ARCHS[a]) for a in ("transformer", "hybrid", "mamba")),
                          ("hybrid, modal filter", modal)):
        model = Model(pattern, 256, 128, 4096 + 2 * steps).to(device)
        state, token = model.init_state(1), torch.zeros(1, dtype=torch.long, device=device)
        t = 0
        for T in (128, 1024, 4096):
            for _ in range(t, T):
                state = model.step(token, state)[1]
            t = T

            def some(state=state):
                for _ in range(steps):
                    state = model.step(token, state)[1]
            kilobytes = 4 * sum(map(count_state, state)) / 1e3
            print(f"{arch:<28}{T:>7}{steps / seconds(some, device, 2):>10,.0f}{kilobytes:>11,.1f}",
                  flush=True)


# =================================================================================================
# Text from a run
# =================================================================================================


@dataclass
class SampleConfig(Options):
    """Let the model of a text run write, one token at a time, through the layers' `step`."""
    sample: str = option("", "folder of a text run, such as out/hybrid_text")
    prompt: str = option("def ", "the text to go on from")
    tokens: int = option(200, "how many to write", low=1)
    temperature: float = option(0.8, "0: always the likeliest token; above 1: bolder", low=0.0)
    top_k: int = option(50, "draw from this many likeliest tokens", low=1)
    seed: int = option(0, "of the draws", low=0)
    device: str = option("auto", "cuda, mps, cpu or auto: the first of these that is there")

    def __post_init__(self):
        super().__post_init__()
        if 0 < self.temperature < 0.001:
            raise ValueError(f"temperature is {self.temperature!r}; permitted: 0, or from 0.001")


def load_run(folder, device):
    """The options (config.json) and the model of a run. ValueError where it has none."""
    folder = Path(folder)
    try:
        saved = read_object(folder / "config.json")
        s = saved["setting"] and tasks.Setting(**saved["setting"])
        size = ((s.vocab_size, saved["dim"], s.length, s.backbone) if s else
                (tasks.vocab_size(saved["tokenizer"]), saved["dim"], saved["context"]))
        model = Model(saved["pattern"], *size)
        model.load_state_dict(read_checkpoint(folder / "ckpt.pt", device)["model"])
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename or folder / 'config.json'} does not exist: give the "
                         f"folder of a run that has saved a checkpoint") from None
    except (KeyError, TypeError, OSError, RuntimeError) as error:
        raise ValueError(f"{folder} does not hold a run of this code that can be read "
                         f"({' '.join(str(error).split())[:120]})") from None
    return saved, model.to(device)


def encode(text, tokenizer):
    try:
        raw = text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt {text!r} is not text ({error.reason})") from None
    if not text:
        raise ValueError("the prompt is empty; permitted: at least one character")
    return (list(raw) if tokenizer == "bytes" else
            tasks.get_encoding(tokenizer).encode_ordinary(text))


def token_bytes(tokenizer):
    """A function from a token's id to its bytes."""
    if tokenizer == "bytes":
        return lambda token: bytes([token])
    encoding = tasks.get_encoding(tokenizer)

    def look_up(token):
        try:
            return encoding.decode_single_token_bytes(token)
        except KeyError:                      # tiktoken's vocabularies have a few unused ids
            return "\ufffd".encode()
    return look_up


@torch.no_grad()
def sample(config, show=lambda text: print(text, end="", flush=True)):
    """
    Shows the prompt and its continuation as they come; bytes that are not UTF-8 become the
    replacement character. Returns the new tokens' ids, and a line about speed and state.
    """
    device, _ = choose_device(config.device)
    saved, model = load_run(config.sample, device)
    if saved["task"] != "text":
        raise ValueError(f"{config.sample} is a run of {saved['task']}: only runs of --task text "
                         f"write text")
    tokenizer = saved["tokenizer"]
    prompt, to_bytes = encode(config.prompt, tokenizer), token_bytes(tokenizer)
    reader = codecs.getincrementaldecoder("utf-8")("replace")
    torch.manual_seed(config.seed)
    show(config.prompt)
    start, state, ids = time.perf_counter(), model.init_state(1), []
    for token in torch.tensor(prompt, device=device):
        logits, state = model.step(token[None], state)
    for _ in range(config.tokens):
        token = pick(logits, config.temperature, config.top_k)
        ids.append(token.item())
        show(reader.decode(to_bytes(ids[-1])))
        logits, state = model.step(token, state)
    show(reader.decode(b"", final=True) + "\n")
    count = len(prompt) + len(ids)
    line = (f"{count / (time.perf_counter() - start):,.0f} tokens a second on {device}; the state "
            f"after {count:,} tokens is {sum(map(count_state, state)):,} numbers")
    if count > model.max_len:
        line += f"; what comes after {model.max_len:,} is longer than all it was trained on"
    return ids, line


def sample_after(config, result):
    """A few lines from a model just trained."""
    prompt = "def " if config.data is None else "\n"
    try:
        print("\n" + sample(SampleConfig(sample=result["folder"], prompt=prompt,
                                         device=config.device))[1])
    except ValueError as error:
        print(f"no sample: {error}")


# =================================================================================================
# Look inside a run: which tokens its layers mix
# =================================================================================================


@dataclass
class ShowConfig(Options):
    """Draw which tokens each layer of a trained run mixes, on a sequence of its task."""
    show: str = option("", "folder of a run, such as out/hybrid_in-context-recall")
    plot: str | None = option(None, "file for a figure (PNG), instead of text")
    tokens: int = option(64, "how many of the sequence", low=2)


@torch.no_grad()
def show(config):
    """Prints the sequence and a picture of each layer (layers.mixing)."""
    saved, model = load_run(config.show, "cpu")
    tokens = (tasks.load_tokens(saved["data"], saved["tokenizer"]) if saved["task"] == "text" else
              tasks.generate(tasks.Setting(**saved["setting"]), 1, saved["seed"], "test")[0][0])
    tokens = torch.from_numpy(tokens[:config.tokens].astype(np.int64))[None]  # (1, T)
    x, pictures = model.embed(tokens), {}
    for i, (name, block) in enumerate(zip(model.names, model.blocks), 1):
        pictures[f"{i} {name}"] = mixing(block.layer, block.norm(x))
        x = block(x)
    print("tokens", *tokens[0].tolist())
    present(pictures, config.plot, decades=3)


# =================================================================================================
# The program
# =================================================================================================


def run_and_report(argv):
    """Does what the arguments ask for. Returns the exit code, 1 if some of many runs failed."""
    asked = {a.partition("=")[0] for a in argv}
    if "--sample" in asked:
        print("\n" + sample(parse_args(argv, SampleConfig))[1])
        return 0
    if "--show" in asked:
        show(parse_args(argv, ShowConfig))
        return 0
    if "--benchmark" in asked:
        config = parse_args(argv, BenchmarkConfig)
        benchmark(config)
        benchmark_generation(choose_device(config.device)[0])
        return 0
    if "--task=mad" in argv or ("--task", "mad") in zip(argv, argv[1:]):
        config = parse_args(argv, MadConfig)
        counts = mad_score(config.label, config.preset, config)["counts"]
        return 1 if counts["failed"] or counts["open"] else 0
    config = parse_args(argv)
    if config.task != "text" and torchrun_place()[1] > 1:
        raise ValueError(f"torchrun's processes can share a run of --task text, not one of "
                         f"{config.task}: start this one with python train.py")
    result = train(config)
    if Ranks(config.task).rank == 0:
        print("\n" + summary(config, result))
        if config.task == "text":
            sample_after(config, result)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def main():
    try:
        return run_and_report(sys.argv[1:])
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        if stop.args[0]:
            print(stop.args[0], file=sys.stderr)
        return 128 + stop.args[1]
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError))
                or "DefaultCPUAllocator" in str(error)):
            raise
        print(f"error: out of memory ({first_line(error)}): try a smaller "
              f"--batch-size, --dim or --seq-len (text: --context, or more --accumulate)",
              file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped at once; what was saved before stays", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
