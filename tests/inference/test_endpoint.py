"""A teacher behind a URL: what is asked for again, what is set aside, and what ends the run."""

import email.utils
import http.client
import json
import time

import pytest

from jaxllm.errors import UserError
from jaxllm.inference import endpoint
from jaxllm.inference.endpoint import Connection, EndpointTeacher
from jaxllm.inference.requests import Sampling
from jaxllm.inference.teacher import Failed, Question

FAULTS = {
    "too many requests": (429, {"Retry-After": "0"}, b"slow down"),
    "a fault": (500, {}, b'{"error": {"message": "out of memory"}}'),
    "no gateway": (503, {}, b""),
    "a conflict": (409, {}, b""),
    "half of an answer": (200, {}, b'{"choices": [{"mess'),
    "no choices": (200, {}, b'{"choices": []}'),
    "an error that is none": (200, {}, b'{"error": "overloaded"}'),
    "another type": (200, {}, b'{"choices": [{"message": {"content": 5}}]}'),
    "half of a character": (200, {}, b'{"choices": [{"message": {"content": "\\ud800"}}]}'),
    "fewer bytes than it says": (200, {"Content-Length": "1000"}, b'{"choices": '),
    "nothing": None,
}


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.001)


@pytest.fixture
def ask(chat_endpoint):
    """Has questions answered; gives texts, or reasons, by question."""

    def run(*questions, seed=0, samples=1, sampling=None, **connection):
        settings = {"retries": 2, "timeout": 5.0, "concurrency": 2} | connection
        made = Connection(chat_endpoint.url, "big", **settings)
        teacher = EndpointTeacher(made, sampling or Sampling(8, 0.5), seed, samples)
        asked = [
            Question(number, [{"role": "user", "content": text}])
            for number, text in enumerate(questions)
        ]
        found = {}
        for outcomes in teacher.answer(asked):
            for question, outcome in outcomes:
                assert question.number not in found
                found[question.number] = outcome
        return [found[number] for number in range(len(questions))]

    return run


def test_a_request_says_what_is_asked_and_how(chat_endpoint, ask):
    sampling = Sampling(8, 0.5, top_p=0.9, stop=("\n",))
    extra = {"seed": None, "effort": "low"}
    (answers,) = ask("2 + 2?", key="secret", sampling=sampling, extra=extra)
    ((path, headers, body),) = chat_endpoint.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert body == {
        "model": "big",
        "messages": [{"role": "user", "content": "2 + 2?"}],
        "max_tokens": 8,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["\n"],
        "effort": "low",
    }
    assert [(a.text[:6], a.finish, a.tokens) for a in answers] == [("2 + 2?", "stop", 3)]


def test_no_key_is_sent_where_there_is_none(chat_endpoint, ask):
    ask("a")
    assert "Authorization" not in chat_endpoint.requests[0][1]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_may_pass_is_asked_for_again(fault, chat_endpoint, ask):
    chat_endpoint.reply = lambda body, time: (
        FAULTS[fault] if time <= 2 else chat_endpoint.says("right")
    )
    timeout = 0.2 if fault == "nothing" else 5.0
    (answers,) = ask("a", timeout=timeout)
    assert [answer.text for answer in answers] == ["right"]
    assert len(chat_endpoint.requests) == 3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("too many requests", "429 Too Many Requests (asked 3 times)"),
        ("a fault", "500 Internal Server Error: out of memory (asked 3 times)"),
        ("no choices", "an answer that is none (IndexError: list index out of range) (asked"),
        ("an error that is none", "an answer that is none (overloaded)"),
        ("nothing", "no answer in 0.2 s (asked 3 times)"),
    ],
)
def test_what_does_not_pass_is_set_aside_and_the_others_go_on(fault, reason, chat_endpoint, ask):
    def reply(body, time):
        asked = body["messages"][-1]["content"]
        return FAULTS[fault] if asked == "b" else chat_endpoint.says(asked)

    chat_endpoint.reply = reply
    timeout = 0.2 if fault == "nothing" else 5.0
    first, failed, last = ask("a", "b", "c", timeout=timeout)
    assert (first[0].text, last[0].text) == ("a", "c")
    assert isinstance(failed, Failed)
    assert failed.reason.startswith(reason)


def test_a_server_that_is_not_there_is_a_lost_connection(chat_endpoint, ask):
    chat_endpoint.url = "http://127.0.0.1:9/v1"  # the port of `discard`
    (failed,) = ask("a", retries=0)
    assert "ConnectionRefusedError" in failed.reason
    assert failed.reason.endswith("(asked once)")


def test_an_answer_that_never_ends_is_cut_off_in_time():
    """Each of its pieces comes in time, but the whole does not."""

    class Slow(http.client.HTTPResponse):
        fp, left = None, 100

        def __init__(self):
            pass

        def read1(self, size=-1):
            time.sleep(0.01)
            self.left -= 1
            return b" " if self.left else b""

    with pytest.raises(TimeoutError):
        endpoint._whole(Slow(), time.monotonic() + 0.1)


