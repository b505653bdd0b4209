"""
How a model learns: one run of one task, from the command line to a folder of results.

    python train.py --arch hybrid                       in-context recall, two minutes on a laptop
    python train.py --arch transformer                  the same steps: it stays near 0.3
    python train.py --arch mamba --task compression     any architecture, any of the six tasks
    python train.py --layers "hyena swiglu" --lr 5e-4   any pattern of layers.py
    python train.py -h                                  every option

Protocol (Poli et al. 2024; mad.md, section 1): AdamW with betas (0.9, 0.98), cosine decay to 1e-6,
no warmup, no clipping, batch 128; a run may end at 99.9% test accuracy. The paper trains for 200
epochs (--epochs 200); the default is 4, enough to see what an architecture is good for.

A run's folder, out/NAME/, holds config.json, log.jsonl (an object a line), ckpt.pt, result.json.

  B batch   T time   M vocabulary
"""
import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import tasks
from layers import fastest_dtype, seconds, tune_allocator
from model import ARCHS, Model, decayed, find_pattern, ledger, show_ledger, total

# =================================================================================================
# The command line: a field is an option, its help text beside it
# =================================================================================================


def option(default, text, **more):
    return dataclasses.field(default=default, metadata=dict(help=text, **more))


def choice(default, *others, text):
    return option(default, f"{text} (one of {', '.join([default, *others])})",
                  choices=(default, *others))


@dataclass
class TrainConfig:
    """Everything that determines a run. ValueError names a bad field, its value and the range."""
    arch: str = option("hybrid", "architecture of model.py")
    layers: str | None = option(None, "pattern of layers instead of an architecture")
    task: str = choice("in-context-recall", *[t for t in tasks.TASKS if t != "in-context-recall"],
                       text="what to learn")
    seq_len: int | None = option(None, "length T of the task's sequences", low=1)
    vocab_size: int | None = option(None, "vocabulary of the task", low=1)
    num_train: int | None = option(None, "training sequences", low=1)
    dim: int = option(128, "width D of the model", low=1)
    epochs: int = option(4, "passes over the training data (the paper: 200)", low=1)
    steps: int | None = option(None, "optimizer steps, instead of epochs", low=1)
    batch_size: int = option(128, "sequences a step", low=1)
    lr: float = option(1e-3, "peak learning rate (the paper's grid: 1e-4 5e-4 1e-3)", low=0.0)
    weight_decay: float = option(0.1, "of matrices only (the paper's grid: 0 0.1)", low=0.0)
    beta2: float = option(0.98, "AdamW's second beta (mad-lab really ran 0.999)", low=0.0)
    schedule: str = choice("cosine", "constant", text="learning rate over time")
    seed: int = option(0, "of parameters, data and order", low=0)
    device: str = option("auto", "cuda, mps, cpu or auto: the first of these that is there")
    dtype: str = choice("auto", "float32", "bfloat16", text="of matrix products")
    compile: str = choice("auto", "on", "off", text="torch.compile")
    out: str = option("out", "folder that run folders go into")
    name: str | None = option(None, "of the run's folder; the default is made from the options")
    clip: float | None = option(None, "largest norm of the gradient (the default: any)", low=0.0)
    eval_every: int | None = option(None, "steps between tests; the default is half an epoch", low=1)
    early_stop: float = option(0.999, "end at this test accuracy (above 1: never)", low=0.0)

    def __post_init__(self):
        for f in dataclasses.fields(self):
            check_field(f, getattr(self, f.name))
        self.pattern, self.setting, self.run_name     # an impossible one is an error here

    @property
    def pattern(self):
        return self.layers if self.layers is not None else find_pattern(self.arch)

    @property
    def setting(self):
        """The task's baseline with what the options change."""
        changes = {k: getattr(self, k) for k in ("seq_len", "vocab_size", "num_train")}
        return dataclasses.replace(tasks.BASELINES[self.task],
                                   **{k: v for k, v in changes.items() if v is not None})

    @property
    def run_name(self):
        """--name, or architecture and task and whatever else is not the default."""
        if self.name is not None:
            return safe_name(self.name)
        parts = [self.layers or self.arch, self.task]
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value != f.default and f.name not in ("arch", "layers", "task", "out", "name"):
                parts.append(f"{f.name.replace('_', '-')}={value}")
        return safe_name("_".join(parts))


def field_type(f):
    """int of `int` and of `int | None`."""
    return f.type.__args__[0] if isinstance(f.type, types.UnionType) else f.type


