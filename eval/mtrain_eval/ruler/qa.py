"""RULER's question answering (scripts/data/synthetic/qa.py): documents that answer a question, among others that do not."""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from mtrain_eval.ruler.qa_data import HOTPOT, SQUAD, Question, Questions, data_source, load_published, missing_data
from mtrain_eval.ruler.synthetic_qa import synthetic_questions
from mtrain_eval.ruler.task import Draft, Plan, RulerTask
from mtrain_eval.sample import SuiteOptions
from mtrain_eval.tokens import count_tokens
from mtrain_eval.upstream import constant

PROBED = 500  # questions that are tried before a length counts as too short; RULER asks so many


class QuestionAnswering(RulerTask):
    """Question ``index`` of the file, its documents, and as many others as there is room for; any right answer counts.

    RULER never ends on a question whose own documents are too long; here such questions are left out, so that sample ``index``
    is the index-th of those that fit. After the last one they start again with other documents around them.
    """

    metric = "string_match_part"

    def __init__(self, options: SuiteOptions, name: str) -> None:
        super().__init__(options, name, max_new_tokens=32)
        self.data = {"qa_1": SQUAD, "qa_2": HOTPOT}[name]
        self.hops = {"qa_1": 1, "qa_2": 2}[name]
        self._sizes: list[
            int
        ] = []  # tokens of the first questions with their own documents only, generated ones included

    @property
    def source(self) -> str:  # type: ignore[override]
        """``local`` or ``published`` with SQuAD or HotpotQA at hand, else ``synthetic``."""
        return data_source(self.options, self.data)

    def missing(self) -> str | None:
        """See RulerTask: the questions."""
        return missing_data(self.options, self.data)

    def questions(self) -> Questions:
        """The set, read when first needed."""
        return synthetic_questions(self.hops) if self.source == "synthetic" else load_published(self.options, self.data)

    def count(self, length: int) -> int | None:
        """Questions there are."""
        return len(self.questions().questions)

    def plan(self, length: int, index: int, attempt: int) -> Plan:
        """A unit is a document: those of the question first, then those on the same subject, then any others."""
        number = self._number(length, index)
        known = self.questions()
        question, docs = known.questions[number], known.docs
        order = self._order(question, len(docs), length, index, attempt)
        sizes = list(accumulate((len(docs[i]) for i in order), initial=0))

        def build(units: int) -> Draft:
            rounds, rest = divmod(units, len(order))
            chosen = (order * rounds + order[:rest]) if rounds else order[:rest]
            shuffle = np.random.default_rng(self.rng(length, index, attempt, "places").getrandbits(64))
            return self._draft(known, number, [chosen[i] for i in shuffle.permutation(len(chosen))])

        smallest = len(question.gold)
        gold = "\n\n".join(docs[i] for i in question.gold)
        price = count_tokens(self.options.tokenizer, gold) / max(len(gold), 1)

        def cost(units: int) -> float:
            rounds, rest = divmod(units, len(order))
            return price * (rounds * sizes[-1] + sizes[rest] + 12 * units)

        return Plan(build, smallest, cost)

    def _order(self, question: Question, docs: int, length: int, index: int, attempt: int) -> list[int]:
        rng = np.random.default_rng(self.rng(length, index, attempt, "documents").getrandbits(64))
        taken = {*question.gold, *question.more}
        more = [question.more[i] for i in rng.permutation(len(question.more))]
        return [*question.gold, *more, *(i for i in rng.permutation(docs).tolist() if i not in taken)]

    def _draft(self, known: Questions, number: int, chosen: list[int]) -> Draft:
        config, header = constant("ruler/qa_utils.py", "CONFIG"), constant("ruler/qa_utils.py", "DOCUMENT_PROMPT")
        question = known.questions[number]
        context = "\n\n".join(header.format(i=i + 1, document=known.docs[doc]) for i, doc in enumerate(chosen))
        prompt = str(config["template"]).format(context=context, query=question.text)
        meta = {"query": question.text, "question": number, "documents": len(chosen)}
        return Draft(prompt, f" {config['answer_prefix']}", question.answers, meta=meta)

    def _number(self, length: int, index: int) -> int:
        """Number of the index-th question that fits; looks at no more of them than it must."""
        known = self.questions()
        fitting: list[int] = []
        for number in range(len(known.questions)):
            if len(fitting) > index or (number >= PROBED and not fitting):
                break
            if number == len(self._sizes):
                gold = list(known.questions[number].gold)
                self._sizes.append(len(self._encode(self._draft(known, number, gold))) + self.max_new_tokens)
            if self._sizes[number] <= length:
                fitting.append(number)
        if not fitting:
            raise self.too_short(length, min(self._sizes[:PROBED]))
        return fitting[index % len(fitting)]
