"""The prompts of vision-language models, by name, and the check of their answers."""

from collections.abc import Sequence

from vlmdiff.core.errors import InputError

# `paper` is VLMDiff's prompt (arXiv 2511.08173), `paper-no-object` its prompt for scenes (COCO-AD). `inspector` is our
# own wording: it serves the same purpose as the paper's prompt of a defect inspector.
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
    """Return the prompt of that name. Any other text is itself the prompt."""
    return PROMPTS.get(prompt, prompt)


class NoCaption(Exception):
    """The answer for one image cannot be its caption. The message says why; other images are unaffected."""


def caption_of(answer: str | None, complete: bool) -> str:
    """Return the caption in a model's answer. Raises NoCaption if the answer is empty or not `complete`.

    Answers cut at the token limit are never stored, so that a caption does not depend on the limit. With a higher
    limit, only the images with cut answers are requested again.
    """
    if not complete:
        raise NoCaption("the answer was cut at caption.captioner.max_new_tokens. Raise it, or ask for fewer words.")
    if not answer or not answer.strip():
        raise NoCaption("the answer is empty")
    return answer.strip()


def raise_for(problems: Sequence[str]) -> None:
    """Raise InputError with the first ten of `problems`, if there are any."""
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems[:10]) + ("\n  …" if len(problems) > 10 else "")
        raise InputError(
            f"{len(problems)} image(s) got no caption; all others are stored. Fix the cause or the prompt, "
            f"or provide captions (caption.captioner.kind: file):{lines}"
        )
