"""
How a model learns: one run of one task, from the command line to a folder of results.

    python train.py --arch hybrid                       in-context recall: 0.99 in a minute or so
    python train.py --arch transformer                  the same steps: it stays near 0.3
    python train.py --layers "hyena swiglu" --lr 5e-4   any pattern of layers.py
    python train.py --arch mamba --task text            a language model of Python's own sources
    python train.py --sample out/mamba_text --prompt "def "       what it writes
    python train.py --arch hybrid --task mad            the quick score: six runs, resumable

Protocol (Poli et al. 2024, appendix): AdamW with betas (0.9, 0.98), cosine decay to 1e-6, no
warmup, no clipping, batch 128, 200 epochs (here 32 and 1: enough to see what an architecture does).

A run's folder, out/NAME/, holds config.json, log.jsonl, result.json, ckpt.pt, best.pt (of the best
test). A stopped run goes on by the same command, or by --resume FOLDER; on a CPU bit for bit.
"""
import argparse
import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import tasks
from layers import tune_allocator
from model import (ARCHS, Model, ledger, load_checkpoint, make_optimizer, print_ledger, sample,
                   stripe, total)
from tasks import IGNORE, Parser, UserError, run_main, unknown

RESULTS_VERSION = 2     # raise it when a change of code changes results beyond rounding
tqdm.set_lock(threading.RLock())     # its own, a semaphore, leaks if a worker is stopped

# ---- The command line: a field of Config is an option -------------------------------------------

def option(default, text, *choices, low=None, high=2 ** 31, run=True):
    """low, high: the permitted range. run=False: it changes how or where, not what is computed."""
    return field(default=default, metadata=dict(help=text, choices=choices or None, low=low,
                                                high=high, run=run))

@dataclass
class Config:
    """None: off, or chosen for the task, as the help says; "auto": chosen for the machine."""
    arch: str = option("hybrid", "architecture; `python model.py` shows them")
    layers: str | None = option(None, "pattern of layers instead, such as 'mamba swiglu'")
    task: str = option("in-context-recall", "what to learn; mad: the score over all six tasks",
                       *tasks.TASKS, "text", "mad")
    # a MAD task (None: as in its baseline setting)
    seq_len: int | None = option(None, "length T of the sequences", low=1)
    vocab_size: int | None = option(None, "vocabulary M", low=1)
    num_train: int | None = option(None, "number of training sequences", low=1)
    frac_noise: float | None = option(None, "noisy recall: share of pairs that are noise", low=0)
    num_tokens_to_copy: int | None = option(None, "selective copying: how many", low=1)
    # text
    data: str | None = option(None, "text, folder, .bin or .npy (None: Python's standard library)")
    tokenizer: str = option("bytes", "bytes, or one of tiktoken's encodings, such as gpt2")
    context: int = option(128, "tokens in a window of text", low=1)
    # learning
    dim: int = option(128, "width D of the model", low=1)
    epochs: int | None = option(None, "passes over a MAD task's data (None: 1)", low=1)
    steps: int | None = option(None, "optimizer steps, whatever the epochs (text: 2000)", low=1)
    batch_size: int = option(32, "sequences per step (the paper: 128)", low=1)
    lr: float = option(2e-3, "peak learning rate (the paper: 1e-4 5e-4 1e-3)", low=0)
    weight_decay: float = option(0.1, "of AdamW (the paper: 0 0.1)", low=0)
    beta2: float = option(0.98, "AdamW's second beta", low=0, high=1)
    schedule: str = option("cosine", "the learning rate's course", "cosine", "constant")
    warmup: int = option(0, "steps in which the learning rate rises from 0", low=0)
    min_lr: float = option(1e-6, "learning rate at the end of the cosine", low=0)
    clip: float | None = option(None, "scale gradients of a larger norm down to this", low=1e-9)
    early_stop: float = option(0.999, "end at this test accuracy; above 1: never", low=0)
    eval_every: int | None = option(None, "steps per test (None: epoch/4; text: run/10)", low=1)
    # machine and files
    seed: int = option(0, "of parameters, data and their order", low=0)
    device: str = option("auto", "where to train", "auto", "cuda", "mps", "cpu", run=False)
    dtype: str = option("auto", "of matrix products", "auto", "float32", "bfloat16")
    compile: str = option("auto", "torch.compile; auto: if the run is long", "auto", "on", "off")
    out: str = option("out", "folder for the runs' folders", run=False)
    name: str | None = option(None, "the run's folder (None: by its options)", run=False)
    resume: str | None = option(None, "go on with the run in this folder", run=False)
    log_every: int = option(10, "steps between lines of the log", low=1, run=False)
    # --task mad
    preset: str = option("quick", "full: the paper's runs", "quick", "hard", "full", run=False)
    tasks: str | None = option(None, "only these tasks, with commas between", run=False)
    settings: str = option("all", "or only each task's first", "all", "baseline", run=False)
    workers: int = option(1, "processes that share the settings", low=1, run=False)
    shard: str = option("0/1", "i/n: machine i, from 0 on, of n that share --out", run=False)
    # other commands
    sample: str | None = option(None, "write text with the model in this folder", run=False)
    prompt: str = option("def ", "the text to go on from", run=False)
    benchmark: bool = option(False, "time whole steps: of --arch, --layers, or three", run=False)

