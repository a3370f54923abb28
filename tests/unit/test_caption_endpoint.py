"""Captions from an OpenAI-compatible endpoint over real HTTP: good answers, every kind of bad one, their cost."""

import email.utils
import hashlib
import logging
import threading
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from tests.endpoint import Endpoint, Reply, caption, completion, image_of
from vlmdiff.captions.captioners import caption_images
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Caption

KEY = "sk-secret-0123456789"
BUSY = Reply("busy", 503)


def photographs(root: Path, count: int) -> pd.DataFrame:
    """Manifest rows of photographs 0, 1, …, told apart by their width."""
    rows = []
    for number in range(count):
        file = root / f"thing/train/good/{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16 + number, 16), (number, 0, 0)).save(file)
        image_id = hashlib.sha256(file.read_bytes()).hexdigest()
        rows.append({"image_id": image_id, "path": str(file.relative_to(root)), "split": "train"})
    return pd.DataFrame(rows).assign(is_anomalous=False)


def captioned(frame: pd.DataFrame, root: Path, url: str, **settings) -> list[str]:
    captioner = {"kind": "openai", "base_url": url, "model": "tiny", "backoff": 0.01, "retries": 3, "timeout": 5}
    params = Caption(captioner=captioner | settings)
    return caption_images(frame, root, root, params, 10**8, root / "captions.sqlite")["caption"].tolist()


def expected(count: int) -> list[str]:
    return [caption(number) for number in range(count)]


def test_each_photograph_is_asked_for_once_and_gets_its_own_caption(tmp_path):
    """Reference defect 10: captions belong to images by content, however the answers are ordered."""

    def later_first(number: int, _: int) -> Reply:
        time.sleep(0.02 * (12 - number))
        return completion(caption(number))

    frame = photographs(tmp_path, 12)
    with Endpoint(later_first) as endpoint:
        assert captioned(frame, tmp_path, endpoint.url) == expected(12)
        assert captioned(frame.iloc[::-1], tmp_path, endpoint.url) == expected(12)[::-1]
        assert endpoint.answered != sorted(endpoint.answered)
        assert sorted(endpoint.asked) == list(range(12))


