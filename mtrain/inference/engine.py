"""`Engine`: a model, its tokenizer, its attention and its ring; answers prompts of any length."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mtrain.comm import Ring
from mtrain.errors import EvalError
from mtrain.inference.batches import DecodeBatch, PrefillBatch
from mtrain.inference.cache import KeyValueCache
from mtrain.inference.head import Head
from mtrain.layout import RingLayout
from mtrain.models.attach import detach, own_config
from mtrain.models.context import RingContext
from mtrain.models.hf_attention import NAME, NO_MASK
from mtrain.models.refuse import LOCAL_ROPE_TYPES, refuse, rope_type
from mtrain.models.rope import check_rope
from mtrain.recipe.schema import AttentionRecipe
from sparse_kernels.bits import upload

# Dense attention through the ring, for a model without an attention recipe.
DENSE = AttentionRecipe(pattern="dense")


@dataclass(frozen=True)
class Generation:
    """A greedy continuation.

    Attributes:
        tokens: generated ids, the end token included when it was generated.
        prefill_s: seconds until the first token was known.
        decode_s: seconds for all others.
        density: of the prefill, mean over layers and heads; None when it was dense.
    """

    tokens: list[int]
    prefill_s: float
    decode_s: float
    density: float | None


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Log-likelihoods of a text.

    Attributes:
        logprobs: float32 [n - 1] (float64 for a float64 model): log p(ids[i + 1] | ids[: i + 1]), natural log.
        greedy: bool [n - 1]: was that token the most likely one?
        seconds: of the whole call.
        density: of the attention, mean over layers and heads; None when it was dense.
    """

    logprobs: np.ndarray
    greedy: np.ndarray
    seconds: float
    density: float | None