FIELDS = {f.name: f for f in fields(Config)}
OF_SETTING = ("seq_len", "vocab_size", "num_train", "frac_noise", "num_tokens_to_copy")
OF_TEXT = ("data", "tokenizer", "context")
OF_PRESET = ("epochs", "steps", "batch_size", "eval_every", "lr", "weight_decay", "name")
OF_MAD = ("preset", "tasks", "settings", "workers", "shard")
flag = lambda name: "--" + name.replace("_", "-")

def parse_args(argv=None):
    parser = Parser(description="Train one architecture on one task.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, f in FIELDS.items():
        kind = getattr(f.type, "__args__", [f.type])[0]                    # int, of int | None
        parsing = (dict(action="store_true") if kind is bool else
                   dict(type=kind, choices=f.metadata["choices"]))
        parser.add_argument(flag(name), default=f.default, help=f.metadata["help"], **parsing)
    config = Config(**vars(parser.parse_args(argv)))
    if config.resume is None:
        return config
    path = Path(config.resume, "config.json").resolve()
    if changed(config) or not path.is_file():
        raise UserError(f"--resume {config.resume}: give a folder with config.json, and no options")
    options = {k: v for k, v in json.loads(path.read_text()).items() if k in FIELDS}
    return replace(config, **options, out=str(path.parents[1]), name=path.parent.name)

def changed(config, *skip):
    """The options of a run that are not at their defaults."""
    return {k: getattr(config, k) for k, f in FIELDS.items()
            if f.metadata["run"] and k not in skip and getattr(config, k) != f.default}

def run_name(config, *skip):
    """Architecture, task and what else is not at its default, as the name of a folder."""
    options = changed(config, "arch", "layers", "task", *skip)
    options |= dict(data=Path(config.data).name) if config.data else {}
    parts = [config.layers or config.arch, config.task, *(f"{k}={v}" for k, v in options.items())]
    name = re.sub(r"[^\w.=,+-]", "-", "_".join(parts)).encode()
    return (name[:-100][:100] + name[-100:]).decode(errors="ignore")      # file systems: 255 bytes

def setting_of(config):
    """The task's baseline, changed by the options."""
    changes = {k: v for k, v in changed(config).items() if k in OF_SETTING}
    return replace(tasks.BASELINES[config.task], **changes)

def check(config):
    """The config with all that None stands for. UserError names a wrong option and its range."""
    text = config.task == "text"
    other = OF_MAD + OF_TEXT + ("num_tokens_to_copy",) * (config.task != "selective-copying")
    unused = dict(text=OF_MAD + OF_SETTING + ("epochs", "early_stop"),
                  mad=OF_SETTING + OF_TEXT + OF_PRESET)
    for name, f in FIELDS.items():
        value, low, high = getattr(config, name), f.metadata["low"], f.metadata["high"]
        if low is not None and value is not None and not low <= value < high:
            raise UserError(f"{flag(name)} is {value}; permitted: {low} to below {high}")
        if name in unused.get(config.task, other) and value != f.default:
            raise UserError(f"{flag(name)} is {value}, but --task {config.task} has no use for it")
    if config.layers and config.arch not in (Config.arch, config.layers):
        raise UserError(f"--arch {config.arch} and --layers {config.layers!r}: give one of them")
    shard = re.fullmatch(r"(\d+)/(\d+)", config.shard)
    if not shard or int(shard[1]) >= int(shard[2]):
        raise UserError(f"--shard is {config.shard}; permitted: i/n, such as 0/4 to 3/4")
    for task in config.tasks.split(",") if config.tasks else ():
        if task not in tasks.TASKS:
            raise unknown("--tasks", task, tasks.TASKS)
    if config.task == "mad":
        return config
    n = 0 if text else setting_of(config).num_train
    batch_size = min(config.batch_size, n or config.batch_size)
    epoch = math.ceil(n / batch_size)                                # steps an epoch; text: 0
    steps = config.steps or (config.epochs or 1) * epoch or 2000
    return replace(config, steps=steps, epochs=None, batch_size=batch_size,
                   eval_every=config.eval_every or max(1, steps // 10 if text else epoch // 4),
                   data=config.data and os.path.abspath(config.data),
                   name=config.name or run_name(config))

# ---- The machine: each choice with its reason, which is printed ---------------------------------

def choose_machine(config, show=print):
    """config with device, dtype and compile decided."""
    present = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    device, dtype, compiled, reason = config.device, config.dtype, config.compile, "asked for"
    device = next(name for name in present if present[name]) if device == "auto" else device
    if not present[device]:
        raise UserError(f"--device {device} is not available here; try --device cpu")
    cuda, cpuinfo = device == "cuda", Path("/proc/cpuinfo")
    if dtype == "auto":
        bf16 = (torch.cuda.is_bf16_supported(False) if cuda else
                device == "cpu" and cpuinfo.exists() and "bf16" in cpuinfo.read_text())
        dtype = "bfloat16" if bf16 else "float32"
    compiler = "CXX" in os.environ or any(map(shutil.which, ("g++", "clang++", "cl")))
    if compiled == "on" and not (compiler or cuda):
        raise UserError("--compile on needs a C++ compiler: install g++, or leave the option out")
    if compiled == "auto":
        # Compiling costs half a minute on two cores, and then saves about a third of each step.
        T = config.context if config.task == "text" else setting_of(config).seq_len
        pays = config.steps * config.batch_size * T * config.dim ** 2 > 5e10 and device != "mps"
        compiled = "on" if pays and compiler else "off"
        reason = f"it {'pays' if pays else 'does not pay'} in {config.steps:,} steps"
        reason += ", but there is no C++ compiler: install g++" * (pays and not compiler)
    card = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} cores"
    show(f"machine  {device} ({card}), matrix products in {dtype}\ncompile  {compiled}: {reason}")
    if device == "cpu":
        tune_allocator()
        torch.set_flush_denormal(True)            # elements below 1e-38 cost 100 times the time
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    return replace(config, device=device, dtype=dtype, compile=compiled)

def connect(config):
    """(rank, world size) of this process among those that torchrun started; (0, 1) without it."""
    if "RANK" not in os.environ:
        return 0, 1
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(f"{name} is missing or empty: start with torchrun, or unset RANK")
    if config.task != "text" or config.batch_size % int(os.environ["WORLD_SIZE"]):
        raise UserError("torchrun needs --task text and a --batch-size that WORLD_SIZE divides")
    cuda = config.device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.is_initialized() or dist.init_process_group("nccl" if cuda else "gloo")
    return dist.get_rank(), dist.get_world_size()

# ---- Data: batches of (tokens, targets) ---------------------------------------------------------

def load_data(config, rank=0, world=1):
    """batch(step) and tests(most) give (tokens, targets), int64 (B, T): a MAD task's data in a new
    order each epoch, or random windows of text; its tests: `most` windows, and recall_tokens."""
    B, T, seed = config.batch_size, config.context, config.seed
    if config.task == "text":
        text = tasks.load_text(config.data, config.tokenizer)
        draw = lambda step: tasks.text_batch(text.train, T, B, seed, step)

        @functools.cache
        def test(most):
            x, y = tasks.text_windows(text.val, tasks.val_starts(text.val, T, most), T)
            n = min(6 if config.tokenizer == "bytes" else 2, T)
            return x, y, recall_tokens(text.train, np.hstack((x, y[:, -1:])), n)[:, 1:]
        size = tasks.bytes_per_token(test(LAST_TEST)[1], config.tokenizer)
        facts = dict(data=text.name, data_sha256=text.sha256, bytes_per_token=size)
        M, backbone = text.vocab_size, "lm"
    else:
        setting, task = setting_of(config), tasks.TASKS[config.task]
        arrays = tasks.generate(setting, setting.num_train, seed, "train")
        inputs, targets = (torch.from_numpy(a).to(config.device) for a in arrays)
        test_set = tasks.generate(setting, setting.num_test, seed, "test")

        def draw(step):
            epoch, i = divmod(step, math.ceil(len(inputs) / B))
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            rows = torch.randperm(len(inputs), generator=generator).split(B)[i]
            rows = rows.to(config.device, non_blocking=True)
            return inputs[rows], targets[rows]
        test = lambda most: test_set
        facts = dict(data=f"{setting.num_train:,} training, {setting.num_test:,} test sequences",
                     data_sha256=hashlib.sha256(arrays[0]).hexdigest(), chance=task.chance(setting))
        M, T, backbone = setting.vocab_size, inputs.shape[1], task.backbone

    def batches(arrays):
        rows = math.ceil(B / world)
        parts = (torch.as_tensor(x[rank::world]).to(config.device, non_blocking=True).split(rows)
                 for x in arrays)
        # Rows that are not scored fill the last batch: one shape, so that one graph is compiled.
        return ([F.pad(x, (0, 0, 0, rows - len(x)), value=fill)
                 for x, fill in zip(batch, (0, IGNORE, False))] for batch in zip(*parts))

    return SimpleNamespace(batch=lambda step: next(batches(draw(step))), facts=facts,
                           tests=lambda most: batches(test(most)),
                           model_args=dict(vocab_size=M, max_len=T, backbone=backbone))

# ---- One step, one test -------------------------------------------------------------------------

LOGITS = 1 << 26                 # elements of logits in memory at a time: 256 MB in float32
TEST, LAST_TEST = 480, 3840      # windows of text in a test, and in the one after the last step

def compute_loss(model, tokens, targets):
    """Mean loss over the scored positions (an auxiliary term, as a balance of experts, goes here);
    without gradients, the loss of each position and the predictions, both (B, T)."""
    unembed = getattr(model, "module", model).unembed         # (module: what DDP has wrapped)
    training = torch.is_grad_enabled()

    def loss_of(x, labels):
        logits = unembed(x).float()                                           # (positions, M)
        losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
        return losses.sum() if training else (losses, logits.argmax(-1))

    x, labels = model(tokens, unembed=False).flatten(0, 1), targets.flatten()     # (B T, D)
    n = len(x) * unembed.out_features // LOGITS + 1
    # Only one piece of the logits is kept at a time: the backward pass makes it again.
    run = loss_of if n == 1 else lambda *piece: checkpoint(loss_of, *piece, use_reentrant=False)
    pieces = [run(*piece) for piece in zip(x.chunk(n), labels.chunk(n))]
    if training:
        return sum(pieces) / (labels != IGNORE).sum().clamp(min=1)
    return [torch.cat(parts).view_as(targets) for parts in zip(*pieces)]

COMPILED = []          # shape of the last compiled run: its graphs serve other runs of that shape

def build(config, rank=0, world=1):
    """Data, model, optimizer, and loss_fn(tokens, targets) in the run's precision."""
    data = load_data(config, rank, world)
    torch.manual_seed(config.seed)
    model = Model(config.layers or config.arch, dim=config.dim, **data.model_args)
    net = model.to(config.device)
    if world > 1:      # buffers are constants; processes may have different numbers of test batches
        net = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)

    def loss_fn(tokens, targets):
        with torch.autocast(config.device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            return compute_loss(net, tokens, targets)

    if config.compile == "on":
        shape = [*model.args.values(), config.batch_size, config.device, config.dtype, world]
        if shape != COMPILED:
            COMPILED[:] = shape
            torch.compiler.reset()                # it keeps only a few graphs of a function
        loss_fn = torch.compile(loss_fn, dynamic=False, mode="reduce-overhead")    # CUDA: graphs
    optimizer = make_optimizer(model, config.lr, config.weight_decay, config.beta2)
    return data, model, optimizer, loss_fn

def schedule(config, step):
    """The share of the peak rate: up for `warmup` steps, then constant or a cosine to min_lr."""
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    low = 1.0 if config.schedule == "constant" else min(1.0, config.min_lr / max(config.lr, 1e-30))
    done = (step - config.warmup) / (config.steps - config.warmup)
    return low + (1 - low) * (1 + math.cos(math.pi * done)) / 2

def one_step(config, step, data, model, optimizer, loss_fn):
    """An optimizer step. Returns loss and gradient norm; both still on the device."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * schedule(config, step)
    loss = loss_fn(*data.batch(step))
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach(), norm

def macro_accuracy(predictions, targets, vocab_size):
    """Mean recall of the tokens that occur as target or prediction, as published; both (n,)."""
    count = lambda x: torch.bincount(x, minlength=vocab_size)
    right, total = count(targets[predictions == targets]), count(targets)
    return (right / total.clamp(min=1))[total + count(predictions) > 0].mean()

def recall_tokens(train, windows, n, min_count=100):
    """bool (B, L): which tokens of windows (B, L) end an n-gram that is earlier in it and, in
    train's first 10^7, rarer than min_count times (after Arora et al. 2023, arXiv 2312.04927)."""
    M = int(max(train.max(), windows.max())) + 1                              # B M^n < 2^63
    code = lambda ids: sum(ids[..., i:ids.shape[-1] + 1 - n + i].astype(np.int64) * M ** i
                           for i in range(n))
    (seen, counts), codes = np.unique(code(train[:10 ** 7]), return_counts=True), code(windows)
    frequent = np.isin(codes, seen[counts >= min_count])
    repeated = tasks.first_shown(codes) < np.arange(codes.shape[1])
    return np.pad(repeated & ~frequent, ((0, 0), (n - 1, 0)))

@torch.no_grad()
def evaluate(loss_fn, data, most=TEST, world=1):
    """The metrics of a test. What you add here is in the log, the bar and result.json."""
    batches = []
    for tokens, targets, *recall in data.tests(most):
        results = [x.clone() for x in loss_fn(tokens, targets)]   # a CUDA graph overwrites its own
        batches.append((*results, targets, *recall))
    losses, predictions, targets, *recall = map(torch.cat, zip(*batches))     # (n, T) each
    scored, right = targets != IGNORE, predictions == targets
    sums = torch.stack([torch.stack((losses[part].sum(), right[part].sum(), part.sum()))
                        for part in (scored, *recall)])
    if world > 1:
        dist.all_reduce(sums)
    loss, accuracy = (sums[0, :2] / sums[0, 2]).tolist()
    if recall:                                            # text
        size, mean = data.facts["bytes_per_token"], lambda part: float(part[0] / part[2])
        parts = [mean(part) if part[2] else None for part in (sums[1], sums[0] - sums[1])]
        return dict(val_loss=loss, val_accuracy=accuracy, recall_loss=parts[0],
                    other_loss=parts[1], bits_per_byte=size and loss / math.log(2) / size)
    macro = [macro_accuracy(p[s], t[s], data.model_args["vocab_size"])     # by 128, as published
             for p, t, s in zip(*(x.split(128) for x in (predictions, targets, scored))) if s.any()]
    return dict(test_loss=loss, test_accuracy=accuracy,
                macro_accuracy=torch.stack(macro).mean().item())

# ---- Files --------------------------------------------------------------------------------------

FIRST_PROCESS = os.environ.get("RANK", "0") == "0"         # of torchrun's: the one that writes

def write(path, content):
    """JSON, text or a .pt: first a temporary file, which replaces path, so it is never half."""
    if not FIRST_PROCESS:
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".pt":
            torch.save(content, temporary)
        else:
            text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
            temporary.write_text(text)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:              # (torch.save's, if the disk is full)
        raise UserError(f"{path} can't be written ({error!s:.99}): choose another --out") from None

def find_folder(config, data_sha256):
    """The run's folder, and its options for config.json; UserError if the folder has others."""
    path = Path(config.out, config.name, "config.json")
    options = {k: getattr(config, k) for k, f in FIELDS.items() if f.metadata["run"]}
    options |= dict(version=RESULTS_VERSION, data_sha256=data_sha256)
    saved = json.loads(path.read_text()) if path.exists() else options
    if saved != options:
        differ = ", ".join(f"{k} is {saved.get(k)}" for k in options if saved.get(k) != options[k])
        raise UserError(f"{path.parent} holds another run ({differ}): change --name or --out")
    return path.parent, options

def save_checkpoint(path, model, optimizer, **state):
    write(path, dict(state, model_args=model.args, model=model.state_dict(),
                     optimizer=optimizer.state_dict(), random=torch.get_rng_state()))

def restore(folder, state, model, optimizer, device):
    """`state`, model, optimizer and log as they were at the last checkpoint, if there is one."""
    if not (folder / "ckpt.pt").exists():
        write(folder / "log.jsonl", "")
        return state
    saved = load_checkpoint(folder / "ckpt.pt", device)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["random"].cpu())
    lines = re.findall(".+\n", (folder / "log.jsonl").read_text())      # the last may be half
    write(folder / "log.jsonl", "".join(s for s in lines if json.loads(s)["step"] <= saved["step"]))
    return {key: saved[key] for key in state}

