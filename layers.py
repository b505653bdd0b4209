"""
Every primitive of MAD (Poli, Thomas et al. 2024, arXiv 2403.17844), each on one screen.

Three families mix tokens: softmax attention; long convolutions under a gate; and one gated linear
recurrence, of which linear attention, GLA, RWKV-5, RWKV-6 and (a channel by itself) Mamba are
special cases. Channel mixers stand behind them. The file goes bottom-up: first the fast paths that
layers share, each beside the plain loop that defines it, then the layers, then the table `LAYERS`
that names them all.

  B batch         T time, tokens      D width             H heads
  K key width of a head               V value width of a head
  N state of a channel                E experts           C chunk length, or channels

A layer is built as Layer(dim, max_len, **settings); only tables and filters depend on max_len, the
longest sequence. It has, for T >= 1,
  forward(x)                (B, T, D) -> (B, T, D), causal
  init_state, step(x, s)    the same, a token at a time: (B, D), state -> (B, D), state, in the
                            dtype of the weights (not under autocast)
  flops(T)                  forward FLOPs of one sequence, a multiply-add counting 2
  nominal(T)                its state as the paper counts it; `count_state` counts real tensors
To add your own: one class, one line in `LAYERS`. Tests, benchmark and --layers then know it.
Weights stay in float32 (or float64): bf16 is what autocast makes of matrix products.

  python layers.py                 every layer: fast path against its plain loop, on this machine
  python layers.py --layers mamba,hyena --compile --peers
  python layers.py --show mamba    which tokens it mixes, as a picture
"""
import argparse
import contextlib
import ctypes
import difflib
import functools
import inspect
import math
import platform
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

# =================================================================================================
# Fast paths and the loops that define them
# =================================================================================================

PLAIN = False          # True inside `plain_loops()`: every fast path then runs its definition


@contextlib.contextmanager
def plain_loops():
    """Inside this context all layers run on their plain-loop definitions: slow, obviously right."""
    global PLAIN
    before, PLAIN = PLAIN, True
    try:
        yield
    finally:
        PLAIN = before


def defined_by(reference):
    """Pair a fast path with the plain loop that defines it; a test compares every such pair."""
    known = inspect.signature(reference).parameters

    def pair(fast):
        @functools.wraps(fast)
        def either(*args, **named):
            if PLAIN:                 # keywords that the loop lacks, as `method`, choose a way
                return reference(*args, **{k: v for k, v in named.items() if k in known})
            return fast(*args, **named)
        either.reference = reference
        return either
    return pair


def at_least_float32(*tensors):
    """
    Entry to a float32 island: bf16 (from autocast) becomes float32, float64 stays. Elementwise
    arithmetic then stays in float32, while autocast still computes matrix products (@) in bf16.
    """
    out = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
    return out if len(out) > 1 else out[0]


# -------------------------------------------------------------------------------------------------
#   y_t = sum_{s <= t} h_{t-s} u_s                                        (elementwise in D)


def long_conv_reference(u, h):
    """The definition. u (B, T, D), filters h (D, T'), T' >= T -> (B, T, D)."""
    u, h = at_least_float32(u, h)
    return torch.stack([(u[:, :t + 1] * h[:, :t + 1].flip(1).T).sum(1)
                        for t in range(u.shape[1])], 1)


def fft_length(T):
    """
    The smallest even n >= 2T - 1 whose factors are 2, 3 and 5: from 2T - 1 on a circular
    convolution does not wrap, and such n have fast FFTs, of real numbers the even ones much faster.
    """
    def smooth(n):
        for p in (2, 3, 5):
            while n % p == 0:
                n //= p
        return n == 1
    return next(n for n in range(max(2, 2 * T - 1), 8 * T) if n % 2 == 0 and smooth(n))


# What a convolution or a scan works on is larger than its inputs and outputs. On a CPU it need not
# leave the cache: one piece of the batch, or stretch of time, is finished before the next. (Only
# spectra of inputs are kept, for the backward pass.)
CACHED = 1 << 19                # numbers of one such array in a piece (results/cache-size.txt)