def test_a_request_says_what_the_parameters_say(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPTION_KEY", f" {KEY}\n")
    file = tmp_path / "thing.png"
    Image.new("RGB", (1600, 400), (200, 10, 10)).save(file)
    frame = pd.DataFrame({"image_id": ["a"], "path": ["thing.png"]})
    with Endpoint(lambda *_: completion("  A red thing. ")) as endpoint:
        settings = dict(prompt="What?", max_new_tokens=99, temperature=0.5, seed=7, max_side=320)
        captions = captioned(frame, tmp_path, f"{endpoint.url}/", api_key_variable="CAPTION_KEY", **settings)
    assert captions == ["A red thing."]
    (request,) = endpoint.requests
    assert request["path"] == "/v1/chat/completions" and request["key"] == f"Bearer {KEY}"
    sampling = {name: request[name] for name in ("model", "max_tokens", "temperature", "seed")}
    assert sampling == {"model": "tiny", "max_tokens": 99, "temperature": 0.5, "seed": 7}
    assert [part.get("text") for part in request["messages"][0]["content"]] == [None, "What?"]
    image = image_of(request)
    assert image.size == (320, 80)
    assert max(abs(a - b) for a, b in zip(image.getpixel((100, 40)), (200, 10, 10), strict=True)) < 4


@pytest.mark.parametrize("change", [{"model": "other"}, {"prompt": "Why?"}, {"max_side": 8}, {"temperature": 0.1}])
def test_what_changes_the_text_is_asked_anew(tmp_path, change):
    frame = photographs(tmp_path, 2)
    with Endpoint() as endpoint:
        captioned(frame, tmp_path, endpoint.url)
        captioned(frame, tmp_path, endpoint.url, concurrency=1, timeout=9, retries=0, max_new_tokens=64)
        assert len(endpoint.asked) == 2
        endpoint.behave = lambda *_: completion("another")
        assert captioned(frame, tmp_path, endpoint.url, **change) == ["another"] * 2


def test_as_many_are_under_way_as_may_be(tmp_path):
    together = threading.Barrier(4, timeout=10)

    def all_or_none(number: int, _: int) -> Reply:
        together.wait()
        return completion(caption(number))

    with Endpoint(all_or_none) as endpoint:
        assert captioned(photographs(tmp_path, 12), tmp_path, endpoint.url, concurrency=4) == expected(12)
        assert endpoint.most_in_flight == 4


def slow(number: int, attempt: int) -> Reply:
    if attempt == 0:
        time.sleep(1)
    return completion(caption(number))


@pytest.mark.parametrize(
    "first",
    [
        Reply("busy", 429),
        Reply("busy", 429, {"Retry-After": "soon"}),
        Reply("wait", 408),
        Reply({"error": "oops"}, 500),
        Reply("<html>bad gateway</html>", 502),
        BUSY,
        Reply(None),
        Reply('{"choices": [{"mess', promised=500),
    ],
    ids=["429", "429 with nonsense", "408", "500", "502", "503", "dropped", "half an answer"],
)
def test_what_may_pass_is_tried_again(tmp_path, first):
    with Endpoint(lambda number, attempt: first if attempt < 2 else completion(caption(number))) as endpoint:
        assert captioned(photographs(tmp_path, 3), tmp_path, endpoint.url) == expected(3)
        assert Counter(endpoint.asked) == dict.fromkeys(range(3), 3)


def test_silence_is_tried_again(tmp_path):
    with Endpoint(slow) as endpoint:
        assert captioned(photographs(tmp_path, 2), tmp_path, endpoint.url, timeout=0.3) == expected(2)
        assert Counter(endpoint.asked) == {0: 2, 1: 2}


@pytest.mark.parametrize("how", ["seconds", "date"])
def test_retry_after_is_heeded(tmp_path, how):
    def behave(number: int, attempt: int) -> Reply:
        value = "1" if how == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
        return completion(caption(number)) if attempt else Reply("busy", 429, {"Retry-After": value})

    with Endpoint(behave) as endpoint:
        assert captioned(photographs(tmp_path, 1), tmp_path, endpoint.url) == expected(1)
        first, second = endpoint.times
    assert second - first >= 1  # a date has whole seconds: two from now is more than one


def test_an_endpoint_that_wants_an_hours_rest_is_an_error(tmp_path):
    with Endpoint(lambda *_: Reply("quota", 429, {"Retry-After": "3600"})) as endpoint:
        with pytest.raises(InputError, match=r"0\.png: http.* accepts no requests for 3600 s \(status 429: 'quota'"):
            captioned(photographs(tmp_path, 1), tmp_path, endpoint.url)
        assert endpoint.asked == [0]


def test_attempts_are_bounded_and_the_answers_before_are_kept(tmp_path):
    def behave(number: int, _: int) -> Reply:
        return BUSY if number == 3 else completion(caption(number))

    frame = photographs(tmp_path, 6)
    with Endpoint(behave) as endpoint:
        with pytest.raises(InputError, match=r"3\.png: .* no caption in 4 attempt\(s\) \(last: status 503"):
            captioned(frame, tmp_path, endpoint.url, concurrency=1)
        assert Counter(endpoint.asked) == {0: 1, 1: 1, 2: 1, 3: 4}
        endpoint.asked.clear()
        endpoint.behave = lambda number, _: completion(caption(number))
        assert captioned(frame, tmp_path, endpoint.url) == expected(6)
        assert sorted(endpoint.asked) == [3, 4, 5]


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 413, 422])
def test_a_refused_request_stops_at_once_and_names_the_image(tmp_path, status):
    def behave(number: int, _: int) -> Reply:
        return Reply({"error": {"message": "not so"}}, status) if number == 2 else completion(caption(number))

    with Endpoint(behave) as endpoint:
        with pytest.raises(InputError, match=rf"good/2\.png: .* refuses it \(status {status}: .*not so"):
            captioned(photographs(tmp_path, 9), tmp_path, endpoint.url, concurrency=1)
        assert endpoint.asked == [0, 1, 2]