# ---- A run --------------------------------------------------------------------------------------

class Diverged(UserError):
    """The loss or the gradient is not finite."""

@contextlib.contextmanager
def catch_signals():
    """A list that collects the numbers of Ctrl-C, SIGTERM, SIGHUP; a repeated one interrupts."""
    def handler(number, frame):
        if number in caught:
            raise KeyboardInterrupt(128 + number)
        caught.append(number)

    caught, numbers = [], {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}
    before = {number: signal.signal(number, handler) for number in numbers
              if signal.getsignal(number) != signal.SIG_IGN}              # as workers do Ctrl-C
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)

def train(config, verbose=True, bar=False):
    """One run, from where its folder stands to its end -> the contents of its result.json. Raises
    UserError, Diverged, and after a signal, once it is saved, KeyboardInterrupt (128 + signal)."""
    started, (rank, world) = time.perf_counter(), connect(config)
    verbose = verbose and rank == 0
    config = choose_machine(check(config), print if verbose else lambda line: None)
    data, model, optimizer, loss_fn = build(config, rank, world)
    folder, options = find_folder(config, data.facts["data_sha256"])
    if (folder / "result.json").exists():
        if verbose:
            print(f"{folder} is finished; to train once more, choose another --seed or --name")
        return json.loads((folder / "result.json").read_text())

    write(folder / "config.json", options)
    T, step_tokens = model.args["max_len"], config.batch_size * model.args["max_len"]
    flops_per_token = 3 * total(ledger(model, T)).flops / T          # backward is twice forward
    if verbose:
        print(f"data     {data.facts['data']}; T = {T}, vocabulary {model.args['vocab_size']}\n")
        print_ledger({"total": model}, T)

    # All that changes beside model and optimizer, and what readers of a checkpoint need.
    state = dict(step=0, best={}, metrics={}, ended=None, s_per_token=[], wall_s=0.0,
                 tokenizer=config.tokenizer if config.task == "text" else None,
                 example=data.batch(0)[0][:1])            # a sequence for `model.py --show`
    state = restore(folder, state, model, optimizer, config.device)
    started -= state["wall_s"]
    last_step, last_time = state["step"], time.perf_counter()
    progress = tqdm(total=config.steps, initial=last_step, unit="step", dynamic_ncols=True,
                    desc=config.layers or config.arch, leave=verbose, disable=not (verbose or bar))
    with progress, catch_signals() as signals:
        while state["ended"] is None:
            loss, norm = one_step(config, state["step"], data, model, optimizer, loss_fn)
            step = state["step"] = state["step"] + 1
            progress.update()
            testing = step % config.eval_every == 0 or step == config.steps
            if not (testing or step % config.log_every == 0 or signals and world == 1):
                continue

            # From here on, and only here, the device is waited for.
            loss, norm, lr = float(loss), float(norm), optimizer.param_groups[0]["lr"]
            if not math.isfinite(loss + norm):
                raise Diverged(f"step {step}, learning rate {lr:.1e}: loss {loss}, gradient norm "
                               f"{norm}; lower --lr or give --clip 1")
            seconds = (time.perf_counter() - last_time) / (step - last_step) / step_tokens
            state["s_per_token"].append(seconds)
            entry = dict(step=step, loss=loss, lr=lr, gradient_norm=norm,
                         tokens_per_s=round(1 / seconds))
            if testing:
                metrics = state["metrics"] = evaluate(loss_fn, data, TEST, world)
                entry |= metrics
                score = -metrics["val_loss"] if "val_loss" in metrics else metrics["test_accuracy"]
                if score > state["best"].get("score", -math.inf):
                    state["best"] = dict(metrics, step=step, score=score)
                    save_checkpoint(folder / "best.pt", model, optimizer, **state)
                if step == config.steps or score >= config.early_stop:
                    state["ended"] = "all steps" if step == config.steps else "solved"
            if rank == 0:
                with open(folder / "log.jsonl", "a") as file:
                    file.write(json.dumps(entry) + "\n")
            last_step, last_time = step, time.perf_counter()
            progress.set_postfix(loss=loss, **state["metrics"])

            stop = torch.tensor(max(signals, default=0), device=config.device)
            if world > 1:                                     # a signal to one process stops all
                dist.all_reduce(stop, dist.ReduceOp.MAX)
            if testing or stop or last_time - started - state["wall_s"] > 60:   # once a minute
                state["wall_s"] = last_time - started
                save_checkpoint(folder / "ckpt.pt", model, optimizer, **state)
            if stop:
                progress.write(f"stopped at step {step:,} of {config.steps:,}; go on by the same "
                               f"command, or by --resume {folder}", file=sys.stderr)
                in_worker = multiprocessing.parent_process()      # a worker's exit is quiet
                raise (SystemExit if in_worker else KeyboardInterrupt)(128 + int(stop))

    if config.task == "text":
        state["metrics"] = evaluate(loss_fn, data, LAST_TEST, world)
    times = state["s_per_token"][1:] or state["s_per_token"]         # the first steps may compile
    result = dict(
        state["metrics"], best=state["best"], **data.facts, folder=str(folder), steps=state["step"],
        ended=state["ended"], tokens_per_s=round(len(times) / sum(times)),
        wall_s=round(time.perf_counter() - started, 1), flops_per_token=flops_per_token,
        train_flops=state["step"] * step_tokens * flops_per_token, version=RESULTS_VERSION,
        parameters=sum(p.numel() for p in model.parameters()), config=asdict(config),
        threads=torch.get_num_threads(), platform=platform.platform(), torch=torch.__version__,
        card=torch.cuda.get_device_name() if config.device == "cuda" else None,
        git=subprocess.getoutput(f"git -C '{Path(__file__).parent}' rev-parse HEAD"))
    write(folder / "result.json", result)
    return result

