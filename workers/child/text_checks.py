"""Notes on texts that figures of quality should not be read from."""

from __future__ import annotations

from collections.abc import Iterator

from app.core.sources.text_repetition import LOOKED_AT, text_notes
from workers.texts.windows import Windows

NEARLY_CERTAIN = 1.5  # a line again and again has 1.3, log lines of one kind 1.6, one page six times over 12


def repetition_notes(calibration: Windows, evaluation: Windows) -> Iterator[str]:
    """What is seen in the tokens, before the run."""
    calibrates, judges = (
        windows.tokens.flatten()[:LOOKED_AT].tolist() for windows in (calibration, evaluation)
    )
    return text_notes(calibrates, judges, "tokens")


def left_out_notes(calibration: Windows, evaluation: Windows) -> Iterator[str]:
    """What a reader of the report should know of conversations with images."""
    for name, windows in (("calibration", calibration), ("evaluation", evaluation)):
        if windows.left_out:
            yield (
                f"{windows.left_out} images, sounds or videos of the {name} text's conversations were left "
                "out: the text around them is read alone"
            )


def perplexity_note(perplexity: float, vocab_size: int) -> str | None:
    """What the original's perplexity says of the evaluation text; None for the usual."""
    if perplexity <= NEARLY_CERTAIN:
        return (
            f"the original's perplexity on the evaluation text is {perplexity:.3f}: nearly every token "
            "follows from those before, so that a worse model may do as well; give text that says more"
        )
    if perplexity >= vocab_size:
        return (
            f"the original's perplexity on the evaluation text is {perplexity:.0f}, and {vocab_size} is that "
            "of guessing each token alike: the model does not know such text, or its tokenizer is another "
            "model's; what quantizing changes can't be seen there"
        )
    return None
