"""Train the small Mixture-of-Experts model that is embedded in `reap`, on text that ships with Debian 12.

    apt-get install libpython3.11-stdlib libpython3.11-dev python3.11-doc postgresql-doc-15 ...  # all of PACKAGES below
    pip install torch transformers tokenizers
    python benchmarks/train_embedded_model.py prepare  --work DIR    # texts, tokenizer, token ids
    python benchmarks/train_embedded_model.py train    --work DIR    # DIR becomes a transformers checkpoint
    python benchmarks/train_embedded_model.py evaluate --work DIR --keep 0.5 0.25
    reap convert DIR python/reap/data/reap-demo-3.7m-q8_0.gguf --outtype q8_0 --pre qwen2

The recipe is `Recipe` with its defaults and `PACKAGES`: 1,500 steps of four windows of 512 tokens, the domains taking
turns (3.07 M tokens of the 7.1 M there are: less than one pass), Muon at 0.015 for the matrices, AdamW at 3e-3 for
embeddings, routers and norms, 30 steps of warm-up and a straight way down to 0 over the last 30 % of the steps,
computed in bfloat16 (routers, softmax and losses in float32) over float32 weights. Everything is seeded, so a second
run (none was made) should differ only by the order of floating point sums.

Printed by the run that made the embedded model (3,688,064 parameters; transformers 5.23, torch 2.13; two busy cores of
a Xeon with AMX; 22 minutes at 900 to 5,000 tokens/s, stopped once after step 720 and resumed from its checkpoint):

    step 200: loss 4.935   step 400: loss 4.210   step 600: loss 3.863   step 800: loss 3.138
    step 1000: loss 3.035   step 1200: loss 2.840   step 1400: loss 2.674   step 1500: loss 2.648, balance 1.32

and by `evaluate` (perplexity on the held-out texts, F32 in PyTorch, experts removed by masking the router):

    layer 0: tokens of the least and most used expert 279 25,495
    layer 1: tokens of the least and most used expert 397 19,569
    layer 2: tokens of the least and most used expert 584 18,718
    layer 3: tokens of the least and most used expert 236 18,735
                                python         c   english
    all experts                  10.60     11.30     26.63
    50% reap                     11.39     12.06     27.96
    50% frequency                11.22     12.23     27.90
    50% weighted_ean_sum         10.91     11.69     28.43
    50% ean_mean                 14.05     13.80     31.83
    50% random-0                 15.36     15.99     36.82
    50% random-1                 15.27     15.06     41.08
    50% random-2                 12.48     13.82     35.53
    25% reap                     16.11     15.50     33.70
    25% frequency                15.27     14.55     36.55
    25% weighted_ean_sum         14.26     14.05     32.19
    25% ean_mean                 20.18     19.36     45.56
    25% random-0                 20.78     21.19     51.50
    25% random-1                 21.27     21.69     64.16
    25% random-2                 17.29     18.63     52.75
"""

from __future__ import annotations

import argparse
import hashlib
import html.parser
import json
import math
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread per worker: see `Workers`

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging as transformers_logging

DOMAINS = ("python", "c", "english")
EXCERPT_CHARS = 4_000  # taken from the head of a held-out or calibration file
HELDOUT_CHARS = 36_000  # a domain
CALIBRATION_CHARS = 48_000  # a domain
WINDOWS_PER_PASS = 2  # small enough for the activations to stay in the cache
SAMPLE_CHARS = 800  # a calibration line; below 512 tokens
LOG_EVERY = 40
ROWS_MULTIPLE = 64
METRICS = ("reap", "frequency", "weighted_ean_sum", "ean_mean", "random-0", "random-1", "random-2")
MAX_FILE_CHARS = 60_000  # of one training file, so that generated tables do not fill the corpus

