"""
What small runs predict about large ones: scaling laws fitted to a table of training runs.

A run is a row of a CSV: N, D, loss, and optionally C, arch, state. From runs at a few budgets this
file finds the best size for each, the law that the loss follows, and whether MAD scores rank
architectures as their losses do (the MAD paper, arXiv 2403.17844).

  N  parameters (see `analyse`)     L  loss, nats per token  a, b   N* ~ C^a, D* ~ C^b
  D  training tokens                P  perplexity, exp(L)    E, A, B, alpha, beta:
  C  training FLOPs, 6ND by default M  total state               L = E + A/N^alpha + B/D^beta
  *  at the best size for a budget  S  problems solved at once (starting points, resamples)

  python scaling.py sweep --budgets 1e12,3e12,1e13,3e13     trains runs into out/sweep/runs.csv
  python scaling.py plan                                    lists the runs at the paper's budgets
  python scaling.py fit results/sweep.csv [--json]          the laws, as text or one JSON object
  python scaling.py plot results/sweep.csv --out sweep.png  parabolas, optima, losses
  python scaling.py curves out/*/log.jsonl --out curves.png learning curves; mixing draws layers
  python scaling.py table --mad results/mad/quick           MAD scores beside the published ones
  python scaling.py compare results/mad-loss.csv --mad results/mad/quick    (or plot: a picture)
"""
import argparse
import csv
import itertools
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from layers import LAYERS, Attention, build_layer, mixing, shade
from model import Model, ledger, parse_pattern, total
from tasks import TASKS, Parser, UserError, load_text, run_main, vocab_size
from train import Config, Diverged, train

# -- Runs and fits ---------------------------------------------------------------------------------

class Runs(NamedTuple):
    """Training runs, float64 (n,) each."""
    N: np.ndarray
    D: np.ndarray
    loss: np.ndarray
    C: np.ndarray
    state: np.ndarray     # NaN where unknown

    def take(self, rows):
        return Runs(*(column[rows] for column in self))

def make_runs(N, D, loss, C=None, state=None):
    """Columns (n,) as Runs. UserError unless all but the state are positive and finite."""
    N, D, loss = (np.asarray(column, np.float64) for column in (N, D, loss))
    columns = np.stack([N, D, loss, 6 * N * D if C is None else C])
    if not (np.isfinite(columns) & (columns > 0)).all():
        raise UserError("N, D, loss and C must be positive and finite in every run")
    return Runs(*columns, N * np.nan if state is None else np.asarray(state, np.float64))

def budget_groups(C):
    """Indices of the runs of each budget, smallest first; budgets are more than 10% apart."""
    order = np.argsort(C, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(np.log(C[order])) > 0.1) + 1)

@dataclass
class Fit:
    """Estimates, which are attributes, too: fit.alpha. residuals (n,): of L, or log y."""
    estimates: dict
    intervals: dict           # name -> [low, high], 95% of the resamples that have an optimum
    residuals: np.ndarray

    def __post_init__(self):
        vars(self).update(self.estimates)

def make_fit(rows, residuals, **more):
    """A Fit of rows: name -> (1 + bootstrap,), the estimate first (NaN: no optimum), and `more`."""
    good = {name: row[1:][np.isfinite(row[1:])] for name, row in rows.items()}
    return Fit({name: float(row[0]) for name, row in rows.items()} | more,
               {name: np.percentile(row, [2.5, 97.5]).tolist() for name, row in good.items()
                if len(row) >= 20}, residuals)

def resample(fitted, residuals, parameters, count, seed):
    """
    (count, n) resamples of a fitted curve (n,). Its sizes stay, since they were chosen; residuals
    are drawn with replacement, and widened for the degrees of freedom that fitting took.
    """
    n, rng = len(residuals), np.random.default_rng(seed)
    widen = np.sqrt(n / (n - parameters)) if n > parameters else np.nan
    return fitted + widen * rng.choice(residuals - residuals.mean(), (count, len(fitted)))

def fit_power_law(x, y, bootstrap=1000, seed=0):
    """y = k x^c through positive x, y (n,), by least squares in logs. UserError for one x."""
    x, y = np.log(np.array([x, y], np.float64))
    if not np.ptp(x) > 0.01:
        raise UserError("a power law needs two different x")
    solve = np.linalg.pinv(np.vander(x, 2))              # a NaN stays in its own resample
    fitted = np.polyval(solve @ y, x)
    draws = resample(fitted, y - fitted, 2, bootstrap, seed)
    c, logk = solve @ np.vstack([y, draws]).T
    return make_fit(dict(k=np.exp(logk), c=c), y - fitted)