def _pieces(u, n):
    """Slices of the batch of u (B, D, T) whose transforms of length n stay in cache, if any do."""
    rows = max(1, CACHED // (u.shape[1] * n)) if u.device.type == "cpu" else len(u)
    return [slice(b, b + rows) for b in range(0, len(u), rows)]


# An operator of its own, since torch.compile has no code for complex numbers: it calls this as it
# is, without a graph break. The spectra are outputs, so that the backward pass can reuse them. (As
# `selective_scan` it has a first derivative, but no second.)
@torch.library.custom_op("nanomad::fft_conv", mutates_args=())
def _fft_conv(u: torch.Tensor, h: torch.Tensor
              ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    T, n = u.shape[2], fft_length(u.shape[2])
    y, fh = torch.empty(u.shape, dtype=u.dtype, device=u.device), torch.fft.rfft(h, n)
    fu = fh.new_empty(*u.shape[:2], n // 2 + 1)                               # (B, D, n/2 + 1)
    for b in _pieces(u, n):
        fu[b] = torch.fft.rfft(u[b], n)
        y[b] = torch.fft.irfft(fu[b] * fh, n)[..., :T]
    return y, fu, fh


@_fft_conv.register_fake
def _(u, h):
    (B, D, T), f = u.shape, fft_length(u.shape[2]) // 2 + 1
    at = dict(dtype=torch.complex128 if u.dtype == torch.float64 else torch.complex64)
    return u.new_empty(B, D, T), u.new_empty(B, D, f, **at), u.new_empty(D, f, **at)


# Both gradients are correlations: du = conj(h) * g and dh = conj(u) * g in frequency. The batch is
# summed there, before the inverse transform: one transform for dh instead of B.
@torch.library.custom_op("nanomad::fft_conv_backward", mutates_args=())
def _fft_conv_backward(g: torch.Tensor, fu: torch.Tensor, fh: torch.Tensor
                       ) -> tuple[torch.Tensor, torch.Tensor]:
    T, n = g.shape[2], fft_length(g.shape[2])
    du, dh = torch.empty(g.shape, dtype=g.dtype, device=g.device), torch.zeros_like(fh)
    back = fh.conj().resolve_conj()
    for b in _pieces(g, n):
        fg = torch.fft.rfft(g[b], n)                                          # (rows, D, n/2 + 1)
        dh += (fg * fu[b].conj()).sum(0)
        du[b] = torch.fft.irfft(fg.mul_(back), n)[..., :T]
    return du, torch.fft.irfft(dh, n)[:, :T].contiguous()                     # (B, D, T), (D, T)


@_fft_conv_backward.register_fake
def _(g, fu, fh):
    B, D, T = g.shape
    return g.new_empty(B, D, T), g.new_empty(D, T)


def _fft_conv_save(ctx, inputs, output):
    ctx.set_materialize_grads(False)     # the spectra get no gradient: don't fill one with zeros
    ctx.save_for_backward(*output[1:])


def _fft_conv_grad(ctx, g, _fu, _fh):
    return _fft_conv_backward(g, *ctx.saved_tensors)


_fft_conv.register_autograd(_fft_conv_grad, setup_context=_fft_conv_save)


def check_method(method, *known):
    if method not in ("auto", *known):
        raise ValueError(f"method={method!r}; permitted: auto, {', '.join(known)}")


def toeplitz(h, T):
    """h (D, T') -> (D, T, T), entry (s, t) = h_{t-s} for s <= t and 0 below the diagonal."""
    h = F.pad(h[:, :T], (T - 1, 0))                                           # (D, 2T - 1)
    return h.unfold(-1, T, 1).flip(-2)


@defined_by(long_conv_reference)
def long_conv(u, h, *, method="auto"):
    """
    Causal convolution along T of u (B, T, D) with filters h (D, T'), T' >= T -> (B, T, D). O(T log
    T) as an FFT, O(T^2) as a product with the Toeplitz matrix of h, which autocast takes in bf16.
    An FFT is causal up to rounding: an output reads later inputs, too, but with weights near 1e-7.

    method: "fft", "toeplitz" or "auto": the matrix on a CPU up to T = 64, as `python layers.py
    --break-even` measured; on a GPU, whose matrix units are faster, up to 512 and 1 GB of matrices
    (a guess, not measured yet). Raises ValueError for another method, or for filters shorter than
    u.
    """
    u, h, T = *at_least_float32(u, h), u.shape[1]
    if h.shape[1] < T:
        raise ValueError(f"long_conv: filter of length {h.shape[1]} for a sequence of length {T}")
    check_method(method, "toeplitz", "fft")
    if method == "auto":
        few = T <= 64 if u.device.type == "cpu" else T <= 512 and len(h) * T * T <= 1 << 28
        method = "toeplitz" if few else "fft"
    if method == "fft":
        return _fft_conv(u.mT, h[:, :T])[0].mT          # (D, T): an FFT reads along time
    return (u.permute(2, 0, 1) @ toeplitz(h, T)).permute(1, 2, 0)             # bmm (D, B, T)


# -------------------------------------------------------------------------------------------------
#   y_t = sum_{i < width} w_i x_{t-i}                                     (elementwise in C)


def short_conv_reference(x, w, time=2):
    """The definition. x (B, C, T), taps w (C, width) -> (B, C, T); all (B, T, C) with time=1."""
    return torch.stack([sum(w[:, i] * x.select(time, t - i) for i in range(min(w.shape[1], t + 1)))
                        for t in range(x.shape[time])], time)


@defined_by(short_conv_reference)
def short_conv(x, w, time=2):
    """The same as a sum of shifted products, which on a CPU is faster than conv1d."""
    T, width = x.shape[time], w.shape[1]
    x = F.pad(x, (width - 1, 0) if time == 2 else (0, 0, width - 1, 0))
    taps = w.T[..., None] if time == 2 else w.T                               # (width, C, 1 or -)
    return sum(taps[i] * x.narrow(time, width - 1 - i, T) for i in range(width))


# -------------------------------------------------------------------------------------------------
#   h_t = a_t h_{t-1} + b_t                                                       (elementwise)


def linear_scan_reference(a, b):
    """The definition. a, b (B, T, ...) -> (B, T, ...), h_{-1} = 0."""
    a, b = at_least_float32(a, b)
    h, hs = torch.zeros_like(b[:, 0]), []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        hs.append(h)
    return torch.stack(hs, 1)


def _scan_loop(a, b, reverse):
    """One pass over time into a buffer. Reversed: h_t = a_{t+1} h_{t+1} + b_t."""
    h = torch.empty_like(b, memory_format=torch.contiguous_format)
    a, b, hs = a.unbind(1), b.unbind(1), h.unbind(1)
    if reverse:
        a, b, hs = (None, *a[:0:-1]), b[::-1], hs[::-1]
    hs[0].copy_(b[0])
    for t in range(1, len(hs)):
        torch.addcmul(b[t], a[t], hs[t - 1], out=hs[t])
    return h


def _scan_blocks(a, b, reverse):
    """
    The same for GPUs, where every launch of a kernel costs microseconds, in 5 sqrt(T) of them: scan
    all chunks of sqrt(T) side by side from zero, then add to each the end of the one before it,
    decayed.
    """
    if reverse:
        a = F.pad(a[:, 1:], (0, 0, 0, 1))                                     # a_{t+1}
        return _scan_blocks(a.flip(1), b.flip(1), False).flip(1)
    B, T, N = b.shape
    c = math.isqrt(T - 1) + 1
    a, b = (F.pad(x, (0, 0, 0, -T % c)).view(B, -1, c, N) for x in (a, b))    # (B, chunks, c, N)
    h, decay = b.clone(), a.clone()
    for t in range(1, c):
        h[:, :, t] += a[:, :, t] * h[:, :, t - 1]
        decay[:, :, t] *= decay[:, :, t - 1]
    for i in range(1, h.shape[1]):
        h[:, i] += decay[:, i] * h[:, i - 1, -1:]
    return h.view(B, -1, N)[:, :T].contiguous()


@torch.library.custom_op("nanomad::scan", mutates_args=())
def _scan(a: torch.Tensor, b: torch.Tensor, reverse: bool) -> torch.Tensor:
    return (_scan_loop if b.device.type == "cpu" else _scan_blocks)(a, b, reverse)


@_scan.register_fake
def _(a, b, reverse):
    return torch.empty_like(b, memory_format=torch.contiguous_format)


# The gradient of a scan is the same scan backwards in time: g_t = dL/dh_t + a_{t+1} g_{t+1}. Left
# to autograd, a loop that writes into slices would cost O(T^2). (conj: for complex a, as in S4.)
def _scan_grad(ctx, g):
    a, h = ctx.saved_tensors
    g = _scan(a.conj().resolve_conj(), g, True)
    return g * F.pad(h[:, :-1].conj(), (0, 0, 1, 0)), g, None


def _scan_save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output)


_scan.register_autograd(_scan_grad, setup_context=_scan_save)


@defined_by(linear_scan_reference)
def linear_scan(a, b):
    """
    h_t = a_t h_{t-1} + b_t along dim 1. a, b (B, T, ...), real or both complex, a may broadcast ->
    shape of b. Raises ValueError where only one is complex.
    """
    a, b = at_least_float32(a, b)
    if a.is_complex() != b.is_complex():
        raise ValueError(f"linear_scan: a is {a.dtype}, b is {b.dtype}: make both complex or none")
    flat = (*b.shape[:2], -1)
    return _scan(a.expand_as(b).reshape(flat), b.reshape(flat), False).view_as(b)


# -------------------------------------------------------------------------------------------------
#   h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t,     y_t = C_t . h_t          (a state of N a channel)
# The arguments A, B and C are named as in Mamba's paper; in shapes B is the batch, C the channels.


def selective_step(h, x, dt, A, B, C):
    """One token. h (B, N, C), x and dt (B, C), A (C, N), B and C (B, N) -> y (B, C), h."""
    h = at_least_float32(h)
    h = (dt[:, None] * A.T).exp() * h + (dt * x)[:, None] * B[..., None]
    return (h * C[..., None]).sum(1), h


def selective_scan_reference(x, dt, A, B, C):
    """The definition: a loop of `selective_step`."""
    h, ys = x.new_zeros(x.shape[0], A.shape[1], x.shape[2]), []               # (B, N, C)
    for t in range(x.shape[1]):
        y, h = selective_step(h, x[:, t], dt[:, t], A, B[:, t], C[:, t])
        ys.append(y)
    return torch.stack(ys, 1)


# a, b and h are N times as large as x and y. On a CPU they never leave the cache: each stretch of
# time is computed whole before the next one, and once more in the backward pass, from the state it
# began with (the idea of Mamba's GPU kernel, section 3.3.2, for a CPU's cache).


def _stretches(x, N):
    """Slices of time whose states stay in cache; single tokens where one token's don't."""
    steps = max(1, CACHED // (x.shape[0] * x.shape[2] * N))
    return [slice(t, t + steps) for t in range(0, x.shape[1], steps)]


def _states(x, dt, A, B, h):
    """Decays a and states (B, steps, N, C) of a stretch that begins with h (B, N, C); A (N, C)."""
    a = (dt[:, :, None] * A).exp_()
    b = (dt * x)[:, :, None] * B[..., None]
    b[:, 0] += a[:, 0] * h
    return a, _scan_loop(a, b, False)


@torch.library.custom_op("nanomad::selective_scan", mutates_args=())
def _selective_scan(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor,
                    C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h, y, starts = x.new_zeros(x.shape[0], *A.shape), torch.empty(x.shape, dtype=x.dtype), []
    for s in _stretches(x, len(A)):
        starts.append(h)
        h = _states(x[:, s], dt[:, s], A, B[:, s], h)[1]
        y[:, s] = (h * C[:, s, :, None]).sum(2)
        h = h[:, -1].clone()
    return y, torch.stack(starts)                                             # starts (., B, N, C)


@_selective_scan.register_fake
def _(x, dt, A, B, C):
    starts = len(_stretches(x, len(A)))
    return torch.empty_like(x, memory_format=torch.contiguous_format), \
        x.new_empty(starts, x.shape[0], *A.shape)


@torch.library.custom_op("nanomad::selective_scan_backward", mutates_args=())
def _selective_scan_backward(
        g: torch.Tensor, x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor,
        C: torch.Tensor, starts: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, ddt, dB, dC = (torch.empty(w.shape, dtype=w.dtype) for w in (x, dt, B, C))
    dA = torch.zeros_like(A)
    later = torch.zeros_like(starts[0])                  # gradient from the stretch that follows
    for i, s in reversed(list(enumerate(_stretches(x, len(A))))):
        a, h = _states(x[:, s], dt[:, s], A, B[:, s], starts[i])
        dh = g[:, s, None] * C[:, s, :, None]                                 # (B, steps, N, C)
        dh[:, -1] += later
        dh = _scan_loop(a, dh, True)
        later = a[:, 0] * dh[:, 0]
        dC[:, s] = (h * g[:, s, None]).sum(-1)
        dB[:, s] = (dh * (dt[:, s] * x[:, s])[:, :, None]).sum(-1)
        into = (dh * B[:, s, :, None]).sum(2)                                 # d / d (dt x)
        a[:, 0] *= starts[i]
        a[:, 1:] *= h[:, :-1]
        a *= dh                                                               # d / d (dt A)
        dA += (a * dt[:, s, None]).sum((0, 1))
        ddt[:, s] = (a * A).sum(2) + into * x[:, s]
        dx[:, s] = into * dt[:, s]
    return dx, ddt, dA, dB, dC


@_selective_scan_backward.register_fake
def _(g, x, dt, A, B, C, starts):
    return tuple(torch.empty_like(w, memory_format=torch.contiguous_format)
                 for w in (x, dt, A, B, C))


def _selective_scan_save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _selective_scan_grad(ctx, g, _):
    return _selective_scan_backward(g, *ctx.saved_tensors)


_selective_scan.register_autograd(_selective_scan_grad, setup_context=_selective_scan_save)


def selective_scan_whole(x, dt, A, B, C):
    """The same for GPUs, with all states in memory at once."""
    a, b = (dt[:, :, None] * A.T).exp(), (dt * x)[:, :, None] * B[..., None]  # (B, T, N, C)
    return (linear_scan(a, b) * C[..., None]).sum(2)


@defined_by(selective_scan_reference)
def selective_scan(x, dt, A, B, C):
    """Mamba's recurrence. x, dt (B, T, C), A (C, N), B and C (B, T, N) -> y (B, T, C), float32."""
    x, dt, A, B, C = at_least_float32(x, dt, A, B, C)
    if x.device.type == "cpu":
        return _selective_scan(x, dt, A.T.contiguous(), B, C)[0]              # inside, A is (N, C)
    return selective_scan_whole(x, dt, A, B, C)


# -------------------------------------------------------------------------------------------------
#   S_t = diag(a_t) S_{t-1} + k_t v_t^T                y_t = S_t^T q_t
#   with a bonus u (RWKV):                             y_t = (S_{t-1} + diag(u) k_t v_t^T)^T q_t


def gated_linear_step(S, q, k, v, log_a=None, u=None):
    """One token. S (B, H, K, V), q, k, log_a (B, H, K), v (B, H, V), u (H, K) -> y (B, H, V), S."""
    S, q, k, v = at_least_float32(S, q, k, v)             # in bf16, sums would stop growing
    kv = k[..., None] * v[..., None, :]                                       # (B, H, K, V)
    old, S = S, (S if log_a is None else log_a.exp()[..., None] * S) + kv
    read = S if u is None else old + u[..., None] * kv
    return (q[..., None] * read).sum(-2), S


def gated_linear_scan_reference(q, k, v, log_a=None, u=None):
    """The definition: a loop of `gated_linear_step`."""
    q, k, v = at_least_float32(q, k, v)
    S, ys = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for t in range(q.shape[2]):
        decay = None if log_a is None else at_least_float32(log_a)[:, :, t]
        y, S = gated_linear_step(S, q[:, :, t], k[:, :, t], v[:, :, t], decay, u)
        ys.append(y)
    return torch.stack(ys, 2)


def decayed_scores(q, k, log_a, u):
    """
    q, k, log_a (.., C, K) of one chunk, C a power of 2 ->
      scores (.., C, C): entry (t, s) = sum_K q_t k_s prod(a_{s+1} .. a_t) for s <= t; with RWKV's
        bonus u, prod up to a_{t-1}, and u on the diagonal;
      to_t, from_s (.., C, K): log of the decay from the chunk's start to t, and from s to its end;
      total (.., K): that of the whole chunk.

    Dividing cumulative products explodes, and forming all C x C x K decays is slow. Instead join
    neighbouring blocks, log2 C times: of 4 tokens (0 1) (2 3), then (01 23). A pair s < t that
    meets in a join has its middle between them, so its decay is that from s to the middle times
    that from the middle to t: two factors, each at most 1, and a matrix product.
    """
    C = q.shape[-2]
    halves = lambda x, m: x.unflatten(-2, (-1, 2, m)).unbind(-3)              # two (.., n, m, K)
    scores = (q * (k if u is None else u[:, None, None] * k)).sum(-1)[..., None, None]
    to_t, from_s = log_a if u is None else torch.zeros_like(log_a), torch.zeros_like(log_a)
    total = log_a[..., None, :]                                               # (.., n, 1, K)
    for m in (2 ** i for i in range(C.bit_length() - 1)):
        (t0, t1), (s0, s1) = halves(to_t, m), halves(from_s, m)               # (.., n, m, K)
        late, early = halves(q, m)[1] * t1.exp(), halves(k, m)[0] * s0.exp()
        left, right = total.unflatten(-3, (-1, 2)).unbind(-3)                 # (.., n, 1, K)
        to_t = torch.stack((t0, t1 + left), -3).flatten(-4, -2)               # (.., C, K)
        from_s = torch.stack((s0 + right, s1), -3).flatten(-4, -2)
        total = left + right
        first, last = scores.unflatten(-3, (-1, 2)).unbind(-3)                # (.., n, m, m)
        joined = (late @ early.mT).to(scores.dtype)                           # (.., n, m, m)
        scores = torch.cat((F.pad(first, (0, m)), torch.cat((joined, last), -1)), -2)    # 2m, 2m
    return scores.squeeze(-3), to_t, from_s, total[..., 0, 0, :]


@defined_by(gated_linear_scan_reference)
def gated_linear_scan(q, k, v, log_a=None, u=None, *, chunk=64):
    """
    The one recurrence behind linear attention, GLA and RWKV, by chunks: inside a chunk as masked
    attention, between chunks by its state. O(T C), stable for any decay.

    Args: q, k (B, H, T, K), v (B, H, T, V), log_a <= 0 (B or 1, H, T, K or 1), None: no decay,
        u (H, K) or None, chunk a power of 2. Returns (B, H, T, V); under autocast its products are
        bf16. Raises ValueError for another chunk.
    """
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"chunk={chunk}; permitted: a power of 2")
    q, k, v, T = *at_least_float32(q, k, v), q.shape[2]
    C = min(chunk, 1 << (T - 1).bit_length())
    cut = lambda x: F.pad(x, (0, 0, 0, -T % C)).unflatten(2, (-1, C))         # (B, H, n, C, .)
    q, k, v = cut(q), cut(k), cut(v)
    if log_a is not None:
        log_a = cut(at_least_float32(log_a))
    if log_a is None:                         # no decay: masked attention without its softmax
        scores = (q @ k.mT).tril(0 if u is None else -1)
        if u is not None:
            scores = scores + (q * k * u[:, None, None]).sum(-1).diag_embed()
    else:
        scores, to_t, from_s, total = decayed_scores(q, k, log_a, u)
    y = scores @ v                                                            # (B, H, n, C, V)
    if q.shape[2] > 1:
        if log_a is not None:
            q, k = q * to_t.exp(), k * from_s.exp()
        kv = at_least_float32(k.mT @ v).transpose(1, 2)                       # (B, n, H, K, V)
        S = (kv.cumsum(1) if log_a is None else
             linear_scan(total.exp().transpose(1, 2)[..., None], kv))
        past = q[:, :, 1:] @ S.transpose(1, 2)[:, :, :-1]                     # (B, H, n-1, C, V)
        y = y + F.pad(past, (0, 0, 0, 0, 1, 0))
    return y.flatten(2, 3)[:, :, :T]


# =================================================================================================
# What all layers share
# =================================================================================================


class Layer(nn.Module):
    """Defaults for a layer without memory, whose matrix products are those of its nn.Linears."""

    def init_state(self, batch, device=None, dtype=None):
        return ()

    def step(self, x, state):
        """One token x (B, D), state -> output (B, D), new state. Equals forward."""
        return self(x[:, None])[:, 0], state

    def matmul_flops(self, T):
        """
        FLOPs of one sequence's matrix products in the plain loop: here, of every nn.Linear. (An
        implicit filter's, made once a batch, are counted as if the batch were one sequence.)
        """
        return sum(2 * T * m.in_features * m.out_features for m in self.modules()
                   if isinstance(m, nn.Linear))

    def mixing_flops(self, T):
        return 0

    def flops(self, T):
        """
        Forward FLOPs of one sequence of length T, whichever fast path computes it; norms and
        activations are left out.
        """
        return self.matmul_flops(T) + self.mixing_flops(T)

    def nominal(self, T):
        """State in numbers as the paper counts it."""
        return 0


def count_state(state):
    """Real numbers per sequence in a (nested) state: of its tensors, but for integer counters."""
    if torch.is_tensor(state):
        return state[0].numel() * (1 + state.is_complex()) if state.dtype != torch.long else 0
    return sum(map(count_state, state))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        wide = at_least_float32(x)
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
                * self.weight).to(x.dtype)


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


def split_heads(x, heads):
    """(B, T, D) -> (B, H, T, K)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x):
    """(B, H, T, K) -> (B, T, D). Most x lie in memory with time last; so does this, uncopied."""
    return x.mT.flatten(1, 2).mT


def check_heads(dim, heads, even=False):
    if dim % heads or (even and dim // heads % 2):
        raise ValueError(f"heads={heads!r} does not divide width {dim} into heads of "
                         f"{'an even' if even else 'a whole'} width")


def token_shift(x):
    return F.pad(x[:, :-1], (0, 0, 1, 0))                                     # x_{t-1}


class ShortConv(nn.Module):
    """
    Causal depthwise convolution of x (B, C, T), or (B, T, C) with time=1; its state is the last
    width - 1 inputs.
    """

    def __init__(self, channels, width, bias=False):
        super().__init__()
        self.taps = nn.Parameter(torch.empty(channels, width).uniform_(-1, 1) / width ** 0.5)
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x, time=2):
        y = short_conv(x, self.taps.to(x.dtype), time)
        if self.bias is None:
            return y
        return y + (self.bias if time == 1 else self.bias[:, None]).to(x.dtype)

    def init_state(self, batch, device=None, dtype=None):
        channels, width = self.taps.shape
        return torch.zeros(batch, channels, width - 1, device=device, dtype=dtype)

    def step(self, x, tail):                                                  # x (B, C)
        window = torch.cat((tail, x[..., None]), -1)                          # (B, C, width)
        y = (window * self.taps.flip(1)).sum(-1)
        return y if self.bias is None else y + self.bias, window[..., 1:]


class Router(nn.Module):
    """
    The top_k experts of a token, weighted by a softmax over their scores alone. mad-lab sets the
    other scores to 0 *before* its softmax, where 0 is a score like any other: all experts stay on.
    """

    def __init__(self, dim, experts, top_k):
        super().__init__()
        least = min(2, experts)                   # of one score, a softmax has no gradient
        if not least <= top_k <= experts:
            raise ValueError(f"top_k={top_k!r}; permitted: {least} to the {experts} experts")
        self.experts, self.top_k, self.score = experts, top_k, linear(dim, experts)

    def forward(self, x):                                                     # (.., D)
        with torch.autocast(x.device.type, enabled=False):        # rounded, they'd choose others
            scores = F.linear(at_least_float32(x), at_least_float32(self.score.weight))
        best, chosen = scores.topk(self.top_k, -1)
        return best.softmax(-1), chosen                                       # (.., top_k) both


class Experts(nn.Module):
    """E matrices side by side, each at nn.Linear's scale."""

    def __init__(self, experts, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, inputs, outputs)
                                   .uniform_(-1, 1) / inputs ** 0.5)


# =================================================================================================
# Softmax attention
#   y_t = sum_{s <= t} softmax_s(q_t . k_s / sqrt(K)) v_s             (window W: t - W < s <= t)
# =================================================================================================


def causal_attention_reference(q, k, v, window=None):
    """The definition. q, k, v (B, H, T, K) -> (B, H, T, K)."""
    ys = []
    for t in range(q.shape[2]):
        seen = slice(0 if window is None else max(0, t + 1 - window), t + 1)
        scores = at_least_float32(q[:, :, t:t + 1] @ k[:, :, seen].mT)
        p = (scores / q.shape[-1] ** 0.5).softmax(-1).to(v.dtype)             # (B, H, 1, seen)
        ys.append(p @ v[:, :, seen])
    return torch.cat(ys, 2)


def hide(mask, like):
    """What to add to scores so that softmax sees them only where mask is True: 0 or -inf."""
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, -torch.inf)


def row_blocks(T):
    """
    Blocks [t, end) of a causal (T, T) matrix's rows: they need columns up to end only, the rest is
    masked. About eight blocks, of at least 64 rows: fewer skip less, more cost more to start.
    """
    rows = max(64, -(-T // 8))
    return [(t, min(t + rows, T)) for t in range(0, T, rows)]


def windowed_attention(q, k, v, window):
    """
    O(T W): blocks of W queries, each looking at its own block of keys and the one before. q comes
    divided by sqrt(K).
    """
    T, W = q.shape[2], window
    q, k, v = (F.pad(x, (0, 0, 0, -T % W)).unflatten(2, (-1, W)) for x in (q, k, v))
    k, v = (torch.cat((F.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0)), x), 3) for x in (k, v))
    t = torch.arange(W, device=q.device)[:, None]
    s = torch.arange(-W, W, device=q.device)
    n = torch.arange(q.shape[2], device=q.device)[:, None, None]
    seen = (s <= t) & (s > t - W) & ((s >= 0) | (n > 0))                      # (n, W, 2W)
    p = (q @ k.mT + hide(seen, q)).softmax(-1)                                # (B, H, n, W, 2W)
    return (p @ v).flatten(2, 3)[:, :, :T]


@defined_by(causal_attention_reference)
def causal_attention(q, k, v, window=None):
    """
    Attention by torch's fused kernel on GPUs, unless in a window. On CPUs that kernel's backward
    pass is slow for narrow heads: two matrix products and a softmax there, in row blocks. (Under
    autocast these round q . k to bf16, which the fused kernel keeps in float32.)
    """
    T, width = q.shape[2], q.shape[-1]
    if window is not None and window < T:
        return windowed_attention(q / width ** 0.5, k, v, window)
    if q.device.type != "cpu":
        # Its fast forms want a head's channels contiguous in memory; after `rotate`, time is.
        return F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v, is_causal=True)
    q, ys = q / width ** 0.5, []
    for t, end in row_blocks(T):
        seen = torch.ones(end - t, end, dtype=torch.bool).tril(t)
        scores = q[:, :, t:end] @ k[:, :, :end].mT + hide(seen, q)
        # v^T p^T, not p v, which has only K columns: a narrow product, slow on a CPU.
        ys.append(v[:, :, :end].mT @ scores.softmax(-1).mT)                   # (B, H, K, rows)
    return torch.cat(ys, 3).mT