def print_summary(r):
    """What came out of a run, r, and what to try next."""
    for key, value in r.items():
        if key.endswith(("accuracy", "loss", "chance", "per_byte")) and value is not None:
            print(f"{key.replace('_', ' '):<17}{value:.4f}")
    print(f"steps            {r['steps']:,} ({r['ended']}), {r['train_flops']:.1e} FLOPs\n"
          f"time             {r['wall_s']:.0f} s, {r['tokens_per_s']:,} tokens a second\n"
          f"saved in         {r['folder']}\n\nnext: another architecture, and what the layers mix\n"
          f"  python train.py --arch mamba --task {r['config']['task']}   (or transformer ..)\n"
          f"  python model.py --show {r['folder']}")
    if "val_loss" in r:
        print(f"  python train.py --sample {r['folder']} --prompt 'def '")

# ---- The MAD protocol ---------------------------------------------------------------------------

def short(*rows, lrs):
    """A preset of rows (task, changes of its baseline, steps), small batches, high rates."""
    settings = [(replace(tasks.BASELINES[task], **changes), steps) for task, changes, steps in rows]
    return dict(settings=settings, batch_size=32, eval_every=100, lrs=lrs, weight_decays=(0.1,))

PRESETS = {        # settings: (Setting, steps of its runs, or None: epochs)
    # The paper's 396 runs: the best of six, chosen and ended by test accuracy, as published.
    # Different from mad-lab: a run counts as it is at its end, not where its test loss was least.
    "full": dict(settings=[(s, None) for s in tasks.mad_settings()], epochs=200, batch_size=128,
                 eval_every=50, lrs=(1e-3, 5e-4, 1e-4), weight_decays=(0.0, 0.1)),
    # The quick score: the baselines, but for memorization, which is solved there by all.
    "quick": short(("in-context-recall", {}, 1600), ("fuzzy-in-context-recall", {}, 800),
                   ("noisy-in-context-recall", {}, 2400), ("selective-copying", {}, 500),
                   ("compression", {}, 1600), ("memorization", dict(vocab_size=4096), 1000),
                   lrs=(3e-3,)),
    # Settings that few architectures solve: the score tells the strong ones apart, too.
    "hard": short(("in-context-recall", dict(vocab_size=64), 1000),
                  ("fuzzy-in-context-recall", {}, 1000),
                  ("noisy-in-context-recall", dict(vocab_size=80, frac_noise=0.4), 1000),
                  ("selective-copying", {}, 1000), ("compression", {}, 1000),
                  ("memorization", dict(vocab_size=4096), 600), lrs=(3e-3, 1e-3))}

