"""
How layers stack: a pattern of layer names becomes a model, its costs become a ledger.

    "mh-hyena swiglu mh-attention swiglu"       the striped multi-head Hyena: `--arch hybrid`
    "hyena(expand=2,order=8) swiglu"            settings of a layer in brackets

Two backbones (Poli et al. 2024, section 3):
  lm           embedding, blocks, norm, unembedding; position t answers from tokens 0 to t
  autoencoder  an MLP restores each position from its sinusoid and the *last* position's vector

  B batch   T time   D width   M vocabulary

  python model.py                   every architecture: parameters, state, FLOPs
  python model.py hybrid            one of them, or any pattern, layer by layer
  python model.py --show out/RUN    which tokens the layers of a trained run mix
"""
import re
from collections import namedtuple
from pathlib import Path

import torch
import torch.nn as nn

from layers import (LAYERS, Experts, ImplicitFilter, RMSNorm, build_layer, count_state, mixing,
                    show_mixing)
from tasks import Parser, UserError, encode, run_main, token_table, unknown

# -------------------------------------------------------------------------------------------------
# Patterns

def stripe(mixer, channel_mixer, n_blocks, attention_every=0, attention="mh-attention"):
    """The paper's striping: n_blocks of (mixer, channel mixer) in which every `attention_every`-th
    mixer is attention (1: all, 2: 50%, 4: 25%, 12: 8.3%, 0: none). Returns a pattern."""
    own = mixer if mixer.startswith("mamba") else channel_mixer          # Mamba mixes channels, too
    return " ".join(f"{attention} {channel_mixer}" if attention_every and i % attention_every == 0
                    else f"{mixer} {own}" for i in range(1, n_blocks + 1))

BLOCKS = {"transformer": "mh-attention", "transformer-1head": "attention",
          "sliding": "mh-sliding-attention", "linear-attention": "linear-attention",
          "mh-linear-attention": "mh-linear-attention", "gla": "gated-linear-attention",
          "mh-gla": "mh-gated-linear-attention", "rwkv5": "rwkv5-time-mixer rwkv5-channel-mixer",
          "rwkv6": "rwkv6-time-mixer rwkv6-channel-mixer", "mamba": "mamba mamba",
          "hyena": "hyena", "mh-hyena": "mh-hyena", "hyena-experts": "hyena-experts",
          "mamba2": "mamba2 mamba2", "deltanet": "deltanet", "gated-deltanet": "gated-deltanet",
          "rwkv7": "rwkv7-time-mixer rwkv7-channel-mixer"}
BLOCKS = {name: block if " " in block else f"{block} swiglu" for name, block in BLOCKS.items()}
BLOCKS |= {f"{name}-moe": BLOCKS[name].replace("swiglu", "moe-mlp")
           for name in ("transformer", "hyena", "mh-hyena", "hyena-experts")}
# Two blocks, as in MAD; in a stripe the second one is attention.
ARCHS = {name: f"{block} {block}" for name, block in BLOCKS.items()}
ARCHS |= {f"striped-{name}": f"{block} mh-attention {'moe-mlp' if 'moe' in name else 'swiglu'}"
          for name, block in BLOCKS.items() if not name.startswith("transformer")}
ARCHS["hybrid"] = ARCHS["striped-mh-hyena"]

def parse_pattern(pattern):
    """Layers "a b(k=1,...) c", or an architecture -> [(name, settings), ...]. Raises UserError."""
    setting = r"\s*(\w+)\s*=\s*([\w.-]+)\s*"
    layer = rf"([\w-]+)(?:\(({setting}(?:,{setting})*)?\))?"
    pattern = ARCHS.get(pattern, pattern)
    if not re.fullmatch(rf"\s*{layer}(\s+{layer})*\s*", pattern):
        raise UserError(f"pattern {pattern!r}: write layers as name or name(key=value,key=value)")

    number = lambda value: int(value) if value.isdecimal() else value
    layers = [(name, {key: number(value) for key, value in re.findall(setting, settings)})
              for name, settings, *_ in re.findall(layer, pattern)]
    for name, _ in layers:
        if name not in LAYERS:
            raise unknown("layer", name, LAYERS) if len(layers) > 1 else unknown(
                "architecture or layer", name, [*ARCHS, *LAYERS])
    return layers

# -------------------------------------------------------------------------------------------------
# The model