def rank_correlation(x, y, permutations=9999, seed=0):
    """
    Spearman's rho of x and y (n,), NaN for a constant column; its two-sided permutation p, n. From
    all orders if n <= 8; else from random ones and the given one, so p > 0 (Phipson, Smyth 2010).
    """
    x, y, n = np.asarray(x, np.float64), np.asarray(y, np.float64), len(x)
    # Ranks less their mean; ties share their average.
    rx, ry = (((v < v[:, None]).sum(1) + (v <= v[:, None]).sum(1) - n) / 2 for v in (x, y))
    rng, norm = np.random.default_rng(seed), np.sqrt((rx @ rx) * (ry @ ry))
    orders = (np.array(list(itertools.permutations(rx))) if n <= 8 else
              np.vstack([rx, rng.permuted(np.tile(rx, (permutations, 1)), axis=1)]))
    p = (np.abs(orders @ ry) >= np.abs(rx @ ry) - 1e-9).mean()
    return SimpleNamespace(rho=float(rx @ ry / norm if norm else np.nan), p=float(p), n=n)

# -- IsoFLOP parabolas: L = L* + curvature (log N - log N*)^2 at one budget -----------------------
# They assume no law, but loss curves are lopsided, and parabolas are not.

def near_optimum(runs):
    """One budget's runs of 1/4 to 4 times the best one's size, at least the four sizes nearest."""
    ratio = lambda N: np.exp(np.abs(np.log(N / runs.N[runs.loss.argmin()])))
    return runs.take(ratio(runs.N) <= max(4, *np.sort(ratio(np.unique(runs.N)))[:4]) * 1.001)

def parabola(runs, loss):
    """
    Parabolas through loss (S, n) at the sizes of runs (n,): the fitted (S, n), and N, D, state,
    curvature, loss (S,) of their optima, NaN where there is no minimum.
    """
    middle = np.log(runs.N).mean()
    u = np.log(runs.N) - middle
    solve = np.linalg.pinv(np.vander(u, 3))                          # of q0 u^2 + q1 u + q2
    q = solve @ loss.T                                               # (3, S)
    curvature = np.where((q[0] > 1e-9) & (len(np.unique(u.round(2))) > 2), q[0], np.nan)
    top = -q[1] / (2 * curvature)                                    # the vertex, in u
    at_top = lambda column: np.exp(np.polyval(solve @ np.log(column), top.clip(u.min(), u.max())))
    N = np.exp(middle + top)
    return (np.vander(u, 3) @ q).T, dict(
        N=N, D=at_top(runs.N * runs.D) / N, state=at_top(runs.state), curvature=curvature,
        loss=q[2] - q[1] ** 2 / (4 * curvature))

def vertex(runs):
    """The optimum of one budget's runs beside its best run; flag: why there is none, or ""."""
    near, best = near_optimum(runs), runs.loss.argmin()
    top = {name: float(v[0]) for name, v in parabola(near, near.loss[None])[1].items()}
    flag = "" if runs.N.min() <= top["N"] <= runs.N.max() else "no minimum within its sizes"
    return dict(C=float(np.exp(np.log(runs.C).mean())), runs=len(runs.N), used=len(near.N), **top,
                best_N=float(runs.N[best]), best_loss=float(runs.loss[best]), flag=flag)

@np.errstate(all="ignore")                # a resample's optimum may be NaN, or out of sight
def fit_isoflop(N, D, loss, C=None, state=None, target=None, bootstrap=1000, seed=0):
    """
    N* ~ C^a, D* ~ C^b, L* ~ C^-loss_exponent, from a parabola per budget (approach 2 of Hoffmann et
    al. 2022, arXiv 2203.15556), their mean curvature, and the optimum at target, the largest budget
    if None. N, D, loss, C (6ND if None), state: (n,). UserError for fewer than two optima.
    """
    runs = make_runs(N, D, loss, C, state)
    groups = [runs.take(rows) for rows in budget_groups(runs.C)]
    budgets, C = [vertex(group) for group in groups], target or runs.C.max()
    used = [near_optimum(group) for group, row in zip(groups, budgets) if not row["flag"]]
    if len(used) < 2:
        why = [f"{row['C']:.3g} FLOPs: {row['flag']}" for row in budgets if row["flag"]]
        raise UserError("; ".join(["power laws need two budgets with an optimum", *why[:4]]))
    fitted = [parabola(group, group.loss[None])[0][0] for group in used]
    residuals = np.hstack([group.loss - curve for group, curve in zip(used, fitted)])
    draws = [resample(curve, residuals, 3 * len(used), bootstrap, [seed, i])
             for i, curve in enumerate(fitted)]
    tops = [parabola(group, np.vstack([group.loss, d]))[1] for group, d in zip(used, draws)]
    solve = np.linalg.pinv(np.vander(np.log([row["C"] for row in budgets if not row["flag"]]), 2))
    rows = dict(curvature=np.mean([top["curvature"] for top in tops], 0))
    for name, exponent in (("N", "a"), ("D", "b"), ("loss", "loss_exponent")):
        slope, intercept = solve @ np.log([top[name] for top in tops])
        rows |= {exponent: slope, f"{name}_target": np.exp(intercept + slope * np.log(C))}
    rows["loss_exponent"] *= -1
    return make_fit(rows, residuals, target=float(C), budgets=budgets)

