"""Decoders as people write them, each with another way to attend: a width of 16, 31 tokens."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS, TOKENS, POSITIONS = 16, 4, 31, 40


def heads(x: torch.Tensor) -> torch.Tensor:
    """[batch, length, width] -> [batch, heads, length, width / heads]."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def causal(length: int) -> torch.Tensor:
    """[length, length] bool, true where a position is seen."""
    return torch.ones(length, length, dtype=torch.bool).tril()


class Base(nn.Module):
    """Token and position embeddings, one attention, a feed-forward, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(TOKENS, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.qkv, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, TOKENS)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, length] -> [batch, length, width]."""
        return self.token(tokens) + self.position(torch.arange(tokens.shape[1]))

    def attend(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Overridden."""
        raise NotImplementedError

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, length] -> [batch, length, 31]."""
        x = self.embed(tokens)
        x = x + self.attend(x, tokens)
        return self.head(x)


class Sink(Base):
    """A logit of every head is joined to the scores and dropped after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.randn(HEADS))

    def attend(self, x, tokens):
        q, k, v = map(heads, self.qkv(x).chunk(3, -1))
        scores = (q @ k.mT / 2).masked_fill(~causal(x.shape[1]), float("-inf"))
        sink = self.sink.reshape(1, -1, 1, 1).expand(x.shape[0], -1, x.shape[1], -1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        return (weights @ v).transpose(1, 2).flatten(2)


class Alibi(Base):
    """Biases by distance, made for the longest length and cut from their end; no position embedding; fused qkv by unbind."""

    def embed(self, tokens):
        return self.token(tokens)

    def attend(self, x, tokens):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        slope = 2.0 ** -torch.arange(1, HEADS + 1)
        table = torch.arange(1 - POSITIONS, 1) * slope[:, None, None]
        scores = q @ k.transpose(-1, -2) / math.sqrt(4) + table[:, :, POSITIONS - x.shape[1] :]
        scores = scores + torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)


class Einsum(Base):
    """Written with einsum, heads in the third place; scores softened by a cap; split into parts."""

    def attend(self, x, tokens):
        q, k, v = (t.view(*t.shape[:2], HEADS, -1) for t in self.qkv(x).split(WIDTH, -1))
        scores = 5 * torch.tanh(torch.einsum("bqhd,bkhd->bhqk", q, k) / 5)
        scores = torch.where(causal(x.shape[1]), scores, torch.finfo(scores.dtype).min)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)


class Turned(Base):
    """Scores are keys by queries; the softmax is over their first dim."""

    def attend(self, x, tokens):
        q, k, v = map(heads, self.qkv(x).chunk(3, -1))
        scores = (k @ q.mT / 2).masked_fill(~causal(x.shape[1]).mT, float("-inf"))
        return (scores.softmax(-2).mT @ v).transpose(1, 2).flatten(2)


class Complex(Base):
    """Rotary by complex numbers, on half of each head; one head of keys for all."""

    def embed(self, tokens):
        return self.token(tokens)

    def attend(self, x, tokens):
        q, k, v = map(heads, self.qkv(x).chunk(3, -1))
        turn = torch.polar(torch.ones(1), torch.arange(x.shape[1])[:, None] * torch.tensor([0.3]))

        def rotated(t):
            part = torch.view_as_complex(t[..., :2].unflatten(-1, (1, 2))) * turn
            return torch.cat([torch.view_as_real(part).flatten(-2), t[..., 2:]], -1)

        k, v = (t[:, :1].expand(-1, HEADS, -1, -1) for t in (k, v))
        out = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        return out.transpose(1, 2).flatten(2)


class Latent(Base):
    """Keys and values from a narrow latent; a part of the key, rotated, is shared by all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.query = nn.Linear(WIDTH, 6), nn.Linear(4, HEADS * 8), nn.Linear(WIDTH, HEADS * 6)

    def attend(self, x, tokens):
        latent, shared = self.down(x).split([4, 2], -1)
        angle = torch.arange(x.shape[1])[:, None] * 0.2
        shared = (shared * angle.cos() + shared.flip(-1) * angle.sin())[:, None].expand(-1, HEADS, -1, -1)
        k, v = heads(self.up(F.rms_norm(latent, (4,)))).chunk(2, -1)
        out = F.scaled_dot_product_attention(heads(self.query(x)), torch.cat([k, shared], -1), v, is_causal=True)
        return out.transpose(1, 2).flatten(2)


class Window(Base):
    """A window of positions in one layer of scores, all in the other; padding tokens (0) are not attended to."""

    def attend(self, x, tokens):
        q, k, v = map(heads, self.qkv(x).chunk(3, -1))
        place = torch.arange(x.shape[1])
        seen = (place[:, None] >= place) & (place[:, None] - place < 5)
        real = (tokens != 0)[:, None, None] | torch.eye(x.shape[1], dtype=torch.bool)
        near = F.scaled_dot_product_attention(q, k, v, attn_mask=seen & real)
        far = F.scaled_dot_product_attention(q, near, v, attn_mask=causal(x.shape[1]) & real)
        return far.transpose(1, 2).flatten(2)


class Experts(Base):
    """Attention, then experts: rows of all samples sorted by the expert that each is given to."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 3), nn.Parameter(torch.randn(3, WIDTH, WIDTH) * 0.2)

    def attend(self, x, tokens):
        q, k, v = map(heads, self.qkv(x).chunk(3, -1))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        rows = x.reshape(-1, WIDTH)
        weight, expert = self.router(rows).softmax(-1).topk(2)
        order = expert.flatten().argsort()
        picked = rows[order // 2]
        made = torch.einsum("ni,nio->no", picked, self.experts[expert.flatten()[order]])
        made = made * weight.flatten()[order][:, None]
        return torch.zeros_like(rows).index_add(0, order // 2, made).view(x.shape)


class Written(Base):
    """Masks and sums are written in place; positions are counted by a running sum of the tokens that are no padding."""

    def embed(self, tokens):
        real = tokens.ne(0).long()
        return self.token(tokens) + self.position(real.cumsum(1) * real)

    def attend(self, x, tokens):
        q, k, v = map(heads, self.qkv(x).chunk(3, -1))
        scores = q @ k.mT
        scores *= 0.5
        scores.masked_fill_(~causal(x.shape[1]), float("-inf"))
        return (F.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)


class Regions(Written):
    """Regions without autocast and with gradients, which capture keeps apart; or one with autocast."""

    def __init__(self, autocast: bool = False) -> None:
        super().__init__()
        self.autocast = autocast

    def attend(self, x, tokens):
        with torch.autocast("cpu", enabled=self.autocast), torch.enable_grad():
            return super().attend(x, tokens).float()


class Convolved(Base):
    """Queries, keys and values pass a short causal convolution; the last token's value is mixed in."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(3 * WIDTH, 3 * WIDTH, 3, padding=2, groups=3 * WIDTH)

    def attend(self, x, tokens):
        x = x + F.pad(x, (0, 0, 1, 0))[:, :-1]
        mixed = self.mix(self.qkv(x).mT)[..., : x.shape[1]].mT
        q, k, v = map(heads, mixed.chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class LengthFirst(Base):
    """[length, batch, width] inside, heads and batch in one dim, as in fairseq."""

    def attend(self, x, tokens):
        x = x.transpose(0, 1)
        length, batch, _ = x.shape
        q, k, v = (
            t.contiguous().view(length, batch * HEADS, WIDTH // HEADS).transpose(0, 1) for t in self.qkv(x).chunk(3, -1)
        )
        scores = torch.bmm(q, k.transpose(1, 2)).view(batch, HEADS, length, length)
        scores = scores + torch.full((length, length), float("-inf")).triu(1)
        out = torch.bmm(scores.softmax(-1).view(batch * HEADS, length, length), v)
        return out.transpose(0, 1).contiguous().view(length, batch, WIDTH).transpose(0, 1)


class Dots(Base):
    """einsum with dots, and without a result; scores divided by their own sum."""

    def attend(self, x, tokens):
        q, k, v = map(heads, self.qkv(x).chunk(3, -1))
        scores = torch.einsum("... i d, ... j d -> ... i j", q, k) / 2
        weights = torch.exp(scores - torch.logsumexp(scores.masked_fill(~causal(x.shape[1]), -1e9), -1, keepdim=True))
        out = torch.einsum("...ij,...jd->...id", weights * causal(x.shape[1]), v)
        return torch.einsum("abc,cd", out.transpose(1, 2).flatten(2), torch.eye(WIDTH))


class Blocks(Base):
    """Linear attention, 16 positions at a time: a loop in Python carries a state from block to block."""

    def attend(self, x, tokens):
        length = x.shape[1]
        q, k, v = (F.pad(heads(t), (0, 0, 0, -length % 16)).unflatten(2, (-1, 16)) for t in self.qkv(x).chunk(3, -1))
        state, out = torch.zeros(x.shape[0], HEADS, 4, 4), []
        for i in range(q.shape[2]):
            out.append((q[:, :, i] @ k[:, :, i].mT).tril() @ v[:, :, i] + q[:, :, i] @ state)
            state = 0.9 * state + k[:, :, i].mT @ v[:, :, i]
        return torch.cat(out, 2)[:, :, :length].transpose(1, 2).flatten(2)


class Angles(Base):
    """Three rows of angles, the first overwritten in part by the others, as in rotary codes of several axes."""

    def embed(self, tokens):
        places = torch.arange(tokens.shape[1])[None, None].expand(3, tokens.shape[0], -1)
        angles = places[..., None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
        first = angles[0]
        first[..., 1:4:3] = angles[1, ..., 1:4:3]
        return self.token(tokens) + first.cos().repeat(1, 1, 4)

    def attend(self, x, tokens):
        q, k, v = map(heads, self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Sparse(Angles):
    """Every query sees the six keys that another score ranks highest; fewer where there are no six."""

    def attend(self, x, tokens):
        q, k, v = map(heads, self.qkv(x).chunk(3, -1))
        seen = causal(x.shape[1])
        rank = (q.sum(1) @ k.sum(1).mT).masked_fill(~seen, float("-inf"))
        best = rank.topk(min(6, x.shape[1]), -1).indices
        picked = best.new_zeros((*x.shape[:2], x.shape[1]), dtype=torch.bool).scatter(-1, best, True)
        mask = (picked & seen)[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Last(Angles):
    """Logits of the last position alone, in one of three spellings."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.attend(x, tokens)
        if self.spelling == "row":
            return self.head(x[:, -1])
        return self.head(x[:, [-1]] if self.spelling == "list" else x[:, -1:])


class Torch(nn.Module):
    """torch's own layers: an encoder with a causal mask, or multi-head attention by itself."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.token, self.position = nn.Embedding(TOKENS, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        first = kind == "encoder"
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=first, norm_first=first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, length] -> [batch, length, 31]."""
        length = tokens.shape[1]
        x = self.token(tokens) + self.position(torch.arange(length))
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        if self.kind == "attention":
            x = x + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
            x = x + self.attention(x, x, x, attn_mask=~causal(length), need_weights=True)[0]
        elif self.kind == "encoder":
            x = self.encoder(x, mask, is_causal=True)
        else:
            x = self.encoder(x.transpose(0, 1), mask).transpose(0, 1)
        return self.head(x)
