"""
Does the MAD score predict language modelling? The trial registered in results/README.md.
It needs cl100k_base, which tiktoken downloads (or has in TIKTOKEN_CACHE_DIR).

  python results/trial.py run [--workers 2]     the runs that are missing, in order, in out/trial
  python results/trial.py report                tests, table, assets/trial.png
"""
import functools
import io
import keyword
import math
import multiprocessing
import signal
import sys
import tokenize
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import layers
import model
import scaling
import tasks
import train
from layers import Attention, ShortConv, rotate

class ConvAttention(Attention):
    """Attention whose q, k, v pass a short convolution, as those of Hyena and the deltanets do."""

    def __init__(self, dim, max_len, heads=16, kernel=4):
        super().__init__(dim, max_len, heads)
        self.short = ShortConv(3 * dim, kernel)
        self.state_shapes = [*self.state_shapes, (kernel - 1, dim)]

    def project(self, x, table):
        """The last positions of x, as many as the table has."""
        qkv = self.short(self.qkv(x.flatten(1, -2)))[:, -table.shape[-1]:].mT
        q, k, v = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)             # (B, H, K, T)
        return rotate(q, table).mT, rotate(k, table).mT, v.mT

    def step(self, x, state):
        keys, values, tail, t = state
        window = torch.cat((tail, x[:, None]), 1)                             # (B, kernel, D)
        y, (keys, values, t) = super().step(window, (keys, values, t))
        return y, (keys, values, window[:, 1:], t)

    def mixing_flops(self, T):
        return 2 * T * self.short.taps.numel()

layers.LAYERS["conv-attention"] = (ConvAttention, dict(heads=16, kernel=4))
model.ARCHS["conv-transformer"] = model.stripe("conv-attention", "swiglu", 2)

ARCHS = ("transformer conv-transformer sliding mh-linear-attention mh-gla rwkv6 mamba hyena "
         "mh-hyena hybrid striped-hyena striped-mamba striped-mh-gla deltanet").split()

# -- The plan: jobs in order, each a function and its arguments ------------------------------------

COMMON = "--tokenizer cl100k_base:2048 --context 512 --depth 4 --sizes 1"
SMALL, LARGE, RATE = 1e12, 1.5e13, 0.024       # FLOPs; scaling.py's learning rate: RATE / width^0.5

def sweep(out, arch, budget, width, batch, rate, *options):
    scaling.SHAPES = [(width, 4)]
    # Compiling pays where three runs have one shape: the text, the control and the second seed.
    scaling.Config = functools.partial(train.Config, compile="auto" if budget == SMALL else "on")
    scaling.main(["sweep", *COMMON.split(), "--archs", arch, "--out", f"{out}/{arch}", "--budgets",
                  f"{budget:g}", "--batch", str(batch), "--lr", str(rate), *options])

def small(out, arch):
    """Rates of twice the one before, until that does not help, by total loss."""
    rate = 1
    while rate == 1 or best_rate(out, arch) >= rate / 2:
        sweep(out, arch, SMALL, 32, 2, rate)
        rate *= 2

def best_rate(out, arch):
    found = scaling.read_csv(Path(out, arch, "runs.csv"), [], ["loss", "lr", "budget"])
    best = min((row for row in found if row["budget"] == SMALL), key=lambda row: row["loss"])
    return round(best["lr"] / RATE * 32 ** 0.5, 1)

def large(out, arch, seed):
    sweep(out, arch, LARGE, 48, 4, best_rate(out, arch), "--seed", str(seed))

def renamed(out, arch):
    sweep(f"{out}/renamed", arch, LARGE, 48, 4, best_rate(out, arch), "--data", f"{out}/names")

def hard(out, arch, seed):
    train.mad_score(arch, "hard", train.Config(out=out, seed=seed, device="cpu"))

def go(out, arch):
    """One run of width 48 with 16 tests: does the loss on recall tokens fall?"""
    rate = RATE / 48 ** 0.5
    train.train(train.Config(
        task="text", tokenizer="cl100k_base:2048", context=512, dim=48, steps=4000, batch_size=4,
        layers=scaling.pattern_at(arch, 48, 4), warmup=200, clip=1.0, lr=rate, min_lr=rate / 10,
        beta2=0.95, eval_every=250, out=f"{out}/go", name=arch), verbose=False)