def runs_of(config, setting, steps):
    """The runs of a setting, in order, as Configs: the fastest learner first."""
    preset, base = PRESETS[config.preset], tasks.BASELINES[setting.task]
    changes = {k: v for k, v in asdict(setting).items() if v != getattr(base, k)}
    changes |= {k: FIELDS[k].default for k in OF_MAD}
    runs = [replace(config, **changes, task=setting.task, lr=lr, weight_decay=decay, steps=steps,
                    epochs=preset.get("epochs"), batch_size=preset["batch_size"],
                    eval_every=preset["eval_every"], out=f"{config.out}/mad/{config.preset}")
            for lr in preset["lrs"] for decay in preset["weight_decays"]]
    return [replace(run, name=run_name(run, "batch_size", "eval_every", "epochs")) for run in runs]

def score_setting(runs, threads, bar):
    """Train the runs of one setting in order, up to the first that solves it -> its record."""
    torch.set_num_threads(threads)
    results, setting = [], setting_of(runs[0])
    for run in runs:
        with contextlib.suppress(Diverged):
            results.append(train(run, verbose=False, bar=bar))
            if results[-1]["test_accuracy"] >= run.early_stop:
                break
    best = max(results, key=lambda r: r["test_accuracy"], default={})
    return dict(setting=asdict(setting), chance=tasks.TASKS[setting.task].chance(setting),
                token=best.get("test_accuracy"), macro=best.get("macro_accuracy"),
                runs=[{k: r[k] for k in ("folder", "test_accuracy", "steps", "wall_s")}
                      for r in results])