# -- The law L = E + A/N^alpha + B/D^beta, by two objectives --------------------------------------
# Both take x = log N and y = log D less their means (else log A and alpha are all but collinear),
# and return, for each of S problems, value (S,), gradient (S, P), curvature (S, P, P), and the law
# E, A, B, alpha, beta in x and y (S, 5).
HUBER = 1e-3          # residuals of log L beyond it count linearly, not squared

def huber(r):
    """r^2 / 2 up to HUBER, and linear beyond, so that an outlier pulls no harder than HUBER."""
    small = np.minimum(np.abs(r), HUBER)
    return small * (np.abs(r) - small / 2)

def parametric_objective(theta, loss, x, y):
    """
    sum of huber(r),   r = log(exp(a - alpha x) + exp(b - beta y) + exp(e)) - log L
    theta = (a, b, e, alpha, beta); equation 3 of Hoffmann et al. 2022
    """
    a, b, e, alpha, beta = theta.T[..., None]                        # (S, 1) each
    terms = np.exp(np.stack([a - alpha * x, b - beta * y, e + 0 * x], 1))
    total = terms.sum(1)                                             # (S, n)
    share, r = terms / total[:, None], np.log(total / loss)
    J = np.concatenate([share, -x * share[:, :1], -y * share[:, 1:2]], 1)        # (S, 5, n)
    w = HUBER / np.maximum(np.abs(r), HUBER)                         # w r^2 has Huber's slope
    H = (J * w[:, None]) @ J.transpose(0, 2, 1)
    law = np.hstack([np.exp(e), np.exp(a), np.exp(b), alpha, beta])
    return huber(r).sum(1), (J @ (w * r)[..., None])[..., 0], H, law

def projection_objective(theta, loss, x, y):
    """
    min over A, B, and E >= 0, of the sum of r^2 / 2, r = A exp(-alpha x) + B exp(-beta y) + E - L
    theta = (log alpha, log beta), clipped, so that no term becomes a constant
    """
    xy, rate = np.stack([x, y], 1), np.exp(theta.clip(-6, 3))[:, None]           # (n, 2), (S, 1, 2)
    phi = np.concatenate([np.exp(-rate * xy), np.ones((len(theta), len(x), 1))], 2)   # (S, n, 3)
    Q, R = np.linalg.qr(phi)                                         # R (A, B, E) = Q^T L
    moment = (loss[:, None] @ Q)[:, 0]                               # (S, 3)
    negative = moment[:, 2] * R[:, 2, 2] < 0                         # so is E, which 0 replaces
    Q[negative, :, 2] = moment[negative, 2] = 0
    c = np.linalg.solve(R, moment[..., None])                        # (S, 3, 1): A, B, E
    r = (Q @ moment[..., None])[..., 0] - loss
    slope = -rate * xy * phi[..., :2] * c[:, None, :2, 0]            # d r / d theta, (S, n, 2)
    J = slope - Q @ (Q.transpose(0, 2, 1) @ slope)                   # A, B, E refitted (Kaufman)
    law = np.hstack([c[:, 2], c[:, 0], c[:, 1], rate[:, 0]])
    return (r * r).sum(1) / 2, (J * r[..., None]).sum(1), J.transpose(0, 2, 1) @ J, law

@np.errstate(all="ignore")                # a step that is too long overflows, and isn't taken
def minimise(objective, theta, target, steps):
    """Levenberg-Marquardt on S problems, theta (S, P), target (S, n) -> theta, value (S,)."""
    theta, damping, eye = theta.copy(), np.full((len(theta), 1, 1), 1e-2), np.eye(theta.shape[1])
    value, gradient, H, _ = objective(theta, target)
    for _ in range(steps):
        size = np.trace(H, axis1=1, axis2=2)[:, None, None]
        damped = H + eye * (damping * (H + 1e-9 * size) + 1e-30)     # never singular
        trial = theta - np.linalg.solve(damped, gradient[..., None])[..., 0].clip(-5, 5)
        new = objective(trial, target)
        better = new[0] < value                                      # False for NaN
        damping = np.clip(damping * np.where(better, 0.2, 5)[:, None, None], 1e-10, 1e10)
        for old, now in zip((theta, value, gradient, H), (trial, *new)):
            old[better] = now[better]
        if (damping == 1e10).all():                                  # nothing gains any more
            break
    return theta, value

def fit_parametric(N, D, loss, target=None, bootstrap=1000, seed=0):
    """
    The law by Huber loss on log L (approach 3 of Hoffmann et al. 2022): E, A, B, alpha, beta; a, b
    and the optimum at target, if C = 6ND; objective, the sum of Huber losses; rss, that of squared
    residuals of L. Robust to outliers; in small sweeps residuals (0.02) far exceed HUBER: it fits
    absolute errors. UserError for runs that cannot tell five parameters apart.
    """
    scale, exponent = np.arange(0, 30, 5.0), np.arange(0, 2.5, 0.5)
    starts = np.array(list(itertools.product(scale, scale, exponent - 1, exponent, exponent)))
    starts[:, :2] -= starts[:, 3:] * np.log([N, D]).mean(1)          # to centred logs
    return fit_law(parametric_objective, starts, N, D, loss, target, bootstrap, seed)

