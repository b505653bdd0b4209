"""
What small runs say about large ones: scaling laws fitted to a table of training runs.

A run is a row of a CSV: N, D, loss, and optionally C, arch, state. From runs at a few budgets this
file finds the best size for each budget, the law that the loss follows, how far to trust both, and
whether MAD scores rank architectures as their compute-optimal losses do (section 4 of the MAD
paper, arXiv 2403.17844). It also trains such runs on text, at any budget, or prices them. Its
letters (in the other files some mean other things):

  N  parameters                     L  loss, nats a token    a, b   N* ~ C^a, D* ~ C^b
  D  training tokens                P  perplexity, exp(L)    E, A, B, alpha, beta:
  C  training FLOPs, 6ND by default M  total state               L = E + A/N^alpha + B/D^beta
  *  at the best size for a budget  S  problems solved together (resamples, starting points)

Sweeps and plans leave embeddings out of N, but the unembedding's products are in C.

Three ways to the optimum, which fail in different manners:

  isoflop              A parabola of L in log N at each budget; its minimum is the optimum
                       (approach 2 of Hoffmann et al. 2022, arXiv 2203.15556). Assumes no law,
                       but is biased: a loss curve is lopsided (arXiv 2603.22339; `parabola_bias`).
  parametric           The law above by Huber loss on log L (their approach 3). Bears outliers, but
                       may end in a local optimum: it is started 4,500 times.
  variable_projection  The law above by least squares on L: E, A and B are solved exactly inside,
                       only alpha and beta are searched (Golub and Pereyra 1973). An outlier bends
                       it.

Intervals are 95% bootstrap percentiles over resampled runs, those without an optimum left out. What
the runs cannot tell is refused (FitError) or flagged: read the flags before the numbers.

  python scaling.py sweep --budgets 1e12,3e12,1e13,3e13    trains such runs into out/sweep/runs.csv
  python scaling.py sweep --archs mh-hyena@0,mh-hyena@25   ratios of attention, at the same shapes
  python scaling.py plan --budgets 4e18,8e19 --card H100   what the paper's budgets would take
  python scaling.py fit runs.csv                           a report: 3 s for 20 runs, 13 s for 240
  python scaling.py fit runs.csv --json --target 1e21      the same as one JSON object
  python scaling.py table --mad results/mad/quick          MAD scores beside the published ones
  python scaling.py compare --mad results/mad/quick --runs runs.csv     how the two orders agree
  python scaling.py plot runs.csv --out scaling.png        parabolas, frontier, losses
"""
import argparse
import csv
import io
import itertools
import json
import sys
from collections import Counter
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import tasks
import train
from layers import LAYERS, Attention, tune_allocator
from model import Model, find_pattern

HUBER = 1e-3          # residuals of log L beyond it count linearly, not squared (Hoffmann et al.)
LAW = ("E", "A", "B", "alpha", "beta")


class FitError(ValueError):
    """These runs cannot answer the question; the message says why, in one line."""


def attempt(fit, *args, **options):
    """fit(...), or {"refused": why}: one method's refusal must not hide the others' answers."""
    try:
        return fit(*args, **options)
    except FitError as error:
        return {"refused": str(error)}


# -------------------------------------------------------------------------------------------------
# Runs


@dataclass
class Runs:
    """The usable runs, float64 (n,) each."""
    N: np.ndarray
    D: np.ndarray
    loss: np.ndarray
    C: np.ndarray
    state: np.ndarray     # NaN where unknown
    dropped: dict         # column -> how many rows it spoiled

    @property
    def columns(self):
        return self.N, self.D, self.loss, self.C

    def take(self, mask):
        return Runs(*(getattr(self, f.name)[mask] for f in fields(self)[:-1]), self.dropped)


def clean(N, D, loss, C=None, state=None):
    """Runs without the rows whose N, D, loss or C is missing, infinite or not positive."""
    N, D, loss = (np.asarray(v, np.float64) for v in (N, D, loss))
    C = 6 * N * D if C is None and N.shape == D.shape else np.asarray(C, np.float64)
    state = N * np.nan if state is None else np.asarray(state, np.float64)
    if N.ndim != 1 or not N.shape == D.shape == loss.shape == C.shape == state.shape:
        raise FitError(f"N {N.shape}, D {D.shape}, loss {loss.shape}, C {C.shape}, state "
                       f"{state.shape} must be columns of one length")
    keep, dropped = np.ones(len(N), bool), {}
    for name, v in dict(N=N, D=D, loss=loss, C=C).items():
        bad = keep & ~(np.isfinite(v) & (v > 0))
        keep &= ~bad
        dropped |= {name: int(bad.sum())} if bad.any() else {}
    if not keep.any():
        raise FitError(f"no usable run in {len(keep)} rows (rows dropped by column: {dropped})")
    return Runs(*(v[keep] for v in (N, D, loss, C, state)), dropped)


def distinct(values):
    """Number of different values after rounding to 1%."""
    return len(np.unique(np.round(100 * np.log(values))))


def dropped_flags(runs):
    return [f"{k} of the rows dropped: {name} is missing, infinite or not positive"
            for name, k in runs.dropped.items()]


def data_flags(runs):
    flags = dropped_flags(runs)
    twins = len(runs.N) - np.unique([runs.N, runs.D, runs.loss], axis=1).shape[1]
    if twins:
        flags.append(f"{twins} of the rows repeat another exactly: they count twice, and intervals "
                     f"are too narrow")
    ratio = runs.C / (6 * runs.N * runs.D)
    if np.abs(ratio - 1).max() > 1e-3:
        flags.append(f"C is {ratio.min():.3g} to {ratio.max():.3g} times 6ND: a + b need not be 1")
    return flags


def group_budgets(C):
    """Label of each run and budget of each group (G,); a group lies within 10% of its middle."""
    label, budgets, order = np.zeros(len(C), int), [], np.argsort(C)
    starts = [0]
    for i in range(len(C)):
        if C[order[i]] > 1.1 ** 2 * C[order[starts[-1]]] * (1 + 1e-9):
            starts.append(i)
    for g, members in enumerate(np.split(order, starts[1:])):
        label[members] = g
        budgets.append(np.exp(np.log(C[members]).mean()))
    return label, np.array(budgets)


# -------------------------------------------------------------------------------------------------
# Bootstrap, lines, ranks


def resample(n, count, seed, strata=None):
    """How often each of n runs is drawn in each resample: (count, n). Strata keep their sizes."""
    rng, weights = np.random.default_rng(seed), np.zeros((count, n))
    strata = np.zeros(n) if strata is None else strata
    for s in np.unique(strata):
        i = np.flatnonzero(strata == s)
        weights[:, i] = rng.multinomial(len(i), np.full(len(i), 1 / len(i)), count)
    return weights


def interval(draws):
    """[low, high] of the middle 95% of the finite draws; NaN when fewer than 20 are finite."""
    good = draws[np.isfinite(draws)]
    return np.percentile(good, [2.5, 97.5]).tolist() if len(good) >= 20 else [np.nan, np.nan]


def estimates(rows):
    """{name: (1 + bootstrap,)}, the estimate first -> {name: estimate}, and their intervals."""
    return {k: float(v[0]) for k, v in rows.items()} | dict(
        intervals={k: interval(v[1:]) for k, v in rows.items()})


def means(v, w):
    """Weighted means of the rows, (S, n) -> (S, 1)."""
    return (w * v).sum(1, keepdims=True) / np.maximum(w.sum(1, keepdims=True), 1e-300)


def fit_lines(x, y, w):
    """Least-squares lines y = i + s x, one a row of (S, n) -> i, s (S,); NaN for constant x."""
    x, y = np.where(w > 0, x, 0), np.where(w > 0, y, 0)
    dx = x - means(x, w)
    square = (w * dx * dx).sum(1)
    slope = (w * dx * y).sum(1) / np.where(square > 1e-9, square, np.nan)
    return means(y, w)[:, 0] - slope * means(x, w)[:, 0], slope


@dataclass
class PowerLaw:
    """y = k x^c, with 95% intervals of k and c. residuals: log y less the line, usable points."""
    k: float
    c: float
    intervals: dict
    failed: int           # resamples with a single x
    flags: list
    residuals: np.ndarray = field(repr=False)
    draws: dict = field(repr=False)


