"""The store of captions: any text, many processes, and a miss for whatever changes the text."""

import hashlib
import json
import multiprocessing
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmdiff.captions.captioners import caption_all
from vlmdiff.captions.store import CaptionStore, key
from vlmdiff.core.errors import InputError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=5,
)
IDENTITY = st.dictionaries(st.text(), JSON, max_size=4)


class Counting:
    """A captioner that remembers what it was asked, and hands over a caption at a time."""

    def __init__(self, prompt="describe the image"):
        self.identity = {"captioner": "counting", "prompt": prompt}
        self.asked = []

    def caption(self, items):
        for image_id, file in items:
            self.asked.append(image_id)
            yield {image_id: f"caption of {file.name} by {self.identity['prompt']}"}


def photographs(folder: Path, *contents: str) -> list[tuple[str, Path]]:
    """(image_id, file) of files with these contents."""
    items = []
    for number, content in enumerate(contents):
        file = folder / f"{number}.png"
        file.write_text(content)
        items.append((hashlib.sha256(content.encode()).hexdigest(), file))
    return items


@given(captions=st.dictionaries(st.text(), st.text()))
def test_any_text_comes_back_as_it_was(captions, tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "captions.sqlite"
    with CaptionStore(path) as store:
        store.put(captions)
        assert store.get(list(captions)) == captions
    with CaptionStore(path) as store:
        assert store.get([*captions, "no such key \N{CAMERA}"]) == captions


@given(first=st.tuples(st.text(), IDENTITY), second=st.tuples(st.text(), IDENTITY))
def test_keys_are_equal_exactly_where_image_and_identity_are(first, second):
    same = json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
    assert (key(*first) == key(*second)) == same


@given(st.text(), IDENTITY)
def test_the_order_of_an_identity_does_not_matter(image_id, identity):
    assert key(image_id, identity) == key(image_id, dict(reversed(identity.items())))


def test_a_rerun_asks_for_nothing(tmp_path):
    items = photographs(tmp_path, "a", "b", "c")
    captioner = Counting()
    with CaptionStore(tmp_path / "captions.sqlite") as store:
        first = caption_all(items, captioner, store)
    with CaptionStore(tmp_path / "captions.sqlite") as store:
        assert caption_all(items, captioner, store) == first
    assert sorted(captioner.asked) == sorted(image_id for image_id, _ in items)


def test_one_touched_photograph_is_one_caption(tmp_path):
    captioner = Counting()
    with CaptionStore(tmp_path / "captions.sqlite") as store:
        before = caption_all(photographs(tmp_path, "a", "b", "c"), captioner, store)
        captioner.asked.clear()
        touched = photographs(tmp_path, "a", "b with a speck", "c")
        after = caption_all(touched, captioner, store)
    assert captioner.asked == [touched[1][0]]
    assert {k: v for k, v in after.items() if k in before} == {k: v for k, v in before.items() if k in after}


def test_identical_photographs_are_captioned_once(tmp_path):
    items = photographs(tmp_path, "same", "same", "other")
    captioner = Counting()
    with CaptionStore(tmp_path / "captions.sqlite") as store:
        assert set(caption_all(items, captioner, store)) == {image_id for image_id, _ in items}
    assert len(captioner.asked) == 2


def test_a_changed_prompt_is_a_miss_and_the_old_captions_stay(tmp_path):
    items = photographs(tmp_path, "a", "b")
    old, new = Counting("old"), Counting("new")
    with CaptionStore(tmp_path / "captions.sqlite") as store:
        before = caption_all(items, old, store)
        after = caption_all(items, new, store)
        assert len(new.asked) == 2 and set(before.values()).isdisjoint(after.values())
        assert caption_all(items, old, store) == before
    assert len(old.asked) == 2


def test_an_image_without_a_caption_is_left_out_and_asked_for_again(tmp_path):
    class Silent(Counting):
        def caption(self, items):
            for captions in super().caption(items):
                yield {image_id: text if "0.png" in text else None for image_id, text in captions.items()}

    items = photographs(tmp_path, "a", "b")
    captioner = Silent()
    with CaptionStore(tmp_path / "captions.sqlite") as store:
        assert set(caption_all(items, captioner, store)) == {items[0][0]}
        caption_all(items, captioner, store)
    assert captioner.asked == [items[0][0], items[1][0], items[1][0]]


def test_what_was_captioned_before_an_error_is_kept(tmp_path):
    class Failing(Counting):
        def caption(self, items):
            yield from super().caption(items[:4])
            raise ConnectionError("the endpoint is gone")

    items = photographs(tmp_path, *"abcdefgh")
    rest = Counting()
    with CaptionStore(tmp_path / "captions.sqlite") as store:
        with pytest.raises(ConnectionError):
            caption_all(items, Failing(), store)
        caption_all(items, rest, store)
    assert rest.asked == [image_id for image_id, _ in items[4:]]


def test_a_captioner_that_loses_an_image_is_no_success(tmp_path):
    class Losing(Counting):
        def caption(self, items):
            return super().caption(items[:-1])

    with (
        CaptionStore(tmp_path / "captions.sqlite") as store,
        pytest.raises(ValueError, match="did not return every image"),
    ):
        caption_all(photographs(tmp_path, "a", "b"), Losing(), store)


def test_captions_go_to_their_images_in_whatever_order_they_come(tmp_path):
    class Hasty(Counting):
        def caption(self, items):
            return super().caption(items[::-1])

    items = photographs(tmp_path, *"abcde")
    with CaptionStore(tmp_path / "captions.sqlite") as store:
        captions = caption_all(items, Hasty(), store)
    assert captions == {image_id: f"caption of {file.name} by describe the image" for image_id, file in items}


def test_a_captioner_is_closed_when_the_store_fails(tmp_path):
    class Open(Counting):
        closed = False

        def caption(self, items):
            try:
                yield from super().caption(items)
            finally:
                self.closed = True

    captioner = Open()
    with CaptionStore(tmp_path / "captions.sqlite") as store:
        with sqlite3.connect(tmp_path / "captions.sqlite") as db:
            db.execute("DROP TABLE captions")
            db.execute("CREATE TABLE captions (key TEXT, caption TEXT)")
        with pytest.raises(InputError, match="captions"):
            caption_all(photographs(tmp_path, "a", "b"), captioner, store)
    assert captioner.closed and len(captioner.asked) == 1


def test_a_file_that_is_no_store_is_named(tmp_path):
    path = tmp_path / "captions.sqlite"
    path.write_bytes(b"captions, captions, captions" * 100)
    with pytest.raises(InputError, match=r"captions\.sqlite.*not a database.*Move it away"):
        CaptionStore(path)
    assert path.read_bytes().startswith(b"captions")


def _write(path: Path, start, name: str) -> None:
    start.wait()
    with CaptionStore(path) as store:
        for i in range(50):
            store.put({f"{name} {i}": f"{name}'s caption {i}", f"shared {i}": f"{name}'s caption {i}"})


def test_processes_write_a_fresh_store_at_once(tmp_path):
    path = tmp_path / "new" / "captions.sqlite"
    context = multiprocessing.get_context("spawn")
    names = ["one", "two", "three"]
    start = context.Barrier(len(names))
    writers = [context.Process(target=_write, args=(path, start, name)) for name in names]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    with CaptionStore(path) as store:
        own = [f"{name} {i}" for name in names for i in range(50)]
        assert store.get(own) == {k: k.replace(" ", "'s caption ") for k in own}
        shared = store.get([f"shared {i}" for i in range(50)])
        assert len(shared) == 50 and all(text.endswith(f"caption {k[7:]}") for k, text in shared.items())