def fit_variable_projection(N, D, loss, target=None, bootstrap=1000, seed=0):
    """The same by least squares on L (Golub and Pereyra 1973), which an outlier bends."""
    starts = np.array(list(itertools.product(np.log(np.geomspace(0.03, 3, 12)), repeat=2)))
    return fit_law(projection_objective, starts, N, D, loss, target, bootstrap, seed)

@np.errstate(all="ignore")                # NaN where a resample has no optimum
def fit_law(objective, starts, N, D, loss, target, bootstrap, seed):
    runs = make_runs(N, D, loss)
    logs, C = np.log(runs[:2]), target or runs.C.max()
    if (len(loss) < 6 or min(len(np.unique(v.round(2))) for v in logs) < 3 or
            np.linalg.eigvalsh(np.cov(logs))[0] < 0.05 ** 2):        # their spread across a line
        raise UserError("five parameters need 6 runs with 3 different N and D, not all on one line "
                        "of log N and log D (such as one budget)")
    middle = logs.mean(1)
    x, y = logs - middle[:, None]
    law = lambda theta, loss: objective(theta, np.broadcast_to(loss, (len(theta), len(x))), x, y)
    # Most starts end in other optima: all take some steps, and the best of them go on to the end.
    theta, value = minimise(law, starts, runs.loss, 30)
    theta, value = minimise(law, theta[np.argsort(value)[:20]], runs.loss, 1000)
    best = theta[value.argmin()][None]
    E, A, B, alpha, beta = law(best, runs.loss)[3][0]
    fitted = E + A * np.exp(-alpha * x) + B * np.exp(-beta * y)
    draws = resample(fitted, runs.loss - fitted, 5, bootstrap, seed)
    theta, _ = minimise(law, np.repeat(best, bootstrap, 0), draws, 50)
    laws = law(np.vstack([best, theta]), np.vstack([runs.loss, draws]))[3]
    E, A, B, alpha, beta = laws.T                                    # (1 + bootstrap,) each
    A, B = A * np.exp(alpha * middle[0]), B * np.exp(beta * middle[1])
    # The least L along C = 6ND (Hoffmann et al. 2022, equation 4), if both terms fall.
    logN = (np.log(alpha * A / (beta * B)) + beta * np.log(C / 6)) / (alpha + beta)
    N = np.where(laws[:, 1:].min(1) > 0, np.exp(logN), np.nan)
    rows = dict(E=E, A=A, B=B, alpha=alpha, beta=beta, a=beta / (alpha + beta),
                b=alpha / (alpha + beta), N_target=N, D_target=C / 6 / N,
                loss_target=E + A / N ** alpha + B / (C / 6 / N) ** beta)
    return make_fit(rows, runs.loss - fitted, target=float(C),
                    objective=float(huber(np.log(runs.loss / fitted)).sum()),
                    rss=float(((runs.loss - fitted) ** 2).sum()))

# -- Findings of the MAD paper ---------------------------------------------------------------------

def fit_all(runs, **options):
    """Each method's Fit, or {"refused": why}, so that one refusal spares the others."""
    fits, methods = {}, dict(isoflop=fit_isoflop, parametric=fit_parametric,
                              variable_projection=fit_variable_projection)
    for name, method in methods.items():
        try:
            fits[name] = method(*(runs if name == "isoflop" else runs[:3]), **options)
        except UserError as error:
            fits[name] = dict(refused=str(error))
    return fits

def hold_out(runs):
    """N* and L* of the largest budget as fits to the others predict them, and as measured."""
    *small, large = budget_groups(runs.C)
    top = vertex(runs.take(large))
    fits = fit_all(runs.take(np.hstack(small)), target=top["C"], bootstrap=0) if small else {}
    return dict(measured=top) | {
        name: dict(N=fit.N_target, loss=fit.loss_target) if isinstance(fit, Fit) else fit
        for name, fit in fits.items()}

def analyse(runs, target=None, bootstrap=1000):
    """
    Fits; overtraining: the excess loss of 1/4 to 4 x N* at its budget; state_law: P* = k M^c at the
    optima; compute_N, if C isn't 6ND (a sweep's N lacks embeddings, its C doesn't): all again with
    N := C/(6D). The laws assume C = 6ND, so only there their targets compare with isoflop's.
    """
    result, N = fit_all(runs, target=target, bootstrap=bootstrap), runs.C / (6 * runs.D)
    if isinstance(fit := result["isoflop"], Fit):
        result["overtraining"] = {q: fit.curvature * np.log(q) ** 2 for q in (0.25, 0.5, 2, 4)}
        M, L = np.array([(row["state"], row["loss"]) for row in fit.budgets if not row["flag"]]).T
        if np.ptp(M) > 0.01 * M.mean():
            result["state_law"] = fit_power_law(M, np.exp(L), bootstrap)
    result["hold_out"] = hold_out(runs)
    if np.abs(N / runs.N - 1).max() > 0.01:
        result["compute_N"] = analyse(runs._replace(N=N), target, bootstrap)
    return result