def check_field(f, value):
    kind, low = field_type(f), f.metadata.get("low")
    if value is None and f.default is None:
        return
    fits = isinstance(value, (int, float) if kind is float else kind) and value is not True
    if not fits or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{f.name} is {value!r}; it takes a {kind.__name__}")
    if low is not None and value < low:
        raise ValueError(f"{f.name} is {value!r}; permitted: at least {low}")
    if "choices" in f.metadata and value not in f.metadata["choices"]:
        raise tasks.unknown(f.name, value, f.metadata["choices"])


def safe_name(name):
    """A file name without separators: nothing is written outside --out by accident."""
    name = "".join(c if c.isalnum() or c in "-_.=," else "-" for c in name).strip(".-")
    if not name:
        raise ValueError("name: needs at least one letter or digit")
    return name[:200]


def parse_args(argv=None):
    """argv -> TrainConfig; a mistake ends in one line that names the way out, and exit code 2."""
    parser = argparse.ArgumentParser(
        description="Train one architecture on one task.", allow_abbrev=False,
        epilog="architectures: " + ", ".join(ARCHS))
    for f in dataclasses.fields(TrainConfig):
        parser.add_argument("--" + f.name.replace("_", "-"), type=field_type(f), default=f.default,
                            metavar=field_type(f).__name__.upper(),
                            help=f.metadata["help"] + ("" if f.default is None else
                                                       f" (default {f.default})"))
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        valid = [o for a in parser._actions for o in a.option_strings]
        raise tasks.unknown("option", unknown[0], valid)
    return TrainConfig(**vars(args))


# =================================================================================================
# What this machine is good for. Each choice comes with its reason, printed before training.
# =================================================================================================


def choose_device(wanted):
    """"cuda", "mps" or "cpu", and why."""
    if wanted != "auto":
        try:
            torch.empty(1, device=wanted)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {wanted!r} is not to be had here: "
                             f"{str(error).splitlines()[0]}; try --device cpu") from None
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


# What compiling saves of a step, and its price, on two CPU cores.
SAVED_BY_COMPILING, COMPILE_SECONDS = 0.4, 40


def choose_compile(wanted, device, steps, step_seconds):
    """Whether to compile, and why. step_seconds: one uncompiled step, measured."""
    if wanted != "auto":
        return wanted == "on", "asked for"
    if device == "mps":
        return False, "not tried on Apple GPUs"
    if device == "cpu" and not has_compiler():
        return False, "there is no C++ compiler on the PATH (install g++ to train faster)"
    saved, cost = steps * step_seconds * SAVED_BY_COMPILING, COMPILE_SECONDS
    about = f"{steps:,} steps of {step_seconds:.2f} s: it would save about {saved:.0f} s"
    return saved > cost, f"{about} and cost about {cost} s"


# =================================================================================================
# Data on the device, as one tensor each
# =================================================================================================


class TaskData:
    """A MAD task: a fixed training set, shuffled anew each epoch, and a test set."""

    def __init__(self, setting, batch_size, seed, device):
        self.setting, self.seed, self.device = setting, seed, device
        arrays = [*tasks.generate(setting, setting.num_train, seed, "train"),
                  *tasks.generate(setting, setting.num_test, seed, "test")]
        self.sha256 = hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()
        self.train, self.targets, self.test, self.test_targets = (
            torch.from_numpy(a).to(device) for a in arrays)
        self.batch_size = min(batch_size, setting.num_train)
        self.epoch_steps = setting.num_train // self.batch_size     # a last, partial batch is left
        self.epoch = None                                           # out; every epoch another one
        self.chance, self.ceiling = tasks.chance(setting), tasks.ceiling(setting)

    def batch(self, step):
        """(tokens, targets) of a step, (B, T) each: a function of seed and step alone."""
        epoch, i = divmod(step, self.epoch_steps)
        if epoch != self.epoch:
            order = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.order = torch.randperm(len(self.train), generator=order).to(self.device)
            self.epoch = epoch
        rows = self.order[i * self.batch_size:(i + 1) * self.batch_size]
        return self.train[rows], self.targets[rows]

    def test_batches(self):
        """Batches of the training batch's shape, so that no second graph is compiled for tests."""
        B = self.batch_size
        for i in range(0, len(self.test), B):
            tokens, targets = self.test[i:i + B], self.test_targets[i:i + B]
            fill = B - len(tokens)
            yield (torch.cat((tokens, self.test[:fill])),
                   F.pad(targets, (0, 0, 0, fill), value=tasks.IGNORE))


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