def test_what_is_under_way_when_one_fails_is_kept(tmp_path):
    under_way, failed = threading.Barrier(3), threading.Event()

    def behave(number: int, _: int) -> Reply:
        if number < 3:
            under_way.wait(60)
        if number == 0:
            failed.set()
            return Reply("no", 400)
        failed.wait(60)
        return completion(caption(number))

    frame = photographs(tmp_path, 9)
    with Endpoint(behave) as endpoint:
        with pytest.raises(InputError, match=r"0\.png"):
            captioned(frame, tmp_path, endpoint.url, concurrency=3)
        # Whether the answers arrive before the failure is a matter of time: then more are asked for, and kept too.
        before = list(endpoint.asked)
        assert {0, 1, 2} <= set(before)
        endpoint.behave = lambda number, _: completion(caption(number))
        assert captioned(frame, tmp_path, endpoint.url) == expected(9)
        assert sorted(endpoint.asked[len(before) :]) == [0, *(n for n in range(9) if n not in before)]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (completion(""), "the answer is empty"),
        (completion(None), "the answer is empty"),
        (completion(" \n"), "the answer is empty"),
        (completion("A thing that has", "length"), "cut at caption.captioner.max_new_tokens"),
        (completion(None, refusal="I would rather not."), "the model refuses (I would rather not.)"),
        (completion("A", "content_filter"), "the model refuses (filtered)"),
    ],
)
def test_an_answer_that_is_no_caption_names_its_image_and_the_others_go_on(tmp_path, answer, why):
    frame = photographs(tmp_path, 6)
    with Endpoint(lambda number, _: answer if number in (1, 4) else completion(caption(number))) as endpoint:
        with pytest.raises(InputError) as error:
            captioned(frame, tmp_path, endpoint.url, concurrency=2)
        assert "2 image(s) got no caption" in str(error.value) and str(error.value).count(why) == 2
        assert "good/1.png: " in str(error.value) and "good/4.png: " in str(error.value)
        assert sorted(endpoint.asked) == list(range(6))
        endpoint.asked.clear()
        endpoint.behave = lambda number, _: completion(caption(number))
        assert captioned(frame, tmp_path, endpoint.url) == expected(6)
        assert sorted(endpoint.asked) == [1, 4]


@pytest.mark.parametrize("body", ["<html>Welcome!</html>", "[]", "{}", {"choices": []}, {"choices": [{"text": "A"}]}])
def test_an_answer_that_is_not_a_chat_completion_is_shown_in_the_error(tmp_path, body):
    with Endpoint(lambda *_: Reply(body)) as endpoint:
        with pytest.raises(
            InputError, match=r"0\.png: the answer of http.* is not a chat completion .*Check .*base_url"
        ):
            captioned(photographs(tmp_path, 1), tmp_path, endpoint.url)
        assert endpoint.asked == [0]


@pytest.mark.parametrize("status", [200, 401, 500])
def test_the_key_is_in_no_error_and_no_log(tmp_path, monkeypatch, caplog, capsys, status):
    monkeypatch.setenv("CAPTION_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with Endpoint(lambda *_: Reply(f"Bearer {KEY} is no key", status)) as endpoint, pytest.raises(InputError) as error:
        captioned(photographs(tmp_path, 1), tmp_path, endpoint.url, api_key_variable="CAPTION_KEY", retries=1)
    assert endpoint.requests[0]["key"] == f"Bearer {KEY}"
    said = "".join([str(error.getrepr()), caplog.text, *capsys.readouterr()])
    assert "*** is no key" in said and KEY not in said


@pytest.mark.parametrize("key", [None, " ", "sk-\u200bsecret", "sk-secret\nX-Other: 1"])
def test_a_key_that_cannot_be_sent_is_an_error_without_it(tmp_path, monkeypatch, key):
    if key is not None:
        monkeypatch.setenv("CAPTION_KEY", key)
    with pytest.raises(InputError, match="environment variable CAPTION_KEY") as error:
        captioned(photographs(tmp_path, 1), tmp_path, "http://127.0.0.1:1/v1", api_key_variable="CAPTION_KEY")
    assert "secret" not in str(error.value)


def test_nobody_there_is_an_error_that_says_where(tmp_path):
    with Endpoint() as endpoint:
        url = endpoint.url
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:\d+/v1.* no caption in 2 attempt\(s\).*ConnectError"):
        captioned(photographs(tmp_path, 3), tmp_path, url, retries=1)
