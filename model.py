"""
How layers stack: a pattern of layer names becomes a model, its costs become a ledger.

    "mh-hyena swiglu mh-attention swiglu"          the striped multi-head Hyena: `--arch hybrid`
    "hyena(filter=modal,order=8) swiglu"           settings of a layer in brackets

A block is x + layer(norm(x)). Two backbones (Poli et al. 2024, section 3):
  lm           embedding, blocks, norm, unembedding; position t answers from tokens 0 to t
  autoencoder  the blocks encode; the vector at the *last* position alone, plus a sinusoid a
               position, goes through a small MLP that has to say the whole sequence again

  B batch   T time   D width   M vocabulary

  python model.py           every architecture: parameters, state at T = 128 and 4096, FLOPs
  python model.py hybrid    one of them (or any pattern), layer by layer
"""
import argparse
import ast
import re
from dataclasses import dataclass

import torch
import torch.nn as nn

from layers import LAYERS, Experts, ImplicitFilter, RMSNorm, build_layer, count_state, unknown

# =================================================================================================
# Patterns
# =================================================================================================


def stripe(mixer, channel_mixer, n_blocks, attention_every=0, attention="mh-attention"):
    """
    The paper's striping: n_blocks of (mixer, channel mixer), in which every `attention_every`-th
    mixer is attention (2: 50%, 4: 25%, 12: 8.3%, 1: all, 0: none). Returns a pattern.
    """
    blocks = []
    for i in range(1, n_blocks + 1):
        here = attention if attention_every and i % attention_every == 0 else mixer
        blocks += [here] if here == "mamba" else [here, channel_mixer]
    return " ".join(blocks)


ARCHS = {       # two blocks each, as in MAD; mamba mixes tokens and channels, so it takes four
    # sequential
    "transformer": stripe("mh-attention", "swiglu", 2),
    "transformer-1head": stripe("attention", "swiglu", 2),
    "transformer-moe": stripe("mh-attention", "moe-mlp", 2),
    "sliding": stripe("mh-sliding-attention", "swiglu", 2),
    "linear-attention": stripe("linear-attention", "swiglu", 2),
    "mh-linear-attention": stripe("mh-linear-attention", "swiglu", 2),
    "gla": stripe("gated-linear-attention", "swiglu", 2),
    "mh-gla": stripe("mh-gated-linear-attention", "swiglu", 2),
    "rwkv5": stripe("rwkv5-time-mixer", "rwkv5-channel-mixer", 2),
    "rwkv6": stripe("rwkv6-time-mixer", "rwkv6-channel-mixer", 2),
    "mamba": stripe("mamba", "", 4),
    "hyena": stripe("hyena", "swiglu", 2),
    "hyena-moe": stripe("hyena", "moe-mlp", 2),
    "mh-hyena": stripe("mh-hyena", "swiglu", 2),
    "mh-hyena-moe": stripe("mh-hyena", "moe-mlp", 2),
    "hyena-experts": stripe("hyena-experts", "swiglu", 2),
    "hyena-experts-moe": stripe("hyena-experts", "moe-mlp", 2),
    # striped: the mixer first, attention second
    "hybrid": stripe("mh-hyena", "swiglu", 2, 2),
    "striped-hyena": stripe("hyena", "swiglu", 2, 2),
    "striped-hyena-moe": stripe("hyena", "moe-mlp", 2, 2),
    "striped-mh-hyena-moe": stripe("mh-hyena", "moe-mlp", 2, 2),
    "striped-hyena-experts": stripe("hyena-experts", "swiglu", 2, 2),
    "striped-hyena-experts-moe": stripe("hyena-experts", "moe-mlp", 2, 2),
    "striped-mamba": "mamba mamba mh-attention swiglu",
    "striped-mh-gla": stripe("mh-gated-linear-attention", "swiglu", 2, 2),
    "striped-rwkv6": "rwkv6-time-mixer rwkv6-channel-mixer mh-attention swiglu",
}


def find_pattern(arch):
    """The pattern of an architecture's name. ValueError with the closest name if there is none."""
    if arch in ARCHS:
        return ARCHS[arch]
    raise unknown("architecture", arch, ARCHS)