class Engine:
    """Inference over a ring; every call is collective: all ranks make it with the same arguments and get the same answer.

    Prompts are laid out as the recipe says; ``balanced``, which learns from the steps of a training, is ``striped`` here. The
    pattern is estimated for every prompt anew, also after a training with a frozen one (an export does not hold masks), and
    a dense warm-up of the training is over.

    Args:
        model: a transformers causal language model of a supported family, on the device; its attention is replaced.
        tokenizer: the model's.
        attention: None: dense.
        ring: the ranks that share each prompt.
        chunk: rows whose logits exist at one time, about 2 * chunk * vocab_size * 4 bytes; None: as `Head` says.

    Attributes:
        max_positions: longest text, generated tokens included.
        vocab_size: rows of the output projection.
        last_density: of the newest call; None when it was dense.

    Raises:
        ModelError: a model that this attention would change.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        attention: AttentionRecipe | None,
        ring: Ring,
        *,
        chunk: int | None = None,
    ) -> None:
        refuse(model.config, ring.world_size)
        check_rope(model)
        detach(model)
        own_config(model)
        model.set_attn_implementation(NAME)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.ring = tokenizer, ring
        self.recipe = DENSE if attention is None else attention
        self.max_positions = int(model.config.max_position_embeddings)
        self.vocab_size = int(model.config.vocab_size)
        self.end_tokens = _end_tokens(model, tokenizer)
        self.last_density: float | None = None
        self._head = Head(model, chunk)
        self._layers = int(model.config.num_hidden_layers)
        self._turning_point = _turning_point(model.config)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @torch.inference_mode()
    def generate(
        self, ids: np.ndarray | Sequence[int], max_new_tokens: int, *, stop: Callable[[list[int]], bool] | None = None
    ) -> Generation:
        """Continue a text greedily.

        Args:
            ids: int64 [n], n >= 1.
            max_new_tokens: at most so many; fewer when an end token comes or ``stop`` says so.
            stop: asked after each token, on one rank, with all tokens generated so far.

        Raises:
            EvalError: a text that is empty, too long, or not the same on all ranks.
        """
        if max_new_tokens < 1:
            raise EvalError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        tokens = self._check(ids, "generate", max_new_tokens)
        started = time.perf_counter()
        cache = KeyValueCache(extra=-(-max_new_tokens // self.ring.world_size))
        layout, hidden = self._prefill(tokens, cache)
        row = self._last_row(hidden, layout)
        del hidden
        found: list[int] = []
        done = self._decide(row, found, stop)
        prefill_s = time.perf_counter() - started
        while not done and len(found) < max_new_tokens:
            position = len(tokens) + len(found) - 1
            if position == self._turning_point:
                # As transformers does it: keys that were rotated for short texts are of no use in a long one.
                layout, hidden = self._prefill(torch.cat([tokens, torch.tensor(found)]), cache)
                row = self._last_row(hidden, layout)
            else:
                row = self._step(found[-1], position, cache)
            done = self._decide(row, found, stop)
        return Generation(found, prefill_s, time.perf_counter() - started - prefill_s, self.last_density)

    @torch.inference_mode()
    def token_logprobs(self, ids: np.ndarray) -> TokenScores:
        """The log-probability of every token but the first; no [n, vocab] exists, on no rank.

        Args:
            ids: int64 [n], n >= 2.

        Raises:
            EvalError: a text that is too short, too long, or not the same on all ranks.
        """
        tokens = self._check(ids, "score")
        if len(tokens) < 2:
            raise EvalError("a text of one token has no next token to score; give at least 2")
        started = time.perf_counter()
        layout, hidden = self._prefill(tokens)
        # The next token may live on another rank, so labels are found in the whole text. Rows without one score token 0.
        following = layout.positions(self.ring.rank)[: hidden.shape[0]] + 1
        labels = tokens[following.clamp(max=len(tokens) - 1)].to(hidden.device)
        scores = []
        for rows, logits in self._head(hidden):
            wanted = labels[rows, None]
            chosen = logits.log_softmax(-1).gather(1, wanted)[:, 0]
            scores.append(torch.stack([chosen, (logits.argmax(-1) == wanted[:, 0]).to(chosen.dtype)]))
        mine = torch.nn.functional.pad(torch.cat(scores, 1), (0, layout.local_len - hidden.shape[0]))
        whole = layout.unshard(self.ring.all_gather(mine), 1)[:, :-1].cpu()
        seconds = time.perf_counter() - started
        return TokenScores(whole[0].numpy(), whole[1].bool().numpy(), seconds, self.last_density)

    @torch.inference_mode()
    def predict_at(self, ids: np.ndarray, at: Sequence[int] | np.ndarray) -> np.ndarray:
        """The most likely next token at some positions of a text, given the text up to each.

        Args:
            ids: int64 [n].
            at: positions 0 .. n - 1, in any order.

        Returns:
            int64 [len(at)].

        Raises:
            EvalError: positions outside the text, or a text that is too long or not the same on all ranks.
        """
        rows = torch.from_numpy(np.array(at, dtype=np.int64).reshape(-1))
        tokens = self._check(ids, f"predict {rows.tolist()}")
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < len(tokens):
            raise EvalError(
                f"positions {int(rows.min())}..{int(rows.max())} are asked of a text of {len(tokens)} tokens"
            )
        layout, hidden = self._prefill(tokens)
        home = rows // layout.block
        mine = (layout.owner[home] == self.ring.rank).nonzero()[:, 0]
        local = (layout.slot[home] * layout.block + rows % layout.block)[mine]
        found = torch.zeros_like(rows)
        found[mine] = self._head.best(hidden[local.to(hidden.device)]).cpu()
        # Exactly one rank has decided each position.
        return self.ring.all_reduce(found.to(self.device)).cpu().numpy()

    def layout_for(self, length: int) -> RingLayout:
        """Who owns which tokens of a prompt."""
        kind = "contiguous" if self.ring.world_size == 1 else self.recipe.layout
        return RingLayout.build(
            "striped" if kind == "balanced" else kind, length, self.ring.world_size, self.recipe.block
        )

    def _prefill(self, tokens: Tensor, cache: KeyValueCache | None = None) -> tuple[RingLayout, Tensor]:
        """The layout and this rank's final hidden states [rows, E]; alone there are no padding rows."""
        layout = self.layout_for(len(tokens))
        positions = layout.positions(self.ring.rank)
        if self.ring.world_size == 1:
            # Attention pads by itself. Positions of padding would count in RoPE types that look at the largest one.
            positions = positions[: len(tokens)]
            self._forget_lengths()
        real = int((positions < len(tokens)).sum())
        assert bool((positions[:real] < len(tokens)).all()), "layouts keep positions in order, padding last"
        context = RingContext(self.recipe, self.ring, layout, self._layers)
        batch = PrefillBatch(
            context, layout, None, step=self.recipe.dense_warmup_steps, training=False, cache=cache, real=real
        )
        shard = tokens[positions.clamp(max=len(tokens) - 1)]
        hidden = self._forward(shard, positions, batch)
        dense = self.recipe.pattern == "dense"
        self.last_density = None if dense else sum(batch.densities) / len(batch.densities)
        return layout, hidden

    def _step(self, token: int, position: int, cache: KeyValueCache) -> Tensor:
        """Final hidden state [1, E] of one new token."""
        batch = DecodeBatch(self.ring, cache, position)
        return self._forward(torch.tensor([token]), torch.tensor([position]), batch)

    def _forward(self, ids: Tensor, positions: Tensor, batch: Any) -> Tensor:
        """[n] -> [n, E], without the output projection."""
        decoder: Any = self.model.base_model
        output = decoder(
            input_ids=upload(ids, self.device)[None],
            position_ids=upload(positions, self.device)[None],
            attention_mask=NO_MASK,
            use_cache=False,
            mtrain_batch=batch,
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def _last_row(self, hidden: Tensor, layout: RingLayout) -> Tensor:
        """[1, E]: the final hidden state of the last token, on every rank."""
        last, block = layout.seq_len - 1, layout.block
        home = last // block
        owner, local = int(layout.owner[home]), int(layout.slot[home]) * block + last % block
        row = hidden[local : local + 1] if owner == self.ring.rank else hidden[:1]
        return self.ring.broadcast(row, owner)

    def _decide(self, row: Tensor, found: list[int], stop: Callable[[list[int]], bool] | None) -> bool:
        """Rank 0 chooses the token after ``row`` and whether it was the last; everybody appends it to ``found``."""
        answer = torch.zeros(2, dtype=torch.int64, device=self.device)
        if self.ring.rank == 0:
            token = int(self._head.best(row)[0])
            done = token in self.end_tokens or (stop is not None and bool(stop([*found, token])))
            answer = torch.tensor([token, int(done)], device=self.device)
        token, ended = self.ring.broadcast(answer, 0).tolist()
        found.append(token)
        return bool(ended)

    def _forget_lengths(self) -> None:
        """RoPE types that adapt to the longest text seen so far would make an answer depend on earlier questions."""
        if rope_type(self.model.config) in LOCAL_ROPE_TYPES:
            start = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
            decoder: Any = self.model.base_model
            decoder.rotary_emb(torch.zeros(1, 1, 1, device=self.device), start)

    def _check(self, ids: np.ndarray | Sequence[int], question: str, new: int = 0) -> Tensor:
        """The text as int64 [n], known to be a possible one and the same on every rank."""
        given = np.asarray(ids)
        # Ranks that answer different questions would wait for each other, or mix two texts without a word.
        asked = torch.tensor([given.size, new, _digest(given, question)], device=self.device)
        parts = torch.stack(self.ring.all_gather(asked))
        if bool((parts != parts[0]).any()):
            raise EvalError(
                "the ranks of the ring were asked different questions: every rank must make the same calls with the same "
                "ids"
            )
        if given.dtype.kind == "U":
            raise EvalError("ids must be token ids, got text: encode it first with engine.tokenizer(text)['input_ids']")
        if given.ndim != 1 or given.size == 0 or not np.issubdtype(given.dtype, np.integer):
            raise EvalError(f"ids must be whole numbers of shape [n], n >= 1; got {given.dtype} {list(given.shape)}")
        if int(given.min()) < 0 or int(given.max()) >= self.vocab_size:
            raise EvalError(
                f"token ids {int(given.min())}..{int(given.max())} do not fit a model of {self.vocab_size} tokens: use the "
                "model's own tokenizer"
            )
        if given.size + new > self.max_positions:
            wanted = f"{given.size} tokens" + (f" and {new} to generate" if new else "")
            raise EvalError(
                f"{wanted} are beyond this model's {self.max_positions} positions (max_position_embeddings): extend it by "
                "training (mtrain train with model.rope and model.max_position_embeddings), ask for shorter texts, or try "
                f"positions it was not trained for with --max-positions {given.size + new} (max_positions= of load_engine)"
            )
        return torch.from_numpy(given.astype(np.int64))


def _digest(ids: np.ndarray, question: str) -> int:
    """A number that two different questions hardly share."""
    return int.from_bytes(hashlib.blake2b(question.encode() + b"\0" + ids.tobytes(), digest_size=7).digest(), "big")


def _turning_point(config: Any) -> int | None:
    """The first position of which longrope changes all frequencies; None: there is none."""
    if rope_type(config) != "longrope":
        return None
    own = getattr(config, "original_max_position_embeddings", None)
    limit = own or config.rope_parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    return int(limit)


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a text: the model's generation config decides, then its config, then the tokenizer."""
    for owner in (model.generation_config, model.config, tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids) if isinstance(ids, (list, tuple)) else frozenset([int(ids)])
    return frozenset()