def compare(scores, archs):
    """A row per budget: rank correlation of {arch: score} with the best losses of {arch: Runs}."""
    rows = []
    tops = [(arch, vertex(archs[arch].take(group))) for arch in archs if arch in scores
            for group in budget_groups(archs[arch].C)]
    for group in budget_groups(np.array([top["C"] for _, top in tops])):
        loss = {arch: top["best_loss" if top["flag"] else "loss"]    # no optimum: the best run's
                for arch, top in (tops[i] for i in group)}
        rank = rank_correlation([scores[arch] for arch in loss], list(loss.values()))
        if rank.n >= 3:
            rows.append(dict(C=tops[group[0]][1]["C"], **vars(rank), loss=loss))
    if not rows:
        raise UserError("no budget has runs of three architectures with a score")
    return rows

# -- Files, table, plots ---------------------------------------------------------------------------
PUBLISHED = Path(__file__).parent / "results" / "mad" / "published.csv"
MARKERS = "osD^vP*X<>phd8" * 30         # one per architecture, or log

def read_csv(path, texts, floats):
    """The rows of a CSV file, which has these columns of texts and of floats, as dicts."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, [*map(str.strip, r)]) for r in reader if "".join(r).strip()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} can't be read: {error}") from None
    head, rows = lines[0][1] if lines else [""], []
    if missing := {*texts, *floats} - {*head}:
        marks = [f", separated by {mark!r}, not by commas" for mark in ";\t" if mark in head[0]]
        raise UserError(f"{path}: no column {min(missing)} in {', '.join(head)!r}{''.join(marks)}")
    for line, cells in lines[1:]:
        if len(cells) != len(head):
            raise UserError(f"{path}, line {line}: {len(cells)} cells under {len(head)} columns")
        rows.append(row := dict(zip(head, cells)))
        for column in {*floats, "C", "state"} & {*head}:
            try:
                row[column] = float(row[column])
            except ValueError:
                raise UserError(f"{path}, line {line}, {column}: {row[column]!r} is not a number "
                                f"such as 1234.5 or 1.2e3") from None
    return rows

def read_runs(path):
    """A CSV of runs -> {architecture: Runs} ("all" without an arch column), for each text apart."""
    archs, rows = {}, read_csv(path, (), ("N", "D", "loss"))
    texts = [" ".join(row.get(k, "") for k in ("data", "tokenizer", "context")) for row in rows]
    for row, text in zip(rows, texts):
        row = dict(C=6 * row["N"] * row["D"], state=np.nan, arch="all") | row
        name = f"{row['arch']} {text}" if texts.count(text) < len(texts) else row["arch"]
        archs.setdefault(name, []).append([row[column] for column in Runs._fields])
    return {arch: make_runs(*np.array(rows).T) for arch, rows in archs.items()}

def read_scores(path):
    """{arch: records}, best first, and {arch: their mean}: train.py's, or a CSV (arch, mean)."""
    by_arch, files = {}, sorted(Path(path).glob("*.json"))
    records = [record for p in files if "mean" in (record := json.loads(p.read_text()))]
    for record in records or read_csv(path, ["arch"], ["mean"]):
        if record.setdefault("macro_mean", record["mean"]) is None:
            raise UserError(f"{record['arch']} has no score: all runs of a setting diverged")
        options = [f"{k}={v}" for k, v in record.get("options", {}).items() if k != "seed"]
        by_arch.setdefault(" ".join([record["arch"], *options]), []).append(record)
    scores = {arch: np.mean([r["macro_mean"] for r in some]) for arch, some in by_arch.items()}
    return {arch: by_arch[arch] for arch in sorted(scores, key=scores.get, reverse=True)}, scores