def fit_power_law(x, y, bootstrap=1000, seed=0):
    """
    The PowerLaw y = k x^c through points, by least squares in logs.

    x, y: (n,), positive; other points are dropped and flagged. Raises FitError for fewer than two
    different x.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise FitError(f"x {x.shape} and y {y.shape} must be columns of one length")
    keep = np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)
    if distinct(x[keep]) < 2:
        raise FitError("a power law needs two different x with positive y")
    lx, ly, n = np.log(x[keep])[None], np.log(y[keep])[None], int(keep.sum())
    i, s = fit_lines(lx, ly, np.vstack([np.ones(n), resample(n, bootstrap, seed)]))
    flags = [f"{len(x) - n} points dropped: missing, infinite or not positive"] * (n < len(x))
    flags += ["two x: the line passes through both, nothing checks it"] * (distinct(x[keep]) == 2)
    return PowerLaw(**estimates(dict(k=np.exp(i), c=s)), failed=int(np.isnan(s[1:]).sum()),
                    flags=flags, residuals=(ly - i[0] - s[0] * lx)[0],
                    draws=dict(k=np.exp(i[1:]), c=s[1:]))


def ranks(x):
    """Ranks less their mean, ties sharing their average: (n,) -> (n,)."""
    below, upto = (x < x[:, None]).sum(1), (x <= x[:, None]).sum(1)
    return (below + upto - len(x)) / 2


@dataclass
class RankCorrelation:
    rho: float            # NaN, as p, for fewer than 3 points or a constant column
    p: float              # two-sided: the share of orderings with at least this |rho|
    n: int


def rank_correlation(x, y, permutations=9999, seed=0):
    """
    Spearman's correlation of x and y, (n,) each, with a permutation p-value.

    Up to n = 8 every ordering is counted. Beyond, random ones and the observed one (the + 1), so
    that p is never 0 (Phipson & Smyth 2010). Raises FitError for columns of two lengths or values
    not finite.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape != y.shape or x.ndim != 1 or not np.isfinite([x, y]).all():
        raise FitError("a rank correlation needs two columns of one length, of finite values")
    rx, ry, n = ranks(x), ranks(y), len(x)
    norm = np.sqrt((rx @ rx) * (ry @ ry))
    if n < 3 or norm == 0:
        return RankCorrelation(np.nan, np.nan, n)
    others = (np.array(list(itertools.permutations(rx))) if n <= 8 else
              np.random.default_rng(seed).permuted(np.tile(rx, (permutations, 1)), axis=1))
    extreme = (np.abs(others @ ry) >= np.abs(rx @ ry) - 1e-9).sum() + (n > 8)
    return RankCorrelation(float(rx @ ry / norm), float(extreme / (len(others) + (n > 8))), n)


# -------------------------------------------------------------------------------------------------
# IsoFLOP parabolas: L = L* + curvature (log N - log N*)^2 at one budget


@dataclass
class Fit:
    """
    What all fits report. target: a budget C, its distance in decades (log10) beyond the largest one
    used, and N, D, loss, tokens_per_parameter of the optimum there. intervals: name -> [low, high],
    the target's included. draws: name -> (bootstrap,), one index being one resample in all of them.
    failed: resamples without an optimum (NaN in draws). residuals: of the usable runs, (n,).
    """
    target: dict
    intervals: dict
    failed: int
    flags: list
    residuals: np.ndarray = field(repr=False)
    draws: dict = field(repr=False)


def summarise(rows, C, largest, flags, residuals):
    """Estimates and the fields of Fit from rows: name -> (1 + bootstrap,), the estimate first."""
    rows["tokens_per_parameter"] = rows["D"] / rows["N"]
    failed = ~np.isfinite(rows["N"][1:])
    draws = {k: np.where(failed, np.nan, v[1:]) for k, v in rows.items()}
    out = {k: float(v[0]) for k, v in rows.items()}
    goal = {k: out.pop(k) for k in ("N", "D", "loss", "tokens_per_parameter")}
    if failed.sum() > 0.05 * len(failed):
        flags.append(f"{failed.sum()} of {len(failed)} resamples failed: intervals are too narrow")
    return out | dict(target=dict(C=float(C), decades=float(np.log10(C / largest)), **goal),
                      intervals={k: interval(v) for k, v in draws.items()},
                      failed=int(failed.sum()), flags=flags, residuals=residuals, draws=draws)


@np.errstate(divide="ignore", invalid="ignore")
def parabola(runs, w):
    """
    The parabola of one budget's runs for each weighting w (S, n).

    Returns the optima, a dict of (S,) arrays (logN, logD, loss, logM, curvature), NaN where there
    is none; why row 0 has none, or ""; and row 0's residuals (n,).
    """
    x = np.log(runs.N)
    middle, half = (x.max() + x.min()) / 2, max(np.ptp(x) / 2, 1e-9)
    u = (x - middle) / half                                          # in [-1, 1]: well conditioned
    basis = np.stack([u ** 0, u, u ** 2])                            # (3, n)
    size = np.round(100 * x)
    left = (w @ (size[:, None] == np.unique(size)) > 0).sum(1)       # different sizes drawn, (S,)
    # log(C / ND), not log D: it is constant at 6ND, and then D* = C / 6N* holds exactly.
    columns = np.stack([runs.loss, np.log(runs.C / (runs.N * runs.D)), np.log(runs.state)], 1)
    gram = (basis * w[:, None]) @ basis.T                            # (S, 3, 3)
    gram[left < 3] = np.eye(3)
    q = np.linalg.solve(gram, (basis * w[:, None]) @ columns)        # (S, power, column)
    bent = q[:, 2, 0] > 1e-9 * runs.loss.mean()
    top = -q[:, 1, 0] / np.where(bent, 2 * q[:, 2, 0], np.nan)       # the vertex, in u
    loss, logk, logM = np.einsum("ks,skc->cs", [top ** 0, top, top ** 2], q)
    logN = middle + half * top
    optima = dict(logN=logN, logD=np.log(runs.C).mean() - logk - logN, loss=loss, logM=logM,
                  curvature=q[:, 2, 0] / half ** 2)                  # nats per (ln N)^2
    ok = (left >= 3) & bent & (np.abs(top) < 1)                      # else it has no optimum
    why = ("" if ok[0] else f"{left[0]} different sizes, a parabola needs 3" if left[0] < 3 else
           "curvature not positive, no minimum" if not bent[0] else "all runs on one side of the "
           f"optimum, which lies {'below' if top[0] < 0 else 'above'} the sampled sizes")
    residuals = runs.loss - basis.T @ q[0, :, 0] if left[0] >= 3 else x * np.nan
    return {k: np.where(ok, v, np.nan) for k, v in optima.items()}, why, residuals


def vertex(runs):
    """The optimum of one budget's runs as they are, in floats, and why there is none."""
    top, why, _ = parabola(runs, np.ones((1, len(runs.N))))
    return {k: float(v[0]) for k, v in top.items()}, why


def isoflop_row(budget, runs, top, flag):
    """One budget of the report, with intervals where it has an optimum."""
    rows = dict(N=np.exp(top["logN"]), D=np.exp(top["logD"]), loss=top["loss"],
                curvature=top["curvature"])
    row = dict(C=float(budget), runs=len(runs.N), sizes=distinct(runs.N), **estimates(rows),
               failed=int(np.isnan(rows["N"][1:]).sum()), flag=flag,
               N_sampled=[float(runs.N.min()), float(runs.N.max())])
    return row | dict(intervals={}) if flag else row


@dataclass
class IsoflopFit(Fit):
    """
    N* ~ C^a, D* ~ C^b, L* ~ C^-loss_exponent. parabolas: a dict a budget, with a flag where it was
    left out; failed: its resamples without an optimum. optima: name -> (1 + bootstrap, budgets),
    the vertices of the runs, then of each resample. residuals: of the parabolas, in nats.
    """
    a: float
    b: float
    loss_exponent: float
    parabolas: list
    optima: dict = field(repr=False)
    logs: dict = field(repr=False)     # N, D, loss -> (intercept, slope) of their lines in log C

    def optimum(self, C):
        """(N*, D*, L*) at a budget of C FLOPs."""
        return tuple(np.exp(i + s * np.log(C)) for i, s in self.logs.values())


@np.errstate(invalid="ignore")                                       # log of a negative vertex
def fit_isoflop(N, D, loss, C=None, state=None, target=None, bootstrap=1000, seed=0):
    """
    Compute-optimal size, tokens and loss as power laws in C, from one parabola a budget.

    N, D, loss, C (FLOPs; 6ND if None), state: (n,). target: the budget to predict (the largest one
    if None). Budgets were chosen, not sampled, so resamples draw within them. Raises FitError when
    fewer than two budgets have a usable optimum. Hoffmann et al. 2022, section 3.2.
    """
    runs = clean(N, D, loss, C, state)
    label, budgets = group_budgets(runs.C)
    w = np.vstack([np.ones(len(label)), resample(len(label), bootstrap, seed, label)])
    found, table, residuals = [], [], np.empty(len(label))
    for g, budget in enumerate(budgets):
        one = runs.take(label == g)
        top, flag, residuals[label == g] = parabola(one, w[:, label == g])
        found.append(top)
        table.append(isoflop_row(budget, one, top, flag))
    optima = {k: np.stack([f[k] for f in found], 1) for k in found[0]}
    used = [p["C"] for p in table if not p["flag"]]
    if len(used) < 2:
        why = [f"{p['C']:.3g} FLOPs: {p['flag']}" for p in table[:4] if p["flag"]]
        raise FitError("; ".join([f"power laws need two budgets with a usable optimum, here "
                                  f"{len(used)} of {len(table)}"] + why))
    flags = data_flags(runs) + isoflop_flags(table, used, runs.C, label, bootstrap)
    C = target or budgets[-1]
    ok = np.isfinite(optima["loss"]).astype(float)                   # (1 + bootstrap, budgets)
    logC = np.broadcast_to(np.log(budgets), ok.shape)
    logs = dict(N=optima["logN"], D=optima["logD"], loss=np.log(optima["loss"]))
    logs = {k: fit_lines(logC, v, ok) for k, v in logs.items()}
    rows = dict(a=logs["N"][1], b=logs["D"][1], loss_exponent=-logs["loss"][1])
    rows |= {k: np.exp(i + s * np.log(C)) for k, (i, s) in logs.items()}
    common = summarise(rows, C, max(used), flags, residuals)
    if abs(common["a"] + common["b"] - 1) > 0.01:
        flags.append(f"a + b is {common['a'] + common['b']:.3f}, not 1")
    return IsoflopFit(**common, parabolas=table, optima=optima,
                      logs={k: (i[0], s[0]) for k, (i, s) in logs.items()})