@pytest.mark.parametrize("status", [401, 403, 404, 400, 302, 308])
def test_what_will_not_pass_ends_it_at_once_without_the_key(status, chat_endpoint, ask):
    said = json.dumps({"error": {"message": "no such key: secret\nof yours"}}).encode()
    chat_endpoint.reply = lambda body, time: (status, {"Location": "http://127.0.0.1:9/"}, said)
    with pytest.raises(UserError, match=f"refuses: {status} .*no such key: \\*\\*\\* of") as told:
        ask("a", "b", "c", key="secret", concurrency=1)
    assert "secret" not in str(told.value)
    assert "\n" not in str(told.value)
    assert len(chat_endpoint.requests) <= 2  # the next may have been on its way


def test_a_question_that_is_refused_among_others_is_set_aside(chat_endpoint, ask):
    def reply(body, time):
        asked = body["messages"][-1]["content"]
        too_long = (400, {}, b'{"message": "too long"}')
        return too_long if asked == "b" else chat_endpoint.says(asked)

    chat_endpoint.reply = reply
    _, failed, _ = ask("a", "b", "c", concurrency=1)
    assert failed == Failed("400 Bad Request: too long")
    assert chat_endpoint.asked.count("b") == 1


def test_no_more_are_asked_at_once_than_may_be(chat_endpoint, ask):
    chat_endpoint.delay = 0.02
    questions = [str(number) for number in range(24)]
    ask(*questions, concurrency=3)
    assert sorted(chat_endpoint.asked) == sorted(questions)
    assert chat_endpoint.busiest == 3


def test_several_answers_are_drawn_by_seeds_of_their_own(chat_endpoint, ask):
    def texts(**options):
        return [[a.text for a in answers] for answers in ask("a", "b", **options)]

    first = texts(samples=3)
    seeds = [body["seed"] for _, _, body in chat_endpoint.requests]
    assert len(set(seeds)) == 6
    assert max(seeds) < 2**31
    assert texts(samples=3, concurrency=5) == first != texts(samples=3, seed=1)


def test_if_one_of_several_answers_fails_the_question_does(chat_endpoint, ask):
    fault = FAULTS["no gateway"]
    chat_endpoint.reply = lambda body, time: (
        fault if body["seed"] % 2 else chat_endpoint.answer(body, time)
    )
    (failed,) = ask("a", samples=8, retries=0)
    assert isinstance(failed, Failed)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"text": "4", "reasoning_content": "2 and 2"}, "<think>2 and 2</think>4"),
        ({"text": "4", "reasoning": "2 and 2"}, "<think>2 and 2</think>4"),
        ({"text": "<think>2</think>4", "reasoning": "2"}, "<think>2</think>4"),
        ({"text": None, "reasoning_content": "2 and", "finish": "length"}, "<think>2 and"),
        ({"text": "4", "reasoning_content": None}, "4"),
    ],
)
def test_what_is_thought_stands_before_the_answer(said, text, chat_endpoint, ask):
    chat_endpoint.reply = lambda body, time: chat_endpoint.says(**said)
    (answers,) = ask("a")
    assert answers[0].text == text


def test_a_call_of_a_tool_is_no_answer(chat_endpoint, ask):
    chat_endpoint.reply = lambda body, time: chat_endpoint.says(None, tool_calls=[{"id": "1"}])
    (failed,) = ask("a")
    assert failed.reason.startswith("it answers by a tool call")
    assert len(chat_endpoint.requests) == 1


def test_the_server_says_how_long_to_wait(chat_endpoint, ask, monkeypatch):
    waits = []
    monkeypatch.setattr(endpoint, "_waiting", lambda *told: waits.append(told) or 0.0)
    chat_endpoint.reply = lambda body, time: (429, {"Retry-After": "7"}, b"")
    ask("a")
    assert waits == [(0, 7.0), (1, 7.0)]


@pytest.mark.parametrize(
    ("said", "least", "most"), [("12", 12, 12), ("", 0, 0), ("soon", 0, 0), ("-5", 0, 0)]
)
def test_how_long_is_read(said, least, most):
    assert least <= endpoint._asked_wait(said) <= most


def test_waits_grow_are_drawn_and_have_a_limit(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 1.0)
    for attempt in range(6):
        waits = {endpoint._waiting(attempt, 0.0) for _ in range(20)}
        assert len(waits) == 20
        assert 2**attempt / 2 <= min(waits) <= max(waits) <= 2**attempt
    assert endpoint._waiting(5000, 0.0) <= endpoint.LONGEST_WAIT
    assert endpoint._waiting(0, 1e9) == endpoint.LONGEST_WAIT
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 25 <= endpoint._asked_wait(date) <= 30