PLAN = [*((go, arch) for arch in ("transformer", "conv-transformer", "hybrid")),
        *((small, arch) for arch in ARCHS), *((large, arch, 0) for arch in ARCHS),
        *((hard, arch, 0) for arch in ARCHS), *((renamed, arch) for arch in ARCHS),
        *((large, arch, 1) for arch in ARCHS), *((hard, arch, 1) for arch in ARCHS)]

def work(job):
    torch.set_num_threads(1)
    function, *arguments = job
    function(*arguments)
    return job

LIBRARY = Path(io.__file__).parent

def rename(folder):
    """Python's library, in each file every name replaced by one drawn from the names of all files:
    what a name means can be read nowhere but in its file."""
    names, texts = {}, {}
    for path in tasks.corpus(None):
        try:
            lines = io.StringIO(path.read_text()).readlines()
            tokens = list(tokenize.generate_tokens(io.StringIO("".join(lines)).readline))
        except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
            continue
        spots = [(t.start, t.string) for t in tokens
                 if t.type == tokenize.NAME and not keyword.iskeyword(t.string)]
        texts[path] = lines, spots
        names |= dict.fromkeys(name for _, name in spots)
    names = sorted(names)
    for i, (path, (lines, spots)) in enumerate(texts.items()):
        own = list(dict.fromkeys(name for _, name in spots))
        new = dict(zip(own, np.random.default_rng(i).choice(names, len(own), replace=False)))
        for (line, column), name in reversed(spots):
            text = lines[line - 1]
            lines[line - 1] = text[:column] + new[name] + text[column + len(name):]
        target = Path(folder, path.relative_to(LIBRARY))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("".join(lines))