def table(records, scores):
    """Markdown: accuracies in % averaged over classes, published ones beneath; how both rank."""
    cell = lambda values: (f"{100 * np.mean(values):.1f}"            # and half the range of seeds
                           + f" ±{50 * np.ptp(values):.1f}" * (len(values) > 1))
    paper, preset = {}, next(iter(records.values()), [{}])[0].get("preset")
    if not preset:
        raise UserError("--mad: a table needs a folder of scores of train.py, not a CSV of means")
    title = f"{'MAD' if preset == 'full' else preset} score"
    names = [name for name in TASKS if all(name in r["tasks"] for r in sum(records.values(), []))]
    lines = [["model", *names, title, "of tokens", "state", "parameters"]]
    lines += [["---"] * len(lines[0])]
    for arch, some in records.items():
        width = some[0]["options"].get("dim", 128)
        costs = total(ledger(Model(some[0]["arch"], 16, width), 128))
        lines += [[arch, *(cell([r["tasks"][task]["macro"] for r in some]) for task in names),
                   cell([r["macro_mean"] for r in some]), cell([r["mean"] for r in some]),
                   f"{costs.nominal:,}", f"{costs.parameters:,}"]]
        for row in read_csv(PUBLISHED, ("arch", "source"), ["mean"]):
            if row["arch"] == arch:
                values = [row["source"], *(row.get(task) for task in names), row["mean"]]
                lines += [[*(f"*{value}*" for value in values), "", "", ""]]
                paper.setdefault(arch, row["mean"])
    rank = rank_correlation([scores[arch] for arch in paper], list(paper.values()))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + (
        f"\n\nSpearman's correlation of these scores with the published means: {rank.rho:.2f}, "
        f"n = {rank.n}, permutation p = {rank.p:.2g}")

def canvas(rows, columns, **size):
    """A matplotlib figure of that many axes. It is imported here: everything else runs without."""
    try:
        import matplotlib.figure
    except ImportError:
        raise UserError("plots need matplotlib: pip install matplotlib") from None
    figure = matplotlib.figure.Figure(dpi=100, layout="constrained", **size)
    shades = lambda n: matplotlib.colormaps["cividis"](np.linspace(0, 0.9, n))      # also in grey
    return figure, figure.subplots(rows, columns, squeeze=False).flatten(), shades

def plot_curves(paths):
    """Test accuracy against the step, of runs' log.jsonl; label: the file's or folder's name."""
    figure, (ax,), shades = canvas(1, 1, figsize=(8, 3))
    for path, marker, color in zip(map(Path, paths), MARKERS, shades(len(paths))):
        tests = [row for line in path.open() if "test_accuracy" in (row := json.loads(line))]
        label = path.parent.name if path.stem == "log" else path.stem
        ax.plot([row["step"] for row in tests], [row["test_accuracy"] for row in tests],
                marker=marker, color=color, label=label)
    ax.set(xlabel="optimizer steps", ylabel="test accuracy, share of tokens", ylim=(0, 1.05))
    ax.legend(loc="center right")
    return figure

def plot_mixing(names):
    """How much each output t of untrained layers depends on each input s, on a log scale."""
    columns = max(c for c in range(1, 7) if len(names) % c == 0)         # so that no place is empty
    rows = len(names) // columns
    figure, axes, _ = canvas(rows, columns, figsize=(4 / 3 * columns, 1.5 * rows))
    figure.supxlabel("input s, 48 tokens")
    figure.supylabel("output t")
    torch.manual_seed(0)
    for ax, name in zip(axes, names):
        matrix = mixing(build_layer(name, 128, 48), torch.randn(1, 48, 128))           # (T, T)
        ax.imshow(shade(matrix).tolist(), cmap="Greys")
        ax.set_title(name, fontsize=7)
        ax.set(xticks=[], yticks=[])
    return figure

def plot(archs, scores):
    """Parabolas and optima; or, with scores, scores against compare's losses."""
    rows, columns = (1, 1) if scores else (len(archs) // 2 + 1, 2)
    figure, axes, shades = canvas(rows, columns, figsize=(8, 3 * rows + columns % 2))
    if scores:
        row = compare(scores, archs)[-1]
        for (arch, loss), marker, color in zip(row["loss"].items(), MARKERS, shades(row["n"])):
            axes[0].plot(scores[arch], loss, marker, color=color, label=arch)
        axes[0].set(title="{C:.1g} FLOPs: Spearman {rho:.2f}, p {p:.2g}, n {n}".format(**row),
                    xlabel="MAD or quick score", ylabel="loss at the optimum, nats per token")
        figure.legend(loc="outside right upper", fontsize=8)
        return figure
    for (arch, runs), marker, ax in zip(archs.items(), MARKERS, axes):
        groups = [runs.take(group) for group in budget_groups(runs.C)]
        tops = [vertex(group) for group in groups]
        for group, top, color in zip(groups, tops, shades(len(groups))):
            N = np.geomspace(*np.sort(near_optimum(group).N)[[0, -1]])
            ax.plot(N, top["loss"] + top["curvature"] * np.log(N / top["N"]) ** 2, color=color)
            ax.plot(top["N"], np.nan if top["flag"] else top["loss"], "k+", ms=9)
            ax.plot(group.N, group.loss, marker, color=color, label=f"{top['C']:.1g} FLOPs")
            axes[-1].plot(group.C, group.loss, marker, color=color)
        optima = [(top["C"], np.nan if top["flag"] else top["loss"]) for top in tops]
        axes[-1].plot(*zip(*optima), "k-", marker=marker, mfc="none", label=arch)
        ax.set(title=f"{arch}, + optimum", xlabel="parameters N")
    axes[-1].set(title="all runs and optima", xlabel="training compute C, FLOPs")
    for ax in axes[len(archs):-1]:
        ax.remove()
    for ax in figure.axes:
        ax.set(xscale="log", ylabel="loss, nats per token")
        ax.legend(fontsize=6, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2))       # below
    return figure

