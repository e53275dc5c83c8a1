"""Records: a composed sample as a line of InternVL jsonl, and the same sample as a line of MM-NIAH.

message = context + question + choices and instruction         (the prompt of the release's evaluation)
InternVL: image, conversations, and for `evaluate` id, length, depth; metadata as Long-VQA has it
MM-NIAH:  images_list, context, question, answer, meta         (cut out of the InternVL record)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_v2pe.data.media.medium import IMAGE_PLACEHOLDER
from megatron_v2pe.synthesis.material.pictures import Picture

# Decoys and absent needles are no tasks of MM-NIAH; under names of their own they keep its six scores comparable.
MM_NIAH_TASKS = {
    "text-retrieval": "retrieval-text",
    "text-decoys": "retrieval-text-decoys",
    "text-absent": "retrieval-text-absent",
    "text-counting": "counting-text",
    "text-reasoning": "reasoning-text",
    "image-retrieval": "retrieval-image",
    "image-decoys": "retrieval-image-decoys",
    "image-absent": "retrieval-image-absent",
    "image-counting": "counting-image",
    "image-jigsaw": "reasoning-image",
    "image-multiview": "reasoning-image",
}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CHOOSE = "\nAnswer with the option's letter from the given choices directly."
_SHORTLY = "\nAnswer the question using a single word or phrase."

Answer = int | str | list[int]


@dataclass(frozen=True, kw_only=True)
class Prompted:
    """What is asked after the document.

    Attributes:
        question: without choices.
        answer: an index into the choices, a list, or a text.
        choices: texts to choose from.
        choice_pictures: images to choose from.
    """

    question: str
    answer: Answer
    choices: Sequence[str] = ()
    choice_pictures: Sequence[Picture] = ()

    @property
    def suffix(self) -> str:
        """Choices and instruction, as the release's evaluation appends them; none after a question for a list."""
        if self.choice_pictures or self.choices:
            options = self.choices or [IMAGE_PLACEHOLDER] * len(self.choice_pictures)
            lines = [f"\n{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=False)]
            return "".join(lines) + _CHOOSE
        return "" if isinstance(self.answer, list) else _SHORTLY

    @property
    def answer_text(self) -> str:
        """What the model is to say."""
        return _LETTERS[self.answer] if isinstance(self.answer, int) else str(self.answer)


def internvl_record(
    *,
    sample_id: str,
    context: str,
    pictures: Sequence[Picture],
    prompted: Prompted,
    length: int,
    depth: float,
    meta: dict[str, Any],
) -> dict[str, Any]:
    """A record that `train` and `evaluate` read.

    Args:
        sample_id: unique name.
        context: the document.
        pictures: images of the document.
        prompted: question and answer.
        length: tokens of the whole sample.
        depth: of the needle, as reports group it.
        meta: everything else that is known about the sample.
    """
    images = [*pictures, *prompted.choice_pictures]
    human = {"from": "human", "value": context + prompted.question + prompted.suffix}
    asked = {
        "question": prompted.question,
        "answer": prompted.answer,
        "choices": list(prompted.choices) or None,
        "choices_image_path": [picture.name for picture in prompted.choice_pictures] or None,
        "context_chars": len(context),
        "num_images": len(pictures),
    }
    return {
        "id": sample_id,
        **({"image": [picture.name for picture in images]} if images else {}),
        "conversations": [human, {"from": "gpt", "value": prompted.answer_text}],
        "length": length,
        "depth": depth,
        "metadata": {"context_length": length},
        "meta": {**asked, **meta},
    }


def mm_niah_record(record: dict[str, Any]) -> dict[str, Any]:
    """The MM-NIAH form of a record of `internvl_record`."""
    meta = dict(record["meta"])
    question, answer = meta.pop("question"), meta.pop("answer")
    context = record["conversations"][0]["value"][: meta.pop("context_chars")]
    return {
        "id": record["id"],
        "images_list": record.get("image", [])[: meta["num_images"]],
        "context": context,
        "question": question,
        "answer": answer,
        "meta": meta,
    }