def parse_pattern(pattern):
    """"a b(k=v,...) c" -> [(name, settings), ...]. ValueError if it can't be read so."""
    layers = []
    for part in re.findall(r"[^\s()]+(?:\([^()]*\))?|[()]", pattern):
        name, _, inside = part.rstrip(")").partition("(")
        if not name:
            raise ValueError(f"pattern {pattern!r}: a bracket outside name(key=value,key=value)")
        settings = {}
        for item in filter(None, inside.split(",")):
            key, _, value = (s.strip() for s in item.partition("="))
            if not key or not value:
                raise ValueError(f"layer {part!r}: write settings as name(key=value,key=value)")
            try:
                settings[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                settings[key] = value                     # a bare word, as in filter=modal
        layers.append((name, settings))
    if not layers:
        raise ValueError(f"empty pattern {pattern!r}: name layers from {', '.join(LAYERS)}")
    return layers


# =================================================================================================
# The model
# =================================================================================================


class Block(nn.Module):
    """x + layer(norm(x)): every layer reads a normalised stream and adds to it."""

    def __init__(self, layer, dim):
        super().__init__()
        self.norm, self.layer = RMSNorm(dim), layer

    def forward(self, x):
        return x + self.layer(self.norm(x))

    def step(self, x, state):
        y, state = self.layer.step(self.norm(x), state)
        return x + y, state


class Decoder(nn.Module):
    """The autoencoder's way back: one vector (B, D) -> (B, T, D), each position by itself."""

    def __init__(self, dim):
        super().__init__()
        self.layers = nn.Sequential(RMSNorm(dim), nn.Linear(dim, dim), nn.GELU(),
                                    RMSNorm(dim), nn.Linear(dim, dim), nn.GELU())

    def forward(self, code, T):
        D, device = code.shape[-1], code.device
        rate = 10000.0 ** -(torch.arange(0, D, 2, device=device) / D)
        angle = torch.arange(T, device=device)[:, None] * rate                # (T, D/2)
        where = torch.stack((angle.sin(), angle.cos()), -1).flatten(1)        # (T, D), D + 1 if odd
        return self.layers(code[:, None] + where[:, :D].to(code.dtype))


class Model(nn.Module):
    """
    pattern names the layers, in order (module docstring); vocab_size is M and dim D; max_len is the
    longest sequence, and an implicit filter's unit of time. Layers
    initialise themselves; only the embedding, which is the model's own, is set here. Raises
    ValueError for an unknown layer, setting or backbone.
    """

    def __init__(self, pattern, vocab_size, dim=128, max_len=128, backbone="lm"):
        super().__init__()
        if backbone not in ("lm", "autoencoder"):
            raise ValueError(f"backbone={backbone!r}: choose lm or autoencoder")
        self.pattern, self.dim, self.max_len, self.backbone = pattern, dim, max_len, backbone
        layers = parse_pattern(pattern)
        self.names = [name for name, _ in layers]
        self.embed = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.embed.weight, std=0.02)                          # as in mad-lab
        self.blocks = nn.ModuleList([Block(build_layer(name, dim, max_len, **settings), dim)
                                     for name, settings in layers])
        self.decoder = Decoder(dim) if backbone == "autoencoder" else None
        self.norm = RMSNorm(dim)
        self.unembed = nn.Linear(dim, vocab_size, bias=False)

    def forward(self, tokens):
        """tokens (B, T) -> logits (B, T, M)."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        if self.decoder is not None:
            x = self.decoder(x[:, -1], tokens.shape[1])
        return self.unembed(self.norm(x))

    def init_state(self, batch):
        """The state before the first token. Raises ValueError for an autoencoder."""
        if self.decoder is not None:
            raise ValueError("step and generate need a language model; this is an autoencoder")
        at = dict(device=self.embed.weight.device, dtype=self.embed.weight.dtype)
        return [block.layer.init_state(batch, **at) for block in self.blocks]

    def step(self, token, state):
        """One token (B,) and the state of every layer -> logits (B, M) of the next, new state."""
        x, new = self.embed(token), []
        for block, s in zip(self.blocks, state):
            x, s = block.step(x, s)
            new.append(s)
        return self.unembed(self.norm(x)), new

    @torch.no_grad()
    def generate(self, tokens, n, temperature=1.0, top_k=None):
        """
        Continue tokens (B, T) by n more, through `step`; temperature 0 is greedy. Returns
        (B, T + n). Raises ValueError for an autoencoder and for T = 0.
        """
        if not tokens.shape[1]:
            raise ValueError("generate needs at least one token to go on from")
        state = self.init_state(len(tokens))
        for token in tokens.unbind(1):
            logits, state = self.step(token, state)
        for i in range(n):
            token = pick(logits, temperature, top_k)
            tokens = torch.cat((tokens, token[:, None]), 1)
            if i + 1 < n:
                logits, state = self.step(token, state)
        return tokens


def pick(logits, temperature, top_k):
    """One token a row of logits (B, M): the best, or drawn from the softmax of the top_k best."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None:
        worst = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < worst, -torch.inf)
    logits = logits - logits.amax(-1, keepdim=True)              # else low temperatures overflow
    return torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]


