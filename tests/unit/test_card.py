from hypothesis import given
from hypothesis import strategies as st

from vlmdiff.registry.card import DESCRIPTION, LEAST, REST, shortened

LIST = "Do not rely on this model for\n\n- one\n- two"
PARAGRAPHS = st.lists(st.sampled_from(["A sentence." * 40, "\n".join(["| a | b |"] * 60), "Two:\n\n- a\n- b", LIST]))
SECTIONS = st.lists(st.tuples(st.sampled_from(["Results", "Limits", *LEAST]), PARAGRAPHS), min_size=1, max_size=8)


@given(SECTIONS, st.integers(200, DESCRIPTION))
def test_a_card_that_is_too_long_for_a_registry_keeps_what_fits_in_whole_paragraphs(sections, limit):
    parts = [f"## {title}\n\n" + "\n\n".join([*paragraphs, "It ends here." * 20]) for title, paragraphs in sections]
    card = "\n\n".join(["It finds defects.", *parts])
    found = shortened(card, limit)
    assert len(found) <= limit and found.endswith(REST)
    kept = found.removesuffix(REST)
    whole = [part for part in parts if part in kept]
    if len(card) + len(REST) <= limit:
        assert kept == card
    # The sections that matter least go first, and nothing else goes as long as there is room.
    rest = "\n\n".join(
        ["It finds defects.", *(p for p, (title, _) in zip(parts, sections, strict=True) if title not in LEAST)]
    )
    if len(rest) + len(REST) <= limit:
        assert all(part in kept for part, (title, _) in zip(parts, sections, strict=True) if title not in LEAST)
    else:
        assert not any(part in whole for part, (title, _) in zip(parts, sections, strict=True) if title in LEAST)
        assert rest.startswith(kept) and rest[len(kept) :].startswith("\n\n")
        assert not kept.splitlines()[-1].startswith("#") and not kept.endswith((":", " for"))
        # At most a heading, a sentence before a list, and the paragraph that does not fit are missing.
        following = rest[len(kept) :].split("\n\n")[1:4]
        assert len(kept) + len(REST) + sum(len(one) + 2 for one in following) > limit