def evaluate(score, data):
    """Test loss, token accuracy, macro accuracy (batch by batch, as published) of a task."""
    loss = right = count = macro = 0
    for n, (tokens, targets) in enumerate(data.test_batches(), 1):
        batch_loss, said = score(tokens, targets)
        at = targets != tasks.IGNORE
        loss = loss + batch_loss.detach() * at.sum()
        right, count = right + (said == targets)[at].sum(), count + at.sum()
        macro = macro + macro_accuracy(said[at], targets[at], data.setting.vocab_size)
    return dict(test_loss=float(loss / count), test_accuracy=float(right / count),
                macro_accuracy=float(macro / n))


def learning_rate(config, step, steps):
    """Cosine from lr to 1e-6 over the run, or constant."""
    if config.schedule == "constant":
        return config.lr
    low = min(1e-6, config.lr)
    return low + (config.lr - low) * (1 + math.cos(math.pi * step / steps)) / 2


def make_optimizer(model, config):
    """AdamW; weight decay on matrices only. Returns it and how many numbers (do, don't) decay."""
    matrices = {id(p) for p in decayed(model)}
    with_, without = ([p for p in model.parameters() if (id(p) in matrices) == yes]
                      for yes in (True, False))
    groups = [dict(params=with_, weight_decay=config.weight_decay),
              dict(params=without, weight_decay=0.0)]
    return (torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True),
            tuple(sum(p.numel() for p in ps) for ps in (with_, without)))


# =================================================================================================
# Files
# =================================================================================================


def write_atomically(path, write):
    """write(file) into a temporary neighbour, which then replaces path: never half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    write_atomically(path, lambda f: f.write((json.dumps(content, indent=1) + "\n").encode()))


def code_version():
    """A hash of the four files that determine a result."""
    sources = [Path(__file__).with_name(n) for n in ("tasks.py", "layers.py", "model.py",
                                                     "train.py")]
    return hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:16]


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
    of another run is left alone: with a default name the run takes the next free one, with --name
    it stops. Returns (folder, note or None), makes nothing. ValueError shows the difference.
    """
    base, wanted = Path(config.out) / config.run_name, identity(config)
    for attempt in range(1, 1000):
        folder = base if attempt == 1 else base.with_name(f"{base.name}-{attempt}")
        try:
            found = json.loads((folder / "config.json").read_text())
        except FileNotFoundError:
            found = None
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder}/config.json can't be read ({error}); choose another "
                             f"--name or --out") from None
        if found is None or found == wanted:
            break
        differ = [f"{k} {found.get(k)!r} -> {wanted.get(k)!r}" for k in wanted
                  if found.get(k) != wanted.get(k)]
        if config.name is not None:
            raise ValueError(f"{folder} holds another run ({'; '.join(differ)}); "
                             f"choose another --name")
    return folder, (f"{base} holds a run of other code, so this one goes into {folder}"
                    if folder != base else None)


def identity(config):
    """What determines a run's result, as JSON."""
    return {**dataclasses.asdict(config), "pattern": config.pattern, "code": code_version()}


# =================================================================================================
# A run
# =================================================================================================

LOG_EVERY, SAVE_SECONDS = 10, 30       # steps between log lines; seconds between checkpoints