class Block(nn.Module):
    """x + layer(norm(x)): every layer reads a normalised stream and adds to it."""

    def __init__(self, name, settings, dim, max_len):
        super().__init__()
        self.name, self.norm = name, RMSNorm(dim)
        self.layer = build_layer(name, dim, max_len, **settings)

    def forward(self, x):
        return x + self.layer(self.norm(x))

    def step(self, x, state):
        y, state = self.layer.step(self.norm(x), state)
        return x + y, state

def sinusoids(T, dim, device):
    """A vector for each position (T, D): sines and cosines of the position, interleaved."""
    rate = 10000.0 ** -(torch.arange(0, dim, 2, device=device) / dim)
    angle = torch.arange(T, device=device)[:, None] * rate                    # (T, D/2)
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)[:, :dim]    # (T, D)

class Model(nn.Module):
    """pattern names the layers in order, or is in ARCHS; vocab_size is M, dim D; max_len is the
    longest sequence, a filter's unit of time. UserError for an unknown layer or setting."""

    def __init__(self, pattern, vocab_size, dim=128, max_len=128, backbone="lm"):
        super().__init__()
        self.args = dict(pattern=pattern, vocab_size=vocab_size, dim=dim, max_len=max_len,
                         backbone=backbone)
        self.embed = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.embed.weight, std=0.02)                          # as in mad-lab
        self.blocks = nn.ModuleList([Block(name, settings, dim, max_len)
                                     for name, settings in parse_pattern(pattern)])
        hidden = lambda: (RMSNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.decoder = nn.Sequential(*hidden(), *hidden()) if backbone == "autoencoder" else None
        self.norm = RMSNorm(dim)
        self.unembed = nn.Linear(dim, vocab_size, bias=False)

    def forward(self, tokens, unembed=True):
        """tokens (B, T) -> logits (B, T, M); unembed=False: what the unembedding reads."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        if self.decoder is not None:
            positions = sinusoids(tokens.shape[1], x.shape[-1], x.device).to(x.dtype)
            x = self.decoder(x[:, -1:] + positions)                           # (B, T, D)
        x = self.norm(x)                                                      # (B, T, D)
        return self.unembed(x) if unembed else x

    def init_state(self, batch):
        """The state of every layer before the first token. UserError for an autoencoder."""
        if self.decoder is not None:
            raise UserError("an autoencoder has no next token: generate from a language model")
        at = dict(device=self.embed.weight.device, dtype=self.embed.weight.dtype)
        return [block.layer.init_state(batch, **at) for block in self.blocks]

    def step(self, token, state):
        """One token (B,) and the states -> logits (B, M) of the next token, new states."""
        x, new = self.embed(token), []
        for block, s in zip(self.blocks, state):
            x, s = block.step(x, s)
            new.append(s)
        return self.unembed(self.norm(x)), new

    @torch.no_grad()
    def generate(self, tokens, n, temperature=1.0, top_k=None):
        """Continue tokens (B, T >= 1) by n, one `step` each -> (B, T + n). At temperature 0 each is
        the likeliest."""
        state, M = self.init_state(len(tokens)), self.args["vocab_size"]
        for i in range(tokens.shape[1] + n - 1):
            logits, state = self.step(tokens[:, i], state)
            if i + 1 == tokens.shape[1]:                  # what was given has been read
                logits, ids = logits.topk(min(top_k or M, M))                 # the largest first
                logits = (logits - logits[:, :1]) / max(temperature, 1e-30)   # at most 0
                drawn = ids.gather(1, torch.multinomial(logits.softmax(-1), 1))
                tokens = torch.cat((tokens, drawn), 1)
        return tokens

def decayed(model):
    """The parameters with weight decay: the weights of nn.Linear, nn.Embedding and Experts, but not
    of a filter's MLP, which reads times. Not: norms, biases, taps, A, D, RWKV's vectors, mix_up."""
    in_filters = {m for f in model.modules() if isinstance(f, ImplicitFilter) for m in f.modules()}
    return [m.weight for m in model.modules()
            if isinstance(m, (nn.Linear, nn.Embedding, Experts)) and m not in in_filters]

def make_optimizer(model, lr, weight_decay, beta2):
    """AdamW in two groups: with weight decay, and without."""
    chosen = set(decayed(model))
    groups = [dict(params=[p for p in model.parameters() if (p in chosen) == decays],
                   weight_decay=weight_decay * decays, initial_lr=lr) for decays in (True, False)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), fused=True)

def load_checkpoint(path, device="cpu"):
    """A .pt file of tensors and Python's own types; no code in it runs. UserError if unreadable."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:              # a damaged archive raises errors of many kinds
        way_out = ("if it is damaged, delete it" if Path(path).exists() else
                   "give the folder of a run that has saved")
        raise UserError(f"{path} can't be read ({type(error).__name__}): {way_out}") from None

def load_run(folder, device="cpu"):
    """The trained model in a run's folder, and its checkpoint."""
    saved = load_checkpoint(Path(folder, "ckpt.pt"), device)
    model = Model(**saved["model_args"]).to(device)
    model.load_state_dict(saved["model"])
    return model, saved

def sample(folder, prompt, n=200, device="cpu", seed=0):
    """The prompt and n tokens that a run's model writes after it. UserError for an empty prompt and
    for a run that is not of text."""
    model, saved = load_run(folder, device)
    if not (prompt and saved["tokenizer"]):
        raise UserError("--sample takes a run of --task text, --prompt a character or more")
    prompt = torch.tensor([encode(prompt, saved["tokenizer"])], device=device)
    torch.manual_seed(seed)
    tokens = model.generate(prompt, n, temperature=0.8, top_k=50)[0].tolist()
    table = token_table(saved["tokenizer"])
    return b"".join(table.get(token, b"") for token in tokens).decode(errors="replace")

# -------------------------------------------------------------------------------------------------
# The ledger

# The costs of a layer for one sequence of length T: `state` counts the elements that `step` carries
# after T tokens, `nominal` is the paper's count of them, `flops` are those of forward.
Entry = namedtuple("Entry", "name parameters state nominal flops")

@torch.no_grad()
def ledger(model, T):
    """One Entry per layer with its norm, then one for embedding, decoder, norm, unembedding."""
    count = lambda module: sum(p.numel() for p in module.parameters())
    rows, x = [], model.embed.weight[:1]                                      # (1, D)
    for block in model.blocks:
        layer = block.layer
        _, state = layer.step(x, layer.init_state(1, x.device, x.dtype))
        size = count_state(state)
        growth = count_state(layer.step(x, state)[1]) - size        # the same at every later token
        rows.append(Entry(block.name, count(block), size + (T - 1) * growth, layer.nominal(T),
                          layer.flops(T)))
    linears = {m for m in model.modules() if isinstance(m, nn.Linear)} - {*model.blocks.modules()}
    return rows + [Entry("embedding, unembedding", count(model) - sum(r.parameters for r in rows),
                         0, 0, 2 * T * sum(m.weight.numel() for m in linears))]

def total(rows):
    return Entry("total", *map(sum, list(zip(*rows))[1:]))

def print_ledger(models, T):
    """The costs of each model of {title: model}; of a single one those of its layers, too."""
    print(f"{'':<27}{'parameters':>11}{f'state, T={T}':>14}{'T=4096':>11}{'paper':>9}"
          f"{'MFLOP/token':>13}")
    for title, model in models.items():
        rows, long = ledger(model, T), ledger(model, 4096)
        lines = [(title, total(rows), total(long))]
        if len(models) == 1:
            lines = [(f"{i} {r.name}", r, s) for i, (r, s) in enumerate(zip(rows, long), 1)] + lines
        for name, row, later in lines:
            print(f"{name:<27}{row.parameters:>11,}{row.state:>14,}{later.state:>11,}"
                  f"{row.nominal:>9,}{row.flops / T / 1e6:>13.3f}  {ARCHS.get(name, '')}")

def main(T=128):
    parser = Parser(description="Parameters, state (as carried, as the paper counts) and FLOPs.")
    parser.add_argument("arch", nargs="?", help="one architecture or pattern, layer by layer")
    parser.add_argument("--show", metavar="FOLDER", help="draw what a run's layers mix")
    args = parser.parse_args()
    if args.show:
        model, saved = load_run(args.show)
        x, pictures = model.embed(saved["example"][:, :64]), {}               # (1, T, D)
        for i, block in enumerate(model.blocks, 1):
            pictures[f"{i} {block.name}"] = mixing(block.layer, block.norm(x))
            x = block(x)
        show_mixing(pictures)
    else:
        patterns = {"total": args.arch} if args.arch else ARCHS
        print_ledger({name: Model(p, 16, max_len=T) for name, p in patterns.items()}, T)

if __name__ == "__main__":
    run_main(main)
