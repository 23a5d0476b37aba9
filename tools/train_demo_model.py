"""Train the demo model embedded in lrconvert: a 5 M parameter Llama with a 4096-token window.

The demo needs a base model that is small enough to ship, good enough that its perplexity means
something, able to retrieve a key anywhere in its window, and that fails beyond it. Two phases:

    apt-get install bible-kjv-text                         # the text and the command that reads it
    python tools/train_demo_model.py prepare --work BUILD  # CPU, seconds: tokenizer, token ids
    python tools/train_demo_model.py train --work BUILD    # one GPU, minutes: weights and record

The model folder (lrconvert/data/demo) holds what both read: config.json gives the shape,
passkey.json the retrieval documents. `prepare` writes tokenizer.json and heldout.txt there, `train`
model.safetensors and training.json; BUILD keeps the token ids.

Every step mixes text with retrieval documents, of which only the answers count: text alone does not
teach 5 M parameters to retrieve. Retrieval is learned in short documents first, where it is a matter
of seconds; at 4096 tokens from the start it does not come. A document with several labelled keys asks
for all of them.

Not every seed learns to tell labels apart: a model that guesses the first digit of an answer and
copies the others from the key that begins alike has a low loss and stays there. Whether it did shows
before the long documents begin, so a run that did not is given up and the next seed begun.

A short last part, at a low rate, has keys at the very start and end of a document. A key with nothing
in front of it is a case of its own, and depths drawn from [0, 1] never show it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import re
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

DEMO = Path(__file__).resolve().parents[1] / "lrconvert" / "data" / "demo"
SPECIAL_TOKENS = ["<s>", "</s>", "<pad>"]
BOS, EOS, PAD = 0, 1, 2
FIRST_HELD_OUT_BOOK = "2Cor"  # this book and all after it: the last 7 % of the text
DIGITS = 5  # of a key, one token each
LABELLED = {"one": 1, "four": 4, "sixteen": 16}  # keys in a document of the labelled task
Rope = tuple[Tensor, Tensor]  # cos and sin, (length, head_dim)

# ------------------------------------------------------------------------------------------ prepare


def read_books() -> list[tuple[str, str]]:
    """The King James Bible as (book, text): one line a chapter, verse numbers removed."""
    command = ["bible", "-f", "gen1:1-rev22:21"]
    verses = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    books: dict[str, dict[str, list[str]]] = {}
    for verse in verses:
        match = re.fullmatch(r"(\d?[A-Za-z]+)(\d+):\d+ (.+)", verse)
        if match is None:
            raise ValueError(f"bible -f printed a line that is no verse: {verse!r}")
        book, chapter, text = match.groups()
        books.setdefault(book, {}).setdefault(chapter, []).append(" ".join(text.split()))
    lines = {book: [" ".join(verses) for verses in books[book].values()] for book in books}
    return [(book, "\n".join(chapters) + "\n") for book, chapters in lines.items()]


def prepare(model_dir: Path, work: Path) -> None:
    """Train the tokenizer and tokenize: single digits, so that a key is always five tokens."""
    books = read_books()
    first = [book for book, _ in books].index(FIRST_HELD_OUT_BOOK)
    training = [text for _, text in books[:first]]
    held_out = "".join(text for _, text in books[first:])

    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=read_shape(model_dir).vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training, trainer)
    tokenizer.save(str(model_dir / "tokenizer.json"))
    (model_dir / "heldout.txt").write_text(held_out, encoding="utf-8")

    work.mkdir(parents=True, exist_ok=True)
    ids = {
        "train": [i for text in training for i in (BOS, *tokenizer.encode(text).ids, EOS)],
        "heldout": tokenizer.encode(held_out).ids,
    }
    for name, tokens in ids.items():
        np.array(tokens, dtype=np.uint16).tofile(work / f"{name}.bin")
        print(f"{name}: {len(tokens)} tokens")


def read_shape(model_dir: Path) -> SimpleNamespace:
    """config.json, its keys as attributes."""
    return SimpleNamespace(**json.loads((model_dir / "config.json").read_text(encoding="utf-8")))


# ------------------------------------------------------------------------------ retrieval documents


class RetrievalDocuments:
    """Batches of the documents that passkey.json describes, made on the device.

    Label 0 is the passkey's, the others those of the labelled task. A document is laid out from the
    question backwards, so its length is exact and only filler is cut, the sentence that is farthest.
    """

    def __init__(self, model_dir: Path, device: torch.device) -> None:
        tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        data = json.loads((model_dir / "passkey.json").read_text(encoding="utf-8"))
        needles, questions = (
            [data[kind], *(data[f"labelled_{kind}"].replace("{label}", x) for x in data["labels"])]
            for kind in ("needle", "question")
        )
        zeros = "0" * DIGITS  # where the digits of a key will go
        texts = data["filler"] + [needle.replace("{key}", zeros) for needle in needles]
        texts += [question + zeros for question in questions]
        pieces = [tokenizer.encode(text).ids for text in texts]
        if list(itertools.chain(*pieces)) != tokenizer.encode("".join(texts)).ids:
            raise ValueError("passkey.json: the pieces tokenize differently alone and joined")
        zero = tokenizer.token_to_id("0")
        starts = [piece.index(zero) if zero in piece else 0 for piece in pieces]
        self.width, self.fillers = max(map(len, pieces)), len(data["filler"])
        self.labels, self.device = len(needles), device
        self.shortest_filler = min(map(len, pieces[: self.fillers]))
        padded = [piece + [PAD] * (self.width - len(piece)) for piece in pieces]
        self.pieces = torch.tensor(padded, device=device)
        self.lengths = torch.tensor([len(piece) for piece in pieces], device=device)
        self.slots = torch.tensor(starts, device=device)[:, None]
        self.slots = self.slots + torch.arange(DIGITS, device=device)  # (pieces, DIGITS)
        self.digits = torch.tensor([tokenizer.token_to_id(d) for d in "0123456789"], device=device)

    def batch(
        self,
        count: int,
        length: int,
        keys: tuple[int, int],
        generator: torch.Generator,
        passkey: bool = False,
        depths: Tensor | None = None,
        questions: int = 1,
        ends: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (count, length) of tokens, places (count, questions) and asked (count, questions).

        A document holds `keys` = (fewest, most) keys, the passkey with `passkey`, labelled ones
        otherwise, and asks for `questions` of them, or for all where it has fewer: `asked` is False
        for what is missing. `places` are the indices of the first digits of the answers; the last
        answer ends its row. `depths` (count,) says where needles stand; otherwise every needle has a
        depth of its own, uniform in [0, 1] but for a share of `ends` at exactly 0 and as many at 1.
        """
        rand = functools.partial(torch.rand, device=self.device, generator=generator)
        fewest, most = keys
        label = rand(count, self.labels - 1).argsort(dim=1)[:, :most] + 1
        kept = fewest + (rand(count, 1) * (most - fewest + 1)).long()
        if passkey:
            label[:, 0] = 0
        present = torch.arange(most, device=self.device) < kept  # (count, most)
        asked = present[:, :questions]  # labels and depths are random: the first ones are any ones
        number = (rand(count, most, DIGITS) * 10).long()
        sentences = length // self.shortest_filler + 1
        filler = (rand(count, sentences) * self.fillers).long()
        needle = self.fillers + label
        question = self.fillers + self.labels + label[:, :questions]

        # The tokens between a piece and the questions decide its place; column 0 is the nearest.
        needle_tokens, question_tokens = self.lengths[needle] * present, self.lengths[question] * asked
        noise_tokens = length - question_tokens.sum(1, keepdim=True) - needle_tokens.sum(1, keepdim=True)
        depth = ((rand(count, most) - ends) / (1 - 2 * ends)).clamp(0, 1)
        if depths is not None:
            depth = depths[:, None].expand(count, most)
        edge = torch.minimum(self.lengths[filler].cumsum(1), noise_tokens)  # the farthest sentence is cut to fit
        edges = torch.cat([edge.double(), (1 - depth.double()) * noise_tokens], dim=1)
        order = edges.argsort(dim=1, stable=True)

        tokens = self.pieces[torch.cat([filler, needle], dim=1)]  # (count, pieces, width)
        tokens[:, sentences:].scatter_(2, self.slots[needle], self.digits[number])
        tokens = tokens.gather(1, order[..., None].expand_as(tokens)).flip(1)
        filler_tokens = edge.diff(dim=1, prepend=torch.zeros_like(noise_tokens))
        size = torch.cat([filler_tokens, needle_tokens], dim=1).gather(1, order).flip(1)
        whole = self.lengths[torch.cat([filler, needle], dim=1)].gather(1, order).flip(1)
        last = self.pieces[question]
        last.scatter_(2, self.slots[question], self.digits[number[:, :questions]])
        tokens = torch.cat([tokens, last.flip(1)], dim=1).flatten(1)  # what is not asked goes first
        size = torch.cat([size, question_tokens.flip(1)], dim=1)[..., None]
        whole = torch.cat([whole, self.lengths[question].flip(1)], dim=1)[..., None]
        behind = question_tokens.cumsum(1) - question_tokens
        places = length - DIGITS - behind

        column = torch.arange(self.width, device=self.device)
        used = ((column >= whole - size) & (column < whole)).flatten(1)
        place = torch.where(used, used.cumsum(1) - 1, length)  # the last column takes what is cut
        rows = torch.empty(count, length + 1, dtype=torch.long, device=self.device)
        rows = rows.scatter_(1, place, tokens)[:, :length]
        return with_bos(rows, generator), places, asked