def decayed(model):
    """
    The parameters that get weight decay: matrices that multiply activations (nn.Linear, Experts)
    and the embedding. Not norms, biases, short and long filters (an implicit one's small MLP
    multiplies times, not activations), Mamba's A and D, RWKV's mixtures, bonus and rates. (RWKV-6's
    mix_up is such a matrix, but counts as one of the mixtures; its mix_down gets decay.)
    """
    in_filters = {m for f in model.modules() if isinstance(f, ImplicitFilter) for m in f.modules()}
    return [m.weight for m in model.modules()
            if isinstance(m, (nn.Linear, nn.Embedding, Experts)) and m not in in_filters]


# =================================================================================================
# The ledger
# =================================================================================================


@dataclass
class Entry:
    """One layer's costs; state in numbers a sequence, FLOPs forward for one sequence."""
    name: str
    parameters: int
    state: int          # carried by step after T tokens, counted from its tensors
    nominal: int        # as the paper counts it
    flops: int


def state_after(layer, dim, T):
    """
    Numbers that `step` carries after T tokens. Counted after one and two tokens; what a state
    grows by a token (keys and values, an implicit filter's history) it grows by at every token.
    """
    p = next(layer.parameters())
    x, state = p.new_zeros(1, dim), layer.init_state(1, device=p.device, dtype=p.dtype)
    with torch.no_grad():
        state = layer.step(x, state)[1]
        one = count_state(state)
        two = count_state(layer.step(x, state)[1])
    return two + (T - 2) * (two - one)


def ledger(model, T):
    """One Entry a layer, then one for embedding, norms and unembedding."""
    count = lambda module: sum(p.numel() for p in module.parameters())
    rows = [Entry(name, count(block), state_after(block.layer, model.dim, T),
                  block.layer.nominal(T), block.layer.flops(T))
            for name, block in zip(model.names, model.blocks)]
    rest = count(model) - sum(r.parameters for r in rows)
    name = "embedding, unembedding" if model.decoder is None else "embedding, decoder"
    weights = sum(m.weight.numel() for part in model.children() if part is not model.blocks
                  for m in part.modules() if isinstance(m, nn.Linear))
    return rows + [Entry(name, rest, 0, 0, 2 * T * weights)]


def total(rows):
    return Entry("total", *(sum(getattr(r, f) for r in rows)
                            for f in ("parameters", "state", "nominal", "flops")))


def show_ledger(model, T):
    """The ledger as lines of text."""
    rows = ledger(model, T)
    lines = [f"{'layer':<27}{'parameters':>12}{f'state, T={T}':>15}{'paper counts':>14}"
             f"{'MFLOP a token':>15}"]
    lines += [f"{r.name:<27}{r.parameters:>12,}{r.state:>15,}{r.nominal:>14,}"
              f"{r.flops / T / 1e6:>15.3f}" for r in [*rows, total(rows)]]
    return "\n".join(lines)


LEGEND = """
paper state   numbers at T = 128 as the paper counts them; 4096 is its common size at width 128.
              Beside it: RWKV's channel mixers keep the token before (the width), heads of 8 give
              mh-linear-attention 2048; attention and layers of one wide head have their own
+ a token     what of it grows with T: keys and values of attention (a stripe's other layers: none)
carried       numbers that `step` really keeps at T = 128, and at 4096: with short convolutions'
              tails, normalisers, and the history of inputs that an implicit filter needs (a modal
              one: none)"""


def show_architectures(dim):
    print(f"{'architecture':<27}{'parameters':>11}{'paper state':>12}{'+ a token':>10}"
          f"{'carried':>9}{'T=4096':>11}{'kFLOP/token':>12}  pattern")
    for name, pattern in ARCHS.items():
        model = Model(pattern, 16, dim, 4096)
        short, next_, long = (total(ledger(model, T)) for T in (128, 129, 4096))
        print(f"{name:<27}{short.parameters:>11,}{short.nominal:>12,}"
              f"{next_.nominal - short.nominal:>10,}{short.state:>9,}{long.state:>11,}"
              f"{short.flops / 128e3:>12,.0f}  {pattern}")
    print(LEGEND)


def main():
    parser = argparse.ArgumentParser(description="Parameters, state and FLOPs of architectures.")
    parser.add_argument("arch", nargs="?", help="one architecture or pattern, layer by layer")
    parser.add_argument("--dim", type=int, default=128, help="width D (default 128)")
    parser.add_argument("--seq-len", type=int, default=128,
                        help="length T for one architecture (default 128)")
    args = parser.parse_args()
    if args.seq_len < 1 or args.dim < 1:
        parser.error("--dim and --seq-len must be at least 1")
    try:
        if args.arch is None:
            return show_architectures(args.dim)
        word = re.fullmatch(r"[\w-]+", args.arch) and args.arch not in LAYERS
        pattern = find_pattern(args.arch) if word else args.arch
        print(pattern, show_ledger(Model(pattern, 16, args.dim, args.seq_len), args.seq_len),
              sep="\n")
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
