from hypothesis import given
from hypothesis import strategies as st

from vlmdiff.registry.card import DESCRIPTION, REST, shortened

PARAGRAPHS = st.lists(
    st.sampled_from(["## Results", "A sentence. " * 40, "\n".join(["| a | b |"] * 60), "- one\n- two"]), min_size=20
)


@given(PARAGRAPHS, st.integers(100, DESCRIPTION))
def test_a_card_that_is_too_long_for_a_registry_ends_with_a_whole_paragraph_and_says_where_the_rest_is(given, limit):
    card = "\n\n".join(["It finds defects.", *given, "It ends here. " * 500])
    found = shortened(card, limit)
    assert len(found) <= limit and found.endswith(REST)
    kept = found.removesuffix(REST).split("\n\n")
    assert kept == ["It finds defects.", *given][: len(kept)] and not kept[-1].startswith("#")