def average(rows):
    """The mean of each column, or None without rows, or if all runs of one have diverged."""
    columns = {k: [row[k] for row in rows] for k in ("token", "macro", "chance")}
    return {k: sum(v) / len(v) if v and None not in v else None for k, v in columns.items()}

def mad_score(arch, preset="quick", config=None):
    """The score of an architecture or pattern, {"tasks": {task: {token, macro, chance}}, "mean"..}:
    accuracies (0 to 1) of a setting's best run; of a task the mean over its settings; "mean" is
    that over tasks. The record of a whole preset is written to out/scores/PRESET/, too."""
    config = replace(config or Config(), task="mad", preset=preset,
                     **{"arch" if arch in ARCHS else "layers": arch})
    i, n = map(int, check(config).shard.split("/"))
    jobs = whole = PRESETS[preset]["settings"]
    if config.tasks:
        jobs = [job for job in jobs if job[0].task in config.tasks.split(",")]
    if config.settings == "baseline":
        jobs = [job for job in jobs if job[0] == next(s for s, _ in jobs if s.task == job[0].task)]
    jobs = [runs_of(config, *job) for job in jobs[i::n]]
    bar = functools.partial(tqdm, total=len(jobs), unit="setting", dynamic_ncols=True)
    score = functools.partial(score_setting, bar=config.workers == 1,
                              threads=max(1, torch.get_num_threads() // config.workers))
    records = [score(runs) for runs in bar(jobs)] if config.workers == 1 else []
    if config.workers > 1:          # Ctrl-C reaches all processes of a terminal: the parent acts
        with bar() as progress, multiprocessing.get_context("spawn").Pool(
                config.workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            workers, results = multiprocessing.active_children(), pool.imap(score, jobs)
            while len(records) < len(jobs):
                with contextlib.suppress(multiprocessing.TimeoutError):
                    records.append(results.next(timeout=5))
                    progress.update()
                if not all(worker.is_alive() for worker in workers):
                    raise UserError("a worker was killed (memory?): go on with fewer --workers")
    by_task = {task: average([r for r in records if r["setting"]["task"] == task])
               for task in dict.fromkeys(r["setting"]["task"] for r in records)}
    mean = average(by_task.values())
    record = dict(arch=arch, preset=preset, seed=config.seed, version=RESULTS_VERSION,
                  options=changed(config, "arch", "layers", "task"), mean=mean["token"],
                  macro_mean=mean["macro"], tasks=by_task, settings=records)
    if len(records) == len(whole):
        write(Path(config.out, "scores", preset, run_name(config) + ".json"), record)
    return record

# ---- The other commands -------------------------------------------------------------------------

PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12}     # bfloat16 FLOP/s, by data sheets

def benchmark(config):
    """Whole steps of training: MAD's baseline, and on a GPU language models of 12 blocks."""
    asked, steps = config.layers or changed(config).get("arch"), config.steps or 40
    archs = [asked] if asked else ["transformer", "hybrid", "mamba"]
    config = replace(config, arch=Config.arch, steps=steps, eval_every=steps)
    jobs = {arch: dict(layers=arch, batch_size=128) for arch in archs}
    large = torch.cuda.is_available() and config.device != "cpu" and not asked
    for dim in (768, 2048) if large else ():
        for every in (1, 4):
            pattern = stripe(f"mh-hyena(heads={dim // 8})", "swiglu", 12, every,
                             f"mh-attention(heads={dim // 64})")
            jobs[f"12 x {dim}, 1 in {every} attends"] = dict(
                task="text", layers=pattern, dim=dim, context=2048, batch_size=12288 // dim)
    print(f"{'model':<28}{'parameters':>12}{'tokens/s':>10}{'GFLOP/s':>9}{'MFU':>7}")
    for title, options in jobs.items():
        with tempfile.TemporaryDirectory() as out:
            r = train(replace(config, out=out, **options), verbose=False)
        flops = r["flops_per_token"] * r["tokens_per_s"]
        peak = next((v for k, v in PEAK.items() if k in str(r["card"])), math.nan)
        print(f"{title:<28}{r['parameters']:>12,}{r['tokens_per_s']:>10,}{flops / 1e9:>9,.0f}"
              f"{flops / peak:>7.3f}", flush=True)

def main():
    config = parse_args()
    if config.sample:
        device = choose_machine(check(Config(device=config.device)), show=lambda line: None).device
        print(sample(config.sample, config.prompt, device=device, seed=config.seed))
    elif config.benchmark:
        benchmark(config)
    elif config.task == "mad":
        record = mad_score(config.layers or config.arch, config.preset, config)
        mean = dict(token=record["mean"], macro=record["macro_mean"])
        print(f"\n{config.preset + ' score':<26}{'token':>9}{'macro':>9}   (per cent)")
        for name, row in (record["tasks"] | {"mean": mean}).items():
            cells = ["no score" if row[k] is None else f"{100 * row[k]:.1f}" for k in mean]
            print("{:<26}{:>9}{:>9}".format(name, *cells))
    else:
        result = train(config)
        if FIRST_PROCESS:
            print_summary(result)

if __name__ == "__main__":
    run_main(main)
