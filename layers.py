"""
What a layer is: every primitive of MAD (Poli, Thomas et al. 2024, arXiv 2403.17844), one a screen.

Three families mix tokens: softmax attention; long convolutions under a gate; and one gated linear
recurrence, of which linear attention, GLA, RWKV and, a channel at a time, Mamba are special cases
(DeltaNet and RWKV-7 remove, too). Channel mixers follow. Most fast paths come first, each below the
plain loop that defines it (`*_reference`); attention's and mh-hyena's stand with their layers.

  B batch     T time, tokens     D width     H heads     K key width, V value width of a head
  N state of a channel           E experts   C chunk length, or channels   n chunks   W window

A layer is Layer(dim, max_len, **settings), max_len the longest sequence; class `Layer` says what it
has. To add one: copy a class, change its equation, add a line to LAYERS. Tests, benchmark and
--layers then know it. Weights are float32 or float64; under autocast, matrix products are bf16.

  python layers.py                  each layer's equation, cost, time of its fast path and its loop
  python layers.py --show mamba     which tokens it mixes
"""
import ctypes
import inspect
import math
import os
import timeit
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tasks import Parser, UserError, run_main, unknown

# GCC 12 compiles the bfloat16 transposes that torch.compile writes for AVX512 to nonsense. This
# turns the pass at fault off, by the one variable whose value reaches the compiler's command line.
os.environ.setdefault("TORCHINDUCTOR_CPP_ENABLE_FLOATING_POINT_CONTRACT_FLAG",
                      "off -fno-tree-slp-vectorize")

# ============================== Fast paths, below their definitions ==============================