def run(out, workers):
    if not Path(out, "names").exists():
        rename(Path(out, "names.tmp"))
        Path(out, "names.tmp").rename(Path(out, "names"))
    with multiprocessing.get_context("spawn").Pool(
            workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        for function, *arguments in pool.imap(work, [(f, out, *rest) for f, *rest in PLAN]):
            print("done:", function.__name__, *arguments[1:], flush=True)

# -- What came out -------------------------------------------------------------------------------

RECALL = [task for task in tasks.TASKS if "recall" in task]
PARTS = ["loss", "recall_loss", "other_loss"]

def ranks(x, y):
    """Spearman's rho of {arch: value} x with y, n, p, and the range of rho without one of them."""
    archs = [arch for arch in x if arch in y]
    rho = lambda some: scaling.rank_correlation([x[a] for a in some], [y[a] for a in some])
    whole = rho(archs)
    without = [rho([a for a in archs if a != arch]).rho for arch in archs]
    return dict(rho=whole.rho, n=whole.n, p=whole.p, low=min(without), high=max(without))

def best_runs(out, budget, seed="0"):
    """{arch: its run of the least loss at a budget}."""
    found = {path.parent.name: [row for row in scaling.read_csv(path, ["seed"], [*PARTS, "budget"])
                                if row["budget"] == budget and row["seed"] == seed]
             for path in Path(out).glob("*/runs.csv")}
    return {arch: min(some, key=lambda row: row["loss"]) for arch, some in found.items() if some}

def value(rows, part):
    """{arch: a loss}; without a row, diverged or not yet run, it ranks last. {} if none has one."""
    return {arch: rows[arch][part] if arch in rows else math.inf for arch in ARCHS if rows}

def report(out):
    records, score = scaling.read_scores(f"{out}/scores/hard")
    recall = {arch: np.mean([r["tasks"][task]["macro"] for r in some for task in RECALL])
              for arch, some in records.items()}
    runs = {"1e12": best_runs(out, SMALL), "1.5e13": best_runs(out, LARGE),
            "1.5e13, renamed": best_runs(f"{out}/renamed", LARGE)}
    print_tests(score, recall, records, runs, best_runs(out, LARGE, "1"))
    runs = {title: rows for title, rows in runs.items() if rows}
    print_table(score, recall, runs)
    hours = sum(row["seconds"] for path in Path(out).rglob("runs.csv")
                for row in scaling.read_csv(path, [], ["seconds"])) / 3600
    print(f"\n{hours:.1f} hours of one thread in the runs of text, with pauses")
    plot(score, runs)

def print_tests(score, recall, records, runs, again):
    """The registered correlations; how far `again`, the second seed's runs, are from the first."""
    last = runs["1.5e13"]
    tests = {
        "primary: hard score, loss at 1.5e13": (score, value(last, "loss")),
        "second: recall part, recall loss at 1.5e13": (recall, value(last, "recall_loss")),
        "control: recall part, recall loss of renamed text":
            (recall, value(runs["1.5e13, renamed"], "recall_loss")),
        "baseline: loss at 1e12, at 1.5e13": (value(runs["1e12"], "loss"), value(last, "loss")),
        "its recall part": (value(runs["1e12"], "recall_loss"), value(last, "recall_loss"))}
    for part in PARTS:
        tests[f"noise: {part} at 1.5e13, two seeds"] = value(last, part), value(again, part)
    tests["noise: hard score, two seeds"] = [
        {arch: some[i]["macro_mean"] for arch, some in records.items() if i < len(some)}
        for i in (0, 1)]
    tests = {title: (x, y) for title, (x, y) in tests.items() if x and y}
    found = [ranks(x, y) for x, y in tests.values()]
    for title, test in zip(tests, found):
        print("{}: rho {rho:.2f}, n {n}, p {p:.2g}, without one {low:.2f} to {high:.2f}".format(
            title, **test))
    p = [test["p"] for test in found[:2]]
    print("p by Holm's correction: " + ", ".join(
        f"{min(1, max(2 * min(p), one)):.2g} ({name})" for name, one in zip(tests, p)))
    for part in PARTS if again else ():
        gaps = [abs(last[arch][part] - again[arch][part]) for arch in last if arch in again]
        print(f"{part} of two seeds: {np.mean(gaps):.3f} nats apart; the architectures' standard "
              f"deviation: {np.std([row[part] for row in last.values()]):.3f}")
    for task in tasks.TASKS:
        solved = [arch for arch, some in records.items()
                  if np.mean([r["tasks"][task]["token"] for r in some]) >= 0.99]
        print(f"{task}: solved by {len(solved)} of {len(records)}: {' '.join(solved)}")

def print_table(score, recall, runs):
    columns = [(rows, part, f"{title}: {part}") for title, rows in runs.items() for part in PARTS]
    print("\n| architecture | hard score | recall part |", *(f"{title} |" for *_, title in columns))
    print("|---" * (3 + len(columns)) + "|")
    for arch in sorted(ARCHS, key=lambda arch: -score.get(arch, 0)):
        cells = [f"{100 * mean[arch]:.1f}" if arch in mean else "" for mean in (score, recall)]
        cells += [f"{rows[arch][part]:.3f}" if arch in rows else "" for rows, part, _ in columns]
        print("|", " | ".join([arch, *cells]), "|")

def plot(score, runs):
    figure, (ax,), colors = scaling.canvas(1, 1, figsize=(8, 3.5))
    labels = "all tokens", "recall tokens", "other tokens"
    for i, (part, label, marker, color) in enumerate(zip(PARTS, labels, "osD", colors(3))):
        found = [ranks(score, value(rows, part)) for rows in runs.values()]
        rho, low, high = np.array([[r[k] for k in ("rho", "low", "high")] for r in found]).T
        x = np.arange(len(rho)) + i / 10
        ax.plot(x, rho, marker, color=color, label=label)
        ax.vlines(x, low, high, color=color)
    ax.set(xticks=range(len(runs)), xticklabels=runs, xlim=(-0.4, len(runs) - 0.2), ylim=(-1, 1),
           xlabel="FLOPs of a run, text", ylabel="Spearman's rho with the hard score")
    ax.axhline(0, color="k", lw=0.5)
    ax.legend(title="bars: without any one\narchitecture", loc="upper right")
    figure.savefig(ROOT / "assets" / "trial.png")

def main():
    parser = tasks.Parser(description=__doc__.splitlines()[1])
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--out", default="out/trial", help="folder of runs and scores")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    args = parser.parse_args()
    run(args.out, args.workers) if args.command == "run" else report(args.out)

if __name__ == "__main__":
    tasks.run_main(main)
