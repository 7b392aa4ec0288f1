"""Every chat template of llama.cpp's tree with every conversation: the text is the engine's, and transformers'; what is
counted is the assistant's."""

from __future__ import annotations

import re

import pytest

from helpers import chat_templates
from helpers.chat_templates import ESCAPED, as_the_engine_ends, by_transformers, results, table
from helpers.conversations import CONVERSATIONS

# What ends the first of three turns, as each model's makers chose it: read off the templates by hand. The GLM models
# write none; the user's header ends their turns.
IM_END, EOT, DEEPSEEK, S = "<|im_end|>\n", "<|eot_id|>", "<｜end▁of▁sentence｜>", "</s>"
ENDS = {
    "Apertus": "<|assistant_end|>",
    "Apriel-1.6": "\n<|end|>",
    "ByteDance": "<seed:eos>",
    "Cohere2MoE": "<|END_TEXT|><|END_OF_TURN_TOKEN|>",
    "CohereForAI-c4ai-command-r-plus": "<|END_OF_TURN_TOKEN|>",
    "CohereForAI-c4ai-command-r7b": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "GLM": "",
    "GigaChat": "<|message_sep|>\n\n",
    "Kimi-K2": "<|im_end|>",
    "moonshotai-Kimi-K2": "<|im_end|>",
    "Kimi-K3": "<|close|>response<|sep|><|close|>message<|sep|><|end_of_msg|>",
    "MiniMax-M1": "<end_of_sentence>\n",
    "MiniMax-M2": "[e~[\n",
    "MiniMax-M3": "[e~[\n",
    "Mistral": S,
    "mistralai": S,
    "unsloth-mistral": S,
    "NVIDIA-Nemotron-Nano-v2": "\n<SPECIAL_12>\n",
    "Reka": "\n\n<sep>",
    "Spark": DEEPSEEK,
    "deepseek-ai": DEEPSEEK,
    "llama-cpp-deepseek": DEEPSEEK,
    "fireworks": EOT,
    "meetkai": EOT,
    "meta-llama": EOT,
    "google-gemma-2": "<end_of_turn>\n",
    "google-gemma-4": "<turn|>\n",
    "ibm-granite": "<|end_of_text|>\n",
    "inclusionai": "<|role_end|>",
    "llama-cpp-rwkv": "\n\n",
    "microsoft-Phi": "<|end|>",
    "muse": "<|eot|>",
    "openai": "<|end|>",
    "poolside-Laguna-S": "</assistant>\n",
    "poolside-Laguna-XS": "\n</assistant>\n",
    "tencent": "<｜hy_eos:opensource｜>",
    "unsloth-Apriel": "\n<|end|>\n</s>",
    "upstage": "<|end|>",
}
N_TEMPLATES = 70


def names() -> list[str]:
    """The templates, or one name that skips where llama.cpp's source is not there."""
    directory = chat_templates.source_directory()
    return [path.stem for path in sorted((directory / "models/templates").glob("*.jinja"))] if directory else ["any"]


each_template = pytest.mark.parametrize("name", names())


def test_no_template_is_missing() -> None:
    assert len(chat_templates.sources()) >= N_TEMPLATES
    assert len(CONVERSATIONS) >= 30


@each_template
def test_the_text_is_the_engine_s(name: str) -> None:
    outcomes, capabilities, _ = results()
    for title, outcome in outcomes[name].items():
        if outcome.rendered is None:
            assert outcome.engine is None, f"{title}: {outcome.error}, where the engine writes {outcome.engine!r}"
        else:
            assert outcome.engine is not None, f"{title}: {outcome.engine_error}"
            assert as_the_engine_ends(name, outcome.rendered.text) == outcome.engine, title
    found = chat_templates.chat_template(name).capabilities
    caps = capabilities[name]
    assert (found.takes_strings, found.takes_parts) == (caps["supports_string_content"], caps["supports_typed_content"])
    assert (found.takes_system, found.takes_objects) == (
        caps["supports_system_role"],
        caps["supports_object_arguments"],
    )


@each_template
def test_what_is_counted_is_the_assistant_s(name: str) -> None:
    for title, outcome in results()[0][name].items():
        if outcome.rendered is None:
            continue
        assert outcome.is_located, title
        assert outcome.rendered.spans is not None
        text, spans = outcome.rendered.text, outcome.rendered.spans
        edges = [edge for span in spans for edge in span]
        assert edges == sorted(edges), title
        assert all(start < end for start, end in spans), title
        inside = [text[start:end] for start, end in spans]
        outside = "|".join(text[a:b] for a, b in zip([0, *edges[1::2]], [*edges[::2], len(text)], strict=True))
        assert not re.search(r"[sur]word", "|".join(inside)), title
        assert not re.search(r"[at]word\d", outside), title
        if title == "same words":
            assert ["same" in piece for piece in inside] == [True, True]
            assert outside.count("same") >= 2
        _check_turns(title, inside, text)


def _check_turns(title: str, inside: list[str], text: str) -> None:
    """Each turn whose words are in the text has a span, and no span has words of two turns."""
    owners = {}
    for number, message in enumerate(CONVERSATIONS[title]["messages"]):
        if message["role"] == "assistant":
            owners |= dict.fromkeys(re.findall(r"[at]word\d", str(message)), number)
    assert all(len({owners[word] for word in re.findall(r"[at]word\d", piece)}) <= 1 for piece in inside), title
    visible = {owners[word] for word in owners if word in text}
    assert len(inside) >= len(visible), title


@each_template
def test_the_end_of_turn_is_counted(name: str) -> None:
    rendered = results()[0][name]["turns"].rendered
    assert rendered is not None
    assert rendered.spans is not None
    assert len(rendered.spans) == 3
    start, end = rendered.spans[0]
    family = max((key for key in ENDS if name.startswith(key)), key=len, default="")
    assert rendered.text[start:end].partition("aword1")[2] == ENDS.get(family, IM_END)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@each_template
def test_the_text_is_transformers(name: str) -> None:
    outcomes, _, now = results()
    for title, outcome in outcomes[name].items():
        theirs = by_transformers(name, title, now)
        if outcome.rendered is None:
            assert theirs is None, title
        elif theirs is not None and (name != ESCAPED or "&#34;" not in theirs):
            assert outcome.rendered.text == theirs, title


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_the_page_is_what_the_script_prints() -> None:
    assert table() in chat_templates.page().read_text(encoding="utf-8")


def test_thoughts_stay_in_every_turn_where_the_template_can_show_them() -> None:
    outcomes, _, _ = results()
    for name in (
        "Cohere2MoE",
        "LFM2.5-8B-A1B",
        "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        "Kimi-K3",
        "poolside-Laguna-S-2.1",
    ):
        rendered = outcomes[name]["thoughts turns"].rendered
        assert rendered is not None
        assert (rendered.left_out, "tword1" in rendered.text) == ([], True), name
    rendered = outcomes["MiniMax-M2"]["thoughts turns"].rendered
    assert rendered is not None
    assert (rendered.left_out, "tword2" in rendered.text) == ([(1, "reasoning_content")], True)


def test_what_a_template_leaves_out_is_known() -> None:
    outcomes, _, _ = results()
    for name, by_title in outcomes.items():
        for title, outcome in by_title.items():
            if outcome.rendered is None:
                continue
            text = outcome.rendered.text
            left_out = {number for number, _ in outcome.rendered.left_out}
            for number, message in enumerate(CONVERSATIONS[title]["messages"]):
                words = re.findall(r"[aturs]word\d", str(message))
                if words:
                    assert (number in left_out) == any(word not in text for word in words), (name, title, number)