# Text for calibration and evaluation comes from the first package of a domain only: those are all under the
# Python Software Foundation's licence, and are what is shipped. The rest is only trained on.
PACKAGES: dict[str, tuple[str, ...]] = {
    "python": ("libpython3.11-stdlib", "libpython3.11-minimal"),
    "c": (
        "libpython3.11-dev", "libssl-dev", "x11proto-dev", "libx11-dev", "libxt-dev", "libxext-dev", "libxcb1-dev",
        "libxml2-dev", "libxslt1-dev", "libfreetype-dev", "tcl8.6-dev", "tk8.6-dev", "libpq-dev", "libpng-dev",
        "libexpat1-dev", "zlib1g-dev", "libsqlite3-dev", "libtirpc-dev", "libjpeg62-turbo-dev",
    ),
    "english": ("python3.11-doc", "postgresql-doc-15"),
}  # fmt: skip
SUFFIX = {"python": (".py",), "c": (".h",), "english": (".rst.txt", ".html")}
SKIPPED = re.compile(
    r"/(encodings|pydoc_data|lib2to3/pgen2|__phello__|whatsnew/changelog)|_generated|/python3[^/]*/html/(?!_sources)|(genindex|bookindex|release)"
)

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# The expression of Qwen2's tokenizer, which llama.cpp knows as tokenizer.ggml.pre = "qwen2".
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


# ---------------------------------------------------------------------------------------------------- texts


@dataclass
class Split:
    """The texts of one domain; no file is in two of the three lists."""

    train: list[str] = field(default_factory=list)
    calibration: list[str] = field(default_factory=list)
    heldout: list[str] = field(default_factory=list)