def with_bos(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Start half of the rows with <s>, so that the model works with it and without it."""
    chosen = torch.rand(len(rows), device=rows.device, generator=generator) < 0.5
    rows[:, 0] = torch.where(chosen, BOS, rows[:, 0])
    return rows


# -------------------------------------------------------------------------------------------- model


class Block(nn.Module):
    """One Llama layer, its modules named as Hugging Face names them."""

    def __init__(self, shape: SimpleNamespace) -> None:
        super().__init__()
        hidden, inner, self.head_dim = shape.hidden_size, shape.intermediate_size, shape.head_dim
        heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
        self.group = heads // kv_heads

        def linears(**sizes: tuple[int, int]) -> nn.ModuleDict:
            return nn.ModuleDict({n: nn.Linear(*size, bias=False) for n, size in sizes.items()})

        q, kv = (hidden, heads * self.head_dim), (hidden, kv_heads * self.head_dim)
        self.self_attn = linears(q_proj=q, k_proj=kv, v_proj=kv, o_proj=q[::-1])
        up = (hidden, inner)
        self.mlp = linears(gate_proj=up, up_proj=up, down_proj=up[::-1])
        self.input_layernorm = nn.RMSNorm(hidden, eps=shape.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=shape.rms_norm_eps)

    def forward(self, x: Tensor, rope: Rope, text_rows: int) -> Tensor:
        rows, length, _ = x.shape
        h, attention = half(self.input_layernorm(x)), self.self_attn
        projected = (attention[name](h) for name in ("q_proj", "k_proj", "v_proj"))
        q, k, v = (t.view(rows, length, -1, self.head_dim).transpose(1, 2) for t in projected)
        k, v = (t.repeat_interleave(self.group, dim=1) for t in (rotate(k, rope), v))
        h = F.scaled_dot_product_attention(rotate(q, rope), k, v, is_causal=True)
        h = attention["o_proj"](h.transpose(1, 2).reshape(rows, length, -1))
        x = x + text_dropout(h, text_rows)
        h = half(self.post_attention_layernorm(x))
        h = self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](h)) * self.mlp["up_proj"](h))
        return x + text_dropout(h, text_rows)


class Decoder(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, shape: SimpleNamespace) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList([Block(shape) for _ in range(shape.num_hidden_layers)])
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)


class Llama(nn.Module):
    """The model; its head is the embedding, applied only where a loss is taken."""

    def __init__(self, shape: SimpleNamespace) -> None:
        super().__init__()
        self.model, self.shape = Decoder(shape), shape
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02 if "embed" in name else weight.shape[1] ** -0.5)

    def forward(self, tokens: Tensor, rope: Rope, text_rows: int = 0) -> Tensor:
        x = text_dropout(self.model.embed_tokens(tokens), text_rows)
        for block in self.model.layers:
            x = block(x, rope, text_rows)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.embed_tokens.weight).float()

    @functools.cache  # noqa: B019 - one model in the life of the program
    def rope(self, length: int, ratio: float = 1.0, attention: float = 1.0) -> Rope:
        """Tables from float64 angles; `ratio` > 1: YaRN's factors, with that attention factor."""
        d, theta = self.shape.head_dim, self.shape.rope_theta
        frequency = theta ** (-np.arange(0, d, 2) / d)
        turns = [self.shape.max_position_embeddings / (n * 2 * math.pi) for n in (32, 1)]
        low, high = (d * math.log(turn) / (2 * math.log(theta)) for turn in turns)
        low, high = max(math.floor(low), 0), min(math.ceil(high), d - 1)
        ramp = np.clip((np.arange(d // 2) - low) / (high - low), 0, 1)
        angle = np.outer(np.arange(length), frequency * (ramp / ratio + 1 - ramp))
        angle = np.concatenate([angle, angle], axis=1)
        device = self.model.norm.weight.device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        cos, sin = (torch.tensor(f(angle) * attention, dtype=dtype) for f in (np.cos, np.sin))
        return cos.to(device), sin.to(device)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * rope[0] + torch.cat([-second, first], dim=-1) * rope[1]


def half(x: Tensor) -> Tensor:
    """To autocast's type, once for all the projections that read `x`."""
    return x.to(torch.get_autocast_dtype(x.device.type))


def text_dropout(x: Tensor, text_rows: int) -> Tensor:
    """Dropout on the text rows, which come first: retrieval has endless data and needs none."""
    return torch.cat([F.dropout(x[:text_rows], 0.2), x[text_rows:]]) if text_rows else x


# ----------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Stage:
    """Steps of `tokens` in rows of `length`; a labelled row holds 2 to `most_labels` keys and asks all."""

    length: int
    steps: int
    most_labels: int
    tokens: int = 65_536


@dataclass(frozen=True)
class Schedule:
    """One part of the training. A run whose labelled loss is not below `learned` at step `judged` is
    given up."""

    stages: tuple[Stage, ...]
    learning_rate: float
    warmup_steps: int
    final_fraction: float = 0.05  # of the learning rate, reached along a cosine
    weight_decay: float = 0.1
    labelled_weight: float = 0.5  # of the mean loss of labelled answers; text and passkeys weigh 1
    ends: float = 0.0  # share of keys at depth 0, and at depth 1
    judged: int | None = None
    learned: float = 0.1

    def rate(self, step: int, progress: float) -> float:
        """Learning rate, by steps while it warms up and by the share of all tokens afterwards."""
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        scale = self.final_fraction + (1 - self.final_fraction) * cosine
        return self.learning_rate * scale * min(1.0, (step + 1) / self.warmup_steps)


# What worked: about 23 passes over the text. Many more overfit it.
SEED, SEEDS = 20_261_129, 8  # the first seed, and how many are tried
LEARN = Schedule(
    stages=(Stage(256, 1050, 4), Stage(1024, 775, 16), Stage(4096, 3035, 16)),
    learning_rate=1.5e-3,
    warmup_steps=100,
    judged=1750,
)
FINISH = Schedule(
    stages=(Stage(1024, 250, 16), Stage(4096, 300, 16)),
    learning_rate=5e-4,
    warmup_steps=25,
    ends=0.25,
)
PARTS = {"learn": LEARN, "finish": FINISH}


class NotLearnedError(Exception):
    """The run does not tell labels apart."""


class Trainer:
    """The model, its data, the device they are on, and the log of what was done."""

    def __init__(self, model_dir: Path, work: Path, seed: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(seed)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.text, self.held_out = (
            torch.from_numpy(np.fromfile(work / name, dtype=np.uint16).astype(np.int64))
            for name in ("train.bin", "heldout.bin")
        )
        self.text, self.held_out = self.text.to(self.device), self.held_out.to(self.device)
        self.documents = RetrievalDocuments(model_dir, self.device)
        self.model = Llama(read_shape(model_dir)).to(self.device)
        self.log: list[dict[str, float]] = []

    def losses(self, stage: Stage, ends: float = 0.0) -> Tensor:
        """Of 16 rows one is text, 4 ask a passkey, 11 each of several keys: the three losses.

        A retrieval row is trained on its answers and the token before each, on nothing else.
        """
        length, rows, generator = stage.length, stage.tokens // stage.length, self.generator
        text_rows = max(1, rows // 16)
        passkeys = (rows - text_rows) * 4 // 15
        labelled = rows - text_rows - passkeys
        options = {"device": self.device, "generator": generator}
        starts = torch.randint(len(self.text) - length, (text_rows, 1), **options)
        window = self.text[starts + torch.arange(length + 1, device=self.device)]
        make, most = functools.partial(self.documents.batch, ends=ends), stage.most_labels
        one, places_of_one, _ = make(passkeys, length + 1, (1, 1), generator, passkey=True)
        many, places, asked = make(labelled, length + 1, (2, most), generator, questions=most)
        batch = torch.cat([with_bos(window, generator), one, many])
        with torch.autocast(self.device.type, torch.bfloat16):
            hidden = self.model(batch[:, :-1], self.model.rope(length), text_rows)
            text_logits = self.model.logits(hidden[:text_rows])
        text = F.cross_entropy(text_logits.flatten(0, 1), batch[:text_rows, 1:].flatten())
        split = text_rows + passkeys
        passkey = self.answer_losses(hidden[text_rows:split], one, places_of_one).mean()
        labels = self.answer_losses(hidden[split:], many, places)
        return torch.stack([text, passkey, (labels * asked).sum() / asked.sum()])

    def answer_losses(self, hidden: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """Mean loss of each answer and the token before it: (rows, questions), as `places`."""
        target = places[..., None] + torch.arange(-1, DIGITS, device=self.device)
        row = torch.arange(len(rows), device=self.device)[:, None, None]
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model.logits(hidden[row, target - 1])
        losses = F.cross_entropy(logits.flatten(0, 2), rows[row, target].flatten(), reduction="none")
        return losses.view(target.shape).mean(-1)

    def fit(self, schedule: Schedule) -> None:
        """Train; the log gets mean losses since its last entry and a held-out perplexity.

        `NotLearnedError`: see `Schedule`.
        """
        recent, begun = [], time.perf_counter()
        before = self.log[-1] if self.log else {"step": 0, "seconds": 0.0}
        parameters = list(self.model.parameters())
        matrices = {"params": [p for p in parameters if p.ndim == 2]}
        norms = {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}
        optimizer = torch.optim.AdamW(
            [matrices, norms],
            betas=(0.9, 0.95),
            weight_decay=schedule.weight_decay,
            fused=self.device.type == "cuda",
        )
        weights = torch.tensor([1.0, 1.0, schedule.labelled_weight], device=self.device)
        step, done, total = 0, 0, sum(stage.steps * stage.tokens for stage in schedule.stages)
        for number, stage in enumerate(schedule.stages):
            for index in range(stage.steps):
                # Every eighth step goes back a stage, so that short documents stay learned.
                back = number > 0 and index % 8 == 7
                for group in optimizer.param_groups:
                    group["lr"] = schedule.rate(step, done / total)
                losses = self.losses(schedule.stages[number - back], schedule.ends)
                (losses * weights).sum().backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                recent.append(losses.detach())
                step, done = step + 1, done + stage.tokens
                if step % 250 == 0 or done == total:
                    text, passkey, labelled = torch.stack(recent).mean(0).tolist()
                    recent.clear()
                    entry = {"step": before["step"] + step, "length": stage.length}
                    entry |= {"seconds": before["seconds"] + time.perf_counter() - begun}
                    entry |= {"text": text, "passkey": passkey, "labelled": labelled}
                    entry |= {"held_out_perplexity": self.held_out_perplexity(1024)}
                    self.log.append({name: round(value, 4) for name, value in entry.items()})
                    print(self.log[-1], flush=True)
                    if step == schedule.judged and labelled >= schedule.learned:
                        raise NotLearnedError

    def save(self, model_dir: Path) -> None:
        """Round the weights to bf16 and write them, without the tied head."""
        state = {name: w.to(torch.bfloat16) for name, w in self.model.state_dict().items()}
        save_file(state, str(model_dir / "model.safetensors"), metadata={"format": "pt"})
        self.model.load_state_dict(state)

    @torch.no_grad()
    def predict(self, rows: Tensor, rope: Rope, last: int) -> Tensor:
        """Logits of the last tokens of each row."""
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.model.logits(self.model(rows[:, :-1], rope)[:, -last:])

    def held_out_perplexity(self, length: int) -> float:
        """Of every token of consecutive windows, each read on its own."""
        ids, losses = self.held_out, []
        for start in range(0, len(ids) - length, length):
            row = ids[None, start : start + length + 1]
            logits = self.predict(row, self.model.rope(length), length)
            losses.append(F.cross_entropy(logits[0], row[0, 1:]))
        return torch.stack(losses).mean().exp().item()

    def same_token_perplexity(self, length: int, rope: Rope) -> float:
        """Of the last 1,024 held-out tokens, read at the end of a row of `length`."""
        row = self.held_out[None, -length - 1 :]
        return F.cross_entropy(self.predict(row, rope, 1024)[0], row[0, -1024:]).exp().item()

    def retrieval(self, length: int, rope: Rope, keys: int, trials: int, passkey: bool) -> float:
        """Share of documents whose five digits are all first choices: of a passkey, at ten depths
        from start to end, or of one of `keys` labelled keys.

        Teacher forcing gives the verdict of greedy decoding: the first wrong digit ends both.
        """
        generator, right = torch.Generator(self.device).manual_seed(1), 0
        depths = torch.linspace(0, 1, 10, device=self.device).repeat(trials // 10 + 1)[:trials]
        for chunk in depths.split(max(1, 131_072 // length)):
            fixed = chunk if passkey else None
            size = (len(chunk), length + 1, (keys, keys))
            rows, _, _ = self.documents.batch(*size, generator, passkey, fixed)
            chosen = self.predict(rows, rope, DIGITS).argmax(-1)
            right += int((chosen == rows[:, -DIGITS:]).all(1).sum())
        return right / trials

    def evaluate(self, lengths: list[int], trials: int) -> dict[str, Any]:
        """Inside and beyond the window, as trained and with YaRN's factors for 8x."""
        window, s = self.model.shape.max_position_embeddings, 8.0
        variants = {
            "base": (1.0, 1.0),
            "yarn 8x, attention factor of YaRN": (s, 0.1 * math.log(s) + 1),
            "yarn 8x, attention factor of LongRoPE": (s, math.sqrt(1 + math.log(s, window))),
        }
        tasks = {"passkey": 1} | {f"{word}_labelled_keys": keys for word, keys in LABELLED.items()}
        result: dict[str, Any] = {"held_out_tokens": len(self.held_out)}
        result |= {"passkey_trials": trials, "labelled_trials": 2 * trials}
        result["held_out_perplexity_4096"] = round(self.held_out_perplexity(window), 2)
        for name, (ratio, attention) in variants.items():
            scores: dict[str, dict[int, float]] = {"same_token_perplexity": {}}
            scores |= {task: {} for task in tasks}
            for length in lengths:
                rope = self.model.rope(length, ratio, attention)
                if length >= window:
                    perplexity = self.same_token_perplexity(length, rope)
                    scores["same_token_perplexity"][length] = round(perplexity, 2)
                for task, keys in tasks.items():
                    passkey = task == "passkey"
                    count = trials if passkey else 2 * trials
                    scores[task][length] = self.retrieval(length, rope, keys, count, passkey)
            result[name] = scores
        return result


def train(model_dir: Path, work: Path, parts: dict[str, Schedule], seed: int, lengths: list[int], trials: int) -> None:
    """Train, with the next seed where labels are not learned; write weights and record."""
    for attempt in range(seed, seed + SEEDS):
        trainer = Trainer(model_dir, work, attempt)
        try:
            for part in parts.values():
                trainer.fit(part)
                trainer.save(model_dir)
        except NotLearnedError:
            print(f"seed {attempt} does not learn labels", flush=True)
        else:
            write_record(trainer, model_dir, parts, attempt, lengths, trials)
            return
    raise NotLearnedError(f"none of {SEEDS} seeds")


def write_record(
    trainer: Trainer,
    model_dir: Path,
    parts: dict[str, Schedule],
    seed: int,
    lengths: list[int],
    trials: int,
) -> None:
    """training.json: what was done, with what, and what the written weights are worth."""
    stages = [stage for part in parts.values() for stage in part.stages]
    text_tokens = sum(stage.steps * stage.tokens // 16 for stage in stages)
    record = {
        "command": "python tools/train_demo_model.py train --work BUILD",
        "device": torch.cuda.get_device_name() if trainer.device.type == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "training_text_tokens": len(trainer.text),
        "passes_over_the_text": round(text_tokens / len(trainer.text), 1),
        "training_seconds": round(trainer.log[-1]["seconds"], 1),
        "seed": seed,
        "schedule": {name: asdict(part) for name, part in parts.items()},
        "log": trainer.log,
        "results": trainer.evaluate(lengths, trials),
    }
    text = json.dumps(record, indent=2) + "\n"
    (model_dir / "training.json").write_text(text, encoding="utf-8")
    print(json.dumps(record["results"], indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model embedded in lrconvert.")
    parser.add_argument("phase", choices=["prepare", "train"])
    parser.add_argument("--work", type=Path, required=True, help="folder for the token ids")
    parser.add_argument("--model", type=Path, default=DEMO, help="the model folder")
    parser.add_argument("--seed", type=int, default=SEED, help="the first one that is tried")
    parser.add_argument("--rehearse", action="store_true", help="a few small steps, on a CPU")
    arguments = parser.parse_args()
    parts, lengths, trials = PARTS, [1024, 2048, 4096, 8192, 16384, 32768], 50
    if arguments.phase == "prepare":
        prepare(arguments.model, arguments.work)
        return
    if arguments.rehearse:
        stages = (Stage(128, 3, 3, 2048), Stage(256, 2, 8, 4096))
        parts, lengths = {name: replace(part, stages=stages) for name, part in PARTS.items()}, [256]
        trials = 4
    train(arguments.model, arguments.work, parts, arguments.seed, lengths, trials)


if __name__ == "__main__":
    main()
