"""Prompts of InfiniteBench: instruction, blank line, context, blank line, question (with options), answer stub.

The texts are those of lm-eval, read where it is installed (`mtrain_eval.upstream`). lm-eval 0.4.13 has the published set for
GPT-4 word for word; what differs from the published protocol, and what is done here:

* It has no answer stub. The published set for base models ends with one ("The pass key is"), without which such a model
  spends its 5 to 40 tokens on anything but the answer. The stub is added here, after a blank line.
* It stops at the first newline, the benchmark does not; neither do we: an answer on the second line would be lost.
* It names splits ``_en`` that the data calls ``_eng``, and has no math_calc. The sentence for math_calc is our own, and asks
  for what the labels hold: the values after each operator, without the first number. (The published prompt for base models
  shows the first number too, so its scorer finds the very first value wrong.)
* Its "What is the .. in the following list?" for math_find takes the words from "The .. of", as MInference does; the official
  code looks for "The <one word> number", which the second and third largest do not have.
"""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

from mtrain.errors import EvalError
from mtrain_eval.infinitebench.catalogue import Entry
from mtrain_eval.upstream import INSTALL, template_of

_MATH_CALC = (
    "Work out the expression below from left to right. After every operator write down the value reached, and nothing else: "
    "for 10 + 3 - 8 + 6 that is [13, 5, 11].\n\n{context}"
)
# kv_retrieval and math_find have theirs in the question.
_STUBS = {
    "passkey": "The pass key is",
    "number_string": "The sequence of digits is",
    "longbook_sum_eng": "Summary:",
    "longbook_qa_eng": "Answer:",
    "longbook_choice_eng": "The letter of the correct answer is",
    "longdialogue_qa_eng": "The name behind $$MASK$$ is",
    "longbook_qa_chn": "答案：",
    "code_debug": "The correct option is:",
    "code_run": "The value of {func_call} is",
    "math_calc": "Values:",
}
_CALL = re.compile(r"(func_[0-9]+)\(-?[0-9]+\)")
_TARGET = re.compile(r"The .+ of")


class Frame(NamedTuple):
    """What stands before and after the context."""

    before: str
    after: str


def frame(entry: Entry, question: str, options: tuple[str, ...] = ()) -> Frame:
    """The prompt of a row around its context.

    Raises:
        EvalError: lm-eval is missing or its templates have other fields than those of 0.4.13.
    """
    before, found, after = (_published(entry.template) if entry.template else _MATH_CALC).partition("{context}")
    stub = _STUBS.get(entry.split)
    fields = _fields(question, options)
    try:
        if not found:
            raise KeyError("context")
        return Frame(before.format(**fields), (f"{after}\n\n{stub}" if stub else after).format(**fields))
    except KeyError as error:
        raise EvalError(
            f"lm-eval's template for {entry.template} and the field {error} do not go together; this was written against "
            f"0.4.13: {INSTALL} 'lm-eval==0.4.13'"
        ) from error


@cache
def _published(name: str) -> str:
    return template_of("infinitebench", f"infinitebench_{name}.yaml")


def _fields(question: str, options: tuple[str, ...]) -> dict[str, str]:
    """Every name that the templates use."""
    call = _CALL.search(question)
    target = _TARGET.search(question)
    wanted = f"What is {target[0].lower()[: -len(' of')]} in the following list?" if target else question
    letters = {f"opt_{letter}": option for letter, option in zip("abcd", options, strict=False)}
    return {
        "input": question,
        "input_text": question,
        "question": question,
        "prefix": wanted,
        "func": call[1] if call else "the function",
        "func_call": call[0] if call else question.strip(),
        **letters,
    }