def package_files(package: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of an installed Debian package that end in one of `suffixes`."""
    run = subprocess.run(["dpkg-query", "-L", package], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise SystemExit(f"{package} is not installed: apt-get install {package}")
    return [Path(line) for line in run.stdout.splitlines() if line.endswith(suffixes) and not SKIPPED.search(line)]


def package_versions() -> dict[str, str]:
    """The Debian version of every package of the recipe."""
    names = [name for packages in PACKAGES.values() for name in packages]
    run = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${Version}\n", *names], capture_output=True, text=True, check=True
    )
    return dict(line.split() for line in run.stdout.splitlines())


class _Paragraphs(html.parser.HTMLParser):
    """Collects the text of the <p> elements of an HTML page."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "p":
            self._inside = True
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "p"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.paragraphs[-1] += data


def rst_paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of a reStructuredText file without directives, literal blocks and markup."""
    literal_indent = -1
    for block in re.split(r"\n\s*\n", text):
        indent = len(block) - len(block.lstrip(" "))
        if 0 <= literal_indent < indent:
            continue
        literal_indent = indent if block.endswith("::") or block.lstrip().startswith(".. ") else -1
        if block.lstrip().startswith((".. ", "* .. ", ">>>", "+", "|", "==", ":")):
            continue
        block = re.sub(r"^\s*([*-]|#\.)\s+|:pep:", "", block)
        block = re.sub(r":[a-z:+-]+:`[!~]?([^`<]*?)(\s*<[^`]*>)?`", r"\1", block)
        block = re.sub(r"`([^`<]+?)\s*<[^`]*>`__?", r"\1", block)
        yield re.sub(r"``|\*\*|(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w)|`__?|`", "", block).removesuffix(":")


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads like sentences: long enough, mostly letters, ending like a sentence."""
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return len(paragraph.split()) >= 15 and letters >= 0.92 * len(paragraph) and paragraph[-1] in ".:?!)"


def read_text(path: Path) -> str:
    """The text that is learned from one file (empty if it is not of use)."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix not in (".txt", ".html"):
        return text.replace("\t", "    ")[:MAX_FILE_CHARS]
    if path.suffix == ".html":
        parser = _Paragraphs()
        parser.feed(text)
        paragraphs: Iterable[str] = parser.paragraphs
    else:
        paragraphs = rst_paragraphs(text)
    lines = (" ".join(p.split()) for p in paragraphs)
    return "\n\n".join(line for line in lines if line and is_prose(line)) + "\n"


def excerpt(text: str) -> str:
    """The head of a text, cut after a whole line."""
    return text if len(text) <= EXCERPT_CHARS else text[: text.rindex("\n", 0, EXCERPT_CHARS) + 1]


def split_domain(domain: str) -> Split:
    """Sort a domain's files by the hash of their path; the first become held-out, the next calibration text."""
    split = Split()
    for rank, package in enumerate(PACKAGES[domain]):
        paths = package_files(package, SUFFIX[domain])
        for path in sorted(paths, key=lambda p: hashlib.sha256(str(p).encode()).digest()):
            text = read_text(path) if path.is_file() and not path.is_symlink() else ""
            if len(text) < 500:
                continue
            if rank == 0 and sum(map(len, split.heldout)) < HELDOUT_CHARS and len(text) >= 2_000:
                split.heldout.append(excerpt(text))
            elif rank == 0 and sum(map(len, split.calibration)) < CALIBRATION_CHARS and len(text) >= 2_000:
                split.calibration.append(excerpt(text))
            else:
                split.train.append(text)
    return split


def calibration_lines(text: str) -> Iterator[str]:
    """Cut an excerpt into samples of at most SAMPLE_CHARS, at line (or, in prose, sentence) ends."""
    while len(text) > SAMPLE_CHARS:
        cut = max(text.rfind("\n", 200, SAMPLE_CHARS), text.rfind(". ", 200, SAMPLE_CHARS)) + 1
        cut = cut or SAMPLE_CHARS
        yield text[:cut]
        text = text[cut:].lstrip(" ") if text[cut - 1] == "." else text[cut:]
    if len(text) >= 200:
        yield text


def write_shipped_texts(splits: dict[str, Split], data: Path) -> None:
    """Write heldout/<domain>.txt and calibration.jsonl; the domains take turns in the latter."""
    (data / "heldout").mkdir(parents=True, exist_ok=True)
    for domain, split in splits.items():
        (data / "heldout" / f"{domain}.txt").write_text("\n".join(split.heldout), encoding="utf-8")
    rows = [
        (i, d, {"domain": domain, "text": line})
        for d, (domain, split) in enumerate(splits.items())
        for i, line in enumerate(line for text in split.calibration for line in calibration_lines(text))
    ]
    with (data / "calibration.jsonl").open("w", encoding="utf-8") as out:
        for _, _, row in sorted(rows, key=lambda r: r[:2]):
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------------------------ tokenizer


def train_tokenizer(splits: dict[str, Split], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen2's pre-tokenizer, trained on as much text of each domain."""
    size = min(sum(map(len, s.train)) for s in splits.values())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ("".join(s.train)[:size] for s in splits.values())
    tokenizer.train_from_iterator((part for text in texts for part in text.split("\n\n")), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL_TOKENS[0],
        pad_token=SPECIAL_TOKENS[0],
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
        add_bos_token=False,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> torch.Tensor:
    """All texts as one row of ids, each closed by the end-of-text token."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text, add_special_tokens=False)
        ids.append(int(tokenizer.eos_token_id))
    return torch.tensor(ids, dtype=torch.long)


# ---------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out of the training."""

    vocab_size: int = 2048
    hidden: int = 128
    layers: int = 4
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    experts: int = 32
    experts_used: int = 4
    expert_width: int = 64
    context: int = 512
    windows_per_step: int = 4
    steps: int = 1500
    warmup: int = 30
    decay: float = 0.3  # share of the steps over which the learning rate falls to 0
    lr: float = 3e-3
    muon_lr: float = 0.015
    weight_decay: float = 0.05
    clip: float = 1.0
    balance: float = 0.005
    seed: int = 20240

    def config(self) -> Qwen3MoeConfig:
        """The transformers configuration."""
        return Qwen3MoeConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.expert_width * self.experts_used,
            moe_intermediate_size=self.expert_width,
            num_experts=self.experts,
            num_experts_per_tok=self.experts_used,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            tie_word_embeddings=True,
            max_position_embeddings=self.context,
            rope_theta=10_000.0,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )


class SortedExperts(torch.autograd.Function):
    """Sum over a token's experts of gate * down(silu(gate_proj x) * up x), with the rows sorted by expert.

    Each expert's rows are padded with zeros to a multiple, so that few shapes of matrix product occur (the library
    compiles one kernel for each). transformers' own loop makes a full copy of the gradient for every expert.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, gates: torch.Tensor, ids: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
    ) -> torch.Tensor:
        n, k = ids.shape
        flat = ids.reshape(-1)
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=len(gate_up))
        padded = (counts + ROWS_MULTIPLE - 1) // ROWS_MULTIPLE * ROWS_MULTIPLE
        ends = padded.cumsum(0)
        shift = (ends - padded) - (counts.cumsum(0) - counts)
        place_sorted = torch.arange(n * k) + shift[flat[order]]
        place = torch.empty_like(order).index_copy_(0, order, place_sorted)
        source = torch.full((int(ends[-1]),), n).index_copy_(0, place_sorted, order // k)
        inputs = torch.cat([x, x.new_zeros(1, x.shape[1])]).index_select(0, source)
        spans = [
            (e, b - size, b) for e, (b, size) in enumerate(zip(ends.tolist(), padded.tolist(), strict=True)) if size
        ]
        hidden, outputs = x.new_empty(len(source), gate_up.shape[1]), torch.empty_like(inputs)
        for e, a, b in spans:
            torch.mm(inputs[a:b], gate_up[e].T, out=hidden[a:b])
        g, u = hidden.chunk(2, dim=-1)
        act = F.silu(g) * u
        for e, a, b in spans:
            torch.mm(act[a:b], down[e].T, out=outputs[a:b])
        by_token = outputs.index_select(0, place).view(n, k, -1)
        ctx.spans = spans
        ctx.save_for_backward(inputs, hidden, act, by_token, gates, place, source, gate_up, down)
        return (by_token * gates.unsqueeze(-1)).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, hidden, act, by_token, gates, place, source, gate_up, down = ctx.saved_tensors
        d_gates = (by_token * grad.unsqueeze(1)).sum(-1)
        weight = gates.new_zeros(len(source)).index_copy_(0, place, gates.reshape(-1))
        d_out = torch.cat([grad, grad.new_zeros(1, grad.shape[1])]).index_select(0, source).mul_(weight.unsqueeze(1))
        d_act, d_inputs = torch.empty_like(act), torch.empty_like(inputs)
        d_gate_up, d_down = torch.zeros_like(gate_up), torch.zeros_like(down)
        for e, a, b in ctx.spans:
            torch.mm(d_out[a:b], down[e], out=d_act[a:b])
            torch.mm(d_out[a:b].T, act[a:b], out=d_down[e])
        g, u = hidden.chunk(2, dim=-1)
        sigma = torch.sigmoid(g)
        d_hidden = torch.cat([d_act * u * sigma * (1 + g * (1 - sigma)), d_act * g * sigma], dim=-1)
        for e, a, b in ctx.spans:
            torch.mm(d_hidden[a:b], gate_up[e], out=d_inputs[a:b])
            torch.mm(d_hidden[a:b].T, inputs[a:b], out=d_gate_up[e])
        d_x = d_inputs.index_select(0, place).view(*gates.shape, -1).sum(1)
        return d_x, d_gates, None, d_gate_up, d_down


seen = threading.local()  # the router logits of the pass that a thread is in


def build_model(recipe: Recipe) -> Qwen3MoeForCausalLM:
    """A freshly initialised model."""
    torch.manual_seed(recipe.seed)
    return Qwen3MoeForCausalLM(recipe.config())


def bfloat16_copy(model: Qwen3MoeForCausalLM) -> Qwen3MoeForCausalLM:
    """The copy that computes: bfloat16 except for the routers, its experts run by SortedExperts."""
    copy = Qwen3MoeForCausalLM(model.config).bfloat16()
    copy.set_attn_implementation("eager")  # in bfloat16 and at this length quicker than the fused one
    for layer in copy.model.layers:
        experts, router = layer.mlp.experts, layer.mlp.gate.float()

        def run(x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor, experts: Any = experts) -> torch.Tensor:
            return SortedExperts.apply(x, gates, ids, experts.gate_up_proj, experts.down_proj)  # type: ignore[no-any-return]

        def route(x: torch.Tensor, router: Any = router) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits = F.linear(x.float(), router.weight)
            seen.router_logits.append(logits)
            gates, ids = logits.softmax(-1).topk(router.top_k)
            return logits, (gates / gates.sum(-1, keepdim=True)).to(x.dtype), ids

        experts.forward, router.forward = run, route
    return copy


# ------------------------------------------------------------------------------------------------- training


class Muon:
    """Momentum whose update is orthogonalised (K. Jordan et al., 2024), for matrices and stacks of them."""

    def __init__(self, params: Sequence[torch.nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        self.params, self.lr, self.momentum, self.weight_decay = list(params), lr, momentum, weight_decay
        self.buffers = [torch.zeros_like(p) for p in self.params]

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Update every parameter with the learning rate times `scale`."""
        for p, buffer in zip(self.params, self.buffers, strict=True):
            assert p.grad is not None
            buffer.lerp_(p.grad, 1 - self.momentum)
            update = orthogonalise(p.grad.lerp(buffer, self.momentum))
            p.mul_(1 - self.lr * scale * self.weight_decay)
            p.add_(update, alpha=-self.lr * scale * max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps towards the nearest semi-orthogonal matrices."""
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Windows:
    """Random windows of the domains' training ids, as many of each; the same sequence for the same seed."""

    def __init__(self, streams: Sequence[torch.Tensor], recipe: Recipe) -> None:
        self.streams, self.length = streams, recipe.context
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.turn = 0

    def next(self, n: int) -> torch.Tensor:
        """int64 [n, context + 1]."""
        rows = []
        for _ in range(n):
            stream = self.streams[self.turn % len(self.streams)]
            start = int(torch.randint(len(stream) - self.length - 1, (1,), generator=self.generator))
            rows.append(stream[start : start + self.length + 1])
            self.turn += 1
        return torch.stack(rows)


def balance_loss(router_logits: Sequence[torch.Tensor], recipe: Recipe) -> torch.Tensor:
    """Switch Transformers' load-balancing loss, the mean over the layers (1 when perfectly even)."""
    losses = []
    for logits in router_logits:
        probs = logits.softmax(-1)
        chosen = torch.zeros_like(probs).scatter_(1, probs.topk(recipe.experts_used).indices, 1.0)
        losses.append(recipe.experts / recipe.experts_used * (chosen.mean(0) * probs.mean(0)).sum())
    return torch.stack(losses).mean()


def gradients(
    model: Qwen3MoeForCausalLM, params: Sequence[torch.nn.Parameter], rows: torch.Tensor, recipe: Recipe
) -> tuple[float, float, tuple[torch.Tensor, ...]]:
    """Cross-entropy and balance loss of some windows, and the gradients of their weighted sum."""
    seen.router_logits = []
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
    balance = balance_loss(seen.router_logits, recipe)
    return loss.item(), balance.item(), torch.autograd.grad(loss + recipe.balance * balance, params)


class Trainer:
    """Two workers of one thread each take half of every step's windows: quicker than two threads per operation."""

    workers = 2

    def __init__(self, recipe: Recipe, streams: Sequence[torch.Tensor], optimiser: str = "muon") -> None:
        self.recipe = recipe
        self.model = build_model(recipe)
        self.copy = bfloat16_copy(self.model)
        self.windows = Windows(streams, recipe)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        matrices = [p for n, p in self.model.named_parameters() if "proj" in n] if optimiser == "muon" else []
        others = [p for p in self.params if not any(p is m for m in matrices)]
        self.muon = Muon(matrices, recipe.muon_lr, 0.95, recipe.weight_decay)
        self.adamw = torch.optim.AdamW(
            others, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True
        )
        self.pool = ThreadPoolExecutor(self.workers)

    def scale(self, step: int) -> float:
        """The learning rate's factor: a short warm-up, level, and a straight way down over the last steps."""
        up = (step + 1) / self.recipe.warmup
        down = (self.recipe.steps - step) / (self.recipe.decay * self.recipe.steps)
        return max(0.0, min(1.0, up, down))

    def step(self, step: int) -> tuple[float, float]:
        """One update; returns the cross-entropy and the balance loss."""
        parts = self.windows.next(self.recipe.windows_per_step).split(WINDOWS_PER_PASS)
        copies = [p for p in self.copy.parameters() if p.requires_grad]
        with torch.no_grad():
            for copied, p in zip(copies, self.params, strict=True):
                copied.copy_(p)
        results = list(self.pool.map(lambda rows: gradients(self.copy, copies, rows, self.recipe), parts))
        for i, p in enumerate(self.params):
            p.grad = torch.stack([r[2][i] for r in results]).float().mean(0)
        torch.nn.utils.clip_grad_norm_(self.params, self.recipe.clip)
        scale = self.scale(step)
        self.muon.step(scale)
        for group in self.adamw.param_groups:
            group["lr"] = self.recipe.lr * scale
        self.adamw.step()
        return sum(r[0] for r in results) / len(results), sum(r[1] for r in results) / len(results)

    def save(self, folder: Path, step: int) -> None:
        """Write the model as a transformers checkpoint and all that `resume` needs, whole or not at all."""
        self.model.save_pretrained(folder)
        state = {
            "step": step,
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "muon": self.muon.buffers,
            "adamw": self.adamw.state_dict(),
            "windows": (self.windows.turn, self.windows.generator.get_state()),
        }
        torch.save(state, folder / "training.tmp")
        (folder / "training.tmp").replace(folder / "training.pt")

    def resume(self, folder: Path) -> int:
        """Take up a saved training; returns the number of steps done."""
        state = torch.load(folder / "training.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        for mine, saved in zip(self.muon.buffers, state["muon"], strict=True):
            mine.copy_(saved)
        self.adamw.load_state_dict(state["adamw"])
        self.windows.turn = state["windows"][0]
        self.windows.generator.set_state(state["windows"][1])
        return int(state["step"])


def prepare(work: Path, data: Path, recipe: Recipe) -> None:
    """Collect the texts, write those that are shipped, train the tokenizer and encode the training texts."""
    splits = {domain: split_domain(domain) for domain in DOMAINS}
    write_shipped_texts(splits, data)
    tokenizer = train_tokenizer(splits, recipe.vocab_size)
    tokenizer.save_pretrained(work)
    streams = {domain: encode(tokenizer, split.train) for domain, split in splits.items()}
    torch.save(streams, work / "streams.pt")
    (work / "packages.json").write_text(json.dumps(package_versions(), indent=1) + "\n")
    for domain, split in splits.items():
        print(
            f"{domain}: {len(split.train)} files, {len(streams[domain]):,} tokens to train on; "
            f"{len(encode(tokenizer, split.calibration)):,} for calibration, "
            f"{len(encode(tokenizer, split.heldout)):,} held out"
        )


def train(work: Path, recipe: Recipe, resume: bool) -> None:
    """Train (or go on training) and leave a transformers checkpoint in `work`."""
    streams = list(torch.load(work / "streams.pt", weights_only=True).values())
    trainer = Trainer(recipe, streams)
    first = trainer.resume(work) if resume else 0
    print(f"{sum(p.numel() for p in trainer.params):,} parameters, {asdict(recipe)}", flush=True)
    started, losses = time.monotonic(), []
    for step in range(first, recipe.steps):
        losses.append(trainer.step(step))
        if (step + 1) % LOG_EVERY == 0 or step + 1 == recipe.steps:
            loss, balance = (sum(column) / len(losses) for column in zip(*losses, strict=True))
            rate = len(losses) * recipe.windows_per_step * recipe.context / (time.monotonic() - started)
            print(f"step {step + 1}: loss {loss:.3f}, balance {balance:.2f}, {rate:,.0f} tokens/s", flush=True)
            trainer.save(work, step + 1)
            started, losses = time.monotonic(), []


# ----------------------------------------------------------------------------------------------- evaluation


class Probe:
    """Sums per layer and expert, taken by a plain loop that shares no code with the training or with `reap`.

    counts, gated_norm_sum, norm_sum: float64 [n_layers, n_experts].
    """

    def __init__(self, model: Qwen3MoeForCausalLM, recipe: Recipe) -> None:
        shape = (recipe.layers, recipe.experts)
        self.counts, self.gated_norm_sum, self.norm_sum = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
        self.removed = torch.zeros(shape, dtype=torch.bool)
        self.collecting = True
        for index, layer in enumerate(model.model.layers):
            layer.mlp.forward = partial(self._block, index, layer.mlp)

    def _block(self, index: int, block: Any, x: torch.Tensor) -> torch.Tensor:
        """One expert block; removed experts get a router logit of minus infinity."""
        rows = x.flatten(0, 1)
        logits = F.linear(rows, block.gate.weight).masked_fill(self.removed[index], -math.inf)
        gates, ids = logits.softmax(-1).topk(block.gate.top_k)
        gates = gates / gates.sum(-1, keepdim=True)
        out = torch.zeros_like(rows)
        for e in ids.unique().tolist():
            token, slot = torch.where(ids == e)
            g, u = F.linear(rows[token], block.experts.gate_up_proj[e]).chunk(2, dim=-1)
            f = F.linear(F.silu(g) * u, block.experts.down_proj[e])
            gate = gates[token, slot]
            out.index_add_(0, token, gate[:, None] * f)
            if self.collecting:
                norms = f.double().norm(dim=-1)
                self.counts[index, e] += len(token)
                self.norm_sum[index, e] += norms.sum()
                self.gated_norm_sum[index, e] += (gate * norms).sum()
        return out.view_as(x)

    def scores(self, metric: str) -> torch.Tensor:
        """float64 [n_layers, n_experts]; higher is kept. `random-N` is seeded with N."""
        if metric.startswith("random-"):
            generator = torch.Generator().manual_seed(int(metric.removeprefix("random-")))
            return torch.rand(self.counts.shape, generator=generator, dtype=torch.float64)
        seen_often = self.counts.clamp(min=1)
        return {
            "reap": self.gated_norm_sum / seen_often,
            "frequency": self.counts,
            "weighted_ean_sum": self.gated_norm_sum,
            "ean_mean": self.norm_sum / seen_often,
        }[metric]

    def keep(self, metric: str, share: float) -> None:
        """From now on, only the best `share` of each layer's experts takes part."""
        n_removed = self.removed.shape[1] - math.floor(share * self.removed.shape[1] + 0.5)
        worst = self.scores(metric).argsort(dim=1, stable=True)[:, :n_removed]
        self.removed = torch.zeros_like(self.removed).scatter_(1, worst, True)


@torch.no_grad()
def perplexity(model: Qwen3MoeForCausalLM, ids: torch.Tensor, context: int) -> float:
    """As llama-perplexity counts it: whole windows, of which the second half is scored."""
    windows = ids[: len(ids) // context * context].view(-1, context)
    losses = []
    for rows in windows.split(4):
        logits = model(input_ids=rows, use_cache=False).logits[:, context // 2 : -1]
        losses.append(F.cross_entropy(logits.flatten(0, 1), rows[:, context // 2 + 1 :].flatten(), reduction="none"))
    return math.exp(torch.cat(losses).double().mean().item())


def plain_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """The ids of a text, without any special token."""
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False))


@torch.no_grad()
def evaluate(work: Path, data: Path, shares: Sequence[float]) -> None:
    """Collect on the calibration text, remove experts by several metrics, print held-out perplexities."""
    model = Qwen3MoeForCausalLM.from_pretrained(work, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work)
    recipe = Recipe(layers=model.config.num_hidden_layers, experts=model.config.num_experts)
    heldout = {d: plain_ids(tokenizer, (data / "heldout" / f"{d}.txt").read_text("utf-8")) for d in DOMAINS}
    probe = Probe(model, recipe)
    with (data / "calibration.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            model(input_ids=plain_ids(tokenizer, json.loads(line)["text"])[None, : recipe.context], use_cache=False)
    probe.collecting = False
    for index, counts in enumerate(probe.counts.long().tolist()):
        print(f"layer {index}: tokens of the least and most used expert {min(counts):,} {max(counts):,}")
    print(f"{'':24}" + "".join(f"{d:>10}" for d in DOMAINS))

    def row(name: str) -> None:
        values = (perplexity(model, ids, recipe.context) for ids in heldout.values())
        print(f"{name:24}" + "".join(f"{value:10.2f}" for value in values), flush=True)

    row("all experts")
    for share in shares:
        for metric in METRICS:
            probe.keep(metric, share)
            row(f"{share:.0%} {metric}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("mode", choices=("prepare", "train", "evaluate"))
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint and the training state")
    parser.add_argument("--data", type=Path, default=Path("python/reap/data"), help="folder of the shipped texts")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5], help="shares of the experts to keep (evaluate)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the work folder")
    return parser.parse_args()


def main() -> None:
    """Run one of the three modes."""
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    recipe = Recipe(steps=args.steps)
    if args.mode == "prepare":
        prepare(args.work, args.data, recipe)
    elif args.mode == "train":
        train(args.work, recipe, args.resume)
    else:
        evaluate(args.work, args.data, args.keep)


if __name__ == "__main__":
    main()
