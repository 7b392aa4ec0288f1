"""A GGUF model as lm-evaluation-harness wants it: log-likelihoods of continuations and of whole texts, and generation.

Imported only where the harness is installed (the extra `tasks`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from reap.engine.generation import TEXT_END, Prompt, Sampling, continue_batch, prompt_batches
from reap.engine.options import GENERATION_CTX_SIZE, EngineArguments, EngineOptions
from reap.engine.session import SessionTokenizer, open_session
from reap.errors import UnsupportedModelError, UsageError
from reap.evaluation.virtual import keep_only
from reap.files.paths import PathLike
from reap.gguf.model_info import inspect
from reap.pruning.compatibility import check_plan
from reap.scores.plan import PrunePlan
from reap.text.encoding import Encoder

#: Continuations that share a batch.
SEQUENCES = 16
#: Windows that the cache has room for: what shares a batch seldom fills its windows.
_WINDOWS = 2
#: Tokens generated where a task does not say how many.
USUAL_NEW_TOKENS = 256
_TAKEN_ALREADY = ("batch_size", "max_batch_size", "device")  # the harness gives them to every model

Request = tuple[Any, list[int], list[int]]
Answer = tuple[float, bool]


@dataclass
class _Question:
    """A context, and which of the requests ask what may follow it."""

    context: list[int]
    requests: list[int] = field(default_factory=list)


@register_model("reap")
class HarnessModel(TemplateLM):  # type: ignore[misc]
    """`lm_eval`'s model "reap": `pretrained=model.gguf,plan=plan.json`, and any option of the engine."""

    def __init__(
        self,
        pretrained: PathLike,
        plan: PrunePlan | PathLike | None = None,
        allow_mismatch: bool = False,
        sequences: int = SEQUENCES,
        progress: Callable[[int], None] | None = None,
        **engine: Any,
    ) -> None:
        """Load a model.

        Args:
            pretrained: a GGUF file.
            plan: prune it so, virtually.
            allow_mismatch: go on with a plan that was made of another model.
            sequences: continuations, or texts being generated, that share a batch.
            progress: called with the number of tokens of each pass.
            engine: options of the engine; what the harness gives to every model (batch_size, device) is left out.

        Raises:
            UsageError, MismatchError, UnsupportedModelError, EngineError: as `evaluate`.
        """
        super().__init__()
        given = cast("EngineArguments", {name: value for name, value in engine.items() if name not in _TAKEN_ALREADY})
        options = EngineOptions.of(given, ctx_size=GENERATION_CTX_SIZE)
        self.info = inspect(pretrained)
        options = options.within(given, self.info.context_length)
        self._allow_mismatch = allow_mismatch
        self._progress = progress
        self._session = open_session(
            pretrained,
            options,
            n_sequences=sequences,
            cache_size=_WINDOWS * (options.ctx_size or self.info.context_length),
            n_bytes=self.info.n_bytes,
        )
        self._tokenizer = SessionTokenizer(self._session)
        if not self._tokenizer.has_tokenizer:
            raise UnsupportedModelError(f"{pretrained}: the model has no tokenizer, which tasks need")
        if self._session.sees_the_future():
            raise UnsupportedModelError(
                f"{pretrained}: {self.info.architecture} sees the tokens that it should predict"
            )
        #: What the engine warned of.
        self.warnings: tuple[str, ...] = tuple(self._session.warnings())
        self.set_plan(None if plan is None else PrunePlan.of(plan))

    def set_plan(self, plan: PrunePlan | None) -> None:
        """From now on only the experts that `plan` keeps; None: all of them."""
        if plan is None:
            return self._session.set_kept(None)
        self.check_plan(plan)
        keep_only(self._session, self.info, plan.layers, plan.model)

    def check_plan(self, plan: PrunePlan) -> None:
        """UsageError or MismatchError where this model cannot follow a plan."""
        check_plan(self.info, plan, allow_mismatch=self._allow_mismatch)

    # ---- tokens

    @property
    def max_length(self) -> int:
        """Tokens that the model sees at once."""
        return self._session.ctx_size

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text, or the one that begins it where there is none."""
        token = self._tokenizer.eos if self._tokenizer.eos is not None else self._tokenizer.bos
        if token is None:
            raise UnsupportedModelError(
                "the model has neither a first nor a last token of a text, and tasks need one of them"
            )
        return token

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return self._tokenizer.bos if self._tokenizer.bos is not None else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; BOS first where the model adds one and the text does not have it."""
        ids = self._tokenizer.tokenize(string, add_special=False, parse_special=True)
        adds = self._tokenizer.add_bos if add_special_tokens is None else add_special_tokens
        bos = self._tokenizer.bos
        return [bos, *ids] if adds and bos is not None and ids[:1] != [bos] else ids

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of some tokens; U+FFFD for what is not UTF-8."""
        return b"".join(self._tokenizer.token_text(token) for token in tokens).decode("utf-8", "replace")

    # ---- the chat template, for the harness's --apply_chat_template

    @property
    def tokenizer_name(self) -> str:
        """What the harness calls the template's tokenizer where it keeps requests."""
        return self.info.name or self.info.path.name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template in the model's file, as it is."""
        return self._tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text; without the prompt the last turn, which the model is to go on with, stays open."""
        template = Encoder(self._tokenizer).template()
        if add_generation_prompt:
            return template.render(chat_history, add_generation_prompt=True)
        return template.render(chat_history[:-1], add_generation_prompt=True) + chat_history[-1]["content"]

    # ---- log-likelihoods

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Answer]:
        """ln p of each continuation after its context, and whether each of its tokens is the most probable."""
        found: list[Answer] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """ln p of each whole text, in windows of `max_length` tokens."""
        windows: list[Request] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(index)
        sums = [0.0] * len(requests)
        for index, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[index] += log_prob
        for request, log_prob in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, log_prob)
        return sums

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[Answer]:
        """Requests with one context, such as the choices of a question, share what the cache holds of it."""
        answers: dict[int, Answer] = {}
        for batch in self._batches(requests):
            asked = [
                (np.array(it.context, np.int32), [np.array(requests[index][2], np.int32) for index in it.requests])
                for it in batch
            ]
            for question, found in zip(batch, self._session.score_continuations(asked), strict=True):
                for index, answer in zip(question.requests, found, strict=True):
                    answers[index] = answer
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
            self._report(sum(len(context) + sum(map(len, following)) for context, following in asked))
        return [answers[index] for index in range(len(requests))]

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[_Question]]:
        """The requests by their contexts, as many at once as the session has sequences and room for."""
        by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_text, before, continuation) in enumerate(requests):
            room = self.max_length + 1 - len(continuation)  # the last token is not run
            if room < 1:
                raise UsageError(
                    f"a continuation has {len(continuation)} tokens, which do not fit a context of {self.max_length}"
                )
            by_context[tuple(before[-room:])].append(index)
        batch: list[_Question] = []
        n_sequences = n_tokens = 0
        for context, indices in by_context.items():
            question = None
            for index in indices:
                size = len(requests[index][2]) - 1
                new = size if question is not None else size + len(context)
                if batch and (n_sequences == self._session.n_sequences or n_tokens + new > self._session.cache_size):
                    yield batch
                    batch, n_sequences, n_tokens = [], 0, 0
                    question, new = None, size + len(context)
                if question is None:
                    question = _Question(list(context))
                    batch.append(question)
                question.requests.append(index)
                n_sequences, n_tokens = n_sequences + 1, n_tokens + new
        if batch:
            yield batch

    # ---- generation

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """What the model goes on with after each context, before the first stop word."""
        by_sampling: dict[Sampling, list[int]] = defaultdict(list)
        prompts = []
        for index, request in enumerate(requests):
            context, given = request.args
            prompt, sampling = self._prompt(context, given, seed=index)
            prompts.append(prompt)
            by_sampling[sampling].append(index)
        texts = [""] * len(requests)
        for sampling, indices in by_sampling.items():
            asked = [prompts[index] for index in indices]
            for batch in prompt_batches(self._session, asked):
                found = continue_batch(self._session, [asked[place] for place in batch], sampling)
                for place, continuation in zip(batch, found, strict=True):
                    tokens = continuation.tokens[:-1] if continuation.ended == TEXT_END else continuation.tokens
                    context, given = requests[indices[place]].args
                    text = postprocess_generated_text(self.text_of(tokens), self._stops(given), None)
                    texts[indices[place]] = text
                    self.cache_hook.add_partial("generate_until", (context, given), text)
                self._report(sum(len(asked[place].tokens) for place in batch) + sum(len(it.tokens) for it in found))
        return texts

    def _stops(self, given: Mapping[str, Any]) -> list[str]:
        until = given.get("until")
        stops: list[str] = handle_stop_sequences(
            list(until) if isinstance(until, list | tuple) else until, eos=self.text_of([self.eot_token_id])
        )
        return [stop for stop in stops if stop]

    def _prompt(self, context: str, given: Mapping[str, Any], seed: int) -> tuple[Prompt, Sampling]:
        options = normalize_gen_kwargs(dict(given), USUAL_NEW_TOKENS)
        n_new = options["max_gen_toks"]
        if n_new >= self.max_length:
            raise UsageError(f"a task asks for {n_new} new tokens, which do not fit a context of {self.max_length}")
        tokens = (self.tok_encode(context) or [self.prefix_token_id])[-(self.max_length - n_new) :]
        samples = bool(options.get("do_sample"))
        sampling = Sampling(
            temperature=float(options.get("temperature") or 0.0) if samples else 0.0,
            top_k=int(options.get("top_k") or 0) if samples else 0,
            top_p=float(options.get("top_p") or 1.0) if samples else 1.0,
            min_p=float(options.get("min_p") or 0.0) if samples else 0.0,
        )
        return Prompt(tuple(tokens), n_new, seed, tuple(stop.encode() for stop in self._stops(given))), sampling

    def _report(self, n_tokens: int) -> None:
        if self._progress is not None:
            self._progress(n_tokens)