# -- Runs to fit: IsoFLOP groups; (width, blocks): 12 x blocks x width^2 parameters -----------
SHAPES = [(width, min(32, max(2, 2 * round(width / 128)))) for width in (
    16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 896, 1024, 1280,
    1536, 1792, 2048, 2560, 3072, 4096)]
RESULTS = ["bits_per_byte", "recall_loss", "other_loss"]
COLUMNS = ("arch N N_total state D C loss seconds budget width depth batch lr steps seed epochs "
           "context tokenizer data").split() + RESULTS
KEY = "arch budget width depth batch lr steps seed context tokenizer data".split()

def pattern_at(arch, width, depth):
    """`depth` blocks; MAD's settings are for width 128 and scaled to this one. Heads of attention
    have at least 16 channels, 64 from width 512 on."""
    words = []
    for name, given in parse_pattern(arch):
        scaled = {key: value * width // 128 for key, value in LAYERS[name][1].items()
                  if key in ("heads", "width", "dt_rank") and value > 1}
        if issubclass(LAYERS[name][0], Attention) and "heads" in scaled:  # others' stay as wide
            scaled["heads"] = width // (16 if width < 512 else 64)
        settings = ",".join(f"{key}={value}" for key, value in (scaled | given).items())
        words.append(f"{name}({settings})" if settings else name)
    return " ".join((words * 2 * depth)[:2 * depth])

