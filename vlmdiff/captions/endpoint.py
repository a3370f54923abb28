"""Captions from a model behind an OpenAI-compatible endpoint (vLLM, LMDeploy, and others)."""

import base64
import email.utils
import io
import os
import random
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path

import httpx
from PIL import Image

from vlmdiff.captions.prompts import NoCaption, caption_of, prompt_text, raise_for
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Endpoint
from vlmdiff.data.images import read_image

# Temporary statuses, worth another attempt. Any other status below 500 means that the request is wrong.
PASSING = {408, 429}
LONGEST_BACKOFF = 60.0
# A longer Retry-After is left to a person, or to the flow's next retry.
LONGEST_WAIT = 600.0
JPEG_QUALITY = 95


class FromEndpoint:
    """Request `concurrency` captions at a time and yield each when it arrives.

    Temporary failures (no connection, timeout, 408, 429, 5xx) are retried after an exponential backoff with full
    jitter plus Retry-After. Any other failure raises an InputError that names the image, after the answers under way
    are yielded. The server's address is not part of the identity: the store treats models of one name as one model.
    """

    def __init__(self, params: Endpoint, max_pixels: int):
        self.params = params
        self.max_pixels = max_pixels
        self.key = read_key(params.api_key_variable)
        self.url = f"{params.base_url.rstrip('/')}/chat/completions"
        self.identity = {
            "captioner": "openai",
            "model": params.model,
            "prompt": prompt_text(params.prompt),
            "decoding": {"temperature": params.temperature, "seed": params.seed} if params.temperature else "greedy",
            "max_side": params.max_side,
        }

    def caption(self, items: Sequence[tuple[str, Path]]) -> Generator[dict[str, str | None]]:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        limits = httpx.Limits(max_connections=self.params.concurrency)
        stop = threading.Event()
        problems: list[str] = []
        fatal: InputError | None = None
        waiting = iter(items)
        pending: dict[Future[str], tuple[str, Path]] = {}
        with (
            httpx.Client(headers=headers, timeout=self.params.timeout, limits=limits) as client,
            ThreadPoolExecutor(self.params.concurrency) as pool,
        ):

            def ask(count: int) -> None:
                for image_id, file in islice(waiting, count):
                    pending[pool.submit(self._ask, client, file, stop)] = image_id, file

            try:
                ask(self.params.concurrency)
                while pending:
                    for future in wait(pending, return_when=FIRST_COMPLETED).done:
                        image_id, file = pending.pop(future)
                        caption = None
                        try:
                            caption = future.result()
                        except NoCaption as error:
                            problems.append(f"{file}: {error}")
                        except _Stopped:
                            pass  # the first failure is the one to report
                        except InputError as error:
                            stop.set()
                            fatal = fatal or error
                        if not stop.is_set():
                            ask(1)
                        if caption is not None:
                            yield {image_id: caption}
            finally:
                stop.set()
        if fatal is not None:
            raise fatal
        raise_for(problems)

    def _ask(self, client: httpx.Client, file: Path, stop: threading.Event) -> str:
        """Return one image's caption. Raises NoCaption, InputError, or _Stopped if another image failed."""
        if stop.is_set():
            raise _Stopped
        body, problem = self._body(file), ""
        for attempt in range(self.params.retries + 1):
            pause = random.uniform(0, min(LONGEST_BACKOFF, self.params.backoff * 2**attempt))
            try:
                response = client.post(self.url, json=body)
            except httpx.RequestError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if response.is_success:
                    return self._read(response, file)
                problem = f"status {response.status_code}: {self._excerpt(response)}"
                if response.status_code < 500 and response.status_code not in PASSING:
                    raise InputError(f"{file}: {self.url} refuses it ({problem}).{_hint(response.status_code)}")
                asked = _retry_after(response)
                if asked > LONGEST_WAIT:
                    raise InputError(
                        f"{file}: {self.url} accepts no requests for {asked:.0f} s ({problem}). Run again later."
                    )
                pause += asked
            if attempt < self.params.retries and stop.wait(pause):
                raise _Stopped
        raise InputError(
            f"{file}: {self.url} returned no caption in {self.params.retries + 1} attempt(s) (last: {problem}). "
            "Received captions are stored. Run again to request the rest."
        )

    def _body(self, file: Path) -> dict:
        params = self.params
        image = read_image(file, self.max_pixels)
        image.thumbnail((params.max_side, params.max_side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=JPEG_QUALITY)
        url = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": prompt_text(params.prompt)},
        ]
        return {
            "model": params.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "seed": params.seed,
        }

    def _read(self, response: httpx.Response, file: Path) -> str:
        try:
            choice = response.json()["choices"][0]
            message, reason = choice["message"], choice.get("finish_reason")
            answer, refusal = message.get("content"), message.get("refusal")
            if not isinstance(answer, str | None):
                raise TypeError("`content` is not text")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(
                f"{file}: the answer of {self.url} is not a chat completion ({type(error).__name__}: {error}): "
                f"{self._excerpt(response)}. Check caption.captioner.base_url."
            ) from error
        if refusal or reason == "content_filter":
            raise NoCaption(f"the model refuses ({refusal or 'filtered'})")
        return caption_of(answer, complete=reason != "length")

    def _excerpt(self, response: httpx.Response) -> str:
        """Return the start of an answer without the key, which some servers repeat."""
        text = response.text
        return repr(text.replace(self.key, "***")[:200] if self.key else text[:200])


class _Stopped(Exception):
    """Another image's failure stopped the work."""


def read_key(variable: str | None) -> str | None:
    """Return the key in that environment variable. Raises InputError, without the key, if it is unset or invalid."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    # The HTTP client's own error for an invalid header would show the key.
    if not key or not key.isascii() or not key.isprintable():
        raise InputError(
            f"caption.captioner.api_key_variable: the environment variable {variable} "
            f"{'is not a valid HTTP header value' if key else 'is empty or not set'}. Set it to the key."
        )
    return key


def _retry_after(response: httpx.Response) -> float:
    """Return the seconds that Retry-After asks to wait, as number or date (RFC 9110, 10.2.3), or 0 without it."""
    value = response.headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _hint(status: int) -> str:
    match status:
        case 401 | 403:
            return " Set caption.captioner.api_key_variable to the environment variable that holds the key."
        case 404:
            return " Check caption.captioner.base_url and model."
        case 413:
            return " Lower caption.captioner.max_side."
    return ""