def isoflop_flags(table, used, C, label, bootstrap):
    flags = [f"budget {p['C']:.3g} left out: {p['flag']}" for p in table if p["flag"]]
    flags += [f"budget {p['C']:.3g}: {p['failed']} of {bootstrap} resamples have no optimum, its "
              f"intervals are too narrow" for p in table
              if not p["flag"] and p["failed"] > 0.2 * bootstrap]    # (a tenth draw too few sizes)
    if len(used) == 2:
        flags.append("two budgets: the power laws pass through both, nothing checks them")
    spread = max(np.ptp(np.log(C[label == g])) for g in set(label))
    if spread > 0.03:
        flags.append(f"budgets in a group differ by up to {100 * spread:.0f}%: not corrected")
    return flags


# -------------------------------------------------------------------------------------------------
# Many small minimisations at once


def minimise(objective, theta, w, tol=1e-10):
    """
    Levenberg-Marquardt (Marquardt 1963) on S problems together, each with its own damping.

    objective(theta (S, P), w (S or 1, n)) -> value (S,), gradient (S, P), curvature (S, P, P). A
    problem leaves after two steps that gain less than tol of its value, when no step gains, or
    after 100. Returns theta (S, P), value (S,).
    """
    w = np.broadcast_to(w, (len(theta), w.shape[1]))
    block = max(1, 30_000 // w.shape[1])                             # larger ones leave the cache
    parts = [_minimise(objective, theta[i:i + block], w[i:i + block], tol)
             for i in range(0, len(theta), block)]
    return tuple(np.concatenate(p) for p in zip(*parts))


def _minimise(objective, theta, w, tol):
    theta, live, diagonal = theta.copy(), np.arange(len(theta)), np.arange(theta.shape[1])
    v, g, H = objective(theta, w)
    value, damping, idle = v.copy(), np.full(len(v), 1e-2), np.zeros(len(v), int)
    for _ in range(100):
        size, damped = np.abs(H[:, diagonal, diagonal]), H.copy()
        floor = 1e-9 * size.max(1, keepdims=True) + 1e-30
        damped[:, diagonal, diagonal] += damping[:, None] * np.maximum(size, floor)
        trial = theta[live] - np.linalg.solve(damped, g[..., None])[..., 0].clip(-5, 5)
        v2, g2, H2 = objective(trial, w[live])
        better = v2 < v                                              # False for NaN
        idle = np.where(better, np.where(v - v2 < tol * v, idle + 1, 0), idle)
        theta[live[better]], g[better], H[better] = trial[better], g2[better], H2[better]
        value[live] = v = np.where(better, v2, v)
        damping = np.maximum(damping * np.where(better, 0.2, 5), 1e-10)   # never singular
        stay = (idle < 2) & (damping < 1e10)
        live, v, g, H, damping, idle = (q[stay] for q in (live, v, g, H, damping, idle))
        if not len(live):
            break
    return theta, value


# -------------------------------------------------------------------------------------------------
# The law L = E + A/N^alpha + B/D^beta, twice. Both objectives work on centred logs
#   x = log N - mean, y = log D - mean
# since log A and alpha are all but collinear otherwise. Parameters come as (a, b, e, alpha, beta):
# the logs of A, B, E at the centre, and the exponents. TERM: which of the three terms each is in.

TERM = np.array([0, 1, 2, 0, 1])
SAME = TERM[:, None] == TERM                                         # (5, 5)


def huber(r):
    """r^2 / 2 up to HUBER, and linear beyond, so that an outlier pulls no harder than HUBER."""
    small = np.minimum(np.abs(r), HUBER)
    return small * (np.abs(r) - small / 2)


class Huber:
    """
    The objective sum_i w_i huber(r_i),   r = logsumexp(a - alpha x, b - beta y, e) - log L

    Losses are summed, not averaged. Hoffmann et al. 2022, equation 3.
    """
    # Resamples start here, relative to the best optimum: a resample may have another one.
    nearby = np.array([[0, 0, 0, 0, 0], [0, 0, -1, -.1, -.1], [0, 0, .1, .2, .2]])

    def __init__(self, runs):
        x, y = np.log(runs.N), np.log(runs.D)
        self.middle = np.array([x.mean(), y.mean()])
        one = np.ones_like(x)
        # The derivative of each parameter's own exponent.
        self.lift = np.stack([one, one, one, self.middle[0] - x, self.middle[1] - y])   # (5, n)
        self.loss = runs.loss

    def starts(self):
        """The 4,500 points of Hoffmann et al. 2022, moved to centred logs: (4500, 5)."""
        scale, exponent = np.arange(0, 30, 5.0), np.arange(0, 2.5, 0.5)
        theta = np.array(list(itertools.product(scale, scale, exponent - 1, exponent, exponent)))
        theta[:, :2] -= theta[:, 3:] * self.middle
        return theta

    def search(self, w):
        """
        Where every start ends: theta (4500, 5) and value (4500,). Two stages: reweighted least
        squares descends from anywhere (far away, the true curvature of an almost absolute loss says
        little); then Newton's method is exact.
        """
        theta, _ = minimise(lambda t, w: self(t, w, newton=False), self.starts(), w, tol=1e-6)
        return minimise(self, theta, w)

    def __call__(self, theta, w, newton=True):
        z = np.stack([theta[:, :1] + theta[:, 3:4] * self.lift[3],
                      theta[:, 1:2] + theta[:, 4:] * self.lift[4], theta[:, 2:3] * self.lift[2]], 1)
        top = z.max(1, keepdims=True)
        share = np.exp(z - top)                                      # (S, 3, n)
        total = share.sum(1, keepdims=True)
        share /= total                                               # of each term in L
        r = (np.log(total) + top)[:, 0] - np.log(self.loss)          # (S, n)
        size, value = np.abs(r), (w * huber(r)).sum(1)
        J = share[:, TERM] * self.lift                               # d r / d theta, (S, 5, n)
        psi = w * r.clip(-HUBER, HUBER)                              # d huber / d r
        pull = J * psi[:, None]
        if not newton:
            k = w * HUBER / np.maximum(size, HUBER)
            return value, pull.sum(2), (J * k[:, None]) @ J.transpose(0, 2, 1)
        # The Hessian of logsumexp is diag(share) - share share^T, in each parameter's own exponent.
        k = w * (size < HUBER) - psi
        H = (J * k[:, None]) @ J.transpose(0, 2, 1) + SAME * (pull @ self.lift.T)
        return value, pull.sum(2), H

    def law(self, theta, w):
        """(E, A, B, alpha, beta) in the runs' own units: (S, 5)."""
        a, b = (theta[:, :2] + theta[:, 3:] * self.middle).T
        return np.stack([*np.exp([theta[:, 2], a, b]), theta[:, 3], theta[:, 4]], 1)


class Projection(Huber):
    """
    The objective min over E, A, B >= 0 of sum_i w_i r_i^2 / 2,
    r = E + A exp(-alpha x) + B exp(-beta y) - L

    theta = (log alpha, log beta), which keeps the exponents positive.
    """
    nearby = np.array([[0, 0], [-.4, -.4], [.4, .4]])
    SETS = [np.array(s) for s in sorted(itertools.product([1., 0.], repeat=3), key=sum)[:0:-1]]

    def starts(self):
        return np.array(list(itertools.product(np.log(np.geomspace(0.03, 3, 12)), repeat=2)))

    def search(self, w):
        return minimise(self, self.starts(), w)

    def inner(self, theta, w):
        """The terms at coefficient 1, (S, 3, n), and the best coefficients A, B, E, (S, 3)."""
        rate = np.exp(theta)
        phi = np.exp(np.stack([rate[:, :1] * self.lift[3], rate[:, 1:] * self.lift[4],
                               np.zeros((len(rate), len(self.loss)))], 1))
        weighted = phi * w[:, None]
        gram, moment = weighted @ phi.transpose(0, 2, 1), weighted @ self.loss
        norm = np.sqrt(gram[:, range(3), range(3)])
        gram = gram / (norm[:, :, None] * norm[:, None]) + 1e-14 * np.eye(3)
        moment = moment / norm
        # Non-negative least squares, exactly: solve on each set of terms, the full set first, and
        # of the feasible solutions keep the one that explains the most.
        best, c = np.full(len(rate), -np.inf), np.zeros((len(rate), 3))
        for on in self.SETS:
            square = gram * np.outer(on, on) + np.diag(1 - on)
            trial = np.linalg.solve(square, (moment * on)[..., None])[..., 0]
            gain = np.where((trial >= 0).all(1), (trial * moment).sum(1), -np.inf)
            win = gain > best
            best[win], c[win] = gain[win], trial[win]
        return phi, c / norm

    def __call__(self, theta, w):
        phi, c = self.inner(theta, w)
        terms = phi * c[..., None]
        r = terms.sum(1) - self.loss
        outer = terms[:, :2] * self.lift[3:] * np.exp(theta)[..., None]   # d r / d theta, (S, 2, n)
        J = np.concatenate([phi * (c > 0)[..., None], outer], 1)          # (S, 5, n)
        H = (J * w[:, None]) @ J.transpose(0, 2, 1)
        H[:, range(3), range(3)] = H[:, range(3), range(3)] * (1 + 1e-13) + (c <= 0)
        # E, A and B follow: what is left is the Schur complement. Being optimal, they add nothing
        # to the gradient (Kaufman 1975).
        cross = H[:, :3, 3:]
        H = H[:, 3:, 3:] - cross.transpose(0, 2, 1) @ np.linalg.solve(H[:, :3, :3], cross)
        return (w * r * r).sum(1) / 2, (outer * (w * r)[:, None]).sum(2), H

    def law(self, theta, w):
        rate, (_, c) = np.exp(theta), self.inner(theta, w)
        return np.stack([c[:, 2], *(c[:, :2] * np.exp(rate * self.middle)).T, *rate.T], 1)


# An exponent near 0 overflows to infinity: no optimum, and no warning either.
@np.errstate(all="ignore")
def optimum(law, C, rule=(6.0, 1.0)):
    """
    N*, D*, L* (S,) of laws (S, 5): where the loss is least on C = k N^p D, which is where
    alpha A / N^alpha = p beta B / D^beta (p = 1: Hoffmann et al. 2022, equation 4). NaN unless A,
    B, alpha and beta are positive.
    """
    (E, A, B, alpha, beta), (k, p) = np.where((law[:, 1:] > 0).all(1), law.T, np.nan), rule
    logN = (np.log(alpha * A / (p * beta * B)) + beta * np.log(C / k)) / (alpha + p * beta)
    N, D = np.exp(logN), C / k * np.exp(-p * logN)
    return N, D, E + A / N ** alpha + B / D ** beta


@dataclass
class LawFit(Fit):
    """
    L = E + A/N^alpha + B/D^beta, and its N* ~ C^a, D* ~ C^b.

    objective: sum of Huber losses of log L. rss: sum of squared residuals of L. reached: share of
    the starts that ended at this optimum. rule: (k, p) of C = k N^p D by least squares in logs,
    (6, 1) where C is 6ND. influence: the five largest residuals, and the law without each.
    residuals are of log L.
    """
    E: float
    A: float
    B: float
    alpha: float
    beta: float
    a: float
    b: float
    objective: float
    rss: float
    reached: float
    rule: tuple
    influence: list

    @np.errstate(all="ignore")
    def loss(self, N, D):
        return self.E + self.A / N ** self.alpha + self.B / D ** self.beta

    def optimum(self, C):
        """(N*, D*, L*) at a budget of C FLOPs."""
        law = np.array([[self.E, self.A, self.B, self.alpha, self.beta]])
        return tuple(v[0] for v in optimum(law, C, self.rule))


def fit_parametric(N, D, loss, C=None, target=None, bootstrap=1000, seed=0):
    """
    The law by Huber loss on log residuals, from 4,500 starts (Hoffmann et al. 2022, section 3.3).

    N, D, loss, C (FLOPs; 6ND if None): (n,). target: as in fit_isoflop. Raises FitError for runs
    that cannot tell five parameters apart: fewer than 6 different ones, fewer than 3 different N or
    D, or all along one line of log N and log D.
    """
    return _fit_law(Huber, clean(N, D, loss, C), target, bootstrap, seed)


def fit_variable_projection(N, D, loss, C=None, target=None, bootstrap=1000, seed=0):
    """The law by least squares on L, E, A, B >= 0. Arguments and errors: as in fit_parametric."""
    return _fit_law(Projection, clean(N, D, loss, C), target, bootstrap, seed)


@np.errstate(all="ignore")
def _fit_law(method, runs, target, bootstrap, seed):
    check_resolved(runs)
    fitter, n = method(runs), len(runs.N)
    once, C = np.ones((1, n)), target or runs.C.max()
    theta, value = fitter.search(once)
    best = theta[value.argmin()]
    laws = np.vstack([fitter.law(best[None], once),
                      refit(fitter, best, resample(n, bootstrap, seed))])     # (1 + bootstrap, 5)
    logk, p = fit_lines(np.log(runs.N)[None], np.log(runs.C / runs.D)[None], once)
    rule = round(float(np.exp(logk[0])), 9), round(float(p[0]), 9)
    rows = dict(zip(LAW, laws.T)) | dict(zip(("N", "D", "loss"), optimum(laws, C, rule)))
    rows["a"] = laws[:, 4] / (laws[:, 3] + rule[1] * laws[:, 4])
    rows["b"] = 1 - rule[1] * rows["a"]
    E, A, B, alpha, beta = laws[0]
    terms = A / runs.N ** alpha, B / runs.D ** beta
    r = np.log(runs.loss / (E + sum(terms)))
    influence = influential(fitter, best, runs, r)
    flags = data_flags(runs) + law_flags(laws, terms, runs, influence)
    off = np.abs(np.log(runs.C / (rule[0] * runs.N ** rule[1] * runs.D))).max()
    if off > 0.02:
        flags.append(f"C differs by up to {100 * off:.0f}% from the k N^p D that N* and D* assume")
    return LawFit(**summarise(rows, C, runs.C.max(), flags, r), objective=float(huber(r).sum()),
                  rss=float(((runs.loss - E - sum(terms)) ** 2).sum()), rule=rule,
                  reached=float((value <= value.min() * (1 + 1e-6) + 1e-12).mean()),
                  influence=influence)


def check_resolved(runs):
    """Refuse runs that cannot tell the five parameters apart, however well the curve would fit."""
    logs = np.log([runs.N, runs.D])
    if (points := np.unique(np.round(100 * logs), axis=1).shape[1]) < 6:
        raise FitError(f"{points} different runs: five parameters need at least 6")
    for name in "ND":
        if (k := distinct(getattr(runs, name))) < 3:
            raise FitError(f"{name} takes {k} different values: its exponent needs at least 3")
    if np.linalg.eigvalsh(np.cov(logs))[0] < 0.05 ** 2:              # their spread across that line
        raise FitError("all runs lie on one line of log N and log D (one budget, or one ratio of "
                       "tokens to parameters): the terms of the law cannot be told apart")


def refit(fitter, best, w):
    """The law for each weighting w (S, n), from the best optimum and near it: (S, 5)."""
    if not len(w):
        return np.empty((0, 5))
    tries = [minimise(fitter, np.tile(best + shift, (len(w), 1)), w) for shift in fitter.nearby]
    theta, value = (np.stack(t) for t in zip(*tries))
    return fitter.law(theta[value.argmin(0), np.arange(len(w))], w)


def influential(fitter, best, runs, residuals):
    """The five largest residuals, each with the law that is left without that run."""
    worst = np.argsort(-np.abs(residuals))[:5]
    w = 1 - np.eye(len(residuals))[worst]                            # all runs but that one
    return [dict(N=float(runs.N[i]), D=float(runs.D[i]), residual=float(residuals[i]),
                 without=dict(zip(LAW, law.tolist())))
            for i, law in zip(worst, refit(fitter, best, w))]


def law_flags(laws, terms, runs, influence):
    """Where the numbers of a law are not to be believed as they stand."""
    flags, at_zero = [], laws[:, 0] < 1e-3 * runs.loss.min()
    if at_zero[0]:
        flags.append("E is at 0: these runs do not show where the loss levels off")
    elif at_zero[1:].sum() > 0.05 * len(laws):
        flags.append(f"E is at 0 in {at_zero[1:].sum()} of {len(laws) - 1} resamples")
    for name, term, exponent in zip("ND", terms, laws[0, 3:]):
        if np.ptp(term) < 1e-3 * np.ptp(runs.loss) or not 0.02 < exponent < 2.5:
            flags.append(f"the term in {name} is not resolved: exponent {exponent:.3g}, varying by "
                         f"{np.ptp(term):.2g} of the loss's {np.ptp(runs.loss):.2g} nats")
    if len(runs.N) < 10:
        flags.append(f"only {len(runs.N)} runs for five parameters")
    for i in influence:
        for name, exponent in zip(("alpha", "beta"), laws[0, 3:]):
            if abs(shift := i["without"][name] - exponent) > 0.05:
                flags.append(f"{name} moves by {shift:+.3f} without the run at N {i['N']:.3g}, "
                             f"D {i['D']:.3g}")
    return flags


# -------------------------------------------------------------------------------------------------
# What the fits say (MAD paper, section 4)


def parabola_bias(law, runs):
    """
    How far parabolas miss on the law itself, at these runs and without noise (arXiv 2603.22339):
    the law is lopsided in log N and a parabola is not, so its vertex moves with the sizes sampled.
    Returns the bias of a, and the factor on N* at the law's target.
    """
    ideal = fit_isoflop(runs.N, runs.D, law.loss(runs.N, runs.D), runs.C,
                        target=law.target["C"], bootstrap=0)
    return dict(a=ideal.a - law.a, N_factor=ideal.target["N"] / law.target["N"])


def state_law(fits):
    """
    State-optimal scaling P* = k M^c: perplexity at the optimum against the state there.

    fits: architecture -> IsoflopFit with states, of one number of resamples. Returns one c with a k
    for each architecture, and each alone. Raises FitError where no state varies.
    """
    points, separate = {}, {}                                        # log M, log P = L, weight
    for arch, fit in fits.items():
        w = np.isfinite(fit.optima["logM"]).astype(float)            # (1 + bootstrap, budgets)
        x, y = (np.where(w > 0, fit.optima[k], 0) for k in ("logM", "loss"))
        if w[0].sum() >= 2 and np.ptp(x[0][w[0] > 0]) > 0.01:
            points[arch], (logk, c) = (x, y, w), fit_lines(x, y, w)
            separate[arch] = estimates(dict(k=np.exp(logk), c=c))
    if not points:
        raise FitError("no architecture has a positive state that varies over two usable budgets")
    # One slope with an intercept each: take each architecture's means away first.
    x, y, w = (np.concatenate(p, 1) for p in
               zip(*((x - means(x, w), y - means(y, w), w) for x, y, w in points.values())))
    c = fit_lines(x, y, w)[1]
    k = {arch: float(np.exp(means(y, w) - c[0] * means(x, w))[0, 0])
         for arch, (x, y, w) in points.items()}
    return estimates(dict(c=c)) | dict(k=k, separate=separate)


def overtraining(iso, law, C, ratios=(1 / 4, 1 / 2, 2, 4)):
    """
    Excess loss, in nats, of a model of ratio * N* at the same budget; below 1 it is overtrained.

    isoflop: by the mean curvature of the budgets, with no value where one did not sample that size.
    law: at budget C. Either fit may be a refusal.
    """
    out = {}
    if isinstance(iso, IsoflopFit):
        curvature = iso.optima["curvature"]                          # (1 + bootstrap, budgets)
        curvature = means(np.nan_to_num(curvature), np.isfinite(curvature))[:, 0]
        used = [p for p in iso.parabolas if not p["flag"]]
        excess = {f"{q:g}": curvature[0] * np.log(q) ** 2 for q in ratios
                  if all(p["N_sampled"][0] <= q * p["N"] <= p["N_sampled"][1] for p in used)}
        out["isoflop"] = excess | estimates(dict(curvature=curvature))
    if isinstance(law, LawFit):
        N, D, loss = law.optimum(C)
        out["law"] = {f"{q:g}": law.loss(N * q, D * q ** -law.rule[1]) - loss for q in ratios}
    return out


METHODS = dict(isoflop=fit_isoflop, parametric=fit_parametric,
               variable_projection=fit_variable_projection)


@np.errstate(all="ignore")
def hold_out(runs, above=None):
    """
    Fit the smaller budgets, predict the larger: a row for each method and held-out budget.

    above: the budget from which runs are held out (the largest group if None). decades: distance
    beyond the fitted budgets. loss_error: log of predicted over measured loss, the mean over runs
    for a law, at the optimum for isoflop (NaN without one). log10_N_error: the same for N*.
    """
    label, budgets = group_budgets(runs.C)
    test = label == len(budgets) - 1 if above is None else runs.C >= above
    if test.all() or not test.any():
        raise FitError("hold-out needs runs on both sides of the cut")
    fitted, rows = runs.take(~test), []
    fits = {name: attempt(fit, *fitted.columns, bootstrap=0) for name, fit in METHODS.items()}
    for g, (name, fit) in itertools.product(np.unique(label[test]), fits.items()):
        group, C = runs.take(test & (label == g)), budgets[g]
        row = dict(method=name, C=C, decades=np.log10(C / fitted.C.max()))
        if isinstance(fit, dict):
            rows.append(row | fit)
            continue
        (top, _), (N, _, loss) = vertex(group), fit.optimum(C)
        error = (np.log(loss / top["loss"]) if name == "isoflop" else
                 np.log(fit.loss(group.N, group.D) / group.loss))
        rows.append(row | dict(loss_error=error.mean(), loss_rms=np.sqrt((error ** 2).mean()),
                               log10_N_error=(np.log(N) - top["logN"]) / np.log(10)))
    return rows


@np.errstate(all="ignore")
def analyse(runs, target=None, bootstrap=1000, seed=0, above=None):
    """Everything about one set of runs: name -> fit, table or refusal."""
    options = dict(target=target, bootstrap=bootstrap, seed=seed)
    out = dict(runs=len(runs.N), dropped=runs.dropped)
    if runs.dropped:                                                 # the fits see clean runs only
        out["flags"] = dropped_flags(runs)
    out["isoflop"] = iso = attempt(fit_isoflop, *runs.columns, runs.state, **options)
    for name in ("parametric", "variable_projection"):
        out[name] = law = attempt(METHODS[name], *runs.columns, **options)
        if isinstance(law, LawFit) and isinstance(iso, IsoflopFit):
            out.setdefault("parabola_bias", {})[name] = attempt(parabola_bias, law, runs)
            out["parabola_bias"][name]["a_parabola_less_law"] = iso.a - law.a
    middle = np.exp(np.log(runs.C).mean())
    out["overtraining"] = overtraining(iso, out["variable_projection"], middle)
    out["hold_out"] = attempt(hold_out, runs, above)
    return out


def compare(scores, archs):
    """
    Rank correlation of MAD scores {arch: score} with compute-optimal losses, a row for each budget
    that three scored architectures share; -1 if a higher score always means a lower loss.

    archs: {arch: Runs}. Where a parabola has no usable minimum, the best run stands in, flagged, as
    are architectures without a score or without runs. Raises FitError where no budget serves.
    """
    missing = [f"{a}: a score, but no runs" for a in scores if a not in archs]
    missing += [f"{a}: runs, but no score" for a in archs if a not in scores]
    rows, archs = [], {a: r for a, r in archs.items() if a in scores}
    if len(archs) < 3:
        raise FitError("a rank correlation needs three architectures with both runs and a score, "
                       f"here {', '.join(archs) or 'none'}")
    runs, names = pool(archs), np.repeat([*archs], [len(r.C) for r in archs.values()])
    label, budgets = group_budgets(runs.C)
    for g, C in enumerate(budgets):
        losses, flags = {}, list(missing)
        for arch in dict.fromkeys(names[label == g].tolist()):
            group = runs.take((label == g) & (names == arch))
            top, why = vertex(group)
            losses[arch] = float(group.loss.min()) if why else top["loss"]
            flags += [f"{arch}: best run in place of the optimum: {why}"] * bool(why)
        if len(losses) >= 3:
            found = rank_correlation([scores[a] for a in losses], list(losses.values()))
            rows.append(dict(C=float(C), **vars(found), loss=losses, flags=flags))
    if not rows:
        raise FitError("no budget has runs of three architectures with a score")
    return rows


# Published accuracies in %, averaged over classes: the MAD paper's as arXiv 2406.06484 prints them
# (the striped ones read off mad-lab's figure, to about 0.2 points), and three that MetaLA's authors
# ran again (NeurIPS 2024).
COLUMNS = ("compression", "fuzzy-in-context-recall", "in-context-recall", "memorization",
           "noisy-in-context-recall", "selective-copying")
PUBLISHED = {   # arch -> COLUMNS, mean. (Of "GLA" no heads are named; 8 have the common state.)
    "transformer": (51.6, 29.8, 94.1, 85.2, 86.8, 99.6, 74.5),
    "hyena": (45.2, 7.9, 81.7, 89.5, 78.8, 93.1, 66.0),
    "mh-hyena": (44.8, 14.4, 99.0, 89.4, 98.6, 93.0, 73.2),
    "mamba": (52.7, 6.7, 90.4, 89.5, 90.1, 86.3, 69.3),
    "mh-gla": (38.8, 6.9, 80.8, 63.3, 81.6, 88.6, 60.0),
    "striped-hyena": (47.2, 23.4, 100, 89.2, 100, 100, 76.6),
    "striped-hyena-moe": (50.3, 24.9, 100, 89.6, 100, 100, 77.4),
    "striped-hyena-experts-moe": (52.3, 28.4, 100, 89.1, 100, 100, 78.3),
}
RERUN = {
    "mh-hyena": (47.8, 18.0, 97.5, 89.5, 98.7, 90.8, 73.7),
    "mamba": (44.0, 9.6, 87.9, 89.5, 90.9, 81.8, 67.3),
    "mh-gla": (37.7, 12.5, 91.6, 57.1, 92.6, 88.6, 63.3),
}


def read_records(folder):
    """{name: records of train.py --task mad, one a seed} of a folder, best mean first."""
    found = {}
    for path in sorted(Path(folder).glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            options = [f"{k}={v}" for k, v in record["options"].items()]
            mad_mean([record]), record["preset"], record["code"]     # KeyError where one is missing
            found.setdefault(" ".join([record["arch"], *options]), []).append(record)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise FitError(f"{path}: no MAD score ({type(error).__name__}: {error})") from None
    if not found:
        raise FitError(f"{folder} holds no scores: make them with train.py --task mad")
    if len(codes := {(r["preset"], r["code"]) for rs in found.values() for r in rs}) > 1:
        print(f"! these scores are of {len(codes)} versions of code or preset", file=sys.stderr)
    return dict(sorted(found.items(), key=lambda item: -mad_mean(item[1])))


def mad_mean(records):
    return float(np.mean([r["macro_mean"] for r in records]))


def cell(values):
    """Percent; of several seeds the mean and half the range."""
    values = 100 * np.array(values)
    return f"{values.mean():.1f}" + (f" ±{np.ptp(values) / 2:.1f}" if len(values) > 1 else "")


def run_table(args):
    """Markdown: scores averaged over classes, the published ones beneath; how the orders agree."""
    found = read_records(args.mad)
    heads = ["architecture", *(c.replace("-in-context-", " ").replace("in-context-", "")
                               for c in COLUMNS), "mean", "mean, tokens", "state", "parameters"]
    rows = [heads, ["---"] * len(heads)]
    for name, records in found.items():
        tasks = [cell([r["tasks"][t]["macro"] for r in records]) for t in COLUMNS]
        rows.append([name, *tasks, cell([r["macro_mean"] for r in records]),
                     cell([r["mean"] for r in records]), f"{records[0]['state']:,}",
                     f"{records[0]['parameters']:,}"])
        for source, published in (("paper", PUBLISHED), ("rerun", RERUN)):
            if name in published:
                rows.append([f"*{source}*", *(f"*{v:.1f}*" for v in published[name]), "", "", ""])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    both = [name for name in found if name in PUBLISHED]
    rank = rank_correlation([mad_mean(found[a]) for a in both], [PUBLISHED[a][-1] for a in both])
    print(*lines, "", "Spearman's correlation of these means with the published ones: "
          f"{rank.rho:.2f}, n = {rank.n}, permutation p = {rank.p:.2g}", sep="\n")


# -------------------------------------------------------------------------------------------------
# Files in, text out


def number(text, where):
    """A cell as a float, NaN if it is empty."""
    try:
        return float(text) if text and text.strip() else np.nan
    except ValueError:
        raise FitError(f"{where}: {text!r} is not a number") from None


def read_csv(path, needed):
    """Rows of a CSV file as dicts, with the needed columns."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise FitError(f"{path}: not a CSV file ({error})") from None
    if not rows:
        raise FitError(f"{path}: no rows")
    if missing := [c for c in needed if c not in rows[0]]:
        raise FitError(f"{path}: no column {', '.join(missing)} in {', '.join(map(str, rows[0]))}")
    return rows


def read_runs(path):
    """A CSV of runs -> {architecture: Runs}; without an arch column the name is "all"."""
    archs = {}
    for line, row in enumerate(read_csv(path, ("N", "D", "loss")), 2):
        some = archs.setdefault(row.get("arch") or "all", {})
        for c in ("N", "D", "loss", "C", "state"):
            if c in row:
                some.setdefault(c, []).append(number(row[c], f"{path}, line {line}, {c}"))
    runs = {arch: attempt(clean, **columns) for arch, columns in archs.items()}
    for arch, why in runs.items():
        if isinstance(why, dict):
            raise FitError(f"{path}, {arch}: {why['refused']}")
    return runs


def pool(archs):
    """All architectures' runs as one."""
    parts = archs.values()
    arrays = (np.concatenate([getattr(r, f.name) for r in parts]) for f in fields(Runs)[:-1])
    return Runs(*arrays, dict(sum((Counter(r.dropped) for r in parts), Counter())))


def read_scores(path):
    """{arch: score} from a folder of train.py's MAD scores, or a CSV (arch, mean)."""
    if Path(path).is_dir():
        return {name: mad_mean(records) for name, records in read_records(path).items()}
    return {r["arch"]: number(r["mean"], f"{path}, {r['arch']}")
            for r in read_csv(path, ("arch", "mean"))}


def plain(value):
    """For JSON: dataclasses as dicts without their long arrays, NaN and infinity as null."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value) if f.repr}
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def brief(v):
    return "-" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v)


def report(name, value, near={}, pad=""):
    """A JSON object as indented lines: intervals follow their numbers, "!" leads a flag."""
    if isinstance(value, str):
        return [f"{pad}! {value}"]
    if isinstance(value, list):
        return [line for v in value for line in report(name, v, {}, pad)]
    near = value.get("intervals", near)
    ends = {k: f" [{brief(v[0])}, {brief(v[1])}]" for k, v in near.items() if v[0] is not None}
    here = [f"{k} {brief(v)}{ends.get(k, '')}" for k, v in value.items()
            if not isinstance(v, (dict, list)) and v != ""]
    out = [f"{pad}{name}  " + "  ".join(here)]
    for k, v in value.items():
        if isinstance(v, (dict, list)) and v and k not in ("intervals", "N_sampled", "rule"):
            out += report(k, v, near if k == "target" else {}, pad + "  ")
    return out


# -------------------------------------------------------------------------------------------------
# Plots. Grey tells budgets apart and markers architectures, so that a printed page keeps both.

MARKERS, DASHES = "osD^vPX*", ("-", "--", "-.", ":")


def plot_parabolas(ax, arch, runs):
    label, budgets = group_budgets(runs.C)
    for g, C in enumerate(budgets):
        one, grey = runs.take(label == g), str(0.7 - 0.7 * g / max(1, len(budgets) - 1))
        ax.plot(one.N, one.loss, "o", ms=4, color=grey, label=f"{C:.1e} FLOPs")
        top, _ = vertex(one)
        N = np.geomspace(one.N.min(), one.N.max(), 100)
        ax.plot(N, top["loss"] + top["curvature"] * (np.log(N) - top["logN"]) ** 2, color=grey)
        ax.plot(np.exp(top["logN"]), top["loss"], "*", ms=12, color=grey, mec="black")
    ax.set(title=f"{arch}: optima starred", xlabel="parameters N", xscale="log")
    if len(budgets) <= 12:
        ax.legend(fontsize=7)


def plot_frontier(ax, archs):
    for i, (arch, r) in enumerate(archs.items()):
        look = dict(marker=MARKERS[i % 8], ls="none", label=arch)
        ax.plot(r.C, r.loss, color="0.75", ms=3, **look | dict(label=None))
        fit = attempt(fit_isoflop, *r.columns, bootstrap=0)
        if isinstance(fit, IsoflopFit):
            used = [p for p in fit.parabolas if not p["flag"]]
            ax.plot([p["C"] for p in used], [p["loss"] for p in used], color="black", **look)
            C = np.geomspace(used[0]["C"], 10 * used[-1]["C"], 50)
            ax.plot(C, fit.optimum(C)[2], color="black", lw=1, ls=DASHES[i % 4])
    ax.set(title="optima; L*(C) to 10 times the largest", xlabel="compute C, FLOPs", xscale="log")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=7)


def plot_runs(ax, archs, column, unit):
    every = np.log(pool(archs).C)
    for i, (arch, r) in enumerate(archs.items()):
        ax.scatter(getattr(r, column), r.loss, c=np.log(r.C), cmap="Greys", vmin=every.min() - 2,
                   vmax=every.max(), marker=MARKERS[i % 8], s=20, edgecolors="0.3", label=arch)
    ax.set(title="darker: more compute", xlabel=f"{unit} {column}", xscale="log")
    ax.tick_params(axis="x", which="minor", labelbottom=False)       # they would overlap
    ax.legend(fontsize=7)


# Where a label may stand beside its point: the offset in points, and how it is aligned there.
PLACES = ((6, -3), "left"), ((-6, -3), "right"), ((0, 6), "center"), ((0, -12), "center")


def plot_mad(ax, scores, row):
    """A scatter, each label at the first place where it covers no point and no earlier label."""
    from matplotlib.transforms import Bbox
    points = [(scores[arch], loss) for arch, loss in row["loss"].items()]
    ax.plot(*zip(*points), "o", color="black")
    ax.margins(0.45, 0.15)
    ax.set(title=f"optima at {row['C']:.1e} FLOPs: rho {row['rho']:.2f}, p {row['p']:.2g}, "
           f"n {row['n']}", xlabel="MAD score")
    ax.figure.draw_without_rendering()                               # now points have their pixels
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in ax.transData.transform(points)]
    for arch, point in zip(row["loss"], points):
        label = ax.annotate(arch, point, (0, 0), textcoords="offset points", fontsize=8)
        for place, aligned in PLACES:
            label.set(position=place, ha=aligned)
            if not label.get_window_extent().count_overlaps(taken):
                break
        taken.append(label.get_window_extent())


def run_plot(args):
    """Parabolas, frontier, loss against N and D, and against MAD scores if given: one image."""
    archs, scores = read_runs(args.runs), args.mad and read_scores(args.mad)
    panels = [(plot_parabolas, arch, runs) for arch, runs in archs.items()]
    panels += [(plot_frontier, archs), (plot_runs, archs, "N", "parameters"),
               (plot_runs, archs, "D", "training tokens")]
    panels += [(plot_mad, scores, compare(scores, archs)[-1])] if scores else []
    draw(panels, args.out)


def draw(panels, out):
    """[(function of axes and arguments, arguments ...)] side by side, up to three a row."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise FitError("plots need matplotlib: pip install matplotlib") from None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
    for i, (panel, *args) in enumerate(panels, 1):
        ax = figure.add_subplot(rows, columns, i, ylabel="loss, nats a token")
        panel(ax, *args)
    figure.savefig(out, dpi=130)


# -------------------------------------------------------------------------------------------------
# Runs to fit: IsoFLOP groups of language models. The rules are ours where no source stands.

# Width and blocks (of a mixer and a channel mixer, about 12 width^2 parameters), 6 thousand to 6.4
# billion parameters without embeddings. Heads of every layer divide these widths.
SHAPES = [(width, blocks) for blocks, widths in {
    2: [16, 24, 32, 40, *range(48, 129, 16)], 4: range(96, 193, 16), 6: range(176, 257, 16),
    8: range(256, 385, 32),
    12: [352, 384, *range(448, 769, 64)], 16: range(768, 1025, 64),
    24: [960, 1024, *range(1152, 1793, 128), 2048],
    32: [*range(2048, 3073, 256), 3584, 4096]}.items() for width in widths]
LEAST_STEPS = 50                        # below, warmup and noise decide the loss (a choice of ours)
PAPER_SIZES = (70e6, 7e9)               # parameters of the paper's models; a plan stays within
ATTENTION = {"0": 0, "8.3": 12, "25": 4, "50": 2, "100": 1}       # % of blocks: one in how many
# Tokens a step from each budget upwards: the paper's from memory, which nobody has checked.
BATCHES = {4e18: 2 ** 17, 2e19: 2 ** 18, 8e19: 2 ** 19}


def batch_tokens(C):
    """Tokens a step: BATCHES, and below them a power of two, 2048 at 1e12, growing as C^(1/3)."""
    recalled = [tokens for budget, tokens in BATCHES.items() if C >= budget * 0.999]
    return max(recalled, default=min(2 ** round(np.log2(2048 * (C / 1e12) ** (1 / 3))), 2 ** 17))


def family(arch):
    """
    The pattern that "hybrid" or "mh-hyena@25" (25% attention) repeats, and its blocks. Before @
    stands an architecture; its first mixer and channel mixer are striped with attention.
    """
    name, at, percent = arch.partition("@")
    words = find_pattern(name).split()
    if not at:
        return " ".join(words), 2
    if percent not in ATTENTION or words[0] in ("attention", "mh-attention"):
        raise FitError(f"architecture {arch!r}: write NAME@PERCENT, of a mixer other than "
                       f"attention, and attention in {', '.join(ATTENTION)}% of the blocks")
    every, channel = ATTENTION[percent], words[1] if words[1] == "moe-mlp" else "swiglu"
    striped = words[:2] * (every - 1) + ["mh-attention", channel]
    return (" ".join(striped), every) if every else (" ".join(words[:2]), 1)


def at_width(pattern, width):
    """
    The pattern with MAD's settings, which are for width 128, at another width: experts' widths and
    Mamba's rank grow with it. Heads keep their width (8 or 16), so their number grows; attention's
    are about 16 wide, 64 from width 512, 128 from 2048.
    """
    def sized(name):
        cls, settings = LAYERS[name]
        grown = {k: v * width // 128 for k, v in settings.items()
                 if k in ("heads", "width", "dt_rank") and v > 1}
        if cls is Attention and grown:
            grown["heads"] = width // (16 if width < 512 else 64 if width < 2048 else 128)
        return name + f"({','.join(f'{k}={v}' for k, v in grown.items())})" * bool(grown)
    return " ".join(map(sized, pattern.split()))


def choose_shapes(low, high, count, period, limits):
    """
    `count` shapes, evenly from `low` to `high` parameters, depth a multiple of `period`. Where too
    few lie there, some beyond are taken, which is said, but none beyond the limits.
    """
    size = lambda shape: 12 * shape[1] * shape[0] ** 2
    shapes = {(width, -(-blocks // period) * period) for width, blocks in SHAPES}
    shapes = sorted((s for s in shapes if limits[0] <= size(s) <= limits[1]), key=size)
    if count > len(shapes):
        raise FitError(f"--sizes {count}: there are only {len(shapes)} sizes to choose from, "
                       f"{size(shapes[0]):.2g} to {size(shapes[-1]):.2g} parameters")
    chosen = []
    for goal in np.geomspace(low, high, count):
        chosen.append(min(shapes, key=lambda shape: abs(np.log(size(shape) / goal))))
        shapes.remove(chosen[-1])
    if beyond := sum(not low / 1.5 < size(s) < high * 1.5 for s in chosen):
        print(f"! {beyond} of {count} sizes lie beyond {low:.2g} to {high:.2g} parameters, "
              f"where there are no more", file=sys.stderr)
    return sorted(chosen, key=size)


def price(pattern, width, context, vocab_size):
    """Parameters, state and training FLOPs a token of a model, which gets no memory for them."""
    with torch.device("meta"):
        model = Model(pattern, vocab_size, width, context)
    count = sum(p.numel() for p in model.parameters())
    unembed, blocks = model.unembed.weight.numel(), [block.layer for block in model.blocks]
    forward = sum(layer.flops(context) for layer in blocks) / context + 2 * unembed
    return dict(N=count - unembed - model.embed.weight.numel(), N_total=count,
                state=sum(layer.nominal(context) for layer in blocks), token_flops=3 * forward)


def isoflop_runs(archs, budgets, context, vocab_size, sizes=7, tokens_per_parameter=20.0,
                 seed=0, reach=4, limits=(0, np.inf)):
    """
    The runs of a sweep, a dict each, budget by budget; and those left out, of fewer than 50 steps.

    Sizes: from N* / reach to reach N*, within limits, N* = sqrt(C / (6 tokens_per_parameter)), the
    same shapes for all architectures. That ratio is about 20 at scale (Hoffmann et al. 2022), and
    more in small runs, short of steps: 77 for the transformer on bytes at 1e12 FLOPs
    (results/sweep-fit.txt). Steps: what the budget buys by the model's own count of FLOPs,
    unembedding included. Learning rate: 0.003 at width 64, falling with its square root, untuned.
    """
    families = {arch: family(arch) for arch in archs}
    period = int(np.lcm.reduce([2, *(blocks for _, blocks in families.values())]))
    runs = []
    for budget in sorted(budgets):
        best = (budget / 6 / tokens_per_parameter) ** 0.5
        batch = max(1, batch_tokens(budget) // context)               # sequences
        low, high = np.clip([best / reach, best * reach], *limits)
        shapes = choose_shapes(low, high, sizes, period, limits)
        for (arch, (unit, blocks)), (width, depth) in itertools.product(families.items(), shapes):
            pattern = at_width(" ".join([unit] * (depth // blocks)), width)
            run = price(pattern, width, context, vocab_size)
            flops = run.pop("token_flops") * batch * context          # of a step
            steps = round(budget / flops)
            runs.append(dict(arch=arch, **run, D=steps * batch * context, C=steps * flops,
                             budget=budget, width=width, depth=depth, batch=batch,
                             lr=round(3e-3 * (width / 64) ** -0.5, 6), steps=steps, seed=seed,
                             pattern=pattern))
    return [[r for r in runs if (r["steps"] >= LEAST_STEPS) == kept] for kept in (True, False)]


def configuration(run, args):
    """The run for train.py: 5% warmup, cosine to a tenth, AdamW (0.9, 0.95), decay 0.1, clip 1."""
    budget = f"{run['budget']:.4g}".replace("+", "")
    name = f"{run['arch']}_{budget}_{run['width']}x{run['depth']}_seed{run['seed']}"
    return train.TrainConfig(
        task="text", name=name, out=args.out, data=args.data, tokenizer=args.tokenizer,
        layers=run["pattern"], dim=run["width"], context=args.context, batch_size=run["batch"],
        steps=run["steps"], warmup=max(1, run["steps"] // 20), lr=run["lr"], min_lr=run["lr"] / 10,
        clip=1.0, beta2=0.95, weight_decay=0.1, eval_every=run["steps"], seed=run["seed"])


CSV_COLUMNS = ("arch N N_total state D C loss bits_per_byte seconds budget width depth batch lr "
               "steps seed epochs context tokenizer data").split()
KEY = ("arch", "budget", "width", "depth", "seed")       # what tells runs apart, as in their names


def write_runs(path, runs, earlier):
    """The CSV anew: the rows of earlier sweeps, and `runs`, in place of earlier rows of theirs."""
    rows = {tuple(str(row[k]) for k in KEY): row for row in [*earlier, *runs]}
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows.values())
    train.write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def earlier_rows(path, run):
    """The rows of earlier sweeps. FitError if they are of other text: no law holds for both."""
    rows = read_csv(path, CSV_COLUMNS) if path.exists() else []
    for key in ("context", "tokenizer", "data"):
        if others := {row[key] for row in rows} - {str(run[key])}:
            raise FitError(f"{path} holds runs of {key} {min(others)}, not {run[key]}: choose "
                           f"another --out")
    return rows


def sweep(runs, configs, path):
    """
    Train what isn't trained yet; the CSV at `path` is rewritten after every run. A run that fails
    has no loss in it, and is tried again next time. Returns how many failed.
    """
    earlier, failed = earlier_rows(path, runs[0]), 0
    with tqdm(total=sum(r["C"] for r in runs), unit="FLOP", unit_scale=True) as bar:
        for i, (run, config) in enumerate(zip(runs, configs), 1):
            bar.set_description(config.name)
            try:
                result = train.train(config, say=None)     # a finished one's at once; or it goes on
                run |= dict(loss=result["val_loss"], bits_per_byte=result["bits_per_byte"],
                            seconds=result["wall_s"],
                            epochs=round(run["D"] / result["corpus"]["training_tokens"], 4))
            except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
                bar.write(f"failed: {config.name}: {' '.join(str(error).split())[:300]}",
                          file=sys.stderr)
                failed += 1
            write_runs(path, runs[:i], earlier)
            bar.update(run["C"])
    return failed


# -------------------------------------------------------------------------------------------------
# A plan: the same runs at the paper's budgets, priced


def memory(run, context, vocab_size):
    """
    GB to train with one sequence at a time (accumulating the rest): 16 bytes a parameter (float32
    weights, gradients, two moments of Adam); 34 a token, channel and block of activations in
    bfloat16 (Korthikanti et al. 2022, equation 2 without the T x T scores, which a fused attention
    doesn't keep; for other mixers a guess); 10 a token and word of logits (bfloat16, then float32
    for the loss and its gradient).
    """
    activations = 34 * context * run["width"] * run["depth"]
    return (16 * run["N_total"] + activations + 10 * context * vocab_size) / 1e9


def run_plan(args):
    runs, vocab_size = runs_of(args, reach=9, limits=PAPER_SIZES), tasks.vocab_size(args.tokenizer)
    peak, room = train.CARDS[args.card]
    hours = lambda C: C / (peak * args.utilisation) / 3600
    print(f"{'architecture':<22}{'budget':>8}{'width':>7}{'blocks':>7}{'N, M':>9}{'all, M':>9}"
          f"{'tokens, B':>11}{'batch':>7}{'steps':>9}{'FLOPs':>11}{'GB':>7}{'hours':>8}")
    for r in runs:
        GB = memory(r, args.context, vocab_size)
        print(f"{r['arch']:<22}{r['budget']:>8.3g}{r['width']:>7}{r['depth']:>7}"
              f"{r['N'] / 1e6:>9,.1f}{r['N_total'] / 1e6:>9,.1f}{r['D'] / 1e9:>11,.2f}"
              f"{r['batch']:>7,}{r['steps']:>9,}{r['C']:>11.3e}"
              f"{GB:>6,.1f}{'!' if GB > room else ' '}{hours(r['C']):>8,.1f}")
    whole = sum(r["C"] for r in runs)
    print(f"{len(runs)} runs, {whole:.3e} FLOPs, {hours(whole):,.0f} hours of one {args.card} at "
          f"{100 * args.utilisation:g}% of {peak / 1e12:g} TFLOP/s (a guess: measure yours)\n"
          f"context {args.context}, vocabulary {vocab_size:,}; N without embeddings; batch: "
          f"sequences a step; GB: one sequence at a time, ! = more than the {room} GB of one "
          f"{args.card}\nbatch in tokens from 4e18 on: the paper's as recalled, not checked")


# -------------------------------------------------------------------------------------------------
# Commands


def run_fit(args):
    archs = read_runs(args.runs)
    options = dict(target=args.target, bootstrap=args.bootstrap, above=args.hold_out)
    # A seed each: resamples of two architectures must not be drawn alike.
    results = {arch: analyse(runs, seed=args.seed + i, **options)
               for i, (arch, runs) in enumerate(archs.items())}
    whole, shown = next(iter(results.values())), results
    if len(archs) > 1:
        whole = analyse(pool(archs), seed=args.seed, **options)
        whole.setdefault("flags", []).append(
            f"{len(archs)} architectures pooled as if they were one: see archs")
        shown = results | {"all together": whole}
    if not any(isinstance(r[m], Fit) for r in shown.values() for m in METHODS):
        raise FitError("; ".join(f"{m}: {whole[m]['refused']}" for m in METHODS))
    fits = {a: r["isoflop"] for a, r in results.items() if isinstance(r["isoflop"], IsoflopFit)}
    last = dict(state_law=attempt(state_law, fits))
    if args.json:
        print(json.dumps(plain(whole | dict(archs=results) | last), allow_nan=False))
    else:
        for name, value in plain(shown | last).items():
            print("\n".join(report(name, value)), end="\n\n")
    if args.draws:
        np.savez(args.draws, **{f"{a}/{m}/{k}": v for a, r in shown.items() for m in METHODS
                                if isinstance(r[m], Fit) for k, v in r[m].draws.items()})


def run_compare(args):
    scores = read_scores(args.mad)
    rows = compare(scores, read_runs(args.runs))
    print(json.dumps(plain(rows), allow_nan=False) if args.json else
          "\n".join(report("budget", plain(rows))))
    if args.plot:
        draw([(plot_mad, scores, rows[-1])], args.plot)


def runs_of(args, **options):
    """The runs that a sweep or plan asks for; those left out are said."""
    runs, left_out = isoflop_runs(args.archs, args.budgets, args.context,
                                  tasks.vocab_size(args.tokenizer), args.sizes,
                                  args.tokens_per_parameter, **options)
    for run in left_out:
        print(f"left out: {run['arch']} of {run['N']:,} parameters: {run['budget']:g} FLOPs buy "
              f"{run['steps']} steps, fewer than {LEAST_STEPS}", file=sys.stderr)
    if not runs:
        raise FitError(f"these budgets buy no run of {LEAST_STEPS} steps: raise them")
    return runs


def run_sweep(args):
    if train.torchrun_place()[1] > 1:
        raise ValueError("a sweep is one process: start it with python, not with torchrun")
    text = dict(context=args.context, tokenizer=args.tokenizer, data=args.data or tasks.LIBRARY)
    runs = [run | text for run in runs_of(args, seed=args.seed)]
    tasks.load_tokens(args.data, args.tokenizer)                     # tokenised once, or refused
    configs = [configuration(run, args) for run in runs]
    for config in configs:
        train.find_folder(config)                                    # no folder holds another run
    path = Path(args.out) / "runs.csv"
    try:
        with train.claim(path.parent):                               # the CSV is rewritten whole
            failed = sweep(runs, configs, path)
    except KeyboardInterrupt as stop:                                # train.Interrupted has args
        why, number = stop.args or ("stopped at once", 2)
        print(f"{why}; finished runs, if any, are in {path}", file=sys.stderr)
        return 128 + number
    again = max(run.get("epochs", 0) for run in runs)                # times they read the corpus
    print(f"{len(runs) - failed} of {len(runs)} runs are in {path}"
          + f"; some read their corpus up to {again:.1f} times" * (again > 1)
          + f"\nnext: python scaling.py fit {path}")
    return 1 if failed else 0


def above(low, kind=int, most=sys.float_info.max):
    """A type for argparse: a number above `low`, `most` at most."""
    def read(text):
        if not low < (value := kind(text)) <= most:
            raise argparse.ArgumentTypeError(
                f"{text} must be above {low} and {'at most 1' if most == 1 else 'finite'}")
        return value
    read.__name__ = kind.__name__                                    # in argparse's message
    return read


def listed(kind):
    """Values with commas between, none of them twice."""
    def split(text):
        return list(dict.fromkeys(map(kind, text.split(","))))
    split.__name__ = f"list of {kind.__name__}"
    return split


def _command(commands, name, run, text, epilog=None):
    """Add a subcommand; returns its add_argument."""
    command = commands.add_parser(name, help=text, description=text, epilog=epilog)
    command.set_defaults(run=run)
    return command.add_argument


def _isoflop_command(commands, name, run, text, budgets, context, tokenizer, ratio):
    """sweep or plan, with the options that both have."""
    add = _command(commands, name, run, text, "An architecture is a name from python model.py, or "
                   "NAME@PERCENT: mh-hyena@25 has attention in 25% of its blocks (0, 8.3, 25, 50 "
                   "or 100). All architectures of one sweep have the same widths and depths.")
    add("--archs", type=listed(str), default=["transformer", "hybrid"], metavar="A,B",
        help="architectures, with commas between (default transformer,hybrid)")
    add("--budgets", type=listed(above(0, float)), default=budgets, metavar="C,C",
        help=f"training FLOPs of each group (default {budgets})")
    add("--sizes", type=above(4), default=7, help="models a budget, at least 5 (default 7)")
    add("--tokens-per-parameter", type=above(0, float), default=ratio,
        help=f"at the middle size of a group; moves all sizes (default {ratio})")
    add("--context", type=above(0), default=context, help=f"tokens a sequence (default {context})")
    add("--tokenizer", default=tokenizer, help=f"bytes or tiktoken's (default {tokenizer})")
    return add


def _sweep_commands(commands):
    add = _isoflop_command(commands, "sweep", run_sweep, "train IsoFLOP groups into a CSV for fit; "
                           "started again it goes on where it was stopped",
                           "1e12,3e12,1e13,3e13", 128, "bytes", 60.0)
    add("--data", help="as in train.py (default: Python's standard library)")
    add("--seed", type=above(-1), default=0, help="of parameters and data (default 0)")
    add("--out", default="out/sweep", help="folder of the runs' folders and of runs.csv, where "
        "rows of other runs stay (default out/sweep)")
    add = _isoflop_command(commands, "plan", run_plan, "price IsoFLOP groups instead of training "
                           "them", "4e18,8e18,2e19,4e19,8e19", 2048, "gpt2", 20.0)
    add("--card", choices=train.CARDS, default="H100", help="to price the runs for (default H100)")
    add("--utilisation", type=above(0, float, 1), default=0.4,
        help="of its peak in bfloat16, a guess until measured (default 0.4)")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add = _command(commands, "fit", run_fit, "scaling laws of a CSV: N, D, loss[, C, arch, state]")
    add("runs", help="CSV file of runs")
    add("--json", action="store_true", help="print one JSON object")
    add("--target", type=above(0, float), help="budget to predict, FLOPs (default: the largest)")
    add("--bootstrap", type=above(0), default=1000, help="resamples (default 1000)")
    add("--seed", type=above(-1), default=0, help="of the resamples (default 0)")
    add("--hold-out", type=above(0, float), help="least budget to hold out (default: the largest)")
    add("--draws", help="write every bootstrap draw to this .npz file")
    add = _command(commands, "compare", run_compare, "rank correlation of MAD scores with losses")
    add("--mad", required=True, help="folder of train.py's scores, or a CSV (arch, mean)")
    add("--runs", required=True, help="CSV file of runs, with an arch column")
    add("--json", action="store_true", help="print a JSON list, a row a budget")
    add("--plot", help="image file, .png or .pdf: scores against losses at the largest budget")
    add = _command(commands, "table", run_table, "MAD scores beside the published ones")
    add("--mad", required=True, help="folder of train.py's scores, such as results/mad/quick")
    add = _command(commands, "plot", run_plot, "draw a CSV of runs")
    add("runs", help="CSV file of runs")
    add("--out", required=True, help="image file, .png or .pdf")
    add("--mad", help="MAD scores to draw against the losses")
    _sweep_commands(commands)
    args = parser.parse_args(argv)
    tune_allocator()                                                 # the fits need it most
    try:
        return args.run(args)
    except (ValueError, OSError) as error:                           # --out names train.py's runs
        text = str(error).replace("--name or --out", "--out").replace("--name", "--out")
        print(f"scaling.py: {text}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