def isoflop_runs(args, vocab):
    """
    A dict for each run of at least 50 steps. Our rules: at N* a parameter has 20 tokens (60 below
    1e15 FLOPs), tokens per step grow as C^(1/3), and learning rates fall as width^-1/2.
    """
    runs, T = [], args.context
    period = int(np.lcm.reduce([2, *(len(parse_pattern(arch)) for arch in args.archs)])) // 2
    if args.depth and args.depth % period:
        raise UserError(f"--depth is {args.depth}; permitted: multiples of {period} blocks")
    shapes = {(width, args.depth or -(-depth // period) * period) for width, depth in SHAPES}
    for C in args.budgets:
        best = np.sqrt(C / 6 / (20 if C > 1e15 else 60))
        near = sorted(shapes, key=lambda shape: abs(np.log(12 * shape[1] * shape[0] ** 2 / best)))
        batch = args.batch or max(1, round(2 ** round(np.log2(2048 * (C / 1e12) ** (1 / 3))) / T))
        for arch, (width, depth) in itertools.product(args.archs, sorted(near[:args.sizes])):
            pattern = pattern_at(arch, width, depth)
            with torch.device("meta"):                               # shapes without memory
                model = Model(pattern, vocab, width, T)
            N, layers = sum(p.numel() for p in model.parameters()), [b.layer for b in model.blocks]
            flops = sum(layer.flops(T) for layer in layers) + 2 * T * vocab * width
            steps = round(C / (3 * flops * batch))                   # backward: 2 forwards
            runs += [dict(
                arch=arch, N=N - 2 * vocab * width, N_total=N, D=steps * batch * T,
                state=sum(layer.nominal(T) for layer in layers), C=3.0 * steps * batch * flops,
                budget=C, width=width, depth=depth, batch=batch, steps=steps, seed=args.seed,
                lr=round(args.lr * 0.024 / width ** 0.5, 6), context=T, tokenizer=args.tokenizer,
                pattern=pattern)] * (steps >= 50)
    if not runs:
        raise UserError(f"no model trains 50 steps at --budgets {args.budgets}: give larger ones")
    return runs

def sweep(args):
    """Train the runs that the CSV lacks, and append a row for each."""
    text, path = load_text(args.data, args.tokenizer), Path(args.out) / "runs.csv"
    done = [[r[key] for key in KEY] for r in (read_csv(path, COLUMNS, ()) if path.exists() else ())]
    for run in tqdm(isoflop_runs(args, text.vocab_size), unit="run"):
        run["data"] = f"{text.name} {text.sha256[:8]}"
        if (key := [str(run[name]) for name in KEY]) in done:
            continue
        config = Config(
            task="text", name=re.sub(r"[^\w.@+-]", "-", "_".join(key)),
            out=args.out, data=args.data, tokenizer=args.tokenizer, context=args.context,
            layers=run["pattern"], dim=run["width"], batch_size=run["batch"], seed=args.seed,
            steps=run["steps"], eval_every=run["steps"], warmup=run["steps"] // 20, lr=run["lr"],
            min_lr=run["lr"] / 10, clip=1.0, beta2=0.95)
        try:
            result = train(config, verbose=False)
        except Diverged as error:
            print(f"failed: {config.name}: {error}", file=sys.stderr)
            continue
        run |= {name: result[name] for name in RESULTS} | dict(
            loss=result["val_loss"], seconds=result["wall_s"],
            epochs=round(run["D"] / len(text.train), 4))
        with open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
            if not file.tell():
                writer.writeheader()
            writer.writerow(run)

def report(name, value):
    """Text: a line for each fit and each dict of findings, intervals behind their estimates."""
    ends, value = getattr(value, "intervals", {}), getattr(value, "estimates", value)
    text = {key: f"{v:.4g}" if isinstance(v, float) else str(v) for key, v in value.items()
            if isinstance(v, (float, int, str))}
    text |= {key: "{} [{:.4g}, {:.4g}]".format(text[key], *ends[key]) for key in ends}
    print(name, *(f"{key} {v}" for key, v in text.items()), sep="  ")
    for key in (key for key in value if key not in text):
        for part in value[key] if isinstance(value[key], list) else [value[key]]:
            report(f"{name} {key}", part)

def parse_args(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands, both = parser.add_subparsers(dest="command", required=True), "sweep plan"
    sub = {name: commands.add_parser(name)
           for name in "sweep plan fit plot curves mixing compare table".split()}
    listed = lambda kind: lambda text: [kind(s.strip()) for s in re.split(r",(?![^(]*\))", text)]
    for names, option, settings in (
            ("fit plot compare", "runs", dict(help="CSV file: N, D, loss[, C, arch, state]")),
            ("compare", "--mad", dict(required=True,
                                      help="scores of train.py, or CSV (arch, mean)")),
            ("table", "--mad", dict(required=True, help="folder of scores of train.py")),
            ("plot", "--mad", dict(help="such scores, to draw instead of the sizes")),
            ("curves", "logs", dict(nargs="+", help="log.jsonl of runs")),
            ("mixing", "layers", dict(nargs="*", default=list(LAYERS), help="names")),
            ("plot curves mixing", "--out", dict(required=True, help="image file, .png or .pdf")),
            ("fit compare", "--json", dict(action="store_true", help="print JSON")),
            ("fit", "--target", dict(type=float, help="FLOPs to predict the optimum of")),
            (both, "--archs", dict(type=listed(str), default="transformer,hybrid", help="names")),
            (both, "--budgets", dict(type=listed(float), help="training FLOPs of each group")),
            (both, "--sizes", dict(type=int, default=7, help="models a budget")),
            (both, "--depth", dict(type=int, help="blocks of every model, instead of by width")),
            (both, "--lr", dict(type=float, default=1.0, help="factor of all learning rates")),
            (both, "--batch", dict(type=int, help="sequences per step, instead of by budget")),
            (both, "--context", dict(type=int, help="tokens a sequence")),
            (both, "--tokenizer", dict(help="bytes, or one of tiktoken's")),
            (both, "--seed", dict(type=int, default=0, help="of parameters and data")),
            ("sweep", "--data", dict(help="as in train.py")),
            ("sweep", "--out", dict(default="out/sweep", help="folder"))):
        for name in names.split():
            sub[name].add_argument(option, **settings)
    sub["sweep"].set_defaults(budgets=[1e12, 3e12, 1e13, 3e13], context=128, tokenizer="bytes")
    sub["plan"].set_defaults(budgets=[4e18, 8e18, 2e19, 4e19, 8e19], context=2048, tokenizer="gpt2")
    args = parser.parse_args(argv)
    for name in ("target", "budgets", "sizes", "context", "depth", "lr", "batch"):
        if (value := getattr(args, name, None)) is not None and not np.min(value) > 0:
            raise UserError(f"--{name} is {value}; permitted: above 0")
    return args

def main(argv=None):
    args = parse_args(argv)
    if args.command == "sweep":
        sweep(args)
    elif args.command == "plan":
        for run in isoflop_runs(args, vocab_size(args.tokenizer)):
            report("run", run)
    elif args.command == "table":
        print(table(*read_scores(args.mad)))
    elif args.command in ("plot", "curves", "mixing"):
        figure = (plot_curves(args.logs) if args.command == "curves" else
                  plot_mixing(args.layers) if args.command == "mixing" else
                  plot(read_runs(args.runs), args.mad and read_scores(args.mad)[1]))
        try:
            figure.savefig(args.out)
        except (OSError, ValueError) as error:            # no such folder, no such format
            raise UserError(f"--out {args.out}: {error}") from None
    else:
        result = {arch: analyse(runs, args.target) for arch, runs in read_runs(args.runs).items()
                  } if args.command == "fit" else dict(
                      budgets=compare(read_scores(args.mad)[1], read_runs(args.runs)))
        if not args.json:
            return report(args.command, result)
        if args.command == "fit":                         # on top: the only, or first, architecture
            result = next(iter(result.values()), {}) | dict(archs=result)
        text = json.dumps(result, default=lambda fit: fit.estimates | dict(intervals=fit.intervals))
        print(json.dumps(json.loads(text, parse_constant=lambda nan: None)))

if __name__ == "__main__":
    run_main(main)