class Run:
    """A run under way: its model, optimizer and data, and their state on disk in `folder`."""

    def __init__(self, config, folder, say=print):
        self.config, self.folder, self.say = config, folder, say
        self.started, self.step, self.train_seconds = time.perf_counter(), 0, 0.0
        self.metrics, self.best, self.shown, self.ended, self.signal = {}, {}, {}, None, None
        self.log_path = folder / "log.jsonl"
        self.choose_machine()
        self.build()
        folder.mkdir(parents=True, exist_ok=True)     # what is wrong with the options is known now
        if not (folder / "config.json").exists():
            write_json(folder / "config.json", identity(config))
        self.load()
        self.choose_graph()

    def choose_machine(self):
        self.device, reason = choose_device(self.config.device)
        self.say(f"device   {self.device}: {reason}")
        if self.device == "cpu":
            self.say(f"memory   the allocator {tune_allocator()}")
            torch.set_flush_denormal(True)        # numbers below 1e-38 cost 100 times the time
        self.dtype, reason = (fastest_dtype(self.device) if self.config.dtype == "auto" else
                              (getattr(torch, self.config.dtype), "asked for"))
        self.say(f"dtype    {str(self.dtype)[6:]}: {reason}")

    def build(self):
        """Data, model and optimizer."""
        config, setting = self.config, self.config.setting
        self.data = data = TaskData(setting, config.batch_size, config.seed, self.device)
        self.steps = config.steps or config.epochs * data.epoch_steps
        self.eval_every = config.eval_every or max(1, data.epoch_steps // 2)
        self.say(f"data     {config.task}: {len(data.train):,} training and {len(data.test):,} "
                 f"test sequences of {setting.length} tokens, vocabulary {setting.vocab_size}")
        torch.manual_seed(config.seed)
        self.model = Model(config.pattern, setting.vocab_size, config.dim, setting.length,
                           setting.backbone).to(self.device)
        self.optimizer, (yes, no) = make_optimizer(self.model, config)
        self.say(f"decay    {config.weight_decay} on {yes:,} parameters (matrices), 0 on {no:,} "
                 f"(norms, biases, filters, decay rates)")

    def plain_score(self, tokens, targets):
        return scored(self.model, self.dtype, tokens, targets)

    def choose_graph(self):
        """self.score: `scored`, compiled if that pays within the run."""
        def one_step():
            self.plain_score(*self.data.batch(self.step))[0].backward()
            self.optimizer.zero_grad()
        left = self.steps - self.step
        measured = seconds(one_step, self.device, 1) if self.config.compile == "auto" and left else 0
        self.compiled, reason = choose_compile(self.config.compile, self.device, left, measured)
        self.score = self.plain_score
        if self.compiled:
            self.score = torch.compile(self.plain_score, dynamic=False)
            try:
                self.score(*self.data.batch(self.step))
            except Exception as error:            # whatever the compiler or its compiler throw
                if self.config.compile == "on":
                    raise
                reason = f"failed here ({type(error).__name__}: {str(error).split(chr(10))[0][:150]})"
                self.score, self.compiled = self.plain_score, False
        self.say(f"compile  {'on' if self.compiled else 'off'}: {reason}")

    # -- disk ------------------------------------------------------------------------------------

    def save(self):
        content = dict(step=self.step, best=self.best, metrics=self.metrics,
                       train_seconds=self.train_seconds, log_bytes=self.log_path.stat().st_size,
                       model=self.model.state_dict(), optimizer=self.optimizer.state_dict())
        write_atomically(self.folder / "ckpt.pt", lambda f: torch.save(content, f))

    def load(self):
        """Go on from the folder's checkpoint, if there is one; log lines after it are dropped."""
        path = self.folder / "ckpt.pt"
        if not path.exists():
            self.log_path.write_bytes(b"")
            return
        content = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        for key in ("step", "best", "metrics", "train_seconds"):
            setattr(self, key, content[key])
        with open(self.log_path, "r+b") as log:
            log.truncate(content["log_bytes"])
        self.say(f"resume   from step {self.step:,} of {self.steps:,} ({path})")

    def log(self, **line):
        with open(self.log_path, "a") as file:
            file.write(json.dumps(dict(step=self.step, **line)) + "\n")

    # -- the loop --------------------------------------------------------------------------------

    def one_step(self):
        """A step; nothing in it waits for the device. Returns tokens, loss, gradient's norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step, self.steps)
        tokens, targets = self.data.batch(self.step)
        loss, _ = self.score(tokens, targets)
        loss.backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return tokens.numel(), loss.detach(), norm

    def some_steps(self, bar):
        """Steps up to the next log line or test, then one look at the loss; less on a signal."""
        start, tokens = time.perf_counter(), 0
        next_one = lambda every: (self.step // every + 1) * every
        until = min(self.steps, next_one(LOG_EVERY), next_one(self.eval_every))
        while self.step < until:
            count, loss, norm = self.one_step()
            tokens += count
            bar.update()
            if self.signal and self.step < until:
                return
        loss, rate = float(loss), self.optimizer.param_groups[0]["lr"]
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {self.step} with learning rate "
                                     f"{rate:.1e}; try a lower --lr")
        took = time.perf_counter() - start
        self.train_seconds += took
        self.log(loss=loss, lr=rate, gradient_norm=float(norm), tokens_per_s=round(tokens / took))
        self.shown |= dict(loss=f"{loss:.4f}", lr=f"{rate:.1e}", tokens_s=f"{tokens / took:,.0f}")

    def test(self):
        self.metrics = evaluate(self.score, self.data)
        self.log(**self.metrics)
        accuracy = self.metrics["test_accuracy"]
        if accuracy >= self.best.get("test_accuracy", 0.0):
            self.best = dict(self.metrics, step=self.step)
        self.shown |= dict(test_acc=f"{accuracy:.3f}")
        if accuracy >= self.config.early_stop:
            self.ended = (f"stopped early at {100 * self.config.early_stop:g}% test accuracy, as "
                          f"the protocol allows")

    def go(self):
        """Train to the end, an early stop or a signal. Returns True unless it was a signal."""
        saved = time.perf_counter()
        with tqdm(total=self.steps, initial=self.step, unit="step", dynamic_ncols=True,
                  desc=self.config.layers or self.config.arch) as bar, catching_signals(self):
            while self.ended is None and self.signal is None:
                self.some_steps(bar)
                if self.step % self.eval_every == 0 or self.step == self.steps:
                    self.test()
                if self.step == self.steps:
                    self.ended = self.ended or "all steps done"
                bar.set_postfix(self.shown)
                if self.ended or self.signal or time.perf_counter() - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.perf_counter()
        return self.ended is not None

    def result(self):
        """The contents of result.json."""
        sequences = self.step * self.data.batch_size
        T = self.data.setting.length
        return dict(
            **self.metrics, best=self.best, chance=self.data.chance, ceiling=self.data.ceiling,
            steps=self.step, planned_steps=self.steps, ended=self.ended,
            tokens_per_s=round(sequences * T / self.train_seconds),
            wall_s=round(time.perf_counter() - self.started, 2),
            train_flops=3 * sequences * total(ledger(self.model, T)).flops,
            parameters=sum(p.numel() for p in self.model.parameters()),
            config=identity(self.config), data_sha256=self.data.sha256, git=git_hash(),
            machine=dict(device=self.device, dtype=str(self.dtype)[6:], compiled=self.compiled,
                         threads=torch.get_num_threads(), platform=platform.platform()),
            versions=dict(python=platform.python_version(), torch=torch.__version__,
                          numpy=np.__version__))


@contextlib.contextmanager
def catching_signals(run):
    """The first Ctrl-C or SIGTERM ends the run after the step under way; the second at once."""
    def stop(number, _):
        if run.signal:
            raise KeyboardInterrupt
        run.signal = number
    main = threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


class Interrupted(Exception):
    """A signal ended the run after it was saved; args: a line that says how to go on, number."""


def train(config, say=print):
    """One run, from its folder's state to its end. Returns the contents of its result.json."""
    folder, note = find_folder(config)
    if note:
        say(f"note     {note}")
    done = folder / "result.json"
    if done.exists():
        say(f"note     this run is finished; its result is shown again. To train once more, choose "
            f"another --seed or --name")
        return json.loads(done.read_text()) | dict(folder=str(folder))
    run = Run(config, folder, say)
    say("\n" + show_ledger(run.model, run.data.setting.length) + "\n")
    if not run.go():
        raise Interrupted(f"stopped at step {run.step:,} of {run.steps:,}, saved in {folder}; the "
                          f"same command goes on from there", run.signal)
    result = run.result()
    write_json(done, result)
    return result | dict(folder=str(folder))


def summary(config, r):
    """What a run came to, and what to try next."""
    other = "transformer" if config.arch != "transformer" else "hybrid"
    task = "" if config.task == TrainConfig.task else f" --task {config.task}"
    lines = [f"test accuracy    {r['test_accuracy']:.4f} of tokens, {r['macro_accuracy']:.4f} "
             f"averaged over classes; chance {r['chance']:.3f}",
             f"training         {r['steps']:,} of {r['planned_steps']:,} steps ({r['ended']})",
             f"time             {r['wall_s']:.0f} s in all, {r['tokens_per_s']:,} tokens a second "
             f"in training",
             f"saved in         {r['folder']}/ (config, log, checkpoint, result)", "",
             "next: the same task for another architecture, another task, the paper's protocol",
             f"  python train.py --arch {other}{task}" + (
                 f" --steps {r['planned_steps']}" if config.steps else ""),
             f"  python train.py --arch {config.arch} --task selective-copying",
             f"  python train.py --arch {config.arch}{task} --epochs 200"]
    return "\n".join(lines)


def main():
    try:
        config = parse_args()
        result = train(config)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(stop.args[0], file=sys.stderr)
        return 128 + stop.args[1]
    print("\n" + summary(config, result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
