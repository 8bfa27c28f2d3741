"""What a server answers through the `openai` client: completions and chats, whole and streamed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from greedy import clear_continuation
from openai import OpenAI
from reference import Reference
from server import MAX_LENGTH, Server, wait_for
from transformers import AutoTokenizer

CHAT = [{"role": "user", "content": "Say something."}]
PROMPT = "Once upon a time"
NO_THOUGHT: dict[str, Any] = {"enable_thinking": False}


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return server.client()


def ask(client: OpenAI, model: str, **options: Any) -> Any:
    """A completion; greedy and past the end of text unless told otherwise."""
    own = {"ignore_eos": True, "return_token_ids": True} | options.pop("extra_body", {})
    return client.completions.create(
        **{"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "extra_body": own} | options
    )


def ask_chat(client: OpenAI, model: str, **options: Any) -> Any:
    """A chat completion; as `ask`. Without a thought, which would not be `content`."""
    own = {"ignore_eos": True, "return_token_ids": True, "chat_template_kwargs": NO_THOUGHT} | options.pop(
        "extra_body", {}
    )
    return client.chat.completions.create(
        **{"model": model, "messages": CHAT, "max_tokens": 12, "temperature": 0, "extra_body": own} | options
    )


def text_of(answer: Any, number: int = 0) -> str:
    """The text of a choice."""
    choice = answer.choices[number]
    return str(choice.message.content if hasattr(choice, "message") else choice.text)


def test_a_completion_is_what_the_reference_chooses_with_its_log_probabilities(
    client: OpenAI, server: Server, steady_reference: Reference, rng: np.random.Generator
) -> None:
    prompt, tokens, log_probabilities = clear_continuation(steady_reference, rng, length=20, steps=6)
    choice = ask(client, server.model, prompt=prompt, max_tokens=6, logprobs=5).choices[0]
    assert choice.token_ids == tokens
    assert choice.logprobs.token_logprobs == pytest.approx(log_probabilities.max(axis=1).tolist(), abs=1e-3)
    for got, want in zip(choice.logprobs.top_logprobs, log_probabilities, strict=True):
        best = np.sort(want)[-5:]
        assert got  # tokens that read alike, such as bytes of no character, share a key
        assert all(np.abs(best - value).min() < 1e-3 for value in got.values())


def test_a_completion_holds_all_that_the_model_says_thoughts_included(client: OpenAI, server: Server) -> None:
    tokenizer = AutoTokenizer.from_pretrained(server.model)
    thinking = tokenizer.encode("<think>", add_special_tokens=False)
    for prompt in (thinking, "<think>"):
        answer = ask(client, server.model, prompt=prompt, logprobs=1)
        choice = answer.choices[0]
        whole = str(tokenizer.decode(choice.token_ids, skip_special_tokens=True)).rstrip("\N{REPLACEMENT CHARACTER}")
        assert choice.text.rstrip("\N{REPLACEMENT CHARACTER}") == whole != ""  # its last character may lack bytes
        assert len(choice.logprobs.token_logprobs) == answer.usage.completion_tokens == 12
        chunks = list(ask(client, server.model, prompt=prompt, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text


def test_a_chat_has_the_log_probabilities_of_what_it_says(client: OpenAI, server: Server) -> None:
    choice = ask_chat(client, server.model, max_tokens=5, logprobs=True, top_logprobs=3).choices[0]
    assert len(choice.logprobs.content) == 5
    for token in choice.logprobs.content:
        ranked = [candidate.logprob for candidate in token.top_logprobs]
        assert ranked == sorted(ranked, reverse=True)
        assert token.logprob == ranked[0]
        assert len(ranked) == 3
        assert 0 < sum(map(math.exp, ranked)) <= 1 + 1e-6


def test_without_asking_there_are_no_log_probabilities(client: OpenAI, server: Server) -> None:
    assert ask(client, server.model, max_tokens=2).choices[0].logprobs.token_logprobs == []
    assert ask_chat(client, server.model, max_tokens=2).choices[0].logprobs.content == []


def test_streamed_text_is_the_whole_text_with_the_same_usage(client: OpenAI, server: Server) -> None:
    for create in (ask, ask_chat):
        whole = create(client, server.model, max_tokens=24)
        chunks = list(create(client, server.model, max_tokens=24, stream=True, stream_options={"include_usage": True}))
        texts, reasons, tokens = [], [], list[int]()
        for choice in (chunk.choices[0] for chunk in chunks if chunk.choices):
            texts.append(choice.text if create is ask else choice.delta.content or "")
            reasons.append(choice.finish_reason)
            tokens += getattr(choice, "token_ids", None) or []
        choice = whole.choices[0]
        assert "".join(texts) == (choice.text if create is ask else choice.message.content)
        assert tokens == choice.token_ids
        assert reasons == [None] * (len(reasons) - 1) + ["length"]
        assert len(reasons) > 1  # a busy server may put tokens together
        assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert getattr(chunks[-1].usage, name) == getattr(whole.usage, name)


def test_usage_counts_the_tokens_of_prompt_and_answer(client: OpenAI, server: Server) -> None:
    tokenizer = AutoTokenizer.from_pretrained(server.model)
    usage = ask(client, server.model, max_tokens=7).usage
    assert usage.prompt_tokens == len(tokenizer(PROMPT)["input_ids"])
    assert (usage.completion_tokens, usage.total_tokens) == (7, usage.prompt_tokens + 7)

    usage = ask_chat(client, server.model, max_tokens=7).usage
    rendered = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False, **NO_THOUGHT)
    assert usage.prompt_tokens == len(tokenizer(rendered)["input_ids"])
    assert (usage.completion_tokens, usage.total_tokens) == (7, usage.prompt_tokens + 7)


def test_an_answer_ends_with_its_last_token_at_max_tokens_or_at_the_end_of_the_context(
    client: OpenAI, server: Server
) -> None:
    answer = ask(client, server.model, max_tokens=1)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 1)
    answer = ask_chat(client, server.model, max_tokens=openai.omit, max_completion_tokens=3)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 3)
    answer = ask(client, server.model, prompt=[20] * (MAX_LENGTH - 5), max_tokens=MAX_LENGTH)
    assert answer.choices[0].finish_reason == "length"
    assert MAX_LENGTH <= answer.usage.total_tokens <= MAX_LENGTH + 1


def test_n_choices_are_n_answers_with_seeds_from_the_one_given(client: OpenAI, server: Server) -> None:
    for create in (ask, ask_chat):
        options: dict[str, Any] = {"temperature": 1, "max_tokens": 10}
        alone = [create(client, server.model, seed=seed, **options) for seed in (6, 7, 8)]
        together = create(client, server.model, seed=6, n=3, **options)
        texts = [text_of(answer) for answer in alone]
        assert [choice.index for choice in together.choices] == [0, 1, 2]
        assert [text_of(together, number) for number in range(3)] == texts
        assert len(set(texts)) == 3
        counts = [answer.usage.completion_tokens for answer in alone]
        assert (together.usage.prompt_tokens, together.usage.completion_tokens) == (
            alone[0].usage.prompt_tokens,
            sum(counts),
        )
        chunks = list(
            create(client, server.model, seed=6, n=3, stream=True, stream_options={"include_usage": True}, **options)
        )
        assert chunks[-1].usage.completion_tokens == sum(counts)
        assert len({chunk.id for chunk in chunks}) == 1
        streamed, reasons = ["", "", ""], [list[str]() for _ in texts]
        for choice in (chunk.choices[0] for chunk in chunks[:-1]):
            streamed[choice.index] += choice.text if create is ask else choice.delta.content or ""
            reasons[choice.index].append(choice.finish_reason)
        assert streamed == texts
        assert all(reason[-1] and not any(reason[:-1]) for reason in reasons)


def test_each_of_n_choices_ends_before_the_stop_string(client: OpenAI, server: Server) -> None:
    for create in (ask, ask_chat):
        options: dict[str, Any] = {"temperature": 1, "max_tokens": 20, "stop": ["e", "t"]}
        texts = [text_of(create(client, server.model, seed=seed, **options)) for seed in (6, 7, 8)]
        assert not any(letter in text for text in texts for letter in "et")
        together = create(client, server.model, seed=6, n=3, **options)
        assert [text_of(together, number) for number in range(3)] == texts
        streamed, reasons = ["", "", ""], [list[str]() for _ in texts]
        for chunk in create(client, server.model, seed=6, n=3, stream=True, **options):
            choice = chunk.choices[0]
            streamed[choice.index] += choice.text if create is ask else choice.delta.content or ""
            reasons[choice.index].append(choice.finish_reason)
        assert streamed == texts
        assert all(reason[-1] and not any(reason[:-1]) for reason in reasons)


def test_several_prompts_are_answered_in_their_order(client: OpenAI, server: Server) -> None:
    prompts = ["One", "and two", "then three."]
    alone = [ask(client, server.model, prompt=prompt).choices[0].text for prompt in prompts]
    together = ask(client, server.model, prompt=prompts).choices
    assert [(choice.index, choice.text) for choice in together] == list(enumerate(alone))
    twice = ask(client, server.model, prompt=prompts, n=2).choices
    assert [(choice.index, choice.text) for choice in twice] == list(enumerate(text for text in alone for _ in "12"))


def test_a_seed_gives_the_same_text_again_and_another_seed_another(client: OpenAI, server: Server) -> None:
    for create in (ask, ask_chat):
        tokens = [
            create(client, server.model, temperature=1, max_tokens=12, seed=seed).choices[0].token_ids
            for seed in (0, 0, 1, 1, 2**40 + 3, -5, openai.omit, openai.omit)
        ]
        assert tokens[0] == tokens[1]
        assert tokens[2] == tokens[3]
        assert len(set(map(tuple, tokens))) == 6


def test_text_ends_at_an_end_token_unless_told_to_go_on(client: OpenAI, server: Server) -> None:
    for seed in range(1, 100):
        options = {"temperature": 2, "seed": seed, "max_tokens": 60}
        stopped = ask(client, server.model, **options, extra_body={"ignore_eos": False})
        if stopped.choices[0].finish_reason == "stop":
            break
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens < 60
    ignored = ask(client, server.model, **options)
    assert (ignored.choices[0].finish_reason, ignored.usage.completion_tokens) == ("length", 60)
    count = stopped.usage.completion_tokens
    assert ignored.choices[0].token_ids[:count] == stopped.choices[0].token_ids


def test_a_stop_token_ends_the_text(client: OpenAI, server: Server) -> None:
    tokens = ask(client, server.model).choices[0].token_ids
    own = {"ignore_eos": False, "stop_token_ids": [tokens[4]]}
    stopped = ask(client, server.model, extra_body=own).choices[0]
    assert stopped.finish_reason == "stop"
    ends = {tokens[4], *json.loads(Path(server.model, "config.json").read_text())["eos_token_id"]}
    assert stopped.token_ids == tokens[: next(at for at, token in enumerate(tokens) if token in ends) + 1]


def test_a_stop_string_ends_the_text_and_is_not_in_it(client: OpenAI, server: Server) -> None:
    for create in (ask, ask_chat):
        text = text_of(create(client, server.model, max_tokens=24))
        stop = text[7:10]  # over the border of two tokens, most of which are one or two letters
        want = text[: text.index(stop)]
        for stops in (stop, ["nowhere to be found", stop]):
            whole = create(client, server.model, max_tokens=24, stop=stops)
            assert (text_of(whole), whole.choices[0].finish_reason) == (want, "stop")
            chunks = [c.choices[0] for c in create(client, server.model, max_tokens=24, stop=stops, stream=True)]
            streamed = [c.text if create is ask else c.delta.content or "" for c in chunks]
            assert ("".join(streamed), chunks[-1].finish_reason) == (want, "stop")


def test_health_metrics_and_the_models_name_answer(client: OpenAI, server: Server) -> None:
    assert httpx.get(f"{server.address}/health").status_code == 200
    assert [model.id for model in client.models.list()] == [server.model]
    name = "maxserve_num_output_tokens_total"
    before = server.metric(name)
    ask(client, server.model, max_tokens=5)
    wait_for(lambda: server.metric(name) >= before + 5, 60, "the tokens to be counted")