def rotary_table(position, width):
    """cos and sin (2, K/2, T) of the angles t 10000^(-2i/K) (Su et al. 2021)."""
    half = width // 2
    angle = 10000.0 ** -(torch.arange(half, device=position.device) / half)[:, None] * position
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x, table):
    """Rotary positions: turn pair (i, i + K/2) of the channels of x (B, H, K, T) by its angle."""
    half, (cos, sin) = x.shape[-2] // 2, table
    a, b = x[..., :half, :], x[..., half:, :]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -2).to(x.dtype)


class Attention(Layer):
    """
    Softmax attention with rotary positions; with a window, over the last `window` tokens only.

    Args: heads H; window in tokens or None. The state is all keys and values so far, or a ring
    buffer of the last `window` of them.
    """

    def __init__(self, dim, max_len, heads=16, window=None):
        super().__init__()
        check_heads(dim, heads, even=True)
        self.dim, self.heads, self.window = dim, heads, window
        self.qkv, self.out = linear(dim, 3 * dim), linear(dim, dim)
        # A table, because torch.compile would compute each cosine anew for every batch and head.
        self.register_buffer("table", rotary_table(torch.arange(max_len), dim // heads), False)

    def project(self, x, table):
        """q, k, v (B, H, T, K); in memory time is contiguous in q and k, K in v."""
        q, k, v = self.qkv(x).mT.unflatten(1, (3, self.heads, -1)).unbind(1)  # (B, H, K, T)
        return rotate(q, table).mT, rotate(k, table).mT, v.mT

    def forward(self, x):
        T = x.shape[1]
        table = self.table[..., :T] if T <= self.table.shape[-1] else \
            rotary_table(torch.arange(T, device=x.device), self.dim // self.heads)
        y = causal_attention(*self.project(x, table), self.window)
        return self.out(merge_heads(y))

    def init_state(self, batch, device=None, dtype=None):
        length = self.window or 0
        empty = torch.zeros(batch, self.heads, length, self.dim // self.heads, device=device,
                            dtype=dtype)
        return empty, empty, torch.zeros((), dtype=torch.long, device=device)

    def step(self, x, state):
        keys, values, t = state
        q, k, v = self.project(x[:, None], rotary_table(t[None], self.dim // self.heads))
        if self.window is None:
            keys, values, empty = torch.cat((keys, k), 2), torch.cat((values, v), 2), 0.0
        else:                                             # overwrite the ring's oldest entry
            slot = (t % self.window)[None]
            keys, values = keys.index_copy(2, slot, k), values.index_copy(2, slot, v)
            empty = hide((torch.arange(self.window, device=x.device) <= t)[None], q)
        p = (q @ keys.mT / q.shape[-1] ** 0.5 + empty).softmax(-1)            # (B, H, 1, t or W)
        return self.out(merge_heads(p @ values))[:, 0], (keys, values, t + 1)

    def matmul_flops(self, T):
        """The Linears'; and q . k and p v, 4 D for each pair (t, s) that is looked at."""
        W = min(self.window or T, T)
        return super().matmul_flops(T) + 4 * self.dim * (T * W - W * (W - 1) // 2)

    def nominal(self, T):
        return 2 * self.dim * (self.window or T)


# =================================================================================================
# Long convolutions under a gate
#   y = q * (h conv (k * v)),  h a filter as long as the sequence, made by a small function of time
# =================================================================================================


class ImplicitFilter(nn.Module):
    """
    h_c(t) = mlp(t, cos, sin)_c * exp(-delta_c t) + d_c [t = 0], t in units of max_len: a sine MLP
    of width `order` under decays spread over the channels (Hyena, Poli et al. 2023, section 3.3).
    Here cos and sin make one turn over max_len; in mad-lab they hardly change. The sines' frequency
    is not learned.

    It has no recurrent form: `step` keeps every input, and costs O(t) a token.
    """

    def __init__(self, channels, max_len, order):
        super().__init__()
        self.max_len = max_len
        self.hidden = nn.ModuleList([nn.Linear(3, order), nn.Linear(order, order),
                                     nn.Linear(order, order)])
        self.readout = linear(order, channels)
        self.skip = nn.Parameter(torch.randn(channels))
        # 1% is left at t = 1.5 of the slowest, 0.3 of the fastest: the Hyena authors' defaults.
        slow, fast = math.log(100) / 1.5, math.log(100) / 0.3
        self.register_buffer("delta", torch.linspace(slow, fast, channels), persistent=False)

    def forward(self, T):                                                     # -> (C, T)
        with torch.autocast(self.skip.device.type, enabled=False):            # a float32 island
            t = torch.arange(T, device=self.skip.device, dtype=self.skip.dtype)[:, None]
            t = t / self.max_len
            z = torch.cat((t, (2 * math.pi * t).cos(), (2 * math.pi * t).sin()), -1)
            for layer in self.hidden:
                z = layer(z).sin()                                            # (T, order)
            h = self.readout(z) * (-self.delta * t).exp()                     # (T, C)
            return torch.cat((h[:1] + self.skip, h[1:])).T

    def init_state(self, batch, channels, device=None, dtype=None):
        return torch.zeros(batch, 0, channels, device=device, dtype=dtype)

    def step(self, u, history):
        """u (B, C) -> sum_s h_{t-s} u_s of the same shape, longer history (B, t, C)."""
        history = torch.cat((history, u[:, None]), 1)
        h = self(history.shape[1]).flip(1)                                    # (C, t), newest last
        return torch.einsum("bsc,cs->bc", history, h.to(u.dtype)), history


class ModalFilter(nn.Module):
    """
    h_c(t) = Re sum_n R_cn p_cn^t + d_c [t = 0]: `order` complex poles and residues a channel
    (StripedHyena-7B). Such a filter is a diagonal state-space model and steps in constant state.
    """

    def __init__(self, channels, max_len, order):
        super().__init__()
        life = torch.logspace(0, 1, channels, base=max(max_len, 2.0))[:, None]    # 1 .. max_len
        self.log_rate = nn.Parameter(-life.log().expand(-1, order).clone())   # |p| = exp(-rate)
        self.angle = nn.Parameter(torch.rand(channels, order) * math.pi)
        self.residue = nn.Parameter(torch.randn(channels, order, 2) / order)
        self.skip = nn.Parameter(torch.randn(channels))

    def forward(self, T):                                                     # -> (C, T)
        # Re(R p^t) = |p|^t (Re R cos(angle t) - Im R sin(angle t)): no complex numbers needed.
        t = torch.arange(T, device=self.skip.device, dtype=self.skip.dtype)
        turn = self.angle[..., None] * t                                      # (C, N, T)
        re, im = self.residue[..., None].unbind(-2)
        h = (re * turn.cos() - im * turn.sin()) * (-self.log_rate.exp()[..., None] * t).exp()
        h = h.sum(1)
        return torch.cat((h[:, :1] + self.skip[:, None], h[:, 1:]), 1)

    def init_state(self, batch, *shape, device=None, dtype=None):
        return torch.zeros(batch, *shape, self.angle.shape[1], 2, device=device, dtype=dtype)

    def step(self, u, state):
        """x_n = p_n x_n + u, y = Re sum_n R_n x_n + d u; u (B, C, ...), state (B, C, ..., N, 2)."""
        like = lambda w: w.view(len(w), *[1] * (u.ndim - 2), *w.shape[1:])    # (C, 1.., N)
        pole = torch.complex(-self.log_rate.exp(), self.angle).exp()          # (C, N)
        residue = torch.view_as_complex(self.residue)
        x = like(pole) * torch.view_as_complex(state) + u[..., None]
        y = (like(residue) * x).real.sum(-1) + like(self.skip) * u
        return y, torch.view_as_real(x)


FILTERS = {"implicit": ImplicitFilter, "modal": ModalFilter}


def make_filter(name, channels, max_len, order):
    if name not in FILTERS:
        raise ValueError(f"filter={name!r}: choose one of {', '.join(FILTERS)}")
    return FILTERS[name](channels, max_len, order)


class Hyena(Layer):
    """
    q, k, v = short_conv(x W_q, x W_k, x W_v);  y = (q * (h conv (k * v))) W_o
    (Poli et al. 2023, section 3.1, at order 2; as in their code, with one long convolution.)

    Args: expand: inner width over D; the `expand` groups of D channels share their projections
        (tied, paper appendix) but have short and long filters of their own. kernel: taps of the
        short convolution. order: width of an implicit filter's MLP, or poles of a modal one.
        filter: "implicit" or "modal".
    """

    def __init__(self, dim, max_len, expand=4, kernel=3, order=4, filter="implicit"):
        super().__init__()
        self.dim, self.expand, self.order, self.inner = dim, expand, order, dim * expand
        self.qkv, self.out = linear(dim, 3 * dim), linear(self.inner, dim)
        self.short = ShortConv(3 * self.inner, kernel)
        self.filter = make_filter(filter, self.inner, max_len, order)

    def project(self, x):                                                     # (B, T, D)
        x = self.qkv(x).mT.unflatten(1, (3, 1, self.dim))                     # (B, 3, 1, D, T)
        return x.expand(-1, -1, self.expand, -1, -1).flatten(1, 3)            # (B, 3 inner, T)

    def readout(self, y, x):
        return self.out(y.to(x.dtype))

    def forward(self, x):
        q, k, v = self.short(self.project(x)).chunk(3, 1)                     # (B, inner, T)
        y = long_conv((k * v).mT, self.filter(x.shape[1]))                    # (B, T, inner)
        return self.readout(q.mT * y, x)

    def init_state(self, batch, device=None, dtype=None):
        at = dict(device=device, dtype=dtype)
        return self.short.init_state(batch, **at), self.filter.init_state(batch, self.inner, **at)

    def step(self, x, state):
        tail, memory = state
        mixed, tail = self.short.step(self.project(x[:, None])[..., 0], tail)
        q, k, v = mixed.chunk(3, -1)                                          # (B, inner)
        y, memory = self.filter.step(k * v, memory)
        return self.readout(q * y, x), (tail, memory)

    def mixing_flops(self, T):
        """A channel: short convolutions 6 a tap, FFTs 10 log2 T, skip and gates 4 (appendix)."""
        taps = self.short.taps.shape[1]
        return int(T * self.inner * (6 * taps + 10 * math.log2(max(T, 2)) + 4))

    def nominal(self, T):
        """The paper counts `order` numbers a channel, as if each were a mode of the filter."""
        return self.inner * self.order


class HyenaExperts(Hyena):
    """
    Narrow Hyenas side by side; each token reads the top_k that a router picks for it, weighted by
    a softmax over the picked ones. All experts convolve all tokens, since a later token may read
    any of them; what is sparse is the read-out. (Paper, section 3: sparse parallel topology.)

    Args: experts E, each of width D / E; top_k; the rest as in Hyena.
    """

    def __init__(self, dim, max_len, experts=8, top_k=2, kernel=3, order=16, filter="implicit"):
        if dim % experts:
            raise ValueError(f"experts={experts!r} does not divide width {dim}")
        super().__init__(dim, max_len, 1, kernel, order, filter)
        self.router = Router(dim, experts, top_k)

    def readout(self, y, x):
        weight, chosen = self.router(x)                                       # (.., top_k)
        gate = torch.zeros(*x.shape[:-1], self.router.experts, dtype=weight.dtype,
                           device=x.device).scatter(-1, chosen, weight)       # (.., E)
        y = y.unflatten(-1, (self.router.experts, -1)) * gate[..., None]
        return self.out(y.flatten(-2).to(x.dtype))


# -------------------------------------------------------------------------------------------------
#   y_t = sum_{s <= t} h_{t-s} (q_t . k_s) v_s                            (one filter h a head)


def toeplitz_attention_reference(q, k, v, h):
    """The definition. q, k (B, H, T, K), v (B, H, T, V), h (H, T) -> (B, H, T, V)."""
    q, k, v, h = at_least_float32(q, k, v, h)
    ys = []
    for t in range(q.shape[2]):
        weight = (q[:, :, t:t + 1] * k[:, :, :t + 1]).sum(-1) * h[:, :t + 1].flip(1)
        ys.append((weight[..., None] * v[:, :, :t + 1]).sum(2))               # (B, H, V)
    return torch.stack(ys, 2)


@defined_by(toeplitz_attention_reference)
def toeplitz_attention(q, k, v, h, *, method="auto"):
    """
    Linear attention under a Toeplitz mask, (B, H, T, V).

    method: "mask", (mask * (k q^T))^T v in O(T^2), without an outer product; "fft", a long
    convolution of k_i * v for each of the K key channels i, then y = sum_i q_i * that; or "auto":
    the mask on a CPU up to T = 256, as `python layers.py --break-even` measured (on a GPU up to
    2048, a guess, not measured yet). Raises ValueError for another method.
    """
    check_method(method, "mask", "fft")
    T, v = q.shape[2], v.mT                                                   # (B, H, V, T)
    if method == "auto":
        method = "mask" if T <= (256 if q.device.type == "cpu" else 2048) else "fft"
    if method == "mask":
        mask, ys = toeplitz(h, T).to(q.dtype), []                             # (H, s, t)
        for t, end in row_blocks(T):
            scores = k[:, :, :end] @ q[:, :, t:end].mT * mask[:, :end, t:end]
            ys.append(v[..., :end] @ scores)                                  # (B, H, V, rows)
        return torch.cat(ys, 3).mT
    h, y = h.repeat_interleave(v.shape[2], 0), 0                              # (H V, T)
    for q_i, k_i in zip(q.mT.unbind(2), k.mT.unbind(2)):     # one at a time: K times less memory
        z = (k_i[:, :, None] * v).flatten(1, 2)                               # (B, H V, T)
        y = y + q_i[:, :, None] * long_conv(z.mT, h, method="fft").mT.view(v.shape)
    return y.mT


class MultiHeadHyena(Layer):
    """
    Hyena with heads: its gates k * v and q * become k (x) v and q . inside a head, and all channels
    of a head share one filter (Massaroli et al. 2023, Laughing Hyena). That is linear attention
    under a Toeplitz mask. mad-lab passes the number of heads where the width of a head belongs and
    ties the projections; here, at D = 128, 16 heads have width 8, and projections are full.
    """

    def __init__(self, dim, max_len, heads=16, kernel=3, order=2, filter="implicit"):
        super().__init__()
        check_heads(dim, heads)
        self.dim, self.heads, self.order = dim, heads, order
        self.qkv, self.out = linear(dim, 3 * dim), linear(dim, dim)
        self.short = ShortConv(3 * dim, kernel)
        self.filter = make_filter(filter, heads, max_len, order)

    def forward(self, x):
        mixed = self.short(self.qkv(x).mT).unflatten(1, (3, self.heads, -1))  # (B, 3, H, K, T)
        q, k, v = mixed.mT.unbind(1)                                          # (B, H, T, K)
        y = toeplitz_attention(q, k, v, self.filter(x.shape[1]))              # (B, H, T, V)
        return self.out(merge_heads(y).to(x.dtype))

    def init_state(self, batch, device=None, dtype=None):
        at, width = dict(device=device, dtype=dtype), self.dim // self.heads
        if isinstance(self.filter, ModalFilter):
            memory = self.filter.init_state(batch, self.heads, width, width, **at)
        else:                        # k and v themselves: K + V numbers a token instead of K V
            memory = torch.zeros(batch, self.heads, 0, 2 * width, **at)
        return self.short.init_state(batch, **at), memory

    def step(self, x, state):
        tail, memory = state
        mixed, tail = self.short.step(self.qkv(x), tail)
        q, k, v = (p.unflatten(-1, (self.heads, -1)) for p in mixed.chunk(3, -1))   # (B, H, K)
        if isinstance(self.filter, ModalFilter):
            kv, memory = self.filter.step(k[..., None] * v[..., None, :], memory)
        else:
            memory = torch.cat((memory, torch.cat((k, v), -1)[:, :, None]), 2)      # (B, H, t, 2K)
            keys, values = memory.chunk(2, -1)
            h = self.filter(keys.shape[2]).flip(1)[..., None].to(keys.dtype)        # (H, t, 1)
            kv = (keys * h).mT @ values                                       # (B, H, K, V)
        y = (q[..., None] * kv).sum(-2)                                       # (B, H, V)
        return self.out(y.flatten(1).to(x.dtype)), (tail, memory)

    def mixing_flops(self, T):
        """Short convolution, and (as FFTs over k (x) v) 10 log2 T + 6 a channel of the state."""
        channels = self.dim * self.dim // self.heads
        short = 6 * self.short.taps.shape[1] * self.dim
        return int(T * (short + channels * (10 * math.log2(max(T, 2)) + 6)))

    def nominal(self, T):
        """As in Hyena: `order` numbers for each of the D V channels of k (x) v."""
        return self.dim * self.dim // self.heads * self.order


# =================================================================================================
# One gated linear recurrence:  S_t = diag(a_t) S_{t-1} + k_t v_t^T,   y_t = S_t^T q_t
#   linear attention   a = 1, divided by the sum of weights
#   GLA                a_t from x_t, one a key channel
#   RWKV-5             a fixed, one a key channel; reads S_{t-1} with a bonus for the present token
#   RWKV-6             the same with a_t from x_t
#   Mamba              a channel is a head with K = N, V = 1: a_t = exp(dt_t A), k_t = dt_t B_t,
#                      v_t = x_t, q_t = C_t
# =================================================================================================


class GatedLinearRecurrence(Layer):
    """
    Forward, step and cost of the four layers that follow. Each has
      project(x (B, T, D), x_{t-1} or None) -> q, k (B, H, T, K), v (B, H, T, V), log_a (B or 1, H,
        T, K or 1) or None, u (H, K) or None, and a gate of its own;
      readout(y (B, H, T, V), gate) -> (B, T, D).
    `step` carries S and, if shifts, the x_{t-1} that `project` reads: (S, x_{t-1}). extra: columns
    that it adds to v.
    """

    shifts, extra = False, 0

    def __init__(self, dim, heads):
        super().__init__()
        check_heads(dim, heads)
        self.dim, self.heads, self.width = dim, heads, dim // heads
        self.out = linear(dim, dim)

    def forward(self, x):
        q, k, v, log_a, u, gate = self.project(x, token_shift(x) if self.shifts else None)
        return self.out(self.readout(gated_linear_scan(q, k, v, log_a, u), gate).to(x.dtype))

    def init_state(self, batch, device=None, dtype=None):
        at = dict(device=device, dtype=dtype)
        S = torch.zeros(batch, self.heads, self.width, self.width + self.extra, **at)
        return S, (torch.zeros(batch, self.dim, **at) if self.shifts else ())

    def step(self, x, state):
        S, before = state
        before = before[:, None] if self.shifts else None
        q, k, v, log_a, u, gate = self.project(x[:, None], before)
        log_a = None if log_a is None else log_a[:, :, 0]
        y, S = gated_linear_step(S, q[:, :, 0], k[:, :, 0], v[:, :, 0], log_a, u)
        y = self.out(self.readout(y[:, :, None], gate).to(x.dtype))[:, 0]
        return y, (S, x if self.shifts else ())

    def mixing_flops(self, T):
        """Update and read of a state of D x V numbers a token: 5 each (decay, outer, add, read)."""
        return 5 * T * self.dim * (self.width + self.extra)

    def nominal(self, T):
        return self.dim * self.width


class LinearAttention(GatedLinearRecurrence):
    """
    y_t = sum_s f(q_t) . g(k_s) v_s / sum_s f(q_t) . g(k_s)           (Katharopoulos et al. 2020)

    f and g: softplus(W_1 z) * softplus(W_2 z) of a head's q or k, learned elementwise products,
    each with its own W_1 and W_2, shared by the heads (1e-6 keeps the denominator from 0). mad-lab
    has no softplus: its denominator changes sign, and outputs reach 33,000. The denominator is the
    same recurrence, for one more column of v that is all ones.
    """

    extra = 1

    def __init__(self, dim, max_len, heads=16):
        super().__init__(dim, heads)
        self.qkv = linear(dim, 3 * dim)
        self.phi_q, self.phi_k = (linear(self.width, 2 * self.width) for _ in range(2))

    def project(self, x, _):
        by_head = lambda p, *shape: p.unflatten(-1, (*shape, self.heads, -1))
        if x.shape[1] == 1:                                                       # a step
            q, k, v = by_head(self.qkv(x), 3).unbind(2)
            z = torch.stack((self.phi_q(q), self.phi_k(k)), 2)                    # (B, 1, 2, H, 2K)
        else:
            # W_1 and W_2 act within a head of K channels. Multiplied into W_q and W_k first, they
            # turn many narrow products with x into a wide one: (2K, K) @ (H, K, D) -> (H, 2K, D),
            # for q and for k.
            Wq, Wk, Wv = self.qkv.weight.view(3, self.heads, self.width, self.dim).unbind()
            maps = torch.cat((self.phi_q.weight @ Wq, self.phi_k.weight @ Wk))    # (2H, 2K, D)
            z = F.linear(x, torch.cat((maps.flatten(0, 1), Wv.flatten(0, 1))))
            z, v = z.split((4 * self.dim, self.dim), -1)
            z, v = by_head(z, 2), by_head(v)
        a, b = F.softplus(z).chunk(2, -1)                                         # (B, T, 2, H, K)
        q, k = (a * b).transpose(1, 3).unbind(2)                                  # (B, H, T, K)
        v = F.pad(v.transpose(1, 2), (0, 1), value=1.0)
        return q, k, v, None, None, None                                          # v: (.., V + 1)

    def readout(self, y, _):
        y = at_least_float32(y)
        return merge_heads(y[..., :-1] / (y[..., -1:] + 1e-6))                # (B, T, D)

    def matmul_flops(self, T):
        """x to 2D features of q and of k, to v, and out. (Weights are multiplied once a batch.)"""
        return 2 * T * self.dim * (4 + 1 + 1) * self.dim

    def mixing_flops(self, T):
        return 4 * T * self.dim * (self.width + self.extra)                   # nothing decays


class GatedLinearAttention(GatedLinearRecurrence):
    """
    log a_t = logsigmoid(W_2 W_1 x_t + b) / 16;  y = (norm(S_t^T q_t) * silu(x W_g)) W_o
    (Yang et al. 2024, sections 4.1 and 4.4.)  Args: heads H; rank of the gate. As in the authors'
    code, the norm is an RMSNorm, W_g has no bias and q is scaled by K^-1/2, which the norm takes
    out again but for its eps; keys are as wide as values (there: half).
    """

    def __init__(self, dim, max_len, heads=8, rank=16):
        super().__init__(dim, heads)
        self.qkvg = linear(dim, 4 * dim)
        self.decay = nn.Sequential(linear(dim, rank), nn.Linear(rank, dim))
        self.norm = RMSNorm(self.width)

    def project(self, x, _):
        q, k, v, gate = self.qkvg(x).chunk(4, -1)
        log_a = F.logsigmoid(at_least_float32(self.decay(x))) / 16
        q, k, v, log_a = (split_heads(p, self.heads) for p in (q, k, v, log_a))
        return q * self.width ** -0.5, k, v, log_a, None, gate

    def readout(self, y, gate):
        return merge_heads(self.norm(y)) * F.silu(gate)


class RWKV5(GatedLinearRecurrence):
    """
    Tokens mixed with the one before; a = exp(-exp(w)) a channel, fixed; bonus u for the present
    token; y = (norm(..) * silu(g)) W_o   (Peng et al. 2024, Eagle, section 4.1).  Args: heads H.
    Their r is q here, scaled as in GLA, and w is log_rate. `step` carries S and x_{t-1}. Initial
    values are simpler than the authors': one ramp, one bonus.
    """

    shifts, mixes = True, 4

    def __init__(self, dim, max_len, heads=8):
        super().__init__(dim, heads)
        ramp = torch.arange(dim) / dim
        self.mix = nn.Parameter(ramp.repeat(self.mixes, 1))     # share of x_{t-1} in r, k, v, g, w
        self.r, self.k, self.v, self.g = (linear(dim, dim) for _ in range(4))
        self.log_rate = nn.Parameter(-6 + 5 * ramp)         # half-lives from 280 tokens to 2
        self.bonus = nn.Parameter(torch.full((heads, self.width), 0.5))
        self.norm_weight = nn.Parameter(torch.ones(heads, 1, self.width))
        self.norm_bias = nn.Parameter(torch.zeros(heads, 1, self.width))

    def mixtures(self, x, before):
        return x + (before - x) * self.mix[:, None, None].to(x.dtype)         # (4, B, T, D)

    def log_decay(self, x):                               # RWKV-6 reads x; here only its length
        return -self.log_rate.exp().expand(1, x.shape[-2], -1)                # (1, T, D)

    def project(self, x, before):
        mixed = self.mixtures(x, before)                     # for r, k, v, g; in RWKV-6 for w, too
        xr, xk, xv, xg = mixed[:4]
        q, k, v, log_a = (split_heads(p, self.heads) for p in
                          (self.r(xr), self.k(xk), self.v(xv), self.log_decay(mixed[-1])))
        return q * self.width ** -0.5, k, v, log_a, self.bonus, self.g(xg)

    def readout(self, y, gate):
        y = F.layer_norm(at_least_float32(y), (self.width,), eps=1e-5)        # within each head
        return merge_heads(y * self.norm_weight + self.norm_bias) * F.silu(gate)


class RWKV6(RWKV5):
    """
    RWKV-5 whose mixtures and decays depend on the token, each through a low-rank tanh
    (Peng et al. 2024, Finch, section 4.2). `step` carries S and x_{t-1}, as in RWKV-5.
    Args: heads H; ranks of the mixtures and of the decay.
    """

    mixes = 5                                               # w, too

    def __init__(self, dim, max_len, heads=8, mix_rank=32, decay_rank=64):
        super().__init__(dim, max_len, heads)
        self.mix_x = nn.Parameter(torch.arange(dim) / dim)
        self.mix_down = linear(dim, 5 * mix_rank)
        self.mix_up = nn.Parameter(torch.randn(5, mix_rank, dim) * 0.01)      # small at first
        self.decay_down, self.decay_up = linear(dim, decay_rank), linear(decay_rank, dim)

    def mixtures(self, x, before):
        past = before - x
        z = self.mix_down(x + past * self.mix_x.to(x.dtype)).tanh()           # (B, T, 5 rank)
        z = z.unflatten(-1, (5, -1)).movedim(-2, 0)                           # (5, B, T, rank)
        mix = self.mix[:, None, None] + z @ self.mix_up[:, None]              # (5, B, T, D)
        return x + past * mix.to(x.dtype)

    def log_decay(self, x):
        w = self.log_rate + at_least_float32(self.decay_up(self.decay_down(x).tanh()))
        # At w = 5 the decay is 1e-64, nothing; from 88 on the gradient would be inf times 0.
        return -w.clamp(max=5).exp()                                          # (B, T, D)

    def matmul_flops(self, T):
        return super().matmul_flops(T) + 2 * T * self.mix_up.numel()


class Mamba(Layer):
    """
    S6 (Gu & Dao 2023, algorithm 2), per channel c and state n:
        h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,     y_t = C_t . h_t + D x_t
    (dt B is what the authors' code has; their equation 4 has (exp(dt A) - 1) / A times B there)
    with dt, B, C from x_t; between a short convolution and a gate. It mixes tokens and channels.
    A is real. (To try a complex one, as in S4, use `linear_scan`: `selective_scan` is for real A.)
    `step` carries the short convolution's last inputs and h (B, N, inner); the recurrence itself is
    in `selective_step` and, as a fast path, in `selective_scan`.

    Args: expand: inner width over D; state N; kernel: taps; dt_rank.
    """

    def __init__(self, dim, max_len, expand=2, state=4, kernel=4, dt_rank=8):
        super().__init__()
        self.inner, self.state, self.dt_rank = dim * expand, state, dt_rank
        self.xz, self.out = linear(dim, 2 * self.inner), linear(self.inner, dim)
        self.short = ShortConv(self.inner, kernel, bias=True)
        self.dt_B_C = linear(self.inner, dt_rank + 2 * state)
        self.dt_up = linear(dt_rank, self.inner)
        # softplus(dt_bias) is log-uniform in [0.001, 0.1], as the authors have it: state n = 1..N
        # forgets over 1 / (n dt), 10/n to 1000/n tokens.
        dt = torch.empty(self.inner).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(dt + (-torch.expm1(-dt)).log())           # inverse softplus
        nn.init.uniform_(self.dt_up.weight, -dt_rank ** -0.5, dt_rank ** -0.5)
        self.A_log = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(self.inner, 1))
        self.D = nn.Parameter(torch.ones(self.inner))

    def selection(self, x):
        """What depends on the token: x (.., C) -> dt (.., C), B and C (.., N)."""
        dt, B, C = self.dt_B_C(x).split((self.dt_rank, self.state, self.state), -1)
        return F.softplus(at_least_float32(self.dt_up(dt)) + self.dt_bias), B, C

    def readout(self, y, x, z):
        return self.out(((y + self.D * x) * F.silu(z)).to(z.dtype))

    def forward(self, x):
        x, z = self.xz(x).chunk(2, -1)                                        # (B, T, inner)
        x = F.silu(self.short(x, time=1))
        dt, B, C = self.selection(x)
        return self.readout(selective_scan(x, dt, -self.A_log.exp(), B, C), x, z)

    def init_state(self, batch, device=None, dtype=None):
        h = torch.zeros(batch, self.state, self.inner, device=device, dtype=dtype)
        return self.short.init_state(batch, device, dtype), h

    def step(self, x, state):
        tail, h = state
        x, z = self.xz(x).chunk(2, -1)                                        # (B, inner)
        x, tail = self.short.step(x, tail)
        x = F.silu(x)
        dt, B, C = self.selection(x)
        y, h = selective_step(h, x, dt, -self.A_log.exp(), B, C)
        return self.readout(y, x, z), (tail, h)

    def mixing_flops(self, T):
        """
        A channel: short convolution 2 a tap; a state: discretisation 3, recurrence 2, read-out 2;
        the input times dt, skip and gate 4.
        """
        return T * self.inner * (2 * self.short.taps.shape[1] + 7 * self.state + 4)

    def nominal(self, T):
        return self.inner * self.state


# =================================================================================================
# Channel mixers: each token by itself (RWKV's also sees the one before)
# =================================================================================================


class MLP(Layer):
    """y = gelu(x W_1) W_2.  Args: expand: inner width over D."""

    def __init__(self, dim, max_len, expand=4):
        super().__init__()
        self.up, self.down = linear(dim, expand * dim), linear(expand * dim, dim)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class SwiGLU(Layer):
    """
    y = (silu(x W_1) * x W_2) W_3 (Shazeer 2020). Inner width 352 at D = 128, as in mad-lab (the
    paper: 512).
    """

    def __init__(self, dim, max_len, inner=None):
        super().__init__()
        inner = inner or 11 * dim // 4                    # 352 at D = 128
        self.up, self.down = linear(dim, 2 * inner), linear(inner, dim)

    def forward(self, x):
        gate, x = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * x)


def expert_glu_reference(x, weight, chosen, w_in, w_out):
    """
    The definition. x (n, D), weight and chosen (n, k), w_in (E, D, 2W), w_out (E, W, D) -> (n, D):
    y = sum over the chosen e of weight_e (gelu(x W_e1) * x W_e2) W_e3.
    """
    y = torch.zeros_like(x, dtype=weight.dtype)
    for e in range(len(w_in)):
        gate, up = (x @ w_in[e]).chunk(2, -1)
        share = (weight * (chosen == e)).sum(-1, keepdim=True)                # (n, 1)
        y = y + share * ((F.gelu(gate) * up) @ w_out[e])
    return y


@defined_by(expert_glu_reference)
def expert_glu(x, weight, chosen, w_in, w_out, *, block=128):
    """
    The same, computing only chosen experts (and up to E blocks of zeros). Tokens are sorted by
    expert and each expert's share is padded to whole blocks, so that no shape depends on the
    routing and each block is one product with the weights of the expert that owns it (the layout of
    MegaBlocks, Gale et al. 2022).
    """
    (n, D), k, E = x.shape, chosen.shape[1], len(w_in)
    block = max(1, min(block, n * k // E))
    mine = F.one_hot(chosen.flatten(), E)                                     # (n k, E)
    rank = (mine.cumsum(0) * mine).sum(-1) - 1          # place of an assignment within its expert
    room = (mine.sum(0) + block - 1) // block * block                         # (E,) padded counts
    slot = (room.cumsum(0) - room)[chosen.flatten()] + rank                   # (n k,)
    blocks = -(-n * k // block) + E
    owner = (torch.arange(blocks, device=x.device)[:, None] * block >= room.cumsum(0)).sum(-1)
    owner = owner.clamp(max=E - 1)                                            # (blocks,)
    rows = x.new_zeros(blocks * block, D).index_copy(0, slot, x.repeat_interleave(k, 0))
    gate, up = (rows.view(blocks, block, D) @ w_in[owner]).chunk(2, -1)
    y = ((F.gelu(gate) * up) @ w_out[owner]).flatten(0, 1)[slot]              # (n k, D)
    return (y.view(n, k, D) * weight[..., None]).sum(1)


class MoE(Layer):
    """
    Mixture of small GEGLU experts, top_k of them a token.
    Args: experts E; width W of an expert; top_k.
    """

    def __init__(self, dim, max_len, experts=8, width=16, top_k=2):
        super().__init__()
        self.router = Router(dim, experts, top_k)
        self.w_in = Experts(experts, dim, 2 * width)
        self.w_out = Experts(experts, width, dim)

    def forward(self, x):                                                     # (.., D)
        flat = x.flatten(0, -2)
        weight, chosen = self.router(flat)
        y = expert_glu(flat, weight, chosen, self.w_in.weight, self.w_out.weight)
        return y.to(x.dtype).view(x.shape)

    def matmul_flops(self, T):
        """Of the chosen experts only."""
        share = self.router.top_k / self.router.experts
        experts = self.w_in.weight.numel() + self.w_out.weight.numel()
        return super().matmul_flops(T) + int(2 * T * share * experts)


class RWKVChannelMixer(Layer):
    """
    y = sigmoid(x_r W_r) * relu(x_k W_k)^2 W_v, x_r and x_k mixed with the token before.
    RWKV-5 writes the mixture as m x_t + (1 - m) x_{t-1}, RWKV-6 as x_t + m (x_{t-1} - x_t): one
    function, two names in the table. (Peng et al. 2024.)  Args: inner width.
    """

    def __init__(self, dim, max_len, inner=None):
        super().__init__()
        inner = inner or 4 * dim
        self.dim, self.mix = dim, nn.Parameter((torch.arange(dim) / dim).repeat(2, 1))
        self.r, self.k, self.v = linear(dim, dim), linear(dim, inner), linear(inner, dim)

    def forward(self, x):
        return self.mixed(x, token_shift(x))

    def mixed(self, x, before):
        xr, xk = x + (before - x) * self.mix.view(2, *[1] * (x.ndim - 1), -1).to(x.dtype)
        return self.r(xr).sigmoid() * self.v(self.k(xk).relu().square())

    def init_state(self, batch, device=None, dtype=None):
        return torch.zeros(batch, self.dim, device=device, dtype=dtype)

    def step(self, x, before):
        return self.mixed(x, before), x

    def nominal(self, T):
        return self.dim


# =================================================================================================
# The table, with MAD's settings at width 128. Two blocks of a mixer with fixed state hold 4096
# numbers, the paper's common size (of Mamba, four layers do). Those of mh-linear-attention hold
# 2048; the state of attention, sliding windows and layers of one wide head isn't of that size.
# =================================================================================================

LAYERS = {
    "attention": (Attention, dict(heads=1)),
    "mh-attention": (Attention, dict(heads=16)),
    "sliding-attention": (Attention, dict(heads=1, window=32)),
    "mh-sliding-attention": (Attention, dict(heads=16, window=32)),
    "hyena": (Hyena, dict(expand=4, kernel=3, order=4)),
    "mh-hyena": (MultiHeadHyena, dict(heads=16, kernel=3, order=2)),
    "hyena-experts": (HyenaExperts, dict(experts=8, top_k=2, order=16)),
    "linear-attention": (LinearAttention, dict(heads=1)),
    "mh-linear-attention": (LinearAttention, dict(heads=16)),
    "gated-linear-attention": (GatedLinearAttention, dict(heads=1, rank=16)),
    "mh-gated-linear-attention": (GatedLinearAttention, dict(heads=8, rank=16)),
    "rwkv5-time-mixer": (RWKV5, dict(heads=8)),
    "rwkv6-time-mixer": (RWKV6, dict(heads=8)),
    "mamba": (Mamba, dict(expand=2, state=4, kernel=4, dt_rank=8)),
    "mlp": (MLP, dict(expand=4)),
    "swiglu": (SwiGLU, dict()),
    "moe-mlp": (MoE, dict(experts=8, width=16, top_k=2)),
    "rwkv5-channel-mixer": (RWKVChannelMixer, dict()),
    "rwkv6-channel-mixer": (RWKVChannelMixer, dict()),
}


def unknown(kind, name, known):
    """The error for a name that isn't there. (tasks.py, which needs no torch, has its own.)"""
    close = difflib.get_close_matches(name, known, 1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return ValueError(f"unknown {kind} {name!r}{hint}; choose from: {', '.join(known)}")


def check_setting(name, key, value, default):
    """A setting has the type of its default; one whose default is None takes a whole number too."""
    if value is default:
        return
    whole = default is None or isinstance(default, int)
    if whole and (type(value) is not int or not 1 <= value <= 1 << 20):
        raise ValueError(f"{name}({key}={value!r}): permitted: a whole number, 1 to {1 << 20}")
    if isinstance(default, str) and not isinstance(value, str):
        raise ValueError(f"{name}({key}={value!r}): permitted: a word, such as {default}")


def build_layer(name, dim, max_len, /, **overrides):
    """The layer of that name in LAYERS, with its MAD settings or the given ones instead."""
    if name not in LAYERS:
        raise unknown("layer", name, LAYERS)
    cls, settings = LAYERS[name]
    allowed = dict(list(inspect.signature(cls.__init__).parameters.items())[3:])
    for key, value in overrides.items():
        if key not in allowed:
            raise ValueError(f"{name} has no setting {key!r}; it has: {', '.join(allowed)}")
        check_setting(name, key, value, allowed[key].default)
    return cls(dim, max_len, **{**settings, **overrides})


# =================================================================================================
# Look inside: which tokens a layer mixes, as a matrix
# =================================================================================================


def mixing(layer, x):
    """
    (T, T): how strongly output t (row) depends on input s (column) of one sequence x (1, T, D):
    the norm over channels of the gradient of g . y_t, for one random direction g of length 1.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = layer(x)[0]                                                       # (T, D)
        g = F.normalize(torch.randn_like(y[0]), dim=0)
        rows = [torch.autograd.grad(y_t @ g, x, retain_graph=True)[0][0].norm(dim=-1) for y_t in y]
    return torch.stack(rows)


def darkness(matrix, decades):
    """From 1, the largest entry, to 0, what is 10^decades times smaller, on a log scale."""
    return (1 + (matrix / matrix.max().clamp(min=1e-30)).log10() / decades).clamp(min=0)


def draw(matrix, decades=5, shades=" .:-=+*#%@"):
    """The matrix as text: a row a line, two characters an entry."""
    level = darkness(matrix, decades) * (len(shades) - 1)
    return "\n".join("".join(2 * shades[i] for i in row).rstrip() for row in level.ceil().int())


def plot_mixing(pictures, path, decades=5):
    """{title: (T, T)} side by side in one PNG. ValueError if matplotlib isn't installed."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot draws with matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    columns = min(5, len(pictures))
    rows = -(-len(pictures) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(2.4 * columns, 2.6 * rows),
                                   squeeze=False, layout="constrained")
    for ax in axes.flat:
        ax.axis("off")
    for ax, (title, matrix) in zip(axes.flat, pictures.items()):
        ax.axis("on")
        ax.imshow(darkness(matrix, decades).tolist(), cmap="Greys", vmin=0, vmax=1)
        ax.set_title(title, fontsize=9)
        ax.set(xticks=[], yticks=[], xlabel="input s", ylabel="output t")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def present(pictures, plot, decades=5):
    """{title: (T, T)} in the terminal, or in the PNG `plot`."""
    if plot:
        plot_mixing(pictures, plot, decades)
        return print(f"drawn in {plot}")
    for title, matrix in pictures.items():
        print(f"{title}: rows are outputs t, columns inputs s\n{draw(matrix, decades)}\n")


def show(names, plot, T=48, D=128):
    """Layers as they are at init, on one sequence of noise."""
    pictures = {}
    for name in names:
        torch.manual_seed(0)
        pictures[name] = mixing(build_layer(name, D, T), torch.randn(1, T, D))
    present(pictures, plot)


# =================================================================================================
# Speed: what this machine is good for, and `python layers.py`
# =================================================================================================


def tune_allocator():
    """
    Tells glibc to keep large buffers. It returns them to the system after use, and gets them back
    at the next step, page by page, zeroed: half the time of small models on a CPU. Returns how.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return f"left alone: no glibc on {platform.system()}"
    most, trim_threshold, mmap_threshold = 2 ** 31 - 1, -1, -3
    kept = (mallopt(trim_threshold, most), mallopt(mmap_threshold, most)
            or mallopt(mmap_threshold, 32 << 20))         # the most that older versions allow
    return "keeps its buffers between steps (glibc mallopt)" if all(kept) else "left alone: refused"


def seconds(f, device="cpu", repeat=5):
    """The fastest of `repeat` calls, after one to warm up; repeat=0: a single call, no warm-up."""
    best = math.inf
    for i in range(repeat + 1):
        start = time.perf_counter()
        f()
        getattr(torch, device).synchronize()
        best = min(best, time.perf_counter() - start) if i or not repeat else best
    return best


@functools.cache                    # so that runs of one process choose alike
def fastest_dtype(device):
    """torch.bfloat16 or torch.float32 for matrix products on this device, and why."""
    if device == "cuda":
        good = torch.cuda.is_bf16_supported(including_emulation=False)
        return (torch.bfloat16, "this GPU has units for it") if good else \
               (torch.float32, "this GPU has no bfloat16 units")
    if device == "mps":
        return torch.float32, "bfloat16 has not been measured on Apple GPUs"
    x, w = torch.randn(1024, 128), torch.randn(128, 512)
    x16, w16, of_32, of_16 = x.bfloat16(), w.bfloat16(), math.inf, math.inf
    for _ in range(10):              # by turns, so that a busy moment of the machine doesn't decide
        of_32 = min(of_32, seconds(lambda: x @ w, repeat=2))
        of_16 = min(of_16, seconds(lambda: x16 @ w16, repeat=2))
        if of_16 > 5 * of_32:        # no units for it: 100 times as slow, and not worth the seconds
            break
    gain = of_32 / of_16
    ratio = f"{gain:.1f} times as fast as" if gain > 0.95 else f"{1 / gain:.1f} times as slow as"
    return (torch.bfloat16 if gain > 1.2 else torch.float32,
            f"a product in bfloat16 is measured {ratio} in float32")


def peak_memory(f, device):
    """The most MB that f holds beyond what was held before it; None where that can't be read."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")                # Linux: forget the peak so far
        status = Path("/proc/self/status")
        held = lambda key: int(re.search(key + r":\s+(\d+)", status.read_text())[1])
        before = held("VmRSS")
        f()
        return (held("VmHWM") - before) / 1024
    except (OSError, AttributeError):
        return None


def time_layer(layer, B, T, D, device, dtype, compiled=False, repeat=5):
    """Seconds of forward and of forward + backward (input's gradient too), and a function of it."""
    x = torch.randn(B, T, D, device=device, requires_grad=True)
    run = torch.compile(layer, dynamic=False) if compiled else layer
    wrt = [x, *layer.parameters()]

    def forward():
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return run(x)

    def both():
        y = forward()
        torch.autograd.grad(y, wrt, torch.ones_like(y), allow_unused=True)
    return seconds(forward, device, repeat), seconds(both, device, repeat), both


def floors(device, dtype):
    """Functions of bytes and of FLOPs: the least seconds for them, as measured on this machine."""
    a = torch.randn(1 << 26, device=device)                                   # 256 MB
    b, m = torch.empty_like(a), torch.randn(4096, 4096, device=device, dtype=dtype)
    copy, product = seconds(lambda: b.copy_(a), device), seconds(lambda: m @ m, device)
    return lambda n: copy * n / (8 << 26), lambda n: product * n / (2 * 4096 ** 3)


class SDPA(Attention):
    """Our attention with torch's fused kernel: the peer of causal_attention on a CPU."""

    def forward(self, x):
        q, k, v = (p.contiguous() for p in self.project(x, self.table[..., :x.shape[1]]))
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


def mambapy_block(dim, max_len):
    """mamba.py (pip install mambapy) with MAD's settings, or None where it isn't installed."""
    try:
        from mambapy.mamba import MambaBlock, MambaConfig
    except ImportError:
        return print("mambapy isn't there to be timed beside mamba: pip install mambapy")
    return MambaBlock(MambaConfig(d_model=dim, n_layers=1, d_state=4, dt_rank=8))


PEERS = {"mamba": mambapy_block, "mh-attention": functools.partial(SDPA, heads=16),
         "attention": functools.partial(SDPA, heads=1)}


def layer_times(name, layer, shape, device, dtype, compiled, unit, least):
    """One line of the benchmark's table."""
    B, T, D = shape
    forward, both, again = time_layer(layer, B, T, D, device, dtype, compiled)
    now = unit()                                                 # next to it: machines drift
    memory = peak_memory(again, device) or math.nan
    # (Compiled, a second length would double the minutes that this takes.)
    short = math.nan if compiled else time_layer(layer, B, T // 4, D, device, dtype)[1]
    line = (f"{name:<27}{1e3 * forward:>8.1f}{1e3 * both:>9.1f}{both / now:>7.1f}"
            f"{math.log(both / short, 4):>6.2f}{memory:>9.0f}"
            f"{memory * 2 ** 20 / (8 * B * T * D):>7.1f}")
    if isinstance(layer, Layer):
        for_bytes, for_flops = least
        # Forward reads x and writes y, backward reads x and dy and writes dx: 5 arrays of float32.
        floor = max(for_bytes(5 * 4 * B * T * D), for_flops(3 * B * layer.flops(T)))
        line += f"{floor / both:>7.2f}{layer.flops(T) / T / 1e6:>10.3f}"
    return line, now


def benchmark(names, shape, device, compiled, loops, peers):
    """A table: times in ms and in units of one 1024^3 float32 matrix product in this process."""
    (B, T, D), (dtype, why) = shape, fastest_dtype(device)
    a, b = torch.randn(2, 1024, 1024, device=device)
    unit = lambda: seconds(lambda: a @ b, device, 20)
    threads = f"{torch.get_num_threads()} threads"
    card = torch.cuda.get_device_name() if device == "cuda" else threads
    print(f"{device} ({card}), {str(dtype)[6:]} ({why}), torch {torch.__version__}, B {B}, T {T}, "
          f"D {D}, {'compiled' if compiled else 'not compiled'}\n"
          f"unit: a 1024^3 float32 product, {1e3 * unit():.2f} ms; T^: the power of T by which f+b "
          f"grew from T/4; x io: peak memory over input and output; floor: what reading and "
          f"writing these, or the FLOPs, take at least, as a share of f+b\n\n"
          f"{'layer':<27}{'fwd ms':>8}{'f+b ms':>9}{'units':>7}{'T^':>6}{'peak MB':>9}{'x io':>7}"
          f"{'floor':>7}{'MFLOP/tok':>10}{'loop units' * loops:>12}")
    least = floors(device, dtype)
    for name in names:
        torch.manual_seed(0)
        layer = build_layer(name, D, T).to(device)
        line, now = layer_times(name, layer, shape, device, dtype, compiled, unit, least)
        if loops:
            with plain_loops():
                slow = time_layer(layer, B, T, D, device, torch.float32, repeat=0)[1]
            line += f"{slow / now:>12.1f}"
        print(line, flush=True)
        peer = PEERS[name](D, T) if peers and name in PEERS else None
        if peer is not None:
            name = f"  {type(peer).__module__.split('.')[0]} {type(peer).__name__}"
            name = name.replace("__main__ SDPA", "torch SDPA")
            print(layer_times(name, peer.to(device), shape, device, dtype, compiled, unit,
                              least)[0], flush=True)


def break_even(device):
    """Forward + backward of both forms of a convolution, 8192 tokens at each length T."""
    dtype = fastest_dtype(device)[0]
    print(f"{device}, {torch.get_num_threads()} threads, f+b in ms: 128 channels; 16 heads of 8")
    print(f"{'T':>5}{'toeplitz':>10}{'fft':>8}{'mask':>10}{'fft':>8}")
    for T in (64, 128, 256, 512, 1024, 2048):
        times = []
        for f, method, shape in [(long_conv, "toeplitz", (T, 128)), (long_conv, "fft", (T, 128)),
                                 (toeplitz_attention, "mask", (16, T, 8)),
                                 (toeplitz_attention, "fft", (16, T, 8))]:
            inputs = [torch.randn(8192 // T, *shape, device=device, requires_grad=True)
                      for _ in range(1 if f is long_conv else 3)]
            h = torch.randn(16 if len(shape) == 3 else 128, T, device=device, requires_grad=True)

            def both():
                with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                    y = f(*inputs, h, method=method)
                torch.autograd.grad(y, [*inputs, h], torch.ones_like(y))
            times.append(1e3 * seconds(both, device))
        print(f"{T:>5}{times[0]:>10.1f}{times[1]:>8.1f}{times[2]:>10.1f}{times[3]:>8.1f}",
              flush=True)


def parse_args():
    parser = argparse.ArgumentParser(description="Time every layer's fast path against its loop.")
    parser.add_argument("--layers", default=",".join(LAYERS), help="names, with commas between")
    parser.add_argument("--long", action="store_true", help="at (2, 4096, 512), not (8, 1024, 128);"
                        " on a GPU at (8, 2048, 1024), too")
    parser.add_argument("--compile", action="store_true", help="compile them, as train.py may")
    parser.add_argument("--no-loops", action="store_true", help="skip the slow loops")
    parser.add_argument("--peers", action="store_true", help="time torch's fused attention and, "
                        "where it is installed, mambapy beside ours")
    parser.add_argument("--show", metavar="LAYER", help="draw which tokens a layer (or: all) mixes")
    parser.add_argument("--plot", metavar="PNG", help="with --show: a figure instead of text")
    parser.add_argument("--break-even", action="store_true", help="Toeplitz against FFT instead")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        choices=("cpu", "cuda"), help="default: cuda if there is one")
    args = parser.parse_args()
    if args.show:
        args.layers = ",".join(LAYERS) if args.show == "all" else args.show
    args.layers = args.layers.split(",")
    for name in args.layers:
        if name not in LAYERS:
            parser.error(str(unknown("layer", name, LAYERS)))
    if args.plot and not args.show:
        parser.error("--plot draws what --show asks for: --show mamba --plot mamba.png")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA card here; try --device cpu")
    return args


def main():
    args = parse_args()
    if args.show:
        try:
            return show(args.layers, args.plot)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
    if args.device == "cpu":
        print(f"allocator: {tune_allocator()}")
    if args.break_even:
        return break_even(args.device)
    shapes = [(2, 4096, 512)] if args.long else [(8, 1024, 128)]
    shapes += [(8, 2048, 1024)] if args.long and args.device == "cuda" else []
    loops = not args.no_loops and not args.long          # at T 4096 they take hours
    for shape in shapes:
        benchmark(args.layers, shape, args.device, args.compile, loops, args.peers)


if __name__ == "__main__":
    main()
