"""What vision-language models are asked, by name, and which of their answers are no captions."""

from collections.abc import Sequence

from vlmdiff.core.errors import InputError

# `paper` is VLMDiff's own (arXiv 2511.08173), `paper-no-object` what it asks of scenes (COCO-AD). The paper's prompt of
# a defect inspector is not this one: `inspector` is ours, for the same purpose.
PROMPTS = {
    "paper": (
        "Describe the visual features of image in detail with a focus on the main object, "
        "with around 60 words and maybe 4 or 5 sentences."
    ),
    "paper-no-object": (
        "Describe the visual features of image in detail, with around 60 words and maybe 4 or 5 sentences."
    ),
    "inspector": (
        "You check products for quality. In four or five sentences, about 60 words, say what the product is, go over "
        "its surface, edges and parts one by one, and report for each whether it looks as it should."
    ),
}


def prompt_text(prompt: str) -> str:
    """The text of a prompt's name; any other text is a prompt itself."""
    return PROMPTS.get(prompt, prompt)


class NoCaption(Exception):
    """An answer that cannot be one image's caption, and why; other images are not concerned."""


def caption_of(answer: str | None, complete: bool) -> str:
    """The caption in a model's answer. Raises NoCaption where it is empty or, not `complete`, was cut at the limit.

    A cut answer is never kept, so that the limit has no part in what decides a caption: raise it, and only the
    images whose answers were cut are asked for again.
    """
    if not complete:
        raise NoCaption("the answer was cut at caption.captioner.max_new_tokens: raise it, or ask for fewer words")
    if not answer or not answer.strip():
        raise NoCaption("the answer is empty")
    return answer.strip()


def raise_for(problems: Sequence[str]) -> None:
    """InputError where images are left without a caption, naming the first ten with the reason."""
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems[:10]) + ("\n  …" if len(problems) > 10 else "")
        raise InputError(
            f"{len(problems)} image(s) got no caption; the other captions are stored. Mend the cause or the prompt, "
            f"or bring captions (caption.captioner.kind: file):{lines}"
        )
