"""Files of answers, as `generate` writes them, read again to be compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reap.errors import FormatError, UsageError
from reap.evaluation.loops import ends_in_loop
from reap.evaluation.shares import two_shares, wilson
from reap.files.paths import PathLike
from reap.files.strict_json import Node, shorten

_MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class FiledAnswer:
    """One line."""

    prompt: str
    """The prompt's digest."""
    question: str
    """What was asked, to be read: the last turn, the pair's first half, or the text."""
    answer: str
    """The answer."""
    tokens: tuple[int, ...]
    """Its token ids."""
    ended: str
    """ "text" or "length"."""


@dataclass(frozen=True)
class AnswerFile:
    """A file of answers."""

    path: str
    """Where it lies."""
    by: str
    """The model and its plan, in words."""
    sampling: Mapping[str, float]
    """How tokens were chosen."""
    answers: tuple[FiledAnswer, ...]
    """In the order of the prompts."""

    @property
    def loops(self) -> int:
        """Answers that end in a loop."""
        return sum(ends_in_loop(it.tokens) for it in self.answers)

    @property
    def loop_interval(self) -> tuple[float, float]:
        """The 95 % interval of their share."""
        return wilson(self.loops, len(self.answers))

    @property
    def settings(self) -> str:
        """How tokens were chosen, in llama.cpp's options."""
        temperature = self.sampling.get("temperature", 0.0)
        if temperature == 0:
            return "--temp 0"
        names = {"top_k": "--top-k", "top_p": "--top-p", "min_p": "--min-p"}
        return " ".join(
            [f"--temp {temperature:g}", *(f"{flag} {self.sampling.get(name, 0):g}" for name, flag in names.items())]
        )


def read_answers(path: PathLike) -> AnswerFile:
    """A file that `reap generate` wrote. UsageError where it cannot be read, FormatError for another kind of file."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot read the answers: {error.strerror or error}") from error
    if len(data) > _MOST_BYTES:
        raise FormatError(f"{path}: is larger than {_MOST_BYTES:,} bytes, which no file of answers is")
    answers, by, sampling = [], "", {}
    for number, line in enumerate(data.splitlines(), 1):
        node = Node(_parsed(line, f"{path}:{number}"), f"{path}:{number}")
        said = node["reap"] if "reap" in node else node.fail("is not an answer that reap generate wrote")
        by, sampling = said["by"].string(), {name: value.number() for name, value in said["sampling"].items()}
        tokens = tuple(said["tokens"].integers().tolist())
        answers.append(
            FiledAnswer(
                said["prompt"].string(),
                _question(node.members()),
                said["answer"].string(),
                tokens,
                said["ended"].string(),
            )
        )
    if not answers:
        raise FormatError(f"{path}: holds no answers")
    return AnswerFile(str(path), by, sampling, tuple(answers))


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: is not JSON: {shorten(str(error))}") from error


def _question(line: Mapping[str, Any]) -> str:
    messages = line.get("messages")
    if isinstance(messages, list):
        users = [it.get("content") for it in messages if isinstance(it, dict) and it.get("role") == "user"]
        last = users[-1] if users else ""
        return last if isinstance(last, str) else json.dumps(last, ensure_ascii=False)
    for name in ("prompt", "text"):
        if isinstance(line.get(name), str):
            text: str = line[name]
            answer = line["reap"]["answer"]
            return text.removesuffix(answer) if name == "text" else text
    return "token ids"


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt."""

    question: str
    """What was asked."""
    first: FiledAnswer
    """By one model."""
    second: FiledAnswer
    """By the other."""

    @property
    def same_tokens(self) -> int:
        """New tokens before the first that differs."""
        shorter = min(len(self.first.tokens), len(self.second.tokens))
        pairs = zip(self.first.tokens, self.second.tokens, strict=False)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), shorter)

    @property
    def differs(self) -> bool:
        """Whether they are not the same tokens."""
        return self.first.tokens != self.second.tokens


def pair_up(first: AnswerFile, second: AnswerFile) -> list[Pair]:
    """Prompts that both were asked: those answered differently first, the earlier they part the earlier.

    Raises UsageError where there is none.
    """
    theirs: dict[str, list[FiledAnswer]] = {}
    for it in second.answers:
        theirs.setdefault(it.prompt, []).append(it)
    pairs = [Pair(it.question, it, theirs[it.prompt].pop(0)) for it in first.answers if theirs.get(it.prompt)]
    if not pairs:
        raise UsageError(f"{first.path} and {second.path} have no prompt in common")
    return sorted(pairs, key=lambda pair: (not pair.differs, pair.same_tokens))


def better_settings(files: Sequence[AnswerFile]) -> Iterator[tuple[AnswerFile, AnswerFile, float]]:
    """Of one model's answers in several settings: those that looped clearly less than its most probable tokens did.

    Yields what looped less, what looped more, and the p-value of the two-proportion test, below 0.05.
    """
    for greedy in files:
        if greedy.sampling.get("temperature", 0.0) != 0:
            continue
        for other in files:
            if other.by != greedy.by or other.sampling.get("temperature", 0.0) == 0:
                continue
            n, m = len(other.answers), len(greedy.answers)
            p_value = two_shares(other.loops, n, greedy.loops, m)
            if other.loops / n < greedy.loops / m and p_value < 0.05:
                yield other, greedy, p_value
