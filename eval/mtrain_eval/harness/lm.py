"""The model ``mtrain`` of lm-eval: prompts split over the ring, read with dense or sparse attention.

    mtrain lm-eval run --model mtrain --model_args pretrained=DIR,attention=sparse --tasks ... --include_path eval/tasks

A ring answers every request together, so each of its ranks must be given all of them: the model says rank 0 of 1 on every rank, and
lm-eval deals no documents out. What lm-eval's own Hugging Face model does in silence is an error here: a text that does not fit is
never cut at its head.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Sequence
from datetime import timedelta
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from mtrain.errors import EvalError
from mtrain.recipe.parts import attention_from_dict
from mtrain.recipe.schema import AttentionRecipe
from mtrain_eval.ask import cut, make_stop
from mtrain_eval.config import DENSE, MODES, SPARSE, EvalConfig, attention_recipes, read_training
from mtrain_eval.tokens import decode_answer, encode_prompt

BUDGETS = {"topk": ("columns", "slashes"), "coverage": ("p", "floor", "cap")}


@register_model("mtrain")
class MtrainLM(TemplateLM):
    """See the module docstring.

    Args (``--model_args``):
        pretrained: directory in Hugging Face format, or a hub id.
        attention: ``dense``; ``sparse``, which is what the export was trained with or the attention section of ``recipe``;
            or a pattern such as ``vertical_slash``, with any key of a recipe's attention section beside it
            (``block=64,columns=1024,slashes=64`` or ``p=0.95``).
        recipe: a recipe file for ``attention=sparse``.
        max_length: longest text; default the model's own limit, above it positions that were never trained.
        dtype: auto, float32 or bfloat16.
        add_bos_token: put the tokenizer's special tokens before a text? Default: as the tokenizer does by itself.
        device: which GPU, for one process; a launch gives each its own.
        outer, inner: of a launch: nodes and processes per node; default one flat ring.
        timeout: seconds until a silent process is lost.

    Raises:
        EvalError: anything of these that cannot be.
    """

    def __init__(
        self,
        pretrained: str,
        attention: str = DENSE,
        recipe: str | None = None,
        max_length: int | None = None,
        dtype: str = "auto",
        add_bos_token: bool | None = None,
        outer: int = 1,
        inner: int | None = None,
        timeout: float = 1800.0,
        **more: Any,
    ) -> None:
        super().__init__()
        from mtrain.inference import load_engine
        from mtrain.parallel import join_processes
        from mtrain_eval.command import make_rings

        _check_batch(more.pop("batch_size", 1), more.pop("max_batch_size", None))
        wanted_device = more.pop("device", None)
        self.attention = attention_of(pretrained, attention, recipe, more)
        limit = timedelta(seconds=timeout)
        _, size, place = join_processes(limit)
        if (
            wanted_device is not None and place.type == "cuda" and size == 1
        ):  # lm-eval says cuda also where there is none
            place = torch.device(wanted_device)
        self.ring, _ = make_rings(size, 1, outer, inner, limit)
        self.engine = load_engine(
            pretrained,
            self.attention,
            self.ring,
            max_positions=max_length,
            dtype=dtype,
            device=place,
        )
        self.tokenizer = self.engine.tokenizer
        self.pretrained, self.add_bos_token = pretrained, add_bos_token
        self._device = self.engine.device

    @property
    def max_length(self) -> int:
        """Longest text, answer included."""
        return int(self.engine.max_positions)

    @property
    def max_gen_toks(self) -> int:
        """Tokens generated when a task does not say."""
        return 256

    @property
    def eot_token_id(self) -> int:
        """The end token, which lm-eval also puts before texts that have no beginning."""
        found = self.tokenizer.eos_token_id
        if found is None:
            raise EvalError(
                f"the tokenizer of {self.pretrained} has no end token, which lm-eval needs; set eos_token in it"
            )
        return int(found)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the beginning token, else the end token."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """Names the request cache of lm-eval."""
        return self.pretrained.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The tokenizer's own template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refused: lm-eval's cache of answers knows neither the model nor its attention, so another run would inherit them."""
        if getattr(cache_hook, "dbdict", None) is not None:
            raise EvalError(
                "--use_cache: lm-eval's cache does not know the model, so a sparse run would inherit the answers of a dense one; "
                "leave it out (`mtrain eval` keeps every answer and goes on where it was stopped)"
            )
        super().set_cache_hook(cache_hook)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Text to tokens; special tokens as ``add_bos_token`` says, unless the caller decides."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if special is None:
            return [int(token) for token in encode_prompt(self.tokenizer, string)]
        return list(self.tokenizer.encode(string, add_special_tokens=special))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, cut before the first stop string.

        Raises:
            EvalError: sampling, or a prompt that does not fit with its answer.
        """
        answers = []
        for context, settings in self._watched(requests, disable_tqdm):
            wanted = normalize_gen_kwargs(dict(settings), default_max_gen_toks=self.max_gen_toks)
            if wanted["do_sample"]:
                raise EvalError(
                    f"mtrain decodes greedily, the task asks for sampling ({settings}); set do_sample: false"
                )
            ids = np.asarray(self.tok_encode(context), dtype=np.int64)
            most = int(wanted["max_gen_toks"])
            self._check_fits(len(ids) + most, f"a prompt of {len(ids)} tokens and {most} generated ones")
            until = tuple(word for word in wanted["until"] if word)
            stop = make_stop(self.tokenizer, until) if until else None
            found = self.engine.generate(ids, most, stop=stop)
            answers.append(cut(decode_answer(self.tokenizer, found.tokens), until))
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return [
            self._continuation(context, continuation)
            for _, context, continuation in tqdm(requests, disable=disable_tqdm or self.ring.rank != 0, desc="mtrain")
        ]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in disjoint windows of ``max_length`` (each begins with one token of context)."""
        totals = []
        for (text,) in self._watched(requests, disable_tqdm):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,  # the last token of a window is read too
                context_len=1,
            )
            totals.append(sum(self._continuation(*make_disjoint_window(window))[0] for window in windows))
        return totals

    def _continuation(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """(sum of log-probabilities, is it what greedy decoding would say) of the last tokens of a text."""
        ids = np.asarray([*context, *continuation], dtype=np.int64)
        self._check_fits(len(ids), f"a text of {len(ids)} tokens")
        scores = self.engine.token_logprobs(ids)
        last = slice(len(ids) - 1 - len(continuation), None)
        return float(scores.logprobs[last].astype(np.float64).sum()), bool(scores.greedy[last].all())

    def _check_fits(self, tokens: int, what: str) -> None:
        if tokens > self.max_length:
            raise EvalError(
                f"{what} do not fit into {self.max_length}: take a shorter task, or a model that was extended "
                f"(max_length={tokens} in --model_args lets this one try positions it was never trained for)"
            )

    def _watched(self, requests: Sequence[Any], disable_tqdm: bool) -> Any:
        return tqdm([r.args for r in requests], disable=disable_tqdm or self.ring.rank != 0, desc="mtrain")


def attention_of(pretrained: str, attention: str, recipe: str | None, keys: dict[str, Any]) -> AttentionRecipe | None:
    """What ``attention=...`` and the keys beside it mean; None: dense.

    Raises:
        EvalError: keys that nothing has or that do not belong there, or "sparse" without anything that says which.
        RecipeError: a pattern, key or value that recipes do not know.
    """
    check_keys(keys)
    if attention in MODES:
        if attention not in (DENSE, SPARSE):
            raise EvalError(
                f"attention={attention}: one model has one attention, give dense, sparse or the name of a pattern"
            )
        if keys:
            raise EvalError(
                f"attention={attention} takes no {', '.join(keys)}; name a pattern (attention=vertical_slash) to set its keys"
            )
        config = EvalConfig(model=pretrained, lengths=(1,), attention=(attention,), recipe=recipe)
        return attention_recipes(config)[attention]
    values = dict(keys)
    for kind, names in BUDGETS.items():
        given = {name: values.pop(name) for name in names if name in values}
        if given:
            values["budget"] = {"kind": kind, **given}
    return attention_from_dict({**_trained_with(pretrained, attention), "pattern": attention, **values}, "--model_args")


def check_keys(keys: Iterable[str]) -> None:
    """Keys of ``--model_args``: arguments of `MtrainLM`, what lm-eval adds, keys of a recipe's attention section and its budget.

    Raises:
        EvalError: any other, with the nearest of these.
    """
    own = [name for name in inspect.signature(MtrainLM.__init__).parameters if name not in ("self", "more")]
    recipe = [field.name for field in dataclasses.fields(AttentionRecipe)]
    known = [
        *own,
        "device",
        "batch_size",
        "max_batch_size",
        *recipe,
        *(name for names in BUDGETS.values() for name in names),
    ]
    for key in keys:
        if key not in known:
            near = get_close_matches(key, known, n=1, cutoff=0.5)
            advice = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise EvalError(f"--model_args: unknown key {key!r}; {advice}")


def _trained_with(pretrained: str, pattern: str) -> dict[str, Any]:
    """The keys of the training's own attention, if it had this pattern: what is not said stays as it was trained."""
    stored = read_training(pretrained).get("recipe", {}).get("attention") or {}
    fields = {field.name for field in dataclasses.fields(AttentionRecipe)}
    return {key: value for key, value in stored.items() if key in fields} if stored.get("pattern") == pattern else {}


def _check_batch(batch_size: Any, max_batch_size: Any) -> None:
    """The sequence is what is split here, so prompts come one at a time; "auto" may stay."""
    if str(batch_size) not in ("1", "auto") or str(max_batch_size) not in ("None", "1"):
        raise EvalError(
            f"mtrain reads one prompt at a time, split over the ring; leave out --batch_size (got {batch_size})"
        )