def upcast(x):
    """bf16 (from autocast) becomes float32, float64 stays: sums over time need the digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

# -------------------------------------------------------------------------------------------------
#   y_t = sum_{s <= t} h_{t-s} u_s                                        (elementwise in D)

def long_conv_reference(u, h):
    """u (B, T, D), filters h (D, T'), T' >= T -> (B, T, D)."""
    u, h = upcast(u), upcast(h)
    ys = [(u[:, :t + 1] * h[:, :t + 1].flip(1).T).sum(1) for t in range(u.shape[1])]
    return torch.stack(ys, 1)

def fft_length(T):
    """The least even n >= 2T - 1 with factors 2, 3, 5 only: long enough not to wrap, and fast."""
    return next(n for n in range(2 * T, 8 * T, 2) if pow(30, 64, n) == 0)     # n divides 30^64

def cached(size, device, elements=1 << 19):
    """How many parts of `size` elements fit in a CPU's cache, with room for temporaries."""
    return max(1, elements // size) if device.type == "cpu" else 1 << 30

# The same, u (B, D, T), h (D, T). An operator: torch.compile has no code for complex numbers.
@torch.library.custom_op("nanomad::fft_conv", mutates_args=())
def fft_conv(u: Tensor, h: Tensor) -> Tensor:
    T, n = u.shape[2], fft_length(u.shape[2])
    fh, rows = torch.fft.rfft(h, n), cached(len(h) * n, u.device)             # (D, n/2 + 1)
    return torch.cat([torch.fft.irfft(torch.fft.rfft(part, n) * fh, n)[..., :T]
                      for part in u.split(rows)])

@torch.library.custom_op("nanomad::fft_conv_backward", mutates_args=())
def fft_conv_backward(g: Tensor, u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Both gradients are correlations; dh is summed over the batch before it leaves frequency."""
    T, n = u.shape[2], fft_length(u.shape[2])
    fh, rows = torch.fft.rfft(h, n).conj(), cached(len(h) * n, u.device)
    dh, du = 0, []
    for g, u in zip(g.split(rows), u.split(rows)):
        fg = torch.fft.rfft(g, n)
        dh = dh + (fg * torch.fft.rfft(u, n).conj()).sum(0)
        du.append(torch.fft.irfft(fg * fh, n)[..., :T])
    return torch.cat(du), torch.fft.irfft(dh, n)[..., :T].contiguous()

fft_conv.register_fake(lambda u, h: u.new_empty(u.shape))
fft_conv_backward.register_fake(lambda g, u, h: (u.new_empty(u.shape), h.new_empty(h.shape)))
fft_conv.register_autograd(
    lambda ctx, g: fft_conv_backward(g, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))

def long_conv(u, h):
    """The same as a product of spectra, O(T log T). Later inputs leak in by rounding, near 1e-7."""
    return fft_conv(upcast(u).mT, upcast(h)[:, :u.shape[1]]).mT               # (B, T, D)

# -------------------------------------------------------------------------------------------------
#   y_t = sum_{i < width} w_i x_{t-i}                                     (elementwise in C)

def short_conv_reference(x, w):
    """x (B, T, C), taps w (C, width) -> (B, T, C)."""
    ys = [sum(w[:, i] * x[:, t - i] for i in range(min(w.shape[1], t + 1)))
          for t in range(x.shape[1])]
    return torch.stack(ys, 1)

def short_conv(x, w):
    """The same as a sum of shifted products, on a CPU faster than conv1d."""
    T, width = x.shape[1], w.shape[1]
    x, w = F.pad(x, (0, 0, width - 1, 0)), w.T.contiguous()                   # w (width, C)
    return sum(w[i] * x.narrow(1, width - 1 - i, T) for i in range(width))

# -------------------------------------------------------------------------------------------------
#   h_t = a_t h_{t-1} + b_t,     h_{-1} = 0                                       (elementwise)

def linear_scan_reference(a, b):
    """a, b (B, T, ...) -> (B, T, ...); a may broadcast."""
    a, b = upcast(a), upcast(b)
    h, hs = torch.zeros_like(b[:, 0]), []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        hs.append(h)
    return torch.stack(hs, 1)

# An operator again, since torch.compile would unroll the loop. Returns every h, and the last one.
# reverse: h_t = a_{t+1} h_{t+1} + b_t, from the end.
@torch.library.custom_op("nanomad::scan", mutates_args=())
def step_scan(a: Tensor, b: Tensor, h: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(b, memory_format=torch.contiguous_format)
    a, b, hs = a.unbind(1), b.unbind(1), out.unbind(1)
    if reverse:
        a, b, hs = (torch.ones_like(h), *a[:0:-1]), b[::-1], hs[::-1]
    for a_t, b_t, h_t in zip(a, b, hs):
        h = torch.addcmul(b_t, a_t, h, out=h_t)
    return out, h.clone()

def scan_backward(ctx, g, g_last):
    """The same scan, backwards in time: g_t = dL/dh_t + a_{t+1} g_{t+1}."""
    a, h, hs = ctx.saved_tensors
    g, g_first = step_scan(a, g, g_last, True)
    before = torch.cat((h[:, None], hs[:, :-1]), 1)                           # h_{t-1}
    return g * before, g, g_first * a[:, 0], None

step_scan.register_fake(lambda a, b, h, reverse=False: (b.new_empty(b.shape), h.new_empty(h.shape)))
step_scan.register_autograd(scan_backward, setup_context=lambda ctx, inputs, output:
                            ctx.save_for_backward(inputs[0], inputs[2], output[0]))

def parallel_scan(a, b, h):
    """The same in log2 T rounds, for a GPU. Two steps in a row are one, h -> a' (a h + b) + b'. A
    scan over such pairs gives h at odd times; from there one step leads to those at even times."""
    T = b.shape[1]
    if T == 1:
        h = a[:, 0] * h + b[:, 0]
        return h[:, None], h
    (a0, a1), (b0, b1) = ((x[:, :T - 1:2], x[:, 1::2]) for x in (a, b))
    odd, _ = parallel_scan(a1 * a0, a1 * b0 + b1, h)
    even = a[:, ::2] * torch.cat((h[:, None], odd), 1)[:, :(T + 1) // 2] + b[:, ::2]
    hs = torch.stack((even[:, :T // 2], odd), 2).flatten(1, 2)
    hs = torch.cat((hs, even[:, T // 2:]), 1)           # an odd T ends with one more even time
    return hs, hs[:, -1]

def scan(a, b, h):
    return step_scan(a.expand_as(b), b, h) if b.device.type == "cpu" else parallel_scan(a, b, h)

def linear_scan(a, b):
    """The same without the loop in Python."""
    a, b = upcast(a), upcast(b)
    return scan(a, b, torch.zeros_like(b[:, 0]))[0]

# -------------------------------------------------------------------------------------------------
#   h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t,     y_t = C_t . h_t           (N states per channel)
# A, B and C have the names of Mamba's paper; in shapes B is the batch and C the channels.

def selective_step(h, x, dt, A, B, C):
    """h (B, N, C), x and dt (B, C), A (C, N), B and C (B, N) -> y (B, C), h."""
    h = (dt[:, None] * A.T).exp() * upcast(h) + (dt * x)[:, None] * B[..., None]
    return (h * C[..., None]).sum(1), h

def selective_scan_reference(x, dt, A, B, C):
    """x, dt (B, T, C), A (C, N), B and C (B, T, N) -> y (B, T, C)."""
    x, dt, A, B, C = map(upcast, (x, dt, A, B, C))
    h, ys = x.new_zeros(x.shape[0], A.shape[1], x.shape[2]), []               # (B, N, C)
    for t in range(x.shape[1]):
        y, h = selective_step(h, x[:, t], dt[:, t], A, B[:, t], C[:, t])
        ys.append(y)
    return torch.stack(ys, 1)

def selective_scan(x, dt, A, B, C):
    """The same in pieces of time. a, b and h have N times the elements of x; on a CPU a piece
    is so short that they stay in its cache (Mamba, section 3.3.2, does so in a GPU's)."""
    x, dt, A, B, C = map(upcast, (x, dt, A.T, B, C))
    h, ys = x.new_zeros(x.shape[0], A.shape[0], x.shape[2]), []               # (B, N, C)
    steps = x.shape[1] if torch.compiler.is_compiling() else 2 * cached(h.numel(), x.device)
    for x, dt, B, C in zip(*(p.split(steps, 1) for p in (x, dt, B, C))):
        a = (dt[:, :, None] * A).exp()                                        # (B, steps, N, C)
        hs, h = scan(a, (dt * x)[:, :, None] * B[..., None], h)
        ys.append((hs * C[..., None]).sum(2))
    return torch.cat(ys, 1)

# -------------------------------------------------------------------------------------------------
#   S_t = diag(a_t) S_{t-1} + k_t v_t^T                y_t = S_t^T q_t
#   with a bonus u (RWKV):                             y_t = (S_{t-1} + diag(u) k_t v_t^T)^T q_t

def gated_linear_step(S, q, k, v, log_a=None, u=None):
    """S (B, H, K, V), q, k (B, H, K), log_a (B or 1, H, K or 1), v (B, H, V), u (H, K) -> y, S."""
    S, q, k, v = map(upcast, (S, q, k, v))
    kv = k[..., None] * v[..., None, :]                                       # (B, H, K, V)
    past, S = S, (S if log_a is None else log_a.exp()[..., None] * S) + kv
    read = S if u is None else past + u[..., None] * kv
    return (q[..., None] * read).sum(-2), S

def gated_linear_scan_reference(q, k, v, log_a=None, u=None):
    """q, k (B, H, T, K), v (B, H, T, V), log_a (B or 1, H, T, K or 1) <= 0 -> (B, H, T, V)."""
    S, ys = upcast(q).new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for t in range(q.shape[2]):
        decay = None if log_a is None else upcast(log_a)[:, :, t]
        y, S = gated_linear_step(S, q[:, :, t], k[:, :, t], v[:, :, t], decay, u)
        ys.append(y)
    return torch.stack(ys, 2)

def decayed_scores(q, k, log_a):
    """One chunk, q, k (.., C, K), log_a (.., C, K or 1), C a power of 2 ->
      scores (.., C, C): sum_K q_t k_s a_{s+1} .. a_t for s <= t, else 0;
      to_t, from_s (as log_a): log of the decay from the chunk's start to t, from s to its end.

    Dividing cumulative products overflows, and all C x C x K decays are slow. Instead join halves:
    from s in the first to t in the second the decay is that from s to the middle times that from
    the middle to t. Both are at most 1, and all such scores are one matrix product."""
    C = q.shape[-2]
    if log_a.shape[-1] == 1:       # one decay per head: for each pair the sum of logs, s < i <= t
        steps = log_a.expand(*log_a.shape[:-1], C).tril(-1).cumsum(-2)        # (.., t, s)
        return (q @ k.mT) * steps.exp().tril(), log_a.cumsum(-2), steps[..., -1, :, None]
    if C == 1:
        return (upcast(q) * k).sum(-1, keepdim=True), log_a, torch.zeros_like(log_a)
    q, k, log_a = (x.unflatten(-2, (2, C // 2)) for x in (q, k, log_a))       # (.., 2, C/2, K)
    scores, to_t, from_s = decayed_scores(q, k, log_a)
    (first, last), (t0, t1), (s0, s1) = (x.unbind(-3) for x in (scores, to_t, from_s))
    cross = (q[..., 1, :, :] * t1.exp()) @ (k[..., 0, :, :] * s0.exp()).mT    # (.., C/2, C/2)
    lower = torch.cat((cross.to(last.dtype), last), -1)                       # (.., C/2, C)
    scores = torch.cat((F.pad(first, (0, C // 2)), lower), -2)                # (.., C, C)
    to_t = torch.cat((t0, t1 + t0[..., -1:, :]), -2)
    from_s = torch.cat((s0 + t1[..., -1:, :], s1), -2)
    return scores, to_t, from_s

def gated_linear_scan(q, k, v, log_a=None, u=None):
    """The same by chunks of C tokens: inside one as masked attention, between them by the state.
    O(T C), stable for any decay. About C = K makes both parts cost the same."""
    if u is not None:              # y_t reads S_{t-1}, as a query q_t at time t - 1 would
        past = gated_linear_scan(F.pad(q[:, :, 1:], (0, 0, 0, 1)), k, v, log_a)
        now = upcast(q * u[:, None] * k).sum(-1, keepdim=True) * v
        return F.pad(past[:, :, :-1], (0, 0, 1, 0)) + now
    T = q.shape[2]
    C = 1 << (min(T, 64, max(16, q.shape[-1])) - 1).bit_length()              # a power of 2
    cut = lambda x: F.pad(x, (0, 0, 0, -T % C)).unflatten(2, (-1, C))
    q, k, v = cut(q), cut(k), cut(v)                       # (B, H, n, C, .), bf16 under autocast
    if log_a is None:
        scores, total = (q @ k.mT).tril(), torch.ones_like(q[:1, :, :, 0, :1])
    else:
        scores, to_t, from_s = decayed_scores(q, k, cut(upcast(log_a)))
        q, k, total = q * to_t.exp(), k * from_s.exp(), to_t[..., -1, :].exp()
    y = scores @ v                                                            # (B, H, n, C, V)
    if q.shape[2] > 1:
        kv = upcast(k.mT @ v).transpose(1, 2)                                 # (B, n, H, K, V)
        S = linear_scan(total.transpose(1, 2)[..., None], kv).transpose(1, 2)
        y = y + F.pad(q[:, :, 1:] @ S[:, :, :-1], (0, 0, 0, 0, 1, 0))
    return y.flatten(2, 3)[:, :, :T]

# -------------------------------------------------------------------------------------------------
#   S_t = (I - b_t k_t k_t^T) diag(a_t) S_{t-1} + b_t k_t v_t^T,   y_t = S_t^T q_t    (b is beta)
# The delta rule moves the value stored for k_t, S^T k_t, a fraction b_t towards v_t. RWKV-7 removes
# along another key than it writes:    S_t = diag(a_t) S_{t-1} - c_t (r_t^T S_{t-1}) + b_t k_t v_t^T
# (the first is the case r = a k, c = b k).

def delta_terms(k, beta, log_a, r, c):
    """log_a, r and c, with their defaults in place of None."""
    log_a = torch.zeros_like(beta) if log_a is None else log_a
    return (log_a, log_a.exp() * k, beta * k) if r is None else (log_a, r, c)

def delta_step(S, q, k, v, beta, log_a=None, r=None, c=None):
    """S (B, H, K, V), q, k, r, c (B, H, K), v (B, H, V), beta (B, H, 1), log_a (B, H, K or 1)
    -> y (B, H, V), S."""
    S, q, k, v, beta = map(upcast, (S, q, k, v, beta))
    log_a, r, c = delta_terms(k, beta, log_a, r, c)
    removed = (r[..., None] * S).sum(-2, keepdim=True)                        # (B, H, 1, V)
    S = log_a.exp()[..., None] * S - c[..., None] * removed + (beta * k)[..., None] * v[:, :, None]
    return (q[..., None] * S).sum(-2), S

def delta_scan_reference(q, k, v, beta, log_a=None, r=None, c=None):
    """q, k, r, c (B, H, T, K), v (B, H, T, V), beta (B, H, T, 1), log_a (B, H, T, K or 1) <= 0
    -> (B, H, T, V)."""
    S, ys = upcast(q).new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for t in range(q.shape[2]):
        inputs = (x if x is None else x[:, :, t] for x in (q, k, v, beta, log_a, r, c))
        y, S = delta_step(S, *inputs)
        ys.append(y)
    return torch.stack(ys, 2)

def delta_scan(q, k, v, beta, log_a=None, r=None, c=None):
    """The same by chunks of C tokens. With u_t = r_t^T S_{t-1}, what is removed, the recurrence is
    a gated linear one with two writes, b_t k_t v_t^T and -c_t u_t^T. Inside a chunk a triangular
    system gives u (the WY form); from earlier chunks it reads the state."""
    T, K, keys = q.shape[2], q.shape[-1], 1 if c is None else 2       # 1: c is beta k, too
    q, k, v, beta = map(upcast, (q, k, v, beta))
    log_a, r, c = delta_terms(k, beta, log_a, r, c)
    C = 1 << (min(T, 64, max(16, K)) - 1).bit_length()                        # a power of 2
    cut = lambda x: F.pad(x, (0, 0, 0, -T % C)).unflatten(2, (-1, C))         # (B, H, n, C, .)
    q, k, v, r, c, log_a = map(cut, (q, beta * k, v, r, c, log_a))
    with torch.autocast(q.device.type, enabled=False):        # bf16 errors would grow in a solve
        later = lambda x: F.pad(x[..., :-1, :], (0, 0, 1, 0))
        # r_t reads S_{t-1}, as a query at time t - 1 would.
        queries = torch.stack((q, F.pad(r[..., 1:, :], (0, 0, 0, 1))))[:, None]
        scores, to_t, from_s = decayed_scores(queries, torch.stack((k, c)[:keys]), log_a)
        now, before = scores.expand(2, 2, *scores.shape[2:])                  # (2, .., C, C) each
        (qk, qc), (rk, rc) = now, later(before)
        r, q = r * later(to_t).exp(), q * to_t.exp()
        # (I + rc) u = r S_0 + rk v, with S_0 the state before the chunk: u = W S_0 + U.
        W, U = torch.linalg.solve_triangular(rc, torch.cat((r, rk @ v), -1), upper=False,
                                             unitriangular=True).split((K, v.shape[-1]), -1)
        k, c = (k * from_s.exp()).mT, (c * from_s.exp()).mT                   # (.., K, C)
        total, move, write = to_t[..., -1, :, None].exp(), c @ W, k @ v - c @ U
        S = [torch.zeros_like(write[:, :, 0])]                                # (B, H, K, V)
        for a, moved, new in zip(*(x[:, :, :-1].unbind(2) for x in (total, move, write))):
            S.append(a * S[-1] - moved @ S[-1] + new)
        S = torch.stack(S, 2)                                                 # (B, H, n, K, V)
        y = (q - qc @ W) @ S + qk @ v - qc @ U
    return y.flatten(2, 3)[:, :, :T]

# ===================================== What layers share =========================================

class Layer(nn.Module):
    """What every layer has, beside forward(x (B, T, D)) -> (B, T, D), which is causal. The defaults
    are right for a layer without memory."""
    state_shapes = ()              # one for each tensor of the state of one sequence
    paper_state = 0                # elements of the state, as the paper counts them

    def init_state(self, batch, device=None, dtype=None):
        return [torch.zeros(batch, *shape, device=device, dtype=dtype)
                for shape in self.state_shapes]

    def step(self, x, state):
        """One token x (B, D), state before it -> output (B, D), state after it. As forward."""
        return self(x[:, None])[:, 0], state

    def matmul_flops(self, T):
        """Of one sequence's matrix products, with all of its filter's (which a batch shares)."""
        return sum(2 * T * m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))

    def mixing_flops(self, T):
        """Of the rest, without norms and activations."""
        return 0

    def flops(self, T):
        """Forward, one sequence of length T; a multiply-add counts 2."""
        return self.matmul_flops(T) + self.mixing_flops(T)

    def nominal(self, T):
        """Elements of the state after T tokens, as the paper counts them."""
        return self.paper_state

def count_state(state):
    """Elements a sequence in the tensors that `step` carries, without integer counters."""
    return sum(x[0].numel() for x in state if x.is_floating_point())

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32."""
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        scale = (upcast(x).square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (upcast(x) * scale * self.weight).to(x.dtype)

def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)

def check_divides(name, parts, dim, each=1):
    if dim % (parts * each):
        raise UserError(f"{name}={parts}: width {dim} is not a multiple of {parts * each}")

def split_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)                       # (B, H, T, K)

def merge_heads(x):
    return x.mT.flatten(1, 2).mT                # (B, T, D); no copy if time lies last in memory

class ShortConv(nn.Module):
    """Causal depthwise convolution of x (B, T, C); `step` carries the last width - 1 inputs."""
    def __init__(self, channels, width, bias=False):
        super().__init__()
        self.taps = nn.Parameter(torch.empty(channels, width).uniform_(-1, 1) / width ** 0.5)
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x):
        y = short_conv(x, self.taps.to(x.dtype))
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def step(self, x, tail):                                                  # (B, C)
        window = torch.cat((tail, x[:, None]), 1)                             # (B, width, C)
        return self(window)[:, -1], window[:, 1:]

class Router(nn.Module):
    """x (.., D) -> gates (.., E): a softmax over the top_k scores, 0 for other experts. (mad-lab
    sets the others' scores to 0 *before* its softmax, where 0 is a score like any other.)"""
    def __init__(self, dim, experts, top_k):
        super().__init__()
        least = min(2, experts)                    # the softmax of one score has no gradient
        if not least <= top_k <= experts:
            raise UserError(f"top_k={top_k}; permitted: {least} to {experts}, the experts")
        self.top_k, self.score = top_k, linear(dim, experts)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):     # rounding would change the choice
            scores = self.score(x.to(self.score.weight.dtype))
        best, chosen = scores.topk(self.top_k, -1)                            # (.., top_k)
        return torch.zeros_like(scores).scatter(-1, chosen, best.softmax(-1))

class Experts(nn.Module):
    """E matrices in one tensor, initialised as nn.Linear's."""
    def __init__(self, experts, inputs, outputs):
        super().__init__()
        weight = torch.empty(experts, inputs, outputs).uniform_(-1, 1) / inputs ** 0.5
        self.weight = nn.Parameter(weight)

# ===================================== Softmax attention =========================================

def causal_attention_reference(q, k, v, window=None):
    """q, k, v (B, H, T, K); position t reads s <= t, with a window W only t - W < s."""
    ys = []
    for t in range(q.shape[2]):
        read = slice(0 if window is None else max(0, t + 1 - window), t + 1)
        scores = q[:, :, t:t + 1] @ k[:, :, read].mT / q.shape[-1] ** 0.5     # (B, H, 1, read)
        ys.append(scores.softmax(-1).to(v.dtype) @ v[:, :, read])
    return torch.cat(ys, 2)

def causal_attention(q, k, v, window=None):
    """The same by torch's fused kernel on a GPU. On a CPU its backward pass is slow for narrow
    heads; there a block of queries takes two matrix products and a softmax with all keys up to its
    end. With a window, on any device, all blocks at once, with the keys of two blocks each."""
    T, K = q.shape[2:]
    if window is None and q.device.type != "cpu":
        # Its fast forms want a head's channels contiguous in memory.
        return F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v, is_causal=True)
    if window is not None:
        rows = max(32, min(window, T))
        cut = lambda x: F.pad(x, (0, 0, 0, -T % rows)).unflatten(2, (-1, rows))
        both = lambda x: torch.cat((F.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0)), x), 3)
        q, k, v = cut(q), both(cut(k)), both(cut(v))                          # (B, H, n, rows, K)
        t = torch.arange(q.shape[2] * rows, device=q.device).view(-1, rows, 1)
        s = t[:, :1] - rows + torch.arange(2 * rows, device=q.device)         # (n, 1, 2 rows)
        p = (q / K ** 0.5 @ k.mT).masked_fill((s > t) | (s <= t - window) | (s < 0), -torch.inf)
        return (p.softmax(-1) @ v).flatten(2, 3)[:, :, :T]
    rows, ys = max(64, T // 8), []
    k, v = k.split(rows, 2), v.split(rows, 2)
    for i, q in enumerate((q / K ** 0.5).split(rows, 2)):
        k_i, v_i = torch.cat(k[:i + 1], 2), torch.cat(v[:i + 1], 2)
        scores = q @ k_i.mT                                                   # (B, H, rows, s)
        later = torch.ones_like(scores[0, 0], dtype=bool).triu(i * rows + 1)
        p = scores.masked_fill(later, -torch.inf).softmax(-1)
        ys.append(p @ v_i)                                                    # (B, H, rows, K)
    return torch.cat(ys, 2)

def rotary_table(position, width):
    """cos and sin (2, K/2, T) of the angles t 10000^(-2i/K) (Su et al. 2021)."""
    half = width // 2
    rate = 10000.0 ** -(torch.arange(half, device=position.device) / half)
    angle = rate[:, None] * position
    return torch.stack((angle.cos(), angle.sin()))

def rotate(x, table):
    """Turns the pair of channels (i, i + K/2) of x (B, H, K, T) by its angle."""
    (a, b), (cos, sin) = x.chunk(2, -2), table
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -2).to(x.dtype)

class Attention(Layer):
    """y_t = sum_{s <= t} softmax_s(q_t . k_s / sqrt(K)) v_s
    with rotary positions. Args: heads H; window W in tokens, or None. State: all keys and values,
    or the last W."""
    def __init__(self, dim, max_len, heads=16, window=None):
        super().__init__()
        check_divides("heads", heads, dim, each=2)       # rotary positions turn pairs
        self.dim, self.heads, self.window = dim, heads, window
        self.qkv, self.out = linear(dim, 3 * dim), linear(dim, dim)
        # A table, because torch.compile would compute each cosine anew for every batch and head.
        self.register_buffer("table", rotary_table(torch.arange(max_len), dim // heads), False)
        self.state_shapes = [(heads, window or 0, dim // heads)] * 2

    def project(self, x, table):
        """q, k, v (B, H, T, K); in memory time lies last in q and k, channels in v."""
        q, k, v = self.qkv(x).mT.unflatten(1, (3, self.heads, -1)).unbind(1)  # (B, H, K, T)
        return rotate(q, table).mT, rotate(k, table).mT, v.mT

    def forward(self, x):
        q, k, v = self.project(x, self.table[..., :x.shape[1]])
        return self.out(merge_heads(causal_attention(q, k, v, self.window)))

    def init_state(self, batch, device=None, dtype=None):
        t = torch.zeros((), dtype=torch.long, device=device)
        return [*super().init_state(batch, device, dtype), t]

    def step(self, x, state):
        keys, values, t = state
        q, k, v = self.project(x[:, None], rotary_table(t[None], self.dim // self.heads))
        last = slice(-(self.window or 0), None)
        keys, values = torch.cat((keys, k), 2)[:, :, last], torch.cat((values, v), 2)[:, :, last]
        age = torch.arange(keys.shape[2], device=x.device).flip(0)
        scores = (q @ keys.mT / q.shape[-1] ** 0.5).masked_fill(age > t, -torch.inf)
        y = scores.softmax(-1) @ values                                       # (B, H, 1, K)
        return self.out(merge_heads(y))[:, 0], (keys, values, t + 1)

    def matmul_flops(self, T):
        """And q . k and p v: 4 D for each pair (t, s)."""
        W = min(self.window or T, T)
        return super().matmul_flops(T) + 4 * self.dim * (T * W - W * (W - 1) // 2)

    def nominal(self, T):
        return 2 * self.dim * (self.window or T)

# ================================ Long convolutions under a gate =================================

class ImplicitFilter(nn.Module):
    """h_c(t) = mlp(t, cos, sin)_c exp(-delta_c t) + d_c [t = 0]
    with t in units of max_len: a sine MLP of width `order` under decays spread over the channels
    (Poli et al. 2023, section 3.3). cos and sin make one turn over max_len; in mad-lab they hardly
    change. It has no recurrent form: a layer's `step` keeps all inputs and costs O(t)."""
    def __init__(self, channels, max_len, order):
        super().__init__()
        self.max_len = max_len
        self.hidden = nn.ModuleList([nn.Linear(n, order) for n in (3, order, order)])
        self.readout = linear(order, channels)
        self.skip = nn.Parameter(torch.randn(channels))
        # 1% is left at t = 1.5 of the slowest, 0.3 of the fastest: the Hyena authors' defaults.
        slow, fast = math.log(100) / 1.5, math.log(100) / 0.3
        self.register_buffer("delta", torch.linspace(slow, fast, channels), persistent=False)

    def forward(self, T):                                                     # -> (C, T)
        with torch.autocast(self.skip.device.type, enabled=False):
            t = torch.arange(T, device=self.skip.device, dtype=self.skip.dtype)[:, None]
            t = t / self.max_len
            z = torch.cat((t, (2 * math.pi * t).cos(), (2 * math.pi * t).sin()), -1)
            for layer in self.hidden:
                z = layer(z).sin()                                            # (T, order)
            h = self.readout(z) * (-self.delta * t).exp()                     # (T, C)
            return torch.cat((h[:1] + self.skip, h[1:])).T

class Hyena(Layer):
    """q, k, v = short_conv(x W);  y = (q * (h conv (k * v))) W_o
    (Poli et al. 2023, section 3.1; their order, the depth, is 2.)  Args: expand: inner width over
    D; the groups of D channels share their projections (tied, as in mad-lab), not their filters.
    kernel: taps of the short convolution. order: width of the filter's MLP. experts, top_k: the
    inner channels are so many narrow Hyenas; each token reads top_k of them (MAD's sparse parallel
    topology). Each convolves all tokens, since a later token may read it."""
    def __init__(self, dim, max_len, expand=4, kernel=3, order=4, experts=None, top_k=2):
        super().__init__()
        inner = expand * dim
        check_divides("experts", experts or 1, inner)
        self.expand, self.channels, self.gate_flops = expand, inner, 4        # skip 2, k * v, q *
        self.qkv, self.out = linear(dim, 3 * dim), linear(inner, dim)
        self.short = ShortConv(3 * inner, kernel)
        self.filter = ImplicitFilter(inner, max_len, order)
        self.router = Router(dim, experts, top_k) if experts else None
        self.state_shapes = [(kernel - 1, 3 * inner), (0, inner)]
        self.paper_state = order * inner         # as of a state-space model of that order

    def project(self, x):                                                     # (.., D)
        qkv = self.qkv(x).unflatten(-1, (3, -1))                              # (.., 3, D)
        return torch.cat([qkv] * self.expand, -1).flatten(-2)                 # (.., 3 inner)

    def mix(self, q, k, v, h):                                                # (B, T, inner)
        return q * long_conv(k * v, h)

    def mix_step(self, q, k, v, history):                                     # (B, inner)
        history = torch.cat((history, (k * v)[:, None]), 1)                   # (B, t, inner)
        h = self.filter(history.shape[1]).flip(1).T                           # (t, inner)
        return q * (h * history).sum(1), history

    def readout(self, y, x):
        if self.router is not None:
            gate = self.router(x)[..., None]                                  # (.., E, 1)
            y = (y.unflatten(-1, (gate.shape[-2], -1)) * gate).flatten(-2)
        return self.out(y.to(x.dtype))

    def forward(self, x):
        q, k, v = self.short(self.project(x)).chunk(3, -1)
        return self.readout(self.mix(q, k, v, self.filter(x.shape[1])), x)

    def step(self, x, state):
        tail, history = state
        qkv, tail = self.short.step(self.project(x), tail)
        y, history = self.mix_step(*qkv.chunk(3, -1), history)
        return self.readout(y, x), (tail, history)

    def mixing_flops(self, T):
        """Short convolutions 2 per tap; per channel FFTs 10 log2 T, skip and gates (appendix)."""
        short = 2 * self.short.taps.numel()
        return int(T * (short + self.channels * (10 * math.log2(max(T, 2)) + self.gate_flops)))

def toeplitz_attention_reference(q, k, v, h):
    """q, k (B, H, T, K), v (B, H, T, V), a filter per head h (H, T) -> (B, H, T, V)."""
    q, k, v, h = map(upcast, (q, k, v, h))
    ys = []
    for t in range(q.shape[2]):
        weight = (q[:, :, t:t + 1] * k[:, :, :t + 1]).sum(-1) * h[:, :t + 1].flip(1)
        ys.append((weight[..., None] * v[:, :, :t + 1]).sum(2))               # (B, H, V)
    return torch.stack(ys, 2)

def toeplitz_attention(q, k, v, h):
    """The same. Up to 256 tokens, a CPU's break-even: linear attention under a Toeplitz mask,
    O(T^2). Beyond: sum_i q_i (h conv (k_i v)), a long convolution for each key channel i."""
    T = q.shape[2]
    if T <= 256:
        mask = F.pad(h, (T - 1, 0)).unfold(-1, T, 1).flip(-1).to(q.dtype)     # (H, t, s): h_{t-s}
        return (q @ k.mT * mask) @ v
    q, k, v = (x.mT.contiguous() for x in (q, k, v))                          # (B, H, K or V, T)
    y, n = 0, min(q.shape[2], cached(v.numel(), v.device))   # on a GPU all K at once
    for q_i, k_i in zip(q.split(n, 2), k.split(n, 2)):
        kv = k_i[:, :, :, None] * v[:, :, None]                               # (B, H, n, V, T)
        z = long_conv(kv.flatten(1, 3).mT, h.repeat_interleave(kv.shape[2] * kv.shape[3], 0))
        y = y + (q_i[:, :, :, None] * z.mT.view(kv.shape)).sum(2)             # (B, H, V, T)
    return y.mT

class MultiHeadHyena(Hyena):
    """q, k, v = short_conv(x W);  y_t = sum_{s <= t} h_{t-s} (q_t . k_s) v_s in a head;  then W_o
    Hyena with, inside each head, the outer product k (x) v for k * v, q . for q *, and one filter
    (Massaroli et al. 2023). mad-lab passes the number of heads where the width of a head belongs
    and ties the projections; here, at D = 128, 16 heads have width 8, and W is full."""
    def __init__(self, dim, max_len, heads=16, kernel=3, order=2):
        check_divides("heads", heads, dim)
        super().__init__(dim, max_len, 1, kernel, order)
        self.heads, self.channels = heads, dim * dim // heads
        self.gate_flops = 6                   # skip 2, k (x) v 2 (as a multiply-add), q . 2
        self.filter = ImplicitFilter(heads, max_len, order)
        self.state_shapes = [(kernel - 1, 3 * dim), (0, 2 * dim)]
        self.paper_state = order * self.channels

    def mix(self, q, k, v, h):                                                # (B, T, D)
        q, k, v = (split_heads(p, self.heads) for p in (q, k, v))             # (B, H, T, K)
        return merge_heads(toeplitz_attention(q, k, v, h))

    def mix_step(self, q, k, v, history):                                     # (B, D)
        history = torch.cat((history, torch.cat((k, v), -1)[:, None]), 1)     # (B, t, 2D)
        q, k, v = (split_heads(p, self.heads) for p in (q[:, None], *history.chunk(2, -1)))
        h = self.filter(history.shape[1]).flip(1)[:, None]                    # (H, 1, t)
        return merge_heads((q @ k.mT * h) @ v)[:, 0], history

# ============ One gated linear recurrence: S_t = diag(a_t) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t ==
#   linear attention   a = 1, divided by the sum of weights
#   GLA                a_t from x_t, one per key channel
#   RWKV-5             a fixed, one per key channel; reads S_{t-1} and a bonus for the present
#   RWKV-6             the same with a_t from x_t
#   RWKV-7, DeltaNet   the delta rule: not diagonal, since what a key reads is removed first
#   Mamba-2            a_t from x_t, one per head; q_t and k_t the same for all heads
#   Mamba              a channel is a head with K = N, V = 1: a_t = exp(dt_t A), k_t = dt_t B_t,
#                      v_t = x_t, q_t = C_t

class GatedLinearRecurrence(Layer):
    """What the next layers share. Each has project(x) -> q, k, v, log_a, u (as arguments of
    `gated_linear_scan`; with delta_rule those of `delta_scan`) and a gate (B, T, .); and
    readout(y (B, H, T, V), gate) -> (B, T, H V). reads: how many earlier tokens project() needs;
    `step` carries them. extra: columns that project() adds to v."""
    extra, reads, delta_rule, state_flops = 0, 0, False, 5

    def __init__(self, dim, heads, key_width=None, inner=None):
        super().__init__()
        self.dim, self.heads, self.inner = dim, heads, inner or dim
        check_divides("heads", heads, self.inner)
        self.width, value_width = key_width or dim // heads, self.inner // heads
        self.out = linear(self.inner, dim)
        self.state_shapes = [(heads, self.width, value_width + self.extra), (self.reads, dim)]
        self.paper_state = self.width * self.inner

    def forward(self, x):
        *inputs, gate = self.project(x)
        scan = delta_scan if self.delta_rule else gated_linear_scan
        return self.out(self.readout(scan(*inputs), gate).to(x.dtype))

    def step(self, x, state):
        S, earlier = state
        window = torch.cat((earlier, x[:, None]), 1)                          # (B, reads + 1, D)
        *inputs, gate = self.project(window)
        inputs = (p if p is None or p.ndim < 4 else p[:, :, -1] for p in inputs)  # u has no time
        y, S = (delta_step if self.delta_rule else gated_linear_step)(S, *inputs)
        y = self.readout(y[:, :, None], gate if gate is None else gate[:, -1:]).to(x.dtype)
        return self.out(y)[:, 0], (S, window[:, 1:])

    def mixing_flops(self, T):
        """Per element of S: decay 1, k v 1, sum 1, read 2; delta rule: r S 2, c u 2. 2 per tap."""
        taps = sum(m.taps.numel() for m in self.modules() if isinstance(m, ShortConv))
        elements = self.heads * self.width * (self.inner // self.heads + self.extra)
        return T * (self.state_flops * elements + 2 * taps)

class LinearAttention(GatedLinearRecurrence):
    """y_t = sum_{s <= t} f(q_t) . g(k_s) v_s / sum_{s <= t} f(q_t) . g(k_s)
    (Katharopoulos et al. 2020.) f(z), g(z): softplus(W_1 z) * softplus(W_2 z), shared by the heads;
    in mad-lab without softplus, so that the denominator changes sign. It is the same recurrence for
    one more column of v, all ones; 1e-6 keeps it from 0."""
    extra, state_flops = 1, 4                                                 # nothing decays

    def __init__(self, dim, max_len, heads=16):
        super().__init__(dim, heads)
        self.qkv = linear(dim, 3 * dim)
        self.phi_q, self.phi_k = (linear(self.width, 2 * self.width) for _ in range(2))

    def project(self, x):
        # W_1 and W_2 act on a head's K channels. Multiplied into W_q and W_k first, they make one
        # wide product with x of many narrow ones: (2K, K) @ (H, K, D).
        W_q, W_k, W_v = self.qkv.weight.view(3, self.heads, self.width, self.dim)
        phi = torch.cat((self.phi_q.weight @ W_q, self.phi_k.weight @ W_k))   # (2H, 2K, D)
        z = F.linear(x, torch.cat((phi.flatten(0, 1), W_v.flatten(0, 1))))    # (B, T, 5D)
        z, v = z.split((4 * self.dim, self.dim), -1)
        a, b = split_heads(F.softplus(z), 2 * self.heads).chunk(2, -1)        # (B, 2H, T, K)
        q, k = (a * b).chunk(2, 1)
        return q, k, F.pad(split_heads(v, self.heads), (0, 1), value=1.0), None, None, None

    def readout(self, y, _):
        y, weight = upcast(y).split((self.width, 1), -1)
        return merge_heads(y / (weight + 1e-6))

    def matmul_flops(self, T):
        """x to 2D features of q and of k, to v, and out. (Weights are multiplied once a batch.)"""
        return 2 * T * self.dim * (4 + 1 + 1) * self.dim

class GatedLinearAttention(GatedLinearRecurrence):
    """log a_t = logsigmoid(W_2 W_1 x_t + b) / 16;  y_t = (norm(S_t^T q_t) * silu(x_t W_g)) W_o
    (Yang et al. 2024, sections 4.1 and 4.4.)  Args: heads H; rank of W_1. As in the authors' code
    the norm is an RMSNorm and W_g has no bias; keys are as wide as values (there: half)."""
    def __init__(self, dim, max_len, heads=8, rank=16):
        super().__init__(dim, heads)
        self.qkvg = linear(dim, 4 * dim)
        self.decay = nn.Sequential(linear(dim, rank), nn.Linear(rank, dim))
        self.norm = RMSNorm(self.width)

    def project(self, x):
        q, k, v, gate = self.qkvg(x).chunk(4, -1)
        log_a = F.logsigmoid(upcast(self.decay(x))) / 16
        q, k, v, log_a = (split_heads(p, self.heads) for p in (q, k, v, log_a))
        return q * self.width ** -0.5, k, v, log_a, None, gate

    def readout(self, y, gate):
        return merge_heads(self.norm(y)) * F.silu(gate)

class RWKV5(GatedLinearRecurrence):
    """y_t = (norm((S_{t-1} + diag(u) k_t v_t^T)^T r_t) * silu(g_t)) W_o;  a = exp(-exp(w)) fixed
    with r, k, v, g from mixtures of x_t and x_{t-1} (Peng et al. 2024, Eagle, section 4.1).
    Args: heads H. Here r is q, w log_rate; initial values are simpler than the authors'."""
    reads, mixes = 1, 4

    def __init__(self, dim, max_len, heads=8):
        super().__init__(dim, heads)
        ramp = torch.arange(dim) / dim
        self.mix = nn.Parameter(ramp.repeat(self.mixes, 1))     # shares of x_{t-1}, a row a mixture
        self.r, self.k, self.v, self.g = (linear(dim, dim) for _ in range(4))
        self.log_rate = nn.Parameter(-6 + 5 * ramp)         # half-lives from 280 tokens to 2
        self.bonus = nn.Parameter(torch.full((heads, self.width), 0.5))
        self.norm_weight = nn.Parameter(torch.ones(heads, 1, self.width))
        self.norm_bias = nn.Parameter(torch.zeros(heads, 1, self.width))

    def mixtures(self, x):
        shift = F.pad(x[:, :-1], (0, 0, 1, 0)) - x                            # x_{t-1} - x_t
        return x + shift * self.mix[:, None, None].to(x.dtype)                # (mixes, B, T, D)

    def log_decay(self, x):                               # RWKV-6 reads x; here only its length
        return -self.log_rate.exp().expand(1, x.shape[-2], -1)                # (1, T, D)

    def project(self, x):
        mixed = self.mixtures(x)
        q, k, v, gate = (W(m) for W, m in zip((self.r, self.k, self.v, self.g), mixed))
        q, k, v, log_a = (split_heads(p, self.heads) for p in (q, k, v, self.log_decay(mixed[-1])))
        return q * self.width ** -0.5, k, v, log_a, self.bonus, gate

    def readout(self, y, gate):
        y = F.layer_norm(upcast(y), (self.width,), eps=1e-5)                  # within each head
        return merge_heads(y * self.norm_weight + self.norm_bias) * F.silu(gate)

class RWKV6(RWKV5):
    """as RWKV-5, with a_t = exp(-exp(w_t)), w_t = w + tanh(m_t W_1) W_2, m_t a fifth mixture
    (Peng et al. 2024, Finch, section 4.2.)  Args: heads H; ranks of the mixtures and the decay."""
    mixes = 5

    def __init__(self, dim, max_len, heads=8, mix_rank=32, decay_rank=64):
        super().__init__(dim, max_len, heads)
        self.mix_x = nn.Parameter(torch.arange(dim) / dim)
        self.mix_down = linear(dim, 5 * mix_rank)
        self.mix_up = nn.Parameter(torch.randn(5, mix_rank, dim) * 0.01)      # small at first
        self.decay_down, self.decay_up = linear(dim, decay_rank), linear(decay_rank, dim)

    def mixtures(self, x):
        shift = F.pad(x[:, :-1], (0, 0, 1, 0)) - x
        z = self.mix_down(x + shift * self.mix_x.to(x.dtype)).tanh()          # (B, T, 5 rank)
        z = z.unflatten(-1, (5, -1)).movedim(-2, 0)                           # (5, B, T, rank)
        mix = self.mix[:, None, None] + z @ self.mix_up[:, None]              # (5, B, T, D)
        return x + shift * mix.to(x.dtype)

    def log_decay(self, x):
        w = self.log_rate + upcast(self.decay_up(self.decay_down(x).tanh()))
        return -w.clamp(max=5).exp()          # exp(-exp(5)) is 0; from 88 on the gradient is NaN

    def matmul_flops(self, T):
        return super().matmul_flops(T) + 2 * T * self.mix_up.numel()

class RWKV7(RWKV5):
    """S_t = diag(a_t) S_{t-1} - b_t c_t (c_t^T S_{t-1}) + k_t v_t^T;  y_t = S_t^T r_t
    Then (norm(y_t) + (r_t . u k_t) v_t) * g_t and W_o. a, b, c are w, a and normalised kappa of
    Peng et al. (2025, Goose); a, b and g have low rank. Left out: layer 1's v in later ones."""
    mixes, delta_rule, state_flops = 6, True, 9

    def __init__(self, dim, max_len, heads=8, rank=32):
        super().__init__(dim, max_len, heads)
        self.g = None                                     # here of a low rank, like a and b
        self.down = nn.ModuleList(linear(dim, rank) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(rank, dim) for _ in range(3))
        self.remove, self.write = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))

    def project(self, x):
        xr, xk, xv, *low = self.mixtures(x)
        acts = torch.tanh, nn.Identity(), torch.sigmoid
        a, b, g = (up(act(down(m))) for up, act, down, m in zip(self.up, acts, self.down, low))
        log_a = -math.exp(-0.5) * (self.log_rate + upcast(a)).sigmoid()       # a_t > 0.545
        q, k, v, b = self.r(xr), self.k(xk), self.v(xv), b.sigmoid()
        c, k = k * self.remove, k * (1 + (b - 1) * self.write)
        q, k, v, b, c, log_a = (split_heads(p, self.heads) for p in (q, k, v, b, c, log_a))
        c = F.normalize(upcast(c), dim=-1)
        now = (q * self.bonus[:, None] * k).sum(-1, keepdim=True) * v         # (B, H, T, V)
        gate = torch.cat((g, merge_heads(now)), -1)                           # (B, T, 2D)
        # In delta_scan's letters beta is 1, the key r that reads is c, and c, which removes, b c.
        return q, k, v, torch.ones_like(k[..., :1]), log_a, c, b * c, gate

    def readout(self, y, gate):
        gate, now = gate.chunk(2, -1)
        y = F.layer_norm(upcast(y), (self.width,), eps=1e-5)                  # within each head
        return (merge_heads(y * self.norm_weight + self.norm_bias) + now) * gate

class DeltaNet(GatedLinearRecurrence):
    """S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T;  y_t = S_t^T q_t
    with a = 1, then norm and W_o (Yang et al. 2024, DeltaNet); gated: a_t = sigmoid(x_t w + d)^A,
    one per head, and norm(y_t) * silu(x_t W_g) (Yang et al. 2024, Gated DeltaNet). q, k, v pass a
    short convolution, SiLU, q and k a norm; b is a sigmoid.  Args: heads H; gated: 0 or 1."""
    reads, delta_rule, state_flops = 3, True, 9

    def __init__(self, dim, max_len, heads=8, gated=0):
        super().__init__(dim, heads)
        self.qkv, self.short = linear(dim, 3 * dim), ShortConv(3 * dim, self.reads + 1)
        self.beta, self.norm = linear(dim, heads), RMSNorm(self.width)
        self.gate, self.dt = (linear(dim, dim), nn.Linear(dim, heads)) if gated else (None, None)
        self.A_log = nn.Parameter(torch.linspace(-4, 0, heads)) if gated else None

    def project(self, x):
        mixed = F.silu(self.short(self.qkv(x))).chunk(3, -1)
        q, k, v = (split_heads(p, self.heads) for p in mixed)                 # (B, H, T, K)
        q, k = (F.normalize(upcast(p), dim=-1) for p in (q, k))
        beta, log_a = split_heads(upcast(self.beta(x)).sigmoid(), self.heads), None
        if self.dt is not None:
            log_a = self.A_log.exp() * F.logsigmoid(upcast(self.dt(x)))       # (B, T, H)
            log_a = split_heads(log_a, self.heads)                            # (B, H, T, 1)
        return q, k, v, beta, log_a, None if self.gate is None else self.gate(x)

    def readout(self, y, gate):
        y = merge_heads(self.norm(y))
        return y if gate is None else y * F.silu(gate)

class Mamba2(GatedLinearRecurrence):
    """S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T;  y_t = norm((S_t^T C_t + D x_t) * silu(z_t)) W_o
    (Dao & Gu 2024.) Mamba with one decay per head: GLA with k = B, q = C (one for all heads),
    v = dt x. x, B, C pass a short convolution.  Args: expand: H V over D; state K; heads H."""
    reads = 3

    def __init__(self, dim, max_len, expand=2, state=4, heads=8):
        super().__init__(dim, heads, state, expand * dim)
        self.xBC, self.z_dt = linear(dim, self.inner + 2 * state), linear(dim, self.inner + heads)
        self.short = ShortConv(self.inner + 2 * state, self.reads + 1, bias=True)
        self.norm, self.D = RMSNorm(self.inner), nn.Parameter(torch.ones(heads, 1, 1))
        self.dt_bias = nn.Parameter(torch.linspace(-6.9, -2.3, heads))        # dt from 0.001 to 0.1
        self.A_log = nn.Parameter(torch.zeros(heads))

    def project(self, x):
        xBC = F.silu(self.short(self.xBC(x)))
        v, k, q = xBC.split((self.inner, self.width, self.width), -1)
        z, dt = self.z_dt(x).split((self.inner, self.heads), -1)
        dt = split_heads(F.softplus(upcast(dt) + self.dt_bias), self.heads)   # (B, H, T, 1)
        q, k = (p[:, None].expand(-1, self.heads, -1, -1) for p in (q, k))    # (B, H, T, K)
        v, log_a = split_heads(v, self.heads), -self.A_log.exp()[:, None, None] * dt
        return q, k, v * dt, log_a, None, torch.cat((z, merge_heads(self.D * v)), -1)

    def readout(self, y, gate):
        z, now = gate.chunk(2, -1)
        return self.norm((merge_heads(y) + now) * F.silu(z))

class Mamba(Layer):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t;  y_t = ((C_t . h_t + D x_t) * silu(z_t)) W_o
    S6 (Gu & Dao 2023, algorithm 2): dt, B, C from x_t, which has passed a short convolution. dt B
    is the authors' code's; equation 4 has (exp(dt A) - 1) / A times B. It mixes channels, too.
    Args: expand: inner width over D; state N; kernel: taps; dt_rank."""
    def __init__(self, dim, max_len, expand=2, state=4, kernel=4, dt_rank=8):
        super().__init__()
        self.inner, self.state, self.dt_rank = dim * expand, state, dt_rank
        self.xz, self.out = linear(dim, 2 * self.inner), linear(self.inner, dim)
        self.short = ShortConv(self.inner, kernel, bias=True)
        self.dt_B_C = linear(self.inner, dt_rank + 2 * state)
        self.dt_up = linear(dt_rank, self.inner)
        nn.init.uniform_(self.dt_up.weight, -dt_rank ** -0.5, dt_rank ** -0.5)
        # softplus(dt_bias) is log-uniform in [0.001, 0.1]: h_n forgets in 10/n to 1000/n tokens.
        dt = torch.empty(self.inner).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(dt + (-torch.expm1(-dt)).log())           # inverse softplus
        self.A_log = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(self.inner, 1))
        self.D = nn.Parameter(torch.ones(self.inner))
        self.state_shapes = [(kernel - 1, self.inner), (state, self.inner)]
        self.paper_state = state * self.inner

    def selection(self, x):
        """What depends on the token: x (.., C) -> dt (.., C), A (C, N), B and C (.., N)."""
        dt, B, C = self.dt_B_C(x).split((self.dt_rank, self.state, self.state), -1)
        return F.softplus(upcast(self.dt_up(dt)) + self.dt_bias), -self.A_log.exp(), B, C

    def readout(self, y, x, z):
        return self.out(((y + self.D * x) * F.silu(z)).to(z.dtype))

    def forward(self, x):
        x, z = self.xz(x).chunk(2, -1)                                        # (B, T, inner)
        x = F.silu(self.short(x))
        # On a GPU the (B, T, N, C) states are not kept for the backward pass, but computed again.
        inputs = (x, *self.selection(x))
        y = (selective_scan(*inputs) if x.device.type == "cpu" else
             torch.utils.checkpoint.checkpoint(selective_scan, *inputs, use_reentrant=False))
        return self.readout(y, x, z)

    def step(self, x, state):
        tail, h = state
        x, z = self.xz(x).chunk(2, -1)                                        # (B, inner)
        x, tail = self.short.step(x, tail)
        x = F.silu(x)
        y, h = selective_step(h, x, *self.selection(x))
        return self.readout(y, x, z), (tail, h)

    def mixing_flops(self, T):
        """Per channel: 2 a tap, 7 an element of h (discretise 3, recur 2, read 2), dt, D, z 4."""
        return T * self.inner * (2 * self.short.taps.shape[1] + 7 * self.state + 4)

# ============= Channel mixers: each token by itself (RWKV's also reads the one before) ============

class MLP(Layer):
    """y = gelu(x W_1) W_2"""
    def __init__(self, dim, max_len, expand=4):
        super().__init__()
        self.up, self.down = linear(dim, expand * dim), linear(expand * dim, dim)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))

class SwiGLU(Layer):
    """y = (silu(x W_1) * x W_2) W_3
    (Shazeer 2020.)  Args: inner width, by default 352 at D = 128, as in mad-lab (paper: 512)."""
    def __init__(self, dim, max_len, inner=None):
        super().__init__()
        inner = inner or 11 * dim // 4
        self.up, self.down = linear(dim, 2 * inner), linear(inner, dim)

    def forward(self, x):
        gate, x = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * x)

class MoE(Layer):
    """y = sum over the chosen experts e of gate_e (gelu(x W_1e) * x W_2e) W_3e
    All experts are computed, in two wide products, and gates of 0 take out those not chosen: with
    experts so small that takes less time than to sort tokens by expert. FLOPs are of the chosen.
    Args: experts E; width W of an expert; top_k experts per token."""
    def __init__(self, dim, max_len, experts=8, width=16, top_k=2):
        super().__init__()
        self.router = Router(dim, experts, top_k)
        self.w_in = Experts(experts, dim, 2 * width)
        self.w_out = Experts(experts, width, dim)

    def forward(self, x):
        w_in, w_out = self.w_in.weight, self.w_out.weight              # (E, D, 2W), (E, W, D)
        y = x @ w_in.transpose(0, 1).flatten(1)                        # (.., 2 E W)
        gate, up = y.unflatten(-1, (len(w_in), 2, -1)).unbind(-2)      # (.., E, W)
        y = F.gelu(gate) * up * self.router(x)[..., None]
        return y.flatten(-2).to(x.dtype) @ w_out.flatten(0, 1)

    def matmul_flops(self, T):
        expert = self.w_in.weight[0].numel() + self.w_out.weight[0].numel()
        return super().matmul_flops(T) + 2 * T * self.router.top_k * expert

class RWKVChannelMixer(Layer):
    """y = [sigmoid(x_r W_r) *] relu(x_k W_k)^2 W_v, with x_r, x_k mixtures of x_t and x_{t-1}
    (Peng et al. 2024.) The mixture is x_t + m (x_{t-1} - x_t), as RWKV-6 writes it; RWKV-5's m is
    1 minus this one; RWKV-7 has no sigmoid: receptance = 0.  Args: inner width; receptance."""
    def __init__(self, dim, max_len, inner=None, receptance=1):
        super().__init__()
        inner = inner or 4 * dim
        self.mix = nn.Parameter((torch.arange(dim) / dim).repeat(1 + bool(receptance), 1))
        self.k, self.v = linear(dim, inner), linear(inner, dim)
        self.r = linear(dim, dim) if receptance else None
        self.state_shapes, self.paper_state = [(dim,)], dim

    def forward(self, x):
        return self.step(x, [F.pad(x[:, :-1], (0, 0, 1, 0))])[0]              # x_{t-1}

    def step(self, x, state):
        shift, mix = state[0] - x, self.mix.to(x.dtype)                       # x_{t-1} - x_t
        gate = 1 if self.r is None else self.r(x + shift * mix[0]).sigmoid()
        return gate * self.v(self.k(x + shift * mix[-1]).relu().square()), [x]

# ================================ The table, with MAD's settings ================================
# At width 128, two mixers with fixed state hold 4096 elements (of Mamba, four), the paper's common
# size; mh-linear-attention 2048, attention and layers of one wide head their own.

LAYERS = {
    "attention": (Attention, dict(heads=1)),
    "mh-attention": (Attention, dict(heads=16)),
    "sliding-attention": (Attention, dict(heads=1, window=32)),
    "mh-sliding-attention": (Attention, dict(heads=16, window=32)),
    "hyena": (Hyena, dict(expand=4, kernel=3, order=4)),
    "mh-hyena": (MultiHeadHyena, dict(heads=16, kernel=3, order=2)),
    "hyena-experts": (Hyena, dict(expand=1, kernel=3, order=16, experts=8, top_k=2)),
    "linear-attention": (LinearAttention, dict(heads=1)),
    "mh-linear-attention": (LinearAttention, dict(heads=16)),
    "gated-linear-attention": (GatedLinearAttention, dict(heads=1, rank=16)),
    "mh-gated-linear-attention": (GatedLinearAttention, dict(heads=8, rank=16)),
    "rwkv5-time-mixer": (RWKV5, dict(heads=8)),
    "rwkv6-time-mixer": (RWKV6, dict(heads=8)),
    "mamba": (Mamba, dict(expand=2, state=4, kernel=4, dt_rank=8)),
    "mamba2": (Mamba2, dict(expand=2, state=4, heads=8)),
    "deltanet": (DeltaNet, dict(heads=8, gated=0)),
    "gated-deltanet": (DeltaNet, dict(heads=8, gated=1)),
    "rwkv7-time-mixer": (RWKV7, dict(heads=8, rank=32)),
    "mlp": (MLP, dict(expand=4)),
    "swiglu": (SwiGLU, dict()),
    "moe-mlp": (MoE, dict(experts=8, width=16, top_k=2)),
    "rwkv5-channel-mixer": (RWKVChannelMixer, dict()),
    "rwkv6-channel-mixer": (RWKVChannelMixer, dict()),
    "rwkv7-channel-mixer": (RWKVChannelMixer, dict(receptance=0)),
}

def build_layer(name, dim, max_len, /, **overrides):
    """The layer of that name in LAYERS, with its MAD settings or the given ones instead."""
    if name not in LAYERS:
        raise unknown("layer", name, LAYERS)
    cls, settings = LAYERS[name]
    allowed = list(inspect.signature(cls).parameters)[2:]
    for key, value in overrides.items():
        if key not in allowed:
            raise unknown(f"setting of {name}", key, allowed)
        least = 0 if key in ("gated", "receptance") else 1                    # 0 turns it off
        if type(value) is not int or value < least:
            raise UserError(f"{name}({key}={value!r}): permitted: a whole number from {least} on")
    return cls(dim, max_len, **{**settings, **overrides})

# ============================ A look inside: which tokens a layer mixes ===========================

def mixing(layer, x):
    """(T, T): how much output t (row) depends on input s (column) of one sequence x (1, T, D): the
    norm of the gradient of g . y_t, for one random direction g."""
    g = F.normalize(torch.randn_like(x[0, 0]), dim=0)                         # (D,)
    rows = torch.autograd.functional.jacobian(lambda x: layer(x)[0] @ g, x)   # (T, 1, T, D)
    return rows[:, 0].norm(dim=-1)

def shade(matrix, decades=5):
    """1 for the largest entry, 0 for those 10^decades times smaller, on a log scale."""
    return (1 + (matrix / matrix.max().clamp(min=1e-30)).log10() / decades).clamp(min=0)

def draw(matrix, shades=" .:-=+*#%@"):
    """The matrix as text, two characters an entry."""
    rows = (shade(matrix) * (len(shades) - 1)).ceil().int()
    return "\n".join("".join(2 * shades[i] for i in row).rstrip() for row in rows)

def show_mixing(pictures):
    """Prints {title: (T, T)}."""
    for title, matrix in pictures.items():
        print(f"{title}: outputs t down, inputs s across\n{draw(matrix)}\n")

# ============================================ Speed ==============================================

def tune_allocator():
    """Tells glibc to keep large buffers. Otherwise it returns them after use, and gets them back at
    each step, zeroed page by page, which is half of a small model's time."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):                      # no glibc here
        return
    trim_threshold, mmap_threshold, most = -1, -3, 2 ** 31 - 1
    mallopt(trim_threshold, most)
    mallopt(mmap_threshold, most) or mallopt(mmap_threshold, 32 << 20)        # in older versions

def seconds(f, device="cpu", repeat=5):
    """The fastest of `repeat` calls, after one to warm up; repeat=0: that one."""
    run = lambda: (f(), getattr(torch, device).synchronize())
    times = timeit.repeat(run, number=1, repeat=repeat + 1)
    return min(times[1:] or times)

def time_layer(layer, x, repeat):
    """Seconds of forward, and of forward + backward, on a GPU with matrix products in bfloat16."""
    def run(backward):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            y = layer(x)
        if backward:
            torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))

    return [seconds(lambda: run(backward), x.device.type, repeat) for backward in (False, True)]

LOOPS = {name.removesuffix("_reference"): f for name, f in globals().items()
         if name.endswith("_reference")}

def benchmark(args, B, T, D):
    """Prints each layer's equation and cost; then the times of its fast path and of its loop."""
    layers = {name: build_layer(name, D, T).to(args.device) for name in args.layers.split(",")}
    cuda, x = args.device == "cuda", torch.randn(B, T, D, device=args.device, requires_grad=True)
    n, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a = torch.randn(n, n, device=args.device, dtype=dtype)
    rate = 2 * n ** 3 / seconds(lambda: a @ a, args.device, 20)               # FLOP/s
    print(f"{torch.cuda.get_device_name() if cuda else 'cpu'}, {dtype}, {torch.get_num_threads()} "
          f"threads, torch {torch.__version__}; B {B}, T {T}, D {D}; a unit is a product 1024^3, "
          f"{2e3 * 1024 ** 3 / rate:.2f} ms\n\n{'layer':<27}{'state':>11}{'MFLOP/token':>12}"
          f"{'fwd ms':>9}{'fwd+bwd':>10}{'units':>8}{'of rate':>8}{'peak MB':>9}")
    for name, layer in layers.items():
        print(f"\n{(inspect.getdoc(layer) or name).splitlines()[0]}")
        flops = layer.flops(T) * B
        loops = args.loops and not args.compile and layer.nominal(T) > D      # channel mixers: none
        if args.compile:
            torch.compiler.reset()                # it keeps only a few graphs of a function
            layer.compile(dynamic=False)
        for title, replaced in [(name, {}), ("  its loop", LOOPS)][:1 + loops]:
            cuda and torch.cuda.reset_peak_memory_stats()
            try:
                with mock.patch.dict(globals(), replaced):
                    forward, both = time_layer(layer, x, repeat=0 if replaced else 5)
            except RuntimeError as error:                  # such as a lack of memory: go on
                print(f"{title:<27}{error}"[:100])
                continue
            peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else math.nan
            print(f"{title:<27}{layer.nominal(T):>11,}{flops / B / T / 1e6:>12.3f}"
                  f"{1e3 * forward:>9.2f}{1e3 * both:>10.2f}{both * rate / 2 / 1024 ** 3:>8.1f}"
                  f"{3 * flops / both / rate:>8.3f}{peak:>9.0f}", flush=True)

def main():
    parser = Parser(description="Time each layer's fast path, and the loop that defines it.")
    parser.add_argument("--layers", default=",".join(LAYERS), help="names, with commas between")
    parser.add_argument("--shape", type=int, nargs=3, default=(8, 1024, 128), metavar=tuple("BTD"))
    parser.add_argument("--compile", action="store_true", help="compile the layers")
    parser.add_argument("--no-loops", dest="loops", action="store_false", help="skip the loops")
    parser.add_argument("--show", metavar="LAYER", help="draw which tokens a layer (or: all) mixes")
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    parser.add_argument("--device", default=devices[0], choices=devices)
    args = parser.parse_args()
    if min(args.shape) < 1:
        raise UserError(f"--shape is {args.shape}; permitted: three numbers from 1 on")
    torch.manual_seed(0)
    if args.show:
        names = LAYERS if args.show == "all" else [args.show]
        x = torch.randn(1, 48, 128)
        return show_mixing({n: mixing(build_layer(n, 128, 48), x) for n in names})
    tune_allocator()
    benchmark(args, *args.shape)

if __name__ == "__main__":
    run_main(main)
